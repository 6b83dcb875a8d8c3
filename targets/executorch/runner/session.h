// A loaded package. It holds one KV cache, which belongs to the mix that is active when it is filled.
#pragma once

#include "adapter.h"
#include "package.h"
#include "program.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace calora {

using Mix = std::map<std::string, double>; // adapter → gate; empty: the base
using Tokens = std::vector<int64_t>;

class Session {
 public:
  Session(Package package, int64_t threads);

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

  /// Refuse an adapter file that must not run on this base.
  void admit(const std::filesystem::path& path) const { Adapter::load(path, package_); }

 private:
  const Adapter& adapter(const std::string& id);

  Package package_;
  std::unique_ptr<Program> model_, router_;
  int64_t chunk_ = 0, length_ = 0;
  Tokens fed_; // what the program reads stays here
  int64_t position_ = 0;
  std::map<std::string, Adapter> adapters_;
  Rows rows_;
  Mix mix_;
};

} // namespace calora
