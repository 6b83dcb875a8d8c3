#include "adapter.h"

#include "error.h"
#include "fields.h"

#include <cstring>

namespace calora {
namespace {

/// A tensor of a safetensors file.
struct Stored {
  const char* data;
  int64_t elements;
};

Stored tensor(const std::string& file, const Fields& header, const std::string& name, const std::string& dtype,
              const char* data, size_t size) {
  const Fields entry = header.object(name);
  if (entry.text("dtype") != dtype) throw refusal(file, name, dtype, entry.text("dtype"));
  const std::vector<int64_t> shape = entry.integers("shape"), range = entry.integers("data_offsets");
  const int64_t width = dtype == "F16" ? 2 : 4;
  const bool whole = range.size() == 2 && 0 <= range[0] && range[0] <= range[1] && range[1] <= int64_t(size);
  if (shape.size() != 1 || !whole || range[1] - range[0] != shape[0] * width)
    throw refusal(file, name, "a vector inside the file", "another range");
  return {data + range[0], shape[0]};
}

/// Copies a matrix [rank, width] to where the mix holds these ranks of it, and returns what follows it.
const char* append(const char* from, char* to, int64_t rank, int64_t row_bytes) {
  std::memcpy(to, from, size_t(rank * row_bytes));
  return from + rank * row_bytes;
}

} // namespace

Adapter Adapter::load(const std::filesystem::path& path, const Package& package, const Layout& layout) {
  const std::string file = path.filename().string();
  auto mapped = std::make_unique<MappedFile>(path);
  uint64_t length = 0;
  if (mapped->size() >= sizeof length) std::memcpy(&length, mapped->data(), sizeof length);
  if (mapped->size() < sizeof length || length > mapped->size() - sizeof length)
    throw refusal(file, "header", "a safetensors file", "another file or a part of one");
  const char* const data = mapped->data() + sizeof length + length;
  const size_t size = mapped->size() - sizeof length - length;
  const Fields header = Fields::parse(std::string(mapped->data() + sizeof length, length), file);

  package.require_fingerprint(file, header.object("__metadata__").text("base_fingerprint"));
  header.only({"__metadata__", "recovery", "rows"});
  const Stored recovery = tensor(file, header, "recovery", "F32", data, size);
  const Stored rows = tensor(file, header, "rows", layout.half ? "F16" : "F32", data, size);
  const int64_t expected = recovery.elements * layout.elements;
  if (rows.elements != expected)
    throw refusal(file, "rows", std::to_string(expected) + " elements", std::to_string(rows.elements));
  return {std::move(mapped), rows.data, recovery.data, recovery.elements};
}

Rows Rows::mix(const std::vector<std::pair<const Adapter*, float>>& parts, const Layout& layout) {
  Rows mix;
  for (const auto& [adapter, weight] : parts) {
    const int64_t before = mix.rank;
    mix.rank += adapter->rank;
    mix.gate.resize(size_t(mix.rank), weight);
    mix.recovery.resize(size_t(mix.rank));
    std::memcpy(mix.recovery.data() + before, adapter->recovery, size_t(adapter->rank) * sizeof(float));
  }
  if (mix.rank > layout.rank_budget)
    throw refusal("mix", "rank", "at most " + std::to_string(layout.rank_budget), std::to_string(mix.rank));
  if (parts.size() == 1) mix.rows = parts[0].first->rows;
  if (parts.size() < 2) return mix;

  const int64_t width = layout.width();
  mix.blended.resize(size_t(mix.rank * layout.elements * width));
  mix.rows = mix.blended.data();
  int64_t before = 0;
  for (const auto& [adapter, _] : parts) {
    const int64_t rank = adapter->rank;
    const char* from = adapter->rows;
    for (const Group& group : layout.groups) {
      char* to = mix.blended.data() + mix.rank * group.offset * width;
      const auto place = [&](int64_t row) {
        from = append(from, to + before * row * width, rank, row * width);
        to += mix.rank * row * width;
      };
      for (size_t j = 0; j < group.outs.size(); ++j) place(group.inputs);
      for (const int64_t out : group.outs) place(out);
    }
    before += rank;
  }
  return mix;
}

} // namespace calora
