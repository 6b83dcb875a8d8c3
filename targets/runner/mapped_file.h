// A file's bytes, mapped for reading: pages of an adapter are in memory once, and only when they are used.
#pragma once

#include <cstddef>
#include <filesystem>

namespace calora {

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

} // namespace calora
