#include "adapter.h"

#include "error.h"
#include "factors.h"
#include "half.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace calora {
namespace {

std::string described(ort::Type type, const std::vector<int64_t>& shape) {
  const std::map<ort::Type, std::string> names{{ort::fp32, "fp32"}, {ort::fp16, "fp16"}, {ort::int8, "int8"}};
  const auto name = names.find(type);
  return (name == names.end() ? "another type" : name->second) + " " + shown(shape);
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
  std::map<std::string, std::string> forms;
  for (const SlotInput& input : slots.inputs) forms[input.name] = described(input.type, input.shape(rank));
  for (const Extra& extra : slots.extras.fixed) forms[extra.name] = described(ort::fp32, extra.shape);
  for (const auto& [name, expected] : forms) {
    const auto found = tensors.find(name);
    if (found == tensors.end()) throw refusal(file, name, expected, "nothing");
    if (const std::string is = described(found->second.type, found->second.shape); is != expected)
      throw refusal(file, name, expected, is);
  }
  for (const auto& [name, tensor] : tensors)
    if (!forms.count(name)) throw refusal(file, name, "no such slot", described(tensor.type, tensor.shape));
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

/// Appends rows [rank, n] as int8 to one, and their scales to the other: absmax / 127, 1 of zeros
/// (calora_export/compression.py).
void append_int8(const std::vector<float>& rows, int64_t rank, std::vector<char>& rounded, std::vector<float>& scales) {
  const size_t width = rank ? rows.size() / size_t(rank) : 0;
  for (const float* row = rows.data(); row != rows.data() + size_t(rank) * width; row += width) {
    float most = 0.0f;
    for (size_t i = 0; i < width; ++i) most = std::max(most, std::fabs(row[i]));
    const float scale = most > 0.0f ? std::max(most / 127.0f, std::numeric_limits<float>::min()) : 1.0f;
    scales.push_back(scale);
    for (size_t i = 0; i < width; ++i)
      rounded.push_back(char(int8_t(std::clamp(std::nearbyint(row[i] / scale), -128.0f, 127.0f))));
  }
}

/// Rows as a file of the adapter would hold them.
Adapter lay(const Multiplied& made, const Slots& slots) {
  Adapter adapter{nullptr, {}, {}, made.rank, nullptr};
  std::vector<float> scales; // of the int8 rows before them
  for (const SlotInput& input : slots.inputs) {
    std::vector<char> rounded;
    std::vector<float> values;
    for (const Matrix& matrix : input.matrices) {
      if (matrix.site.empty()) {
        values.insert(values.end(), size_t(made.rank * matrix.width), input.name == always ? 1.0f : 0.0f);
        continue;
      }
      const Multiplied::Site& rows = made.sites.at(matrix.site);
      const std::vector<float>& own = matrix.up ? rows.up : rows.down;
      if (input.type == ort::int8) append_int8(own, made.rank, rounded, scales);
      else values.insert(values.end(), own.begin(), own.end());
    }
    if (input.scales) values = std::move(scales);
    std::vector<char>& memory = adapter.memory[input.name];
    memory = input.type == ort::int8 ? std::move(rounded) : packed(values, input.type == ort::fp16);
    adapter.tensors[input.name] = {memory.data(), input.type, input.shape(made.rank)};
  }
  for (const Extra& extra : slots.extras.fixed)
    adapter.tensors[extra.name] = {reinterpret_cast<const char*>(extra.none.data()), ort::fp32, extra.shape};
  return adapter;
}

} // namespace

Adapter Adapter::load(const std::filesystem::path& path, const Package& package, const Slots& slots) {
  if (is_factored(path)) return lay(Multiplied::load(path, package), slots);
  const std::string name = path.filename().string();
  auto file = std::make_unique<MappedFile>(path);
  auto tensors = read_tensors(*file, name);
  package.require_fingerprint(name, read_fingerprint(name, slots, tensors));
  const int64_t rank = require_layout(name, slots, tensors);
  ort::LoraAdapter* handle = nullptr;
  ort::require(ort::api().CreateLoraAdapter(path.c_str(), nullptr, &handle), name);
  return {std::move(file), {}, std::move(tensors), rank, ort::AdapterHandle(handle)};
}

Blend Blend::of(const std::vector<std::pair<const Adapter*, float>>& parts, const Slots& slots) {
  int64_t rank = 0;
  for (const auto& [adapter, _] : parts) rank += adapter->rank;
  Blend blend;
  for (const Extra& extra : slots.extras.fixed) {
    const char* chosen = reinterpret_cast<const char*>(extra.none.data());
    for (const auto& [adapter, _] : parts)
      if (const char* const own = adapter->tensors.at(extra.name).data; !extra.is_none(own)) chosen = own;
    blend.values.emplace_back(&extra.name, tensor(chosen, ort::fp32, extra.shape));
  }
  const bool whole = parts.size() == 1 && parts[0].second == 1.0f;
  for (const SlotInput& input : slots.inputs) {
    if (whole) {
      const char* const data = parts[0].first->tensors.at(input.name).data;
      blend.values.emplace_back(&input.name, tensor(data, input.type, input.shape(rank)));
      continue;
    }
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
    blend.values.emplace_back(&input.name, tensor(memory.data(), input.type, input.shape(rank)));
  }
  return blend;
}

} // namespace calora
