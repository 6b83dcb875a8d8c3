// Where a trace goes, as far as it has come.
#pragma once

#include "fields.h"

#include <filesystem>
#include <memory>
#include <vector>

namespace calora {

class Outlet {
 public:
  virtual ~Outlet() = default;

  /// The next case's logits.
  virtual void add(const std::vector<float>& logits) = 0;

  /// trace.json as far as it is known.
  virtual void say(const Json& trace) = 0;
};

/// logits.bin and trace.json in a directory.
std::unique_ptr<Outlet> to_files(const std::filesystem::path& directory);

/// The same on standard output, in frames: a line with a file's name and a number of bytes, then these bytes. Those of
/// logits.bin follow each other, those of trace.json replace what was said before.
std::unique_ptr<Outlet> to_stream();

} // namespace calora
