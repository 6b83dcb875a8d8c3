#include "program.h"

#include "error.h"

#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/platform/platform.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdio>
#include <cstdlib>

// The pool's size has no header in the wheel, but its library exports it.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t count);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

namespace calora {
namespace {

using executorch::extension::Module;
using Status = executorch::runtime::Error;

std::string& last_message() {
  static std::string message;
  return message;
}

void keep_message(et_timestamp_t, et_pal_log_level_t level, const char*, const char*, size_t, const char* message,
                  size_t length) {
  if (level == kError || level == kFatal) last_message().assign(message, length);
}

[[noreturn]] void stop() {
  std::fprintf(stderr, "ExecuTorch stopped: %s\n", last_message().c_str());
  std::_Exit(1);
}

} // namespace

void capture_runtime_messages() {
  executorch::runtime::PalImpl pal = executorch::runtime::PalImpl::create(keep_message, __FILE__);
  pal.abort = stop;
  executorch::runtime::register_pal(pal);
  executorch::runtime::runtime_init();
}

void set_threads(int64_t count) {
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(uint32_t(count));
}

Program::Program(const std::filesystem::path& path, const std::string& method)
    : file_(path.filename().string()), method_(method), module_(path.string(), Module::LoadMode::Mmap) {
  plan_memory();
  require(module_.load_method(method, planned_.get()), "load");
}

void Program::plan_memory() {
  const auto meta = module_.method_meta(method_);
  require(meta.error(), "load");
  for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
    const auto size = meta->memory_planned_buffer_size(i);
    require(size.error(), "load");
    // calloc has large blocks from the system, which backs their pages when they are first written.
    arenas_.emplace_back(static_cast<uint8_t*>(std::calloc(size_t(*size) + 1, 1)));
    if (!arenas_.back()) throw Error(file_ + ": " + method_ + ": no memory for " + std::to_string(*size) + " bytes");
    spans_.emplace_back(arenas_.back().get(), size_t(*size));
  }
  planned_ = std::make_unique<executorch::runtime::HierarchicalAllocator>(
      executorch::runtime::Span<executorch::runtime::Span<uint8_t>>(spans_.data(), spans_.size()));
}

void Program::require(executorch::runtime::Error error, const std::string& what) const {
  if (error == Status::Ok) return;
  const std::string said = last_message().empty() ? executorch::runtime::to_string(error) : last_message();
  throw Error(file_ + ": " + method_ + ": ExecuTorch refuses to " + what + " it: " + said);
}

int64_t Program::limit(size_t input, size_t dimension) {
  const auto meta = module_.method_meta(method_);
  require(meta.error(), "describe");
  const auto tensor = meta->input_tensor_meta(input);
  require(tensor.error(), "describe");
  if (dimension >= tensor->sizes().size())
    throw refusal(file_, method_ + " input " + std::to_string(input), std::to_string(dimension + 1) + " dimensions",
                   std::to_string(tensor->sizes().size()));
  return tensor->sizes()[dimension];
}

void Program::set(size_t input, const void* data, std::vector<int32_t> sizes, executorch::aten::ScalarType type) {
  const auto tensor = executorch::extension::from_blob(const_cast<void*>(data), std::move(sizes), type);
  require(module_.set_input(method_, tensor, input), "take an input for");
}

Program::Output Program::run() {
  const auto outputs = module_.execute(method_);
  require(outputs.error(), "run");
  if (outputs->empty() || !(*outputs)[0].isTensor() ||
      (*outputs)[0].toTensor().scalar_type() != executorch::aten::ScalarType::Float)
    throw refusal(file_, method_, "a float tensor as its output", "something else");
  const auto& tensor = (*outputs)[0].toTensor();
  return {tensor.const_data_ptr<float>(), int64_t(tensor.numel())};
}

} // namespace calora
