#include "fields.h"

#include "error.h"

#include <nlohmann/json.hpp>

#include <algorithm>
#include <fstream>
#include <iterator>

namespace calora {
namespace {

bool is_text(const Json& value) { return value.is_string(); }
bool is_integer(const Json& value) { return value.is_number_integer(); }
bool is_list(const Json& value) { return value.is_array(); }
bool is_object(const Json& value) { return value.is_object(); }

std::string shown(const Json& value) {
  const std::string text = value.dump();
  return text.size() <= 60 ? text : text.substr(0, 57) + "...";
}

} // namespace

Fields::Fields(std::shared_ptr<const Json> value, std::string file, std::string path)
    : value_(std::move(value)), file_(std::move(file)), path_(std::move(path)) {}

Fields Fields::read(const std::filesystem::path& path) {
  const std::string file = path.filename().string();
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw refusal(path.string(), "file", "a file", "nothing");
  return parse(std::string(std::istreambuf_iterator<char>(stream), {}), file);
}

Fields Fields::parse(const std::string& text, const std::string& file) {
  const auto value = std::make_shared<const Json>(Json::parse(text, nullptr, false));
  if (value->is_discarded()) throw refusal(file, "content", "JSON", "something else");
  if (!value->is_object()) throw refusal(file, "content", "a JSON object", shown(*value));
  return Fields(value, file, "");
}

Fields Fields::part(const Json& value, const std::string& key) const {
  return Fields(std::shared_ptr<const Json>(value_, &value), file_, name(key) + ".");
}

const Json& Fields::at(const std::string& key, const char* expected, bool (*right)(const Json&)) const {
  const auto found = value_->find(key);
  if (found == value_->end()) throw refusal(file_, name(key), expected, "nothing");
  if (!right(*found)) throw refusal(file_, name(key), expected, shown(*found));
  return *found;
}

std::string Fields::text(const std::string& key) const { return at(key, "text", is_text).get<std::string>(); }

std::vector<std::string> Fields::texts(const std::string& key) const {
  if (!has(key)) return {};
  const Json& list = at(key, "a list of texts", is_list);
  if (!std::all_of(list.begin(), list.end(), is_text)) throw refusal(file_, name(key), "a list of texts", shown(list));
  return list.get<std::vector<std::string>>();
}

int64_t Fields::integer(const std::string& key) const { return at(key, "an integer", is_integer).get<int64_t>(); }

std::vector<int64_t> Fields::integers_of(const Json& list, const std::string& key) const {
  if (!list.is_array() || !std::all_of(list.begin(), list.end(), is_integer))
    throw refusal(file_, name(key), "a list of integers", shown(list));
  return list.get<std::vector<int64_t>>();
}

std::vector<int64_t> Fields::integers(const std::string& key) const {
  return integers_of(at(key, "a list of integers", is_list), key);
}

std::vector<int64_t> Fields::integers(const std::string& key, int64_t count) const {
  const auto listed = value_->find(key);
  if (listed == value_->end() || !listed->is_array()) return std::vector<int64_t>(size_t(count), integer(key));
  const std::vector<int64_t> found = integers(key);
  if (int64_t(found.size()) != count)
    throw refusal(file_, name(key), "a list of " + std::to_string(count), "one of " + std::to_string(found.size()));
  return found;
}

std::vector<std::vector<int64_t>> Fields::rows(const std::string& key) const {
  std::vector<std::vector<int64_t>> rows;
  if (has(key))
    for (const Json& row : at(key, "a list of lists", is_list)) rows.push_back(integers_of(row, key));
  return rows;
}

std::map<std::string, double> Fields::numbers(const std::string& key) const {
  std::map<std::string, double> numbers;
  for (const auto& [name_of, value] : at(key, "an object of numbers", is_object).items()) {
    if (!value.is_number()) throw refusal(file_, name(key) + "." + name_of, "a number", shown(value));
    numbers[name_of] = value.get<double>();
  }
  return numbers;
}

bool Fields::has(const std::string& key) const { return value_->contains(key) && !value_->at(key).is_null(); }

Fields Fields::object(const std::string& key) const {
  return part(at(key, "an object", is_object), key);
}

std::optional<Fields> Fields::maybe(const std::string& key) const {
  return has(key) ? std::optional<Fields>(object(key)) : std::nullopt;
}

std::vector<Fields> Fields::objects(const std::string& key) const {
  std::vector<Fields> objects;
  if (!has(key)) return objects;
  for (const Json& item : at(key, "a list of objects", is_list)) {
    const std::string entry = key + "[" + std::to_string(objects.size()) + "]";
    if (!item.is_object()) throw refusal(file_, name(entry), "an object", shown(item));
    objects.push_back(part(item, entry));
  }
  return objects;
}

std::vector<std::string> Fields::keys() const {
  std::vector<std::string> keys;
  for (const auto& item : value_->items()) keys.push_back(item.key());
  return keys;
}

void Fields::only(const std::vector<std::string>& known) const {
  for (const std::string& key : keys())
    if (std::find(known.begin(), known.end(), key) == known.end())
      throw refusal(file_, name(key), "no such key", shown(value_->at(key)));
}

} // namespace calora
