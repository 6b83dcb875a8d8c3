#include "measuring.h"

#include "clock.h"
#include "machine.h"

#include <nlohmann/json.hpp>

#include <algorithm>

namespace calora {
namespace {

using Samples = std::vector<double>;

/// Rounds are interleaved, so that a machine whose speed drifts slows every line alike; the first one warms up.
void measure_speed(Session& session, const Timing& timing, const std::vector<std::pair<std::string, Mix>>& mixes,
                   Samples& prefill, std::map<std::string, Samples>& decode) {
  const Tokens one(timing.prompt.begin(), timing.prompt.begin() + (timing.prompt.empty() ? 0 : 1));
  for (int64_t round = 0; round <= timing.rounds; ++round)
    for (const auto& [name, mix] : mixes) {
      Samples warming;
      session.select(mix);
      timed(round && name == "base" ? prefill : warming, [&] { session.extend(timing.prompt); });
      for (int64_t i = 0; i < timing.decode; ++i)
        timed(round ? decode[name] : warming, [&] { session.extend(one); });
    }
}

/// The base at each length. Its kernels are warm.
Json trace_curve(Session& session, const Timing& timing) {
  Json points = Json::array();
  if (emulated()) return points; // times that mean nothing, and take long
  for (const int64_t length : timing.lengths) {
    Tokens ids;
    for (int64_t i = 0; i < length; ++i) ids.push_back(timing.prompt[size_t(i) % timing.prompt.size()]);
    Samples prefill, decode;
    for (int64_t turn = 0; turn < timing.repeats; ++turn) {
      session.select({});
      timed(prefill, [&] { session.extend(ids); });
      for (int64_t i = 0; i < timing.decode; ++i) timed(decode, [&] { session.extend(ids.data(), 1); });
    }
    points.push_back({{"length", length}, {"prefill", prefill}, {"decode", decode}});
  }
  return points;
}

} // namespace

Json measure(Session& session, const Timing& timing, double load, const std::vector<Tokens>& routes) {
  const Json before = conditions();
  std::vector<std::pair<std::string, Mix>> mixes{{"base", {}}};
  if (!timing.adapter.empty()) mixes.push_back({"adapter", {{timing.adapter, 1.0}}});
  if (!timing.other.empty()) mixes.push_back({"mix2", {{timing.adapter, 0.5}, {timing.other, 0.5}}});
  Samples prefill, swap, first_token, router;
  std::map<std::string, Samples> decode;
  for (const auto& [name, _] : mixes) decode[name];
  measure_speed(session, timing, mixes, prefill, decode);
  if (!timing.adapter.empty()) {
    const Mix pair[] = {{{timing.adapter, 1.0}}, timing.other.empty() ? Mix{} : Mix{{timing.other, 1.0}}};
    for (int64_t i = 0; i < timing.swaps; ++i) timed(swap, [&] { session.select(pair[i % 2]); });
    for (int64_t i = 0; i < std::min<int64_t>(timing.swaps, 10); ++i)
      timed(first_token, [&] {
        session.select(pair[i % 2]);
        session.extend(timing.prompt);
      });
  }
  if (!routes.empty()) {
    session.route(routes[0]); // warms up
    for (int64_t i = 0; i < timing.swaps; ++i) timed(router, [&] { session.route(routes[0]); });
  }
  const Json curve = trace_curve(session, timing);
  return {{"load", load},     {"swap", swap},     {"first_token", first_token},
          {"prefill", prefill}, {"decode", decode}, {"router", router},
          {"curve", curve},   {"before", before}, {"after", conditions()}};
}

} // namespace calora
