// The part of ONNX Runtime's C API that the runner and the operators call, and what frees its objects.
//
// The library is opened when a program runs, so a build needs neither it nor its headers. Its table of functions has
// only ever grown at its end (the C API's promise to programs built against older headers), so a function keeps its
// place; tests/test_onnx_runner.py compares these places with those of the library's own header.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace calora::ort {

struct Status;
struct Env;
struct SessionOptions;
struct Session;
struct RunOptions;
struct MemoryInfo;
struct Value;
struct TensorInfo;
struct LoraAdapter;
struct CustomOp;
struct CustomOpDomain;
struct KernelContext;
struct KernelInfo;

/// The first version that has the adapter API.
constexpr uint32_t api_version = 20;

enum Type : int { any = 0, fp32 = 1, uint8 = 2, int8 = 3, int64 = 7, fp16 = 10 };
enum Presence : int { required = 0, optional = 1 };

using Skipped = void (*)();

struct Api {
  Status* (*CreateStatus)(int code, const char* message);
  Skipped skipped1[1];
  const char* (*GetErrorMessage)(const Status*);
  Status* (*CreateEnv)(int severity, const char* id, Env**);
  Skipped skipped4[3];
  Status* (*CreateSession)(const Env*, const char* path, const SessionOptions*, Session**);
  Skipped skipped8[1];
  Status* (*Run)(Session*, const RunOptions*, const char* const* inputs, const Value* const* values, size_t count,
                 const char* const* outputs, size_t output_count, Value** results);
  Status* (*CreateSessionOptions)(SessionOptions**);
  Skipped skipped11[11];
  Status* (*SetSessionLogSeverityLevel)(SessionOptions*, int severity);
  Skipped skipped23[1];
  Status* (*SetIntraOpNumThreads)(SessionOptions*, int count);
  Skipped skipped25[1];
  Status* (*CreateCustomOpDomain)(const char* name, CustomOpDomain**);
  Status* (*CustomOpDomain_Add)(CustomOpDomain*, const CustomOp*);
  Status* (*AddCustomOpDomain)(SessionOptions*, CustomOpDomain*);
  Skipped skipped29[10];
  Status* (*CreateRunOptions)(RunOptions**);
  Skipped skipped40[9];
  Status* (*CreateTensorWithDataAsOrtValue)(const MemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                                            size_t dimensions, Type, Value**);
  Skipped skipped50[1];
  Status* (*GetTensorMutableData)(Value*, void** data);
  Skipped skipped52[8];
  Status* (*GetTensorElementType)(const TensorInfo*, Type*);
  Status* (*GetDimensionsCount)(const TensorInfo*, size_t* count);
  Status* (*GetDimensions)(const TensorInfo*, int64_t* sizes, size_t count);
  Skipped skipped63[1];
  Status* (*GetTensorShapeElementCount)(const TensorInfo*, size_t* count);
  Status* (*GetTensorTypeAndShape)(const Value*, TensorInfo**);
  Skipped skipped66[3];
  Status* (*CreateCpuMemoryInfo)(int allocator, int kind, MemoryInfo**);
  Skipped skipped70[16];
  Status* (*KernelInfoGetAttribute_int64)(const KernelInfo*, const char* name, int64_t*);
  Skipped skipped87[3];
  Status* (*KernelContext_GetInput)(const KernelContext*, size_t index, const Value**);
  Status* (*KernelContext_GetOutput)(KernelContext*, size_t index, const int64_t* sizes, size_t count, Value**);
  void (*ReleaseEnv)(Env*);
  void (*ReleaseStatus)(Status*);
  void (*ReleaseMemoryInfo)(MemoryInfo*);
  void (*ReleaseSession)(Session*);
  void (*ReleaseValue)(Value*);
  void (*ReleaseRunOptions)(RunOptions*);
  Skipped skipped98[1];
  void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo*);
  void (*ReleaseSessionOptions)(SessionOptions*);
  Skipped skipped101[62];
  Status* (*KernelInfoGetAttributeArray_int64)(const KernelInfo*, const char* name, int64_t*, size_t* count);
  Skipped skipped164[110];
  Status* (*KernelContext_ParallelFor)(const KernelContext*, void (*task)(void* data, size_t i), size_t count,
                                       size_t batches, void* data);
  Skipped skipped275[5];
  Status* (*CreateLoraAdapter)(const char* path, void* allocator, LoraAdapter**);
  Skipped skipped281[1];
  void (*ReleaseLoraAdapter)(LoraAdapter*);
  Status* (*RunOptionsAddActiveLoraAdapter)(RunOptions*, const LoraAdapter*);
};

/// Of the table from version 24 on: type and sizes of a tensor where the library has them, without an object for each.
struct Api24 {
  Skipped skipped0[414];
  Status* (*GetTensorElementTypeAndShapeDataReference)(const Value*, Type*, const int64_t** sizes, size_t* count);
};

/// How the library hands out its table.
struct ApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

/// An operator of our own, as the C API of version 18 has it; null for what is as it is by default.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const void* info);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  Type (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  Type (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  Presence (*GetInputCharacteristic)(const CustomOp*, size_t);
  Presence (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*variadic[4])(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, void* context);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  size_t (*GetAliasMap)(int** inputs, int** outputs);
  void (*ReleaseAliasMap)(int* inputs, int* outputs);
};

/// The library. Opens it at the first call; an Error when there is none.
const ApiBase& base();

/// Its functions; an Error when it is an old one.
const Api& api();

/// An Error `file: ONNX Runtime refuses it: …` unless the status is a success.
void require(Status* status, const std::string& file);

template <auto release>
struct Released {
  template <typename T>
  void operator()(T* object) const {
    (api().*release)(object);
  }
};
using SessionHandle = std::unique_ptr<Session, Released<&Api::ReleaseSession>>;
using OptionsHandle = std::unique_ptr<SessionOptions, Released<&Api::ReleaseSessionOptions>>;
using RunOptionsHandle = std::unique_ptr<RunOptions, Released<&Api::ReleaseRunOptions>>;
using ValueHandle = std::unique_ptr<Value, Released<&Api::ReleaseValue>>;
using InfoHandle = std::unique_ptr<TensorInfo, Released<&Api::ReleaseTensorTypeAndShapeInfo>>;
using AdapterHandle = std::unique_ptr<LoraAdapter, Released<&Api::ReleaseLoraAdapter>>;

} // namespace calora::ort
