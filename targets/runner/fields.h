// JSON that is checked while it is read: a wrong file says which key, what was expected and what was found.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace calora {

using Json = nlohmann::ordered_json;

/// One object of a JSON file; it keeps the file's content alive.
class Fields {
 public:
  static Fields read(const std::filesystem::path& path);
  static Fields parse(const std::string& text, const std::string& file);

  std::string text(const std::string& key) const;
  /// Absent: empty.
  std::vector<std::string> texts(const std::string& key) const;
  int64_t integer(const std::string& key) const;
  std::vector<int64_t> integers(const std::string& key) const;
  /// `count` integers; one stands for as many.
  std::vector<int64_t> integers(const std::string& key, int64_t count) const;
  /// A list of lists; absent: empty.
  std::vector<std::vector<int64_t>> rows(const std::string& key) const;
  std::map<std::string, double> numbers(const std::string& key) const;

  bool has(const std::string& key) const;
  Fields object(const std::string& key) const;
  /// Absent or null: nothing.
  std::optional<Fields> maybe(const std::string& key) const;
  /// Absent: empty.
  std::vector<Fields> objects(const std::string& key) const;
  std::vector<std::string> keys() const;

  /// Refuse every other key: what a reader does not understand, it must not ignore.
  void only(const std::vector<std::string>& known) const;

 private:
  Fields(std::shared_ptr<const Json> value, std::string file, std::string path);
  Fields part(const Json& value, const std::string& key) const;
  const Json& at(const std::string& key, const char* expected, bool (*right)(const Json&)) const;
  std::vector<int64_t> integers_of(const Json& list, const std::string& key) const;
  std::string name(const std::string& key) const { return path_ + key; }

  std::shared_ptr<const Json> value_;
  std::string file_, path_;
};

} // namespace calora
