// An .onnx_adapter file, which is a flatbuffer: its tensors by name, where they lie in the mapped file.
#pragma once

#include "mapped_file.h"
#include "ort.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace calora {

struct Stored {
  const char* data;
  ort::Type type;
  std::vector<int64_t> shape;
};

/// Refuses a file that is damaged; every place in it is checked before it is read.
std::map<std::string, Stored> read_tensors(const MappedFile& file, const std::string& name);

} // namespace calora
