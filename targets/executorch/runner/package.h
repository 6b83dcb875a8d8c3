// A package as this runner needs it: package.json, and that the files it lists are there whole.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace calora {

/// Linears that share an input, and where their rows begin in an adapter of rank R: at element R · offset.
struct Group {
  int64_t inputs, offset;
  std::vector<int64_t> outs;
};

struct Package {
  std::filesystem::path path;
  std::filesystem::path model, router; // router: empty without one
  std::string fingerprint;
  std::map<std::string, std::filesystem::path> adapters; // by id
  std::vector<Group> groups;
  int64_t elements = 0; // of an adapter, per rank
  bool half = false; // rows are fp16
  bool portable = false; // the model takes every matrix of the rows by itself
  int64_t vocab = 0, context = 0, rank_budget = 0;
  std::vector<int64_t> ends; // tokens that end an answer

  static Package load(const std::filesystem::path& path);
  const std::filesystem::path& adapter(const std::string& id) const;
};

} // namespace calora
