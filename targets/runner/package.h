// A package as every runner needs it: package.json, and that the files it lists are there whole.
#pragma once

#include "fields.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace calora {

/// Where one site's rows are in an adapter's tensors (calora_export/package.py).
struct SlotTensor {
  std::string site, down, up;
  int64_t part, parts, inputs, outputs;
};

struct Package {
  struct Entry {
    std::filesystem::path file;
    std::string kind; // rows, scales or routed
  };

  Fields manifest; // package.json, for what only one runtime reads
  std::filesystem::path path;
  std::filesystem::path model, router; // router: empty without one
  std::string fingerprint;
  std::vector<SlotTensor> slots;
  std::map<std::string, Entry> adapters; // by id
  int64_t vocab, context;
  std::vector<int64_t> ends; // tokens that end an answer

  /// Refuses what is no whole package of this target.
  static Package load(const std::filesystem::path& path, const std::string& target);

  const Entry& adapter(const std::string& id) const;

  /// The slot of a site that an adapter's file names.
  const SlotTensor& slot(const std::string& file, const std::string& site) const;

  /// Refuses a mix of adapters that no formula adds up.
  void require_mixable(const std::map<std::string, double>& mix) const;

  /// Refuses an adapter that was trained for another base.
  void require_fingerprint(const std::string& file, const std::string& found) const;
};

/// Refuses a value of package.json that this runner does not know.
void require_value(const std::string& key, const std::string& expected, const std::string& found);

} // namespace calora
