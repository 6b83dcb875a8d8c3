// Where a graph takes the rows of adapters: the `slots` of package.json.
#pragma once

#include "ort.h"
#include "package.h"

#include <cstdint>
#include <string>
#include <vector>

namespace calora {

/// An input of the graph whose size grows with the rank R: [parts · R, width], or [parts · R] where width is 0.
struct SlotInput {
  std::string name;
  ort::Type type;
  int64_t parts, width;
  bool gated; // takes the gates of a mix

  std::vector<int64_t> shape(int64_t rank) const;
  /// Of one row.
  int64_t bytes() const;
};

struct Slots {
  std::vector<SlotInput> inputs; // each once
  std::string fingerprint; // the tensor of an adapter file that says for which base it is
  bool required; // the graph has no base of its own: without an adapter it is given rank 0

  static Slots of(const Package& package);
};

} // namespace calora
