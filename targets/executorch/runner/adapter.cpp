#include "adapter.h"

#include "error.h"
#include "factors.h"
#include "half.h"

#include <algorithm>
#include <cstring>

namespace calora {
namespace {

/// Rows as a file of the adapter would hold them.
Adapter lay(const Multiplied& made, const Layout& layout) {
  std::vector<char> memory;
  const auto append = [&](const std::vector<float>& matrix) {
    const std::vector<char> bytes = packed(matrix, layout.half);
    memory.insert(memory.end(), bytes.begin(), bytes.end());
  };
  for (const Group& group : layout.groups) {
    for (const std::string& site : group.sites) append(made.sites.at(site).down);
    for (const std::string& site : group.sites) append(made.sites.at(site).up);
  }
  const auto rank = size_t(made.rank);
  Adapter adapter{nullptr, std::move(memory), nullptr, std::vector<float>(rank), layout.extras.none,
                  std::vector<float>(size_t(layout.experts) * rank), made.rank};
  adapter.rows = adapter.memory.data();
  return adapter;
}

/// Copies a matrix [rank, width] to where the mix holds these ranks of it, and returns what follows it.
const char* append(const char* from, char* to, int64_t rank, int64_t row_bytes) {
  std::memcpy(to, from, size_t(rank * row_bytes));
  return from + rank * row_bytes;
}

/// What the adapters of a mix have beside rows, of which at most one has more than nothing; experts' rows have their
/// gates from the tokens, times that of the mix.
void add_extras(const std::vector<std::pair<const Adapter*, float>>& parts, const Layout& layout, Rows& mix) {
  mix.extras = layout.extras.none;
  mix.select.resize(size_t(layout.experts * mix.rank));
  int64_t before = 0;
  for (const auto& [adapter, weight] : parts) {
    if (adapter->extras != layout.extras.none) mix.extras = adapter->extras;
    for (size_t i = 0; i < adapter->select.size(); ++i) {
      const int64_t expert = int64_t(i) / adapter->rank, row = before + int64_t(i) % adapter->rank;
      mix.select[size_t(expert * mix.rank + row)] = weight * adapter->select[i];
      if (adapter->select[i] != 0.0f) mix.gate[size_t(row)] = 0.0f;
    }
    before += adapter->rank;
  }
}

} // namespace

Adapter Adapter::load(const std::filesystem::path& path, const Package& package, const Layout& layout) {
  if (is_factored(path)) return lay(Multiplied::load(path, package), layout);
  auto file = std::make_unique<Safetensors>(path);
  package.require_fingerprint(file->name(), file->stated("base_fingerprint"));
  const Safetensors::Tensor* const marks = file->find("recovery");
  const int64_t rank = marks ? marks->elements() : 0;
  Safetensors::Forms forms{{"recovery", {"F32", {rank}}}};
  forms["rows"] = {layout.half ? "F16" : "F32", {rank * layout.elements}};
  if (!layout.extras.none.empty()) forms["extras"] = {"F32", layout.extras.shape};
  if (layout.experts) forms["select"] = {"F32", {layout.experts, rank}};
  file->require(forms);
  const auto numbers = [&](const char* name) { return forms.count(name) ? file->numbers(name) : std::vector<float>(); };
  Adapter made{nullptr, {}, file->find("rows")->data, numbers("recovery"), numbers("extras"), numbers("select"), rank};
  made.file = std::move(file);
  return made;
}

Rows Rows::mix(const std::vector<std::pair<const Adapter*, float>>& parts, const Layout& layout) {
  Rows mix;
  for (const auto& [adapter, weight] : parts) {
    const int64_t before = mix.rank;
    mix.rank += adapter->rank;
    mix.gate.resize(size_t(mix.rank), weight);
    mix.recovery.resize(size_t(mix.rank));
    std::copy(adapter->recovery.begin(), adapter->recovery.end(), mix.recovery.begin() + before);
  }
  if (mix.rank > layout.rank_budget)
    throw refusal("mix", "rank", "at most " + std::to_string(layout.rank_budget), std::to_string(mix.rank));
  add_extras(parts, layout, mix);
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
