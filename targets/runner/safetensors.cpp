#include "safetensors.h"

#include "error.h"

#include <cstring>

namespace calora {
namespace {

constexpr const char* metadata = "__metadata__";

/// Bytes of an element; 0 of a type that no adapter has.
int64_t size_of(const std::string& dtype) { return dtype == "F32" ? 4 : dtype == "F16" ? 2 : dtype == "U8" ? 1 : 0; }

std::string header_of(const std::string& file, const MappedFile& mapped) {
  uint64_t length = 0;
  if (mapped.size() >= sizeof length) std::memcpy(&length, mapped.data(), sizeof length);
  if (mapped.size() < sizeof length || length > mapped.size() - sizeof length)
    throw refusal(file, "header", "a safetensors file", "another file or a part of one");
  return std::string(mapped.data() + sizeof length, length);
}

} // namespace

int64_t Safetensors::Tensor::elements() const {
  int64_t count = 1;
  for (const int64_t size : shape) count *= size;
  return count;
}

Safetensors::Safetensors(const std::filesystem::path& path)
    : name_(path.filename().string()), file_(path) {
  const std::string text = header_of(name_, file_);
  const Fields header = Fields::parse(text, name_);
  metadata_ = header.maybe(metadata);
  const char* const data = file_.data() + sizeof(uint64_t) + text.size();
  const auto size = int64_t(file_.size() - sizeof(uint64_t) - text.size());
  for (const std::string& tensor : header.keys()) {
    if (tensor == metadata) continue;
    const Fields entry = header.object(tensor);
    Tensor found{nullptr, entry.text("dtype"), entry.integers("shape")};
    const std::vector<int64_t> range = entry.integers("data_offsets");
    int64_t bytes = size_of(found.dtype);
    bool whole = range.size() == 2 && 0 <= range[0] && range[0] <= range[1] && range[1] <= size;
    for (const int64_t count : found.shape)
      whole = whole && count >= 0 && !__builtin_mul_overflow(bytes, count, &bytes);
    if (!whole || (size_of(found.dtype) && range[1] - range[0] != bytes))
      throw refusal(name_, tensor, "a tensor inside the file", "another range");
    found.data = data + range[0];
    tensors_[tensor] = found;
  }
}

std::string Safetensors::stated(const std::string& key) const {
  if (!metadata_ || !metadata_->has(key)) throw refusal(name_, key, "an entry of the metadata", "nothing");
  return metadata_->text(key);
}

const Safetensors::Tensor* Safetensors::find(const std::string& tensor) const {
  const auto found = tensors_.find(tensor);
  return found == tensors_.end() ? nullptr : &found->second;
}

void Safetensors::require(const Forms& expected) const {
  for (const auto& [tensor, form] : expected) {
    const Tensor* const found = find(tensor);
    const std::string is = found ? found->dtype + " " + shown(found->shape) : "nothing";
    if (const std::string wanted = form.first + " " + shown(form.second); is != wanted)
      throw refusal(name_, tensor, wanted, is);
  }
  for (const auto& [tensor, found] : tensors_)
    if (!expected.count(tensor)) throw refusal(name_, tensor, "no such tensor", found.dtype + " " + shown(found.shape));
}

std::vector<float> Safetensors::numbers(const std::string& tensor) const {
  const Tensor& found = tensors_.at(tensor);
  std::vector<float> made(size_t(found.elements()));
  if (!made.empty()) std::memcpy(made.data(), found.data, made.size() * sizeof(float));
  return made;
}

} // namespace calora
