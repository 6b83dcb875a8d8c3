// One method of an ExecuTorch program, loaded once; its inputs keep their place from call to call.
#pragma once

#include <executorch/extension/module/module.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace calora {

/// Keep the runtime's own messages for the error that follows them, and let its aborts end with one line and exit code 1.
void capture_runtime_messages();

/// How many threads the runtime's pool has. Before the first program is loaded.
void set_threads(int64_t count);

class Program {
 public:
  Program(const std::filesystem::path& path, const std::string& method);

  /// The largest size of a dimension of an input.
  int64_t limit(size_t input, size_t dimension);

  /// `data` is read at every call, where it is, until another is set.
  void set(size_t input, const void* data, std::vector<int32_t> sizes, executorch::aten::ScalarType type);

  /// Runs; the first output, fp32, valid until the next call.
  struct Output {
    const float* data;
    int64_t count;
  };
  Output run();

 private:
  void require(executorch::runtime::Error error, const std::string& what) const;

  /// Memory for the method's tensors that takes none before it is written: a KV cache grows with what it holds.
  void plan_memory();

  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };

  std::string file_, method_;
  std::vector<std::unique_ptr<uint8_t, Free>> arenas_;
  std::vector<executorch::runtime::Span<uint8_t>> spans_;
  std::unique_ptr<executorch::runtime::HierarchicalAllocator> planned_;
  executorch::extension::Module module_;
};

} // namespace calora
