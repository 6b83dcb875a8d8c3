#include "adapter.h"

#include "error.h"
#include "fields.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

namespace calora {
namespace {

/// A tensor of a safetensors file.
struct Stored {
  const char* data;
  int64_t elements;
};

Stored tensor(const std::string& file, const Fields& header, const std::string& name, const std::string& dtype,
              const char* data, size_t size) {
  const Fields entry = header.object(name);
  if (entry.text("dtype") != dtype) throw refusal(file, name, dtype, entry.text("dtype"));
  const std::vector<int64_t> shape = entry.integers("shape"), range = entry.integers("data_offsets");
  const int64_t width = dtype == "F16" ? 2 : 4;
  const bool whole = range.size() == 2 && 0 <= range[0] && range[0] <= range[1] && range[1] <= int64_t(size);
  if (shape.size() != 1 || !whole || range[1] - range[0] != shape[0] * width)
    throw refusal(file, name, "a vector inside the file", "another range");
  return {data + range[0], shape[0]};
}

/// Copies a matrix [rank, width] to where the mix holds these ranks of it, and returns what follows it.
const char* append(const char* from, char* to, int64_t rank, int64_t row_bytes) {
  std::memcpy(to, from, size_t(rank * row_bytes));
  return from + rank * row_bytes;
}

} // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (descriptor < 0 || ::fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) {
    if (descriptor >= 0) ::close(descriptor);
    throw refusal(path.string(), "file", "a file", "nothing that can be read");
  }
  size_ = size_t(status.st_size);
  void* const mapped = size_ ? ::mmap(nullptr, size_, PROT_READ, MAP_SHARED, descriptor, 0) : nullptr;
  ::close(descriptor);
  if (mapped == MAP_FAILED) throw Error(path.string() + ": cannot be mapped: " + std::strerror(errno));
  data_ = static_cast<const char*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_) ::munmap(const_cast<char*>(data_), size_);
}

Adapter Adapter::load(const std::filesystem::path& path, const Package& package) {
  const std::string file = path.filename().string();
  auto mapped = std::make_unique<MappedFile>(path);
  uint64_t length = 0;
  if (mapped->size() >= sizeof length) std::memcpy(&length, mapped->data(), sizeof length);
  if (mapped->size() < sizeof length || length > mapped->size() - sizeof length)
    throw refusal(file, "header", "a safetensors file", "another file or a part of one");
  const char* const data = mapped->data() + sizeof length + length;
  const size_t size = mapped->size() - sizeof length - length;
  const Fields header = Fields::parse(std::string(mapped->data() + sizeof length, length), file);

  const std::string fingerprint = header.object("__metadata__").text("base_fingerprint");
  if (fingerprint != package.fingerprint)
    throw refusal(file, "base_fingerprint", package.fingerprint, fingerprint, "another base");
  header.only({"__metadata__", "recovery", "rows"});
  const Stored recovery = tensor(file, header, "recovery", "F32", data, size);
  const Stored rows = tensor(file, header, "rows", package.half ? "F16" : "F32", data, size);
  const int64_t expected = recovery.elements * package.elements;
  if (rows.elements != expected)
    throw refusal(file, "rows", std::to_string(expected) + " elements", std::to_string(rows.elements));
  return {std::move(mapped), rows.data, recovery.data, recovery.elements};
}

Rows Rows::mix(const std::vector<std::pair<const Adapter*, float>>& parts, const Package& package) {
  Rows mix;
  for (const auto& [adapter, weight] : parts) {
    const int64_t before = mix.rank;
    mix.rank += adapter->rank;
    mix.gate.resize(size_t(mix.rank), weight);
    mix.recovery.resize(size_t(mix.rank));
    std::memcpy(mix.recovery.data() + before, adapter->recovery, size_t(adapter->rank) * sizeof(float));
  }
  if (mix.rank > package.rank_budget)
    throw refusal("mix", "rank", "at most " + std::to_string(package.rank_budget), std::to_string(mix.rank));
  if (parts.size() == 1) mix.rows = parts[0].first->rows;
  if (parts.size() < 2) return mix;

  const int64_t width = package.half ? 2 : 4;
  mix.blended.resize(size_t(mix.rank * package.elements * width));
  mix.rows = mix.blended.data();
  int64_t before = 0;
  for (const auto& [adapter, _] : parts) {
    const int64_t rank = adapter->rank;
    const char* from = adapter->rows;
    for (const Group& group : package.groups) {
      char* to = mix.blended.data() + mix.rank * group.offset * width;
      const auto place = [&](int64_t row) {
        from = append(from, to + before * row * width, rank, row * width);
        to += mix.rank * row * width;
      };
      for (size_t j = 0; j < group.outs.size(); ++j) place(group.inputs);
      for (const int64_t out : group.outs) place(out);
    }
    before += rank;
  }
  return mix;
}

} // namespace calora
