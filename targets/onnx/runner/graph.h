// A model file that ONNX Runtime has loaded, and tensors over memory of ours.
#pragma once

#include "ort.h"

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace calora {

/// A tensor over `data`, which stays where it is while the tensor is used.
ort::ValueHandle tensor(const void* data, ort::Type type, const std::vector<int64_t>& shape);

/// Bytes of one element.
int64_t size_of(ort::Type type);

/// Names and values of a call; the names and values outlive it.
struct Feeds {
  std::vector<const char*> names;
  std::vector<ort::Value*> values;

  void add(const std::string& name, const ort::ValueHandle& value) {
    names.push_back(name.c_str());
    values.push_back(value.get());
  }
};

class Graph {
 public:
  Graph(const std::filesystem::path& path, int64_t threads);

  /// Runs. Outputs with a value are written there; the first one, fp32, is the result, valid until the next call.
  struct Output {
    const float* data;
    int64_t count;
  };
  Output run(const Feeds& inputs, Feeds outputs, const ort::RunOptions* options = nullptr);

 private:
  std::string file_;
  ort::SessionHandle session_;
  ort::ValueHandle result_;
};

} // namespace calora
