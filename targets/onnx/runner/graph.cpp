#include "graph.h"

#include "kernels.h"

namespace calora {
namespace {

// ONNX Runtime warns once per adapter tensor; errors come back as statuses.
constexpr int quiet = 3;

const ort::Env* environment() {
  static ort::Env* const made = [] {
    ort::Env* env = nullptr;
    ort::require(ort::api().CreateEnv(quiet, "calora", &env), "ONNX Runtime");
    return env;
  }();
  return made;
}

const ort::MemoryInfo* memory() {
  static ort::MemoryInfo* const made = [] {
    ort::MemoryInfo* info = nullptr;
    ort::require(ort::api().CreateCpuMemoryInfo(/*allocator=*/0, /*kind=*/0, &info), "ONNX Runtime");
    return info;
  }();
  return made;
}

} // namespace

int64_t size_of(ort::Type type) {
  switch (type) {
    case ort::uint8: return 1;
    case ort::fp16: return 2;
    case ort::int8: return 1;
    case ort::fp32: return 4;
    default: return 8;
  }
}

ort::ValueHandle tensor(const void* data, ort::Type type, const std::vector<int64_t>& shape) {
  int64_t bytes = size_of(type);
  for (const int64_t size : shape) bytes *= size;
  ort::Value* made = nullptr;
  ort::require(
      ort::api().CreateTensorWithDataAsOrtValue(
          memory(), const_cast<void*>(data), size_t(bytes), shape.data(), shape.size(), type, &made),
      "tensor");
  return ort::ValueHandle(made);
}

Graph::Graph(const std::filesystem::path& path, int64_t threads) : file_(path.filename().string()) {
  ort::SessionOptions* options = nullptr;
  ort::require(ort::api().CreateSessionOptions(&options), file_);
  const ort::OptionsHandle owner(options);
  ort::require(ort::api().SetSessionLogSeverityLevel(options, quiet), file_);
  ort::require(ort::api().SetIntraOpNumThreads(options, int(threads)), file_);
  ort::require(ort::register_kernels(ort::base(), options), file_);
  ort::Session* session = nullptr;
  ort::require(ort::api().CreateSession(environment(), path.c_str(), options, &session), file_);
  session_.reset(session);
}

Graph::Output Graph::run(const Feeds& inputs, Feeds outputs, const ort::RunOptions* options) {
  result_.reset();
  ort::require(
      ort::api().Run(session_.get(), options, inputs.names.data(), inputs.values.data(), inputs.names.size(),
                     outputs.names.data(), outputs.names.size(), outputs.values.data()),
      file_);
  result_.reset(outputs.values[0]);
  void* data = nullptr;
  ort::require(ort::api().GetTensorMutableData(result_.get(), &data), file_);
  ort::TensorInfo* info = nullptr;
  ort::require(ort::api().GetTensorTypeAndShape(result_.get(), &info), file_);
  const ort::InfoHandle owner(info);
  size_t count = 0;
  ort::require(ort::api().GetTensorShapeElementCount(info, &count), file_);
  return {static_cast<const float*>(data), int64_t(count)};
}

} // namespace calora
