// The part of ONNX Runtime's C API that this runner calls, and what frees its objects.
//
// The library is opened when the program runs, so a build needs neither it nor its headers. Its table of functions has
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

/// The first version that has the adapter API.
constexpr uint32_t api_version = 20;

enum Type : int { fp32 = 1, uint8 = 2, int64 = 7, fp16 = 10 };

using Skipped = void (*)();

struct Api {
  Skipped skipped0[2];
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
  Skipped skipped25[14];
  Status* (*CreateRunOptions)(RunOptions**);
  Skipped skipped40[9];
  Status* (*CreateTensorWithDataAsOrtValue)(const MemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                                            size_t dimensions, Type, Value**);
  Skipped skipped50[1];
  Status* (*GetTensorMutableData)(Value*, void** data);
  Skipped skipped52[12];
  Status* (*GetTensorShapeElementCount)(const TensorInfo*, size_t* count);
  Status* (*GetTensorTypeAndShape)(const Value*, TensorInfo**);
  Skipped skipped66[3];
  Status* (*CreateCpuMemoryInfo)(int allocator, int kind, MemoryInfo**);
  Skipped skipped70[22];
  void (*ReleaseEnv)(Env*);
  void (*ReleaseStatus)(Status*);
  void (*ReleaseMemoryInfo)(MemoryInfo*);
  void (*ReleaseSession)(Session*);
  void (*ReleaseValue)(Value*);
  void (*ReleaseRunOptions)(RunOptions*);
  Skipped skipped98[1];
  void (*ReleaseTensorTypeAndShapeInfo)(TensorInfo*);
  void (*ReleaseSessionOptions)(SessionOptions*);
  Skipped skipped101[179];
  Status* (*CreateLoraAdapter)(const char* path, void* allocator, LoraAdapter**);
  Skipped skipped281[1];
  void (*ReleaseLoraAdapter)(LoraAdapter*);
  Status* (*RunOptionsAddActiveLoraAdapter)(RunOptions*, const LoraAdapter*);
};

/// The library's functions. Opens it at the first call; an Error when there is none, or an old one.
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
