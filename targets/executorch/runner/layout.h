// What of package.json only this runtime reads: how an adapter's rows lie in its file, and who multiplies them.
#pragma once

#include "extras.h"
#include "package.h"

#include <cstdint>
#include <vector>

namespace calora {

/// Linears that share an input, and where their rows begin in an adapter of rank R: at element R · offset.
struct Group {
  int64_t inputs, offset;
  std::vector<std::string> sites;
  std::vector<int64_t> outs;
};

struct Layout {
  std::vector<Group> groups;
  int64_t elements = 0; // of an adapter's rows, per rank
  Extra extras;         // beside them; of no elements where the model takes none
  int64_t experts = 0;  // whose rows `select` marks; 0: the model takes none
  int64_t rank_budget = 0;
  bool half = false; // rows are fp16
  bool portable = false; // the model takes every matrix of the rows by itself

  static Layout of(const Package& package);

  int64_t width() const { return half ? 2 : 4; }
};

} // namespace calora
