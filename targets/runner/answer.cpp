#include "answer.h"

#include "clock.h"
#include "error.h"
#include "job.h"
#include "machine.h"
#include "measuring.h"
#include "outlet.h"

#include <nlohmann/json.hpp>
#include <sys/utsname.h>

#include <algorithm>

namespace calora {
namespace {

std::vector<float> force(Session& session, const Case& item) {
  std::vector<float> logits;
  const auto keep = [&](const float* row) { logits.insert(logits.end(), row, row + session.package().vocab); };
  session.select(item.mix);
  keep(session.extend(item.ids.data(), size_t(item.prefill)));
  for (size_t i = size_t(item.prefill); i < item.ids.size(); ++i) keep(session.extend(&item.ids[i], 1));
  return logits;
}

Tokens complete(Session& session, const Completion& completion) {
  const Mix mix{{completion.adapter, 1.0}};
  if (session.mix() != mix) session.select(mix);
  session.forget();
  const Tokens& ends = session.package().ends;
  Tokens made, fed = completion.ids;
  while (int64_t(made.size()) < completion.limit &&
         (made.empty() || std::find(ends.begin(), ends.end(), made.back()) == ends.end())) {
    made.push_back(session.next(fed));
    fed = {made.back()};
  }
  return made;
}

bool refuses(const Session& session, const std::string& forged) {
  try {
    session.admit(forged);
    return false;
  } catch (const Error&) {
    return true;
  }
}

Json check_safety(Session& session, const Safety& safety) {
  const size_t half = safety.ids.size() / 2;
  const Tokens head(safety.ids.begin(), safety.ids.begin() + int64_t(half)),
      tail(safety.ids.begin() + int64_t(half), safety.ids.end());
  using Logits = std::vector<float>;
  const auto copy = [&](const float* logits) { return Logits(logits, logits + session.package().vocab); };
  const auto fresh = [&](const Mix& mix) {
    session.select(mix);
    return copy(session.extend(safety.ids));
  };
  const Logits first = fresh(safety.first), second = fresh(safety.second), again = fresh(safety.first);
  session.select(safety.first);
  session.extend(head);
  session.select(safety.second);
  const Logits switched = copy(session.extend(safety.ids));
  session.select(safety.first);
  session.extend(head);
  session.select(safety.second, /*keep_cache=*/true);
  const Logits stale = copy(session.extend(tail));
  return {{"aba", first == again},
          {"fresh", switched == second},
          {"stale", stale != second},
          {"refused", refuses(session, safety.forged)}};
}

} // namespace

void answer(const std::filesystem::path& package, const std::filesystem::path& directory, bool stream) {
  Job job = Job::read(directory / "job.json");
  if (!job.cores.empty()) pin(job.cores);
  // More than there are processors wait for each other, and emulated ones do so for ages.
  job.threads = emulated() ? 1 : std::min(job.threads, std::max<int64_t>(1, int64_t(cores().size())));
  const std::unique_ptr<Outlet> outlet = stream ? to_stream() : to_files(directory);
  const Stopwatch watch;
  const std::unique_ptr<Session> opened = open_session(package, job.threads);
  Session& session = *opened;
  const double load = watch.milliseconds();

  const std::string rounding = session.rounding();
  utsname system{};
  uname(&system);
  Json trace = {
      {"device", system.nodename},
      {"arch", system.machine},
      {"os", std::string(system.sysname) + " " + system.release},
      {"runtime", target},
      {"vocab", session.package().vocab},
      {"gates", Json::array()},
      {"completions", Json::array()},
      {"safety", Json()},
      {"timing", Json()},
      {"peak_rss", peak_rss()},
      {"emulated", emulated()},
      {"rounding", rounding.empty() ? Json() : Json(rounding)},
      {"threads", job.threads},
      {"cores", cores()},
  };
  outlet->say(trace);
  for (const Case& item : job.cases) outlet->add(force(session, item));
  for (const Tokens& ids : job.routes) trace["gates"].push_back(session.route(ids));
  outlet->say(trace);
  for (const Completion& completion : job.completions) trace["completions"].push_back(complete(session, completion));
  if (job.safety) trace["safety"] = check_safety(session, *job.safety);
  outlet->say(trace);
  if (job.timing) trace["timing"] = measure(session, *job.timing, load, job.routes);
  trace["peak_rss"] = peak_rss();
  trace["mapped"] = mapped();
  outlet->say(trace);
}

} // namespace calora
