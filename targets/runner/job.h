// job.json: what this device is asked to run (calora_export/jobs.py has the same records).
#pragma once

#include "session.h"

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace calora {

/// Teacher-forced: the first `prefill` ids at once, then one by one.
struct Case {
  Mix mix;
  Tokens ids;
  int64_t prefill;
};

/// Greedy, until an end token or `limit` new ones.
struct Completion {
  std::string adapter;
  Tokens ids;
  int64_t limit;
};

struct Safety {
  Mix first, second;
  Tokens ids;
  std::string forged;
};

struct Timing {
  std::string adapter, other;
  Tokens prompt;
  int64_t decode, rounds, swaps;
  Tokens lengths; // the base reads so many tokens and decodes behind them, each length `repeats` times
  int64_t repeats;
};

struct Job {
  int64_t threads;
  std::vector<Case> cases;
  std::vector<Tokens> routes;
  std::vector<Completion> completions;
  std::optional<Safety> safety;
  std::optional<Timing> timing;
  Tokens cores; // the processors on which alone it runs; none: where the system puts it

  static Job read(const std::filesystem::path& path);
};

} // namespace calora
