// Adapter files that hold cores between matrices that a package has once (calora_export/factors.py), multiplied out.
#pragma once

#include "package.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace calora {

/// fp32 down [rank, inputs] and up [rank, outputs] of every site with a slot; zeros where the adapter has no rows.
struct Multiplied {
  struct Site {
    std::vector<float> down, up;
  };
  int64_t rank = 0;
  std::map<std::string, Site> sites;

  /// Refuses an adapter of another base, or whose factors do not fit together and into the package's slots.
  static Multiplied load(const std::filesystem::path& path, const Package& package);
};

/// Whether an adapter file is of this kind.
bool is_factored(const std::filesystem::path& path);

} // namespace calora
