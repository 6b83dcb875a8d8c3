#include "operators.h"

#include "lanes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <type_traits>

namespace calora {
namespace {

/// h = gate · (recovery ? GELU(h) : h) of a position for rows [first, first + count) of a member, with the scales of
/// int8 rows before and after. Hendrycks and Gimpel, arXiv:1606.08415, with erf.
void activate(const Group& group, const Member& member, float* h, int64_t position, int64_t first, int64_t count) {
  for (int64_t r = 0; member.down_scale && r < count; ++r) h[r] *= member.down_scale[first + r];
  for (int64_t r = 0; group.recovery && r < count; ++r)
    if (group.recovery[first + r] != 0.0f) h[r] = 0.5f * h[r] * (1.0f + erff(h[r] * 0.70710678f));
  const float* const gate = group.gate ? group.gate + position * group.own + first : nullptr;
  for (int64_t r = 0; gate && r < count; ++r) h[r] *= gate[r];
  for (int64_t r = 0; member.up_scale && r < count; ++r) h[r] *= member.up_scale[first + r];
}

#define CALORA_KERNEL "slot_kernel.h"
#include "instruction_sets.h"

/// One instruction set's functions (slot_kernel.h).
struct Kernels {
  void (*slot)(const Group&, int64_t, int64_t);
  void (*down)(const Group&, float*, int64_t, int64_t);
  void (*up)(const Group&, const float*, int64_t, int64_t);
  void (*glu)(const float*, float*, int64_t);
  void (*norm)(const Norm&, float*, int64_t, int64_t);
};

template <typename T>
Kernels pick() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f"))
    return {avx512::slot<T>, avx512::slot_down<T>, avx512::slot_up<T>, avx512::glu, avx512::norm};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) // and so F16C
    return {avx2::slot<T>, avx2::slot_down<T>, avx2::slot_up<T>, avx2::glu, avx2::norm};
#endif
  return {baseline::slot<T>, baseline::slot_down<T>, baseline::slot_up<T>, baseline::glu, baseline::norm};
}

Kernels pick(Rows type) {
  return type == Rows::fp32 ? pick<float>() : type == Rows::fp16 ? pick<Half>() : pick<int8_t>();
}

/// Rows that fit onto the stack, and the bytes of a group from which a second thread pays: below, two dispatches cost
/// more than they save.
constexpr int64_t most_rows = 1024, worth_two = 128 * 1024;

template <typename Work>
void parallel(const Threads& threads, int64_t count, Work&& work) {
  using Task = std::remove_reference_t<Work>;
  const auto task = [](void* data, size_t i) { (*static_cast<Task*>(data))(int64_t(i)); };
  threads.run(threads.pool, task, size_t(count), const_cast<std::remove_const_t<Task>*>(&work));
}

int64_t all_outputs(const Group& group) {
  int64_t sum = 0;
  for (int64_t j = 0; j < group.count; ++j) sum += group.members[j].outputs;
  return sum;
}

/// One position on two threads, which is what memory has bandwidth for. Both take what is left to do until nothing is:
/// the second may come late, or never, and one dispatch does for both products.
class OnePosition {
public:
  OnePosition(const Kernels& kernels, const Group& group)
      : kernels_(kernels), group_(group), rows_(group.count * group.rank), outputs_(all_outputs(group)) {}

  void operator()(int64_t) {
    for (int64_t begin; (begin = next_row_.fetch_add(some_rows)) < rows_;)
      down(begin, std::min(begin + some_rows, rows_));
    for (int spins = 0; rows_done_.load(std::memory_order_acquire) < rows_; ++spins) // the other is at its last rows
      if (spins > patience) std::this_thread::yield();
    for (int64_t begin; (begin = next_output_.fetch_add(some_outputs)) < outputs_;)
      kernels_.up(group_, h_, begin, std::min(begin + some_outputs, outputs_));
  }

private:
  static constexpr int64_t some_rows = 8, some_outputs = 256;
  static constexpr int patience = 10000;

  void down(int64_t begin, int64_t end) {
    kernels_.down(group_, h_, begin, end);
    for (int64_t row = begin; row < end; ++row)
      activate(group_, group_.members[row / group_.rank], h_ + row, 0, row % group_.rank, 1);
    rows_done_.fetch_add(end - begin, std::memory_order_release);
  }

  const Kernels& kernels_;
  const Group& group_;
  const int64_t rows_, outputs_;
  std::atomic<int64_t> next_row_{0}, rows_done_{0}, next_output_{0};
  float h_[most_rows];
};

/// What is left without rows.
void copy(const Group& group, int64_t positions) {
  for (int64_t j = 0; j < group.count; ++j) {
    const Member& member = group.members[j];
    if (member.out == member.y) continue;
    for (int64_t s = 0; s < positions; ++s)
      std::memcpy(member.out + s * member.stride, member.y + s * member.stride, size_t(member.outputs) * sizeof(float));
  }
}

} // namespace

void add_slots(const Group& group, int64_t positions, const Threads& threads) {
  if (group.rank == 0) return copy(group, positions);
  const Kernels kernels = pick(group.type);
  const int64_t width = group.type == Rows::fp32 ? 4 : group.type == Rows::fp16 ? 2 : 1;
  const int64_t bytes = (group.count * group.inputs + all_outputs(group)) * group.rank * width;
  if (positions == 1 && group.rank * group.count <= most_rows && bytes >= worth_two)
    return parallel(threads, 2, OnePosition(kernels, group));
  // A block is a multiple of every tile of positions, so that only the last positions are computed one by one.
  constexpr int64_t block = 8;
  if (positions < 2 * block) return kernels.slot(group, 0, positions);
  parallel(threads, (positions + block - 1) / block, [&](int64_t i) {
    kernels.slot(group, i * block, (i + 1) * block < positions ? (i + 1) * block : positions);
  });
}

void add_and_norm(const Norm& norm, float* sum, int64_t width, int64_t positions, const Threads& threads) {
  const auto kernel = pick<float>().norm;
  const auto one = [&](int64_t s) { kernel(norm, sum, width, s); };
  if (positions == 1) return one(0);
  parallel(threads, positions, one);
}

void gate_linear_units(const float* y, float* out, int64_t width, int64_t positions, const Threads& threads) {
  const auto glu = pick<float>().glu;
  const auto one = [&](int64_t s) { glu(y + s * 2 * width, out + s * width, width); };
  if (positions == 1) return one(0);
  parallel(threads, positions, one);
}

} // namespace calora
