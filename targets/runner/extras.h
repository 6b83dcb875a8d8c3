// What adapters have beside rows, where a package's graph takes it (calora_export/runtimes/_extras.py): scales of
// layers, and what weighs experts for each token.
#pragma once

#include "package.h"

#include <cstdint>
#include <string>
#include <vector>

namespace calora {

/// A tensor whose size the rank does not change.
struct Extra {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> none; // what an adapter without such has

  bool is_none(const char* data) const;
};

struct Extras {
  std::vector<Extra> fixed; // in the order of the graph's inputs
  int64_t experts = 0;      // whose rows `select` [experts, R] marks; 0: there is no such input

  static Extras of(const Package& package);

  /// All of `fixed`, one after the other.
  Extra flat() const;
};

} // namespace calora
