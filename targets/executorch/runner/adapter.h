// Adapter files, and the rows that the model reads: one file in place, or several side by side.
#pragma once

#include "layout.h"
#include "safetensors.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

namespace calora {

/// An adapter of this package's base. rows: fp16 or fp32 [rank · Layout::elements].
struct Adapter {
  std::unique_ptr<Safetensors> file; // or what was multiplied:
  std::vector<char> memory;
  const char* rows;
  std::vector<float> recovery; // [rank]
  std::vector<float> extras;   // [Layout::extras]
  std::vector<float> select;   // [Layout::experts, rank]
  int64_t rank;

  /// Refuses an adapter of another base, or whose tensors are not those of the package's slots.
  static Adapter load(const std::filesystem::path& path, const Package& package, const Layout& layout);
};

/// What the model reads. rows points into a mapped file or into `blended`.
struct Rows {
  const void* rows = nullptr;
  int64_t rank = 0;
  std::vector<float> gate, recovery; // [rank]
  std::vector<float> extras, select; // [Layout::extras], [Layout::experts, rank]
  std::vector<char> blended;

  /// Nothing: the base. One adapter: its file, in place. Several: their ranks side by side in every matrix.
  static Rows mix(const std::vector<std::pair<const Adapter*, float>>& parts, const Layout& layout);
};

} // namespace calora
