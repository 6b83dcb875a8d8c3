#include "session.h"

#include "error.h"

#include <algorithm>

namespace calora {

void Session::select(const Mix& mix, bool keep_cache) {
  Mix heard;
  for (const auto& [id, gate] : mix)
    if (gate != 0.0) heard[id] = gate;
  package_.require_mixable(heard);
  activate(heard);
  mix_ = mix;
  if (!keep_cache) forget();
}

const float* Session::extend(const int64_t* ids, size_t count) {
  const int64_t total = length_ + int64_t(count);
  if (total > package_.context)
    throw refusal("package.json", "model.context",
                  "at most " + std::to_string(package_.context) + " tokens of prompt and answer",
                  std::to_string(total));
  for (size_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= package_.vocab)
      throw refusal("package.json", "model.vocab", "tokens from 0 to " + std::to_string(package_.vocab - 1),
                    std::to_string(ids[i]));
  if (count == 0) throw refusal("prompt", "ids", "at least one token", "none");
  const float* const logits = run(ids, count, length_);
  length_ = total;
  return logits;
}

int64_t Session::next(const Tokens& ids) {
  const float* const logits = extend(ids);
  return std::max_element(logits, logits + package_.vocab) - logits;
}

std::vector<double> Session::route(const Tokens& ids) {
  if (package_.router.empty())
    throw refusal("package.json", "router", "a router", "none", "name an adapter instead");
  return gates(ids);
}

} // namespace calora
