// A safetensors file: tensors by name, where they lie in the mapped file.
#pragma once

#include "fields.h"
#include "mapped_file.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace calora {

class Safetensors {
 public:
  /// data is not necessarily aligned; dtype as the format writes it: F32, F16, U8 …
  struct Tensor {
    const char* data;
    std::string dtype;
    std::vector<int64_t> shape;

    int64_t elements() const;
  };

  /// Refuses a file that is damaged; every place in it is checked before it is read.
  explicit Safetensors(const std::filesystem::path& path);

  const std::string& name() const { return name_; }
  /// An entry of the metadata; refuses a file without it.
  std::string stated(const std::string& key) const;

  /// Null without one.
  const Tensor* find(const std::string& tensor) const;

  /// Refuses other tensors than these: name → dtype and shape.
  using Forms = std::map<std::string, std::pair<std::string, std::vector<int64_t>>>;
  void require(const Forms& expected) const;

  /// The numbers of a tensor F32 that is there.
  std::vector<float> numbers(const std::string& tensor) const;

 private:
  std::string name_;
  MappedFile file_;
  std::optional<Fields> metadata_;
  std::map<std::string, Tensor> tensors_;
};

} // namespace calora
