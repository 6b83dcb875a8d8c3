// A package as every runner needs it: package.json, and that the files it lists are there whole.
#pragma once

#include "fields.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace calora {

struct Package {
  Fields manifest; // package.json, for what only one runtime reads
  std::filesystem::path path;
  std::filesystem::path model, router; // router: empty without one
  std::string fingerprint;
  std::map<std::string, std::filesystem::path> adapters; // by id
  int64_t vocab, context;
  std::vector<int64_t> ends; // tokens that end an answer

  /// Refuses what is no whole package of this target.
  static Package load(const std::filesystem::path& path, const std::string& target);

  const std::filesystem::path& adapter(const std::string& id) const;

  /// Refuses an adapter that was trained for another base.
  void require_fingerprint(const std::string& file, const std::string& found) const;
};

/// Refuses inputs of the graph that runners do not fill: scales of layers, gates of every token.
void require_rows_alone(const Fields& slots);

/// Refuses a value of package.json that this runner does not know.
void require_value(const std::string& key, const std::string& expected, const std::string& found);

} // namespace calora
