// Where a graph takes the rows of adapters: the `slots` of package.json.
#pragma once

#include "extras.h"
#include "ort.h"
#include "package.h"

#include <cstdint>
#include <string>
#include <vector>

namespace calora {

/// Of so many columns, and R rows. gated: takes the gates of a mix. site, up: whose rows they are, if a site's.
struct Matrix {
  int64_t width;
  bool gated;
  std::string site = "";
  bool up = false;
};

/// The input [R] that is 1 on rows that are no expert's.
inline const std::string always = "always";

/// An input of the graph whose size grows with the rank R: matrices, each below the one before, [matrices · R, width],
/// or flat [R · all widths], or marks of rows [matrices, R].
struct SlotInput {
  std::string name;
  ort::Type type;
  std::vector<Matrix> matrices;
  bool flat;
  bool marks = false, scales = false; // scales: of the int8 rows before them

  int64_t width() const; // of all matrices
  std::vector<int64_t> shape(int64_t rank) const;
};

struct Slots {
  std::vector<SlotInput> inputs; // each once
  Extras extras; // inputs that do not grow
  std::string fingerprint; // the tensor of an adapter file that says for which base it is
  bool required; // the graph has no base of its own: without an adapter it is given rank 0

  static Slots of(const Package& package);
};

} // namespace calora
