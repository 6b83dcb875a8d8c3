#include "job.h"

#include "error.h"
#include "fields.h"

namespace calora {
namespace {

Case read_case(const Fields& json) {
  json.only({"name", "mix", "ids", "prefill"});
  const Case made{json.numbers("mix"), json.integers("ids"), json.integer("prefill")};
  if (made.prefill < 1 || made.prefill > int64_t(made.ids.size()))
    throw refusal("job.json", json.text("name") + ".prefill", "1 to " + std::to_string(made.ids.size()),
                   std::to_string(made.prefill));
  return made;
}

Completion read_completion(const Fields& json) {
  json.only({"adapter", "ids", "limit"});
  return {json.text("adapter"), json.integers("ids"), json.integer("limit")};
}

Safety read_safety(const Fields& json) {
  json.only({"first", "second", "ids", "forged"});
  return {json.numbers("first"), json.numbers("second"), json.integers("ids"), json.text("forged")};
}

Timing read_timing(const Fields& json) {
  json.only({"adapter", "other", "prompt", "decode", "rounds", "swaps", "lengths", "repeats"});
  const bool curve = json.has("lengths") && json.has("repeats");
  if (curve && json.integers("prompt").empty())
    throw refusal("job.json", "timing.prompt", "at least one token", "none");
  return {json.text("adapter"),
          json.text("other"),
          json.integers("prompt"),
          json.integer("decode"),
          json.integer("rounds"),
          json.integer("swaps"),
          curve ? json.integers("lengths") : Tokens(),
          curve ? json.integer("repeats") : 0};
}

} // namespace

Job Job::read(const std::filesystem::path& path) {
  const Fields json = Fields::read(path);
  json.only({"threads", "cases", "routes", "completions", "safety", "timing", "cores"});
  Job job;
  job.threads = json.integer("threads");
  if (job.threads < 1) throw refusal("job.json", "threads", "at least 1", std::to_string(job.threads));
  for (const Fields& item : json.objects("cases")) job.cases.push_back(read_case(item));
  job.routes = json.rows("routes");
  for (const Fields& item : json.objects("completions")) job.completions.push_back(read_completion(item));
  if (const auto safety = json.maybe("safety")) job.safety = read_safety(*safety);
  if (const auto timing = json.maybe("timing")) job.timing = read_timing(*timing);
  if (json.has("cores")) job.cores = json.integers("cores");
  return job;
}

} // namespace calora
