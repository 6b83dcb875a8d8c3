// Time in milliseconds.
#pragma once

#include <chrono>
#include <vector>

namespace calora {

class Stopwatch {
 public:
  double milliseconds() const {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Runs `work` and adds how long it took.
template <typename Work>
void timed(std::vector<double>& samples, Work&& work) {
  const Stopwatch watch;
  work();
  samples.push_back(watch.milliseconds());
}

} // namespace calora
