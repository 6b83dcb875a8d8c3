// Adapters of a package: the runtime's own mapped files for one alone, rows side by side for a mix.
#pragma once

#include "adapter_file.h"
#include "graph.h"
#include "package.h"
#include "slots.h"

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace calora {

/// An adapter of this package's base; tensors by the name of their input.
struct Adapter {
  std::unique_ptr<MappedFile> file; // or what was multiplied:
  std::map<std::string, std::vector<char>> memory;
  std::map<std::string, Stored> tensors;
  int64_t rank;
  ort::AdapterHandle handle; // what a run is given when this adapter is alone in its file

  /// Refuses an adapter of another base, or whose tensors are not those of the package's slots.
  static Adapter load(const std::filesystem::path& path, const Package& package, const Slots& slots);
};

/// What the graph is fed for a mix: values by name over memory that this owns.
struct Blend {
  std::vector<std::vector<char>> memory;
  std::vector<std::pair<const std::string*, ort::ValueHandle>> values;

  /// Rows of all adapters side by side, gates folded into `up` or its scales. Of none: rank 0. A lone adapter at gate 1
  /// stays where it is. Of what does not grow at most one adapter has more than nothing.
  static Blend of(const std::vector<std::pair<const Adapter*, float>>& parts, const Slots& slots);
};

} // namespace calora
