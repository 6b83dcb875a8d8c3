// Adapter files, and the rows that the model reads: one file in place, or several side by side.
#pragma once

#include "package.h"

#include <cstdint>
#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

namespace calora {

/// A file's bytes, mapped for reading.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  const char* data_ = nullptr;
  size_t size_ = 0;
};

/// An adapter of this package's base. rows: fp16 or fp32 [rank · Package::elements].
struct Adapter {
  std::unique_ptr<MappedFile> file;
  const char* rows;
  const char* recovery; // fp32 [rank], not necessarily aligned
  int64_t rank;

  /// Refuses an adapter of another base, or whose tensors are not those of the package's slots.
  static Adapter load(const std::filesystem::path& path, const Package& package);
};

/// What the model reads. rows points into a mapped file or into `blended`.
struct Rows {
  const void* rows = nullptr;
  int64_t rank = 0;
  std::vector<float> gate, recovery; // [rank]
  std::vector<char> blended;

  /// Nothing: the base. One adapter: its file, in place. Several: their ranks side by side in every matrix.
  static Rows mix(const std::vector<std::pair<const Adapter*, float>>& parts, const Package& package);
};

} // namespace calora
