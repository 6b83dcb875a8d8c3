#include "adapter.h"

#include "error.h"
#include "half.h"

#include <algorithm>
#include <cstring>

namespace calora {
namespace {

std::string described(ort::Type type, const std::vector<int64_t>& shape) {
  const std::map<ort::Type, std::string> names{{ort::fp32, "fp32"}, {ort::fp16, "fp16"}, {ort::int8, "int8"}};
  const auto name = names.find(type);
  std::string text = (name == names.end() ? "another type" : name->second) + " [";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

std::string read_fingerprint(const std::string& file, const Slots& slots, std::map<std::string, Stored>& tensors) {
  const auto found = tensors.find(slots.fingerprint);
  if (found == tensors.end() || found->second.shape != std::vector<int64_t>{32} || found->second.type != ort::uint8)
    throw refusal(file, slots.fingerprint, "uint8 [32]", found == tensors.end() ? "nothing" : "another tensor");
  std::string text = "sha256:";
  for (int i = 0; i < 32; ++i) {
    constexpr const char* digits = "0123456789abcdef";
    const auto byte = static_cast<unsigned char>(found->second.data[i]);
    text += {digits[byte >> 4], digits[byte & 15]};
  }
  tensors.erase(found);
  return text;
}

/// The rank of all tensors; refuses others than those of the slots.
int64_t require_layout(const std::string& file, const Slots& slots, const std::map<std::string, Stored>& tensors) {
  int64_t rank = 0;
  for (const SlotInput& input : slots.inputs)
    if (const auto found = tensors.find(input.name); found != tensors.end()) {
      rank = 1;
      for (const int64_t size : found->second.shape) rank *= size;
      rank /= std::max<int64_t>(input.width(), 1);
      break;
    }
  for (const SlotInput& input : slots.inputs) {
    const std::string expected = described(input.type, input.shape(rank));
    const auto found = tensors.find(input.name);
    if (found == tensors.end()) throw refusal(file, input.name, expected, "nothing");
    if (const std::string is = described(found->second.type, found->second.shape); is != expected)
      throw refusal(file, input.name, expected, is);
  }
  if (tensors.size() != slots.inputs.size())
    for (const auto& [name, tensor] : tensors)
      if (std::none_of(slots.inputs.begin(), slots.inputs.end(), [&](const auto& input) { return input.name == name; }))
        throw refusal(file, name, "no such slot", described(tensor.type, tensor.shape));
  return rank;
}

void scale(char* rows, int64_t bytes, ort::Type type, float gate) {
  if (type == ort::fp32) {
    auto* const values = reinterpret_cast<float*>(rows);
    for (int64_t i = 0; i < bytes / 4; ++i) values[i] *= gate;
  } else {
    auto* const values = reinterpret_cast<uint16_t*>(rows);
    for (int64_t i = 0; i < bytes / 2; ++i) values[i] = to_half(from_half(values[i]) * gate);
  }
}

} // namespace

Adapter Adapter::load(const std::filesystem::path& path, const Package& package, const Slots& slots) {
  const std::string name = path.filename().string();
  auto file = std::make_unique<MappedFile>(path);
  auto tensors = read_tensors(*file, name);
  package.require_fingerprint(name, read_fingerprint(name, slots, tensors));
  const int64_t rank = require_layout(name, slots, tensors);
  ort::LoraAdapter* handle = nullptr;
  ort::require(ort::api().CreateLoraAdapter(path.c_str(), nullptr, &handle), name);
  return {std::move(file), std::move(tensors), rank, ort::AdapterHandle(handle)};
}

Blend Blend::of(const std::vector<std::pair<const Adapter*, float>>& parts, const Slots& slots) {
  int64_t rank = 0;
  for (const auto& [adapter, _] : parts) rank += adapter->rank;
  Blend blend;
  for (const SlotInput& input : slots.inputs) {
    const int64_t size = size_of(input.type);
    std::vector<char>& memory = blend.memory.emplace_back(size_t(rank * input.width() * size) + 1); // of no rank, too
    char* to = memory.data();
    int64_t before = 0;
    for (const Matrix& matrix : input.matrices) {
      for (const auto& [adapter, gate] : parts) {
        const int64_t bytes = adapter->rank * matrix.width * size;
        std::memcpy(to, adapter->tensors.at(input.name).data + adapter->rank * before * size, size_t(bytes));
        if (matrix.gated) scale(to, bytes, input.type, gate);
        to += bytes;
      }
      before += matrix.width;
    }
    blend.values.emplace_back(&input, tensor(memory.data(), input.type, input.shape(rank)));
  }
  return blend;
}

} // namespace calora
