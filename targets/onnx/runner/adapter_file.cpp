#include "adapter_file.h"

#include "error.h"
#include "graph.h"

#include <cstring>

namespace calora {
namespace {

/// Places in a flatbuffer are distances from where they are stored; a table's fields are found through its vtable.
class Buffer {
 public:
  Buffer(const MappedFile& file, const std::string& name) : data_(file.data()), size_(file.size()), name_(name) {}

  template <typename T>
  T read(size_t at) const {
    require(at, sizeof(T));
    T value;
    std::memcpy(&value, data_ + at, sizeof value);
    return value;
  }

  size_t follow(size_t at) const { return at + read<uint32_t>(at); }

  /// Where a field of a table is; 0 when it has its default.
  size_t field(size_t table, int index) const {
    const size_t vtable = size_t(int64_t(table) - read<int32_t>(table));
    const size_t entry = 4 + 2 * size_t(index);
    if (entry + 2 > read<uint16_t>(vtable)) return 0;
    const uint16_t offset = read<uint16_t>(vtable + entry);
    return offset ? table + offset : 0;
  }

  struct Vector {
    size_t at = 0, count = 0;
  };

  /// A vector field of elements of `width` bytes.
  Vector vector(size_t table, int index, size_t width) const {
    const size_t place = field(table, index);
    if (!place) return {};
    const size_t start = follow(place), count = read<uint32_t>(start);
    if (count > size_ / width) fail();
    require(start + 4, count * width);
    return {start + 4, count};
  }

  const char* data(size_t at) const { return data_ + at; }

  [[noreturn]] void fail() const {
    throw refusal(name_, "content", "an adapter file of ONNX Runtime", "another file or a part of one");
  }

 private:
  void require(size_t at, size_t count) const {
    if (at > size_ || count > size_ - at) fail();
  }

  const char* data_;
  size_t size_;
  const std::string& name_;
};

enum AdapterField : int { parameters = 3 };
enum ParameterField : int { name, dims, data_type, raw_data };

} // namespace

std::map<std::string, Stored> read_tensors(const MappedFile& file, const std::string& file_name) {
  const Buffer buffer(file, file_name);
  if (file.size() < 8 || std::memcmp(file.data() + 4, "TORT", 4) != 0) buffer.fail();
  const auto list = buffer.vector(buffer.follow(0), parameters, 4);
  std::map<std::string, Stored> tensors;
  for (size_t i = 0; i < list.count; ++i) {
    const size_t table = buffer.follow(list.at + 4 * i);
    const auto text = buffer.vector(table, name, 1), shape = buffer.vector(table, dims, 8),
               data = buffer.vector(table, raw_data, 1);
    const size_t type = buffer.field(table, data_type);
    Stored stored{buffer.data(data.at), ort::Type(type ? buffer.read<int32_t>(type) : 0), {}};
    uint64_t elements = 1;
    for (size_t d = 0; d < shape.count; ++d) {
      stored.shape.push_back(buffer.read<int64_t>(shape.at + 8 * d));
      if (stored.shape.back() < 0 || stored.shape.back() > int64_t(file.size())) buffer.fail();
      if (__builtin_mul_overflow(elements, uint64_t(stored.shape.back()), &elements)) buffer.fail();
    }
    if (elements > file.size() || elements * uint64_t(size_of(stored.type)) != data.count) buffer.fail();
    tensors[std::string(buffer.data(text.at), text.count)] = stored;
  }
  return tensors;
}

} // namespace calora
