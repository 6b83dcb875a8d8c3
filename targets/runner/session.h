// A loaded package. It holds one KV cache, which belongs to the mix that is active when it is filled.
//
// Each runner defines a Session of its runtime, and the three functions below: one program is one runtime.
#pragma once

#include "package.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace calora {

using Mix = std::map<std::string, double>; // adapter → gate; empty: the base
using Tokens = std::vector<int64_t>;

class Session {
 public:
  explicit Session(Package package) : package_(std::move(package)) {}
  virtual ~Session() = default;
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const Package& package() const { return package_; }
  const Mix& mix() const { return mix_; }

  /// Activate a mix. The KV cache is emptied unless the caller asks to read it under the new mix.
  void select(const Mix& mix, bool keep_cache = false);

  void forget() { length_ = 0; }

  /// Append tokens to the cache; the last one's logits [vocab], valid until the next call.
  const float* extend(const int64_t* ids, size_t count);
  const float* extend(const Tokens& ids) { return extend(ids.data(), ids.size()); }

  /// Append tokens, and the likeliest next one.
  int64_t next(const Tokens& ids);

  /// Gates [classes] for a prompt's router ids.
  std::vector<double> route(const Tokens& ids);

  /// How kernels of this processor round what packed weights read, where they do not all do the same: else empty.
  virtual std::string rounding() const { return ""; }

  /// Refuse an adapter file that must not run on this base.
  virtual void admit(const std::filesystem::path& path) const = 0;

 protected:
  /// From the next run on, the adapters of this mix; no gate of it is 0.
  virtual void activate(const Mix& mix) = 0;

  /// Append `count` tokens to a cache that holds `position` of them; the last one's logits.
  virtual const float* run(const int64_t* ids, size_t count, int64_t position) = 0;

  /// Gates of the package's router, which is there.
  virtual std::vector<double> gates(const Tokens& ids) = 0;

 private:
  Package package_;
  Mix mix_;
  int64_t length_ = 0;
};

/// The target whose packages this program runs: `onnx` or `executorch`.
extern const char* const target;

/// Before anything else.
void start_runtime();

std::unique_ptr<Session> open_session(const std::filesystem::path& package, int64_t threads);

} // namespace calora
