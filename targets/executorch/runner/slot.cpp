// calora::slot.out: what the adapters add to a group of linears that share an input.
//
//   h_j = gate · act(x · down_jᵀ)   out[…, columns[j] : + outs[j]] = y[…] + h_j · up_j   act: exact GELU on recovery rows
//
// Rows stay where they are, in the mapped adapter file: nothing is packed, converted ahead or copied. With one position
// the kernel is as fast as memory delivers the rows; with many, blocks of positions are spread over threads.
#include "lanes.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <cmath>
#include <cstring>

namespace calora {
namespace {

using executorch::aten::ArrayRef;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

/// A call: x [S, inputs], y and out [S, width], rows from the group's first one on, gate and recovery [rank].
struct Group {
  const float *x, *y;
  float* out;
  const void* rows;
  const float *gate, *recovery;
  int64_t inputs, width, rank;
  ArrayRef<int64_t> columns, outs;
};

/// h = gate · (recovery ? GELU(h) : h). Hendrycks and Gimpel, arXiv:1606.08415, with erf.
void activate(float* h, const float* gate, const float* recovery, int64_t count) {
  for (int64_t r = 0; r < count; ++r) {
    const float v = h[r];
    h[r] = gate[r] * (recovery[r] != 0.0f ? 0.5f * v * (1.0f + erff(v * 0.70710678f)) : v);
  }
}

#if defined(__x86_64__)
namespace avx2 {
CALORA_TARGET(CALORA_AVX2)
using Lanes = Avx2;
#include "tiles.h"
#include "slot_kernel.h"
CALORA_TARGET_END
} // namespace avx2

namespace avx512 {
CALORA_TARGET(CALORA_AVX512)
using Lanes = Avx512;
#include "tiles.h"
#include "slot_kernel.h"
CALORA_TARGET_END
} // namespace avx512
#endif

namespace baseline {
#if defined(__aarch64__)
using Lanes = Neon;
#else
using Lanes = Plain;
#endif
#include "tiles.h"
#include "slot_kernel.h"
} // namespace baseline

/// One instruction set's functions (slot_kernel.h).
struct Kernels {
  void (*slot)(const Group&, int64_t, int64_t);
  void (*down)(const Group&, float*, int64_t, int64_t);
  void (*up)(const Group&, const float*, int64_t, int64_t);
};

template <typename T>
Kernels pick() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {avx512::slot<T>, avx512::slot_down<T>, avx512::slot_up<T>};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) // and so F16C
    return {avx2::slot<T>, avx2::slot_down<T>, avx2::slot_up<T>};
#endif
  return {baseline::slot<T>, baseline::slot_down<T>, baseline::slot_up<T>};
}

/// Rows that fit onto the stack, and the bytes of a group from which a second thread pays: below, two dispatches cost
/// more than they save.
constexpr int64_t most_rows = 1024, worth_two = 128 * 1024;

/// One position of many rows on two threads, which is what memory has bandwidth for.
void one_position(const Kernels& kernels, const Group& group) {
  float h[most_rows];
  const int64_t members = int64_t(group.outs.size()), rows = members * group.rank;
  int64_t outputs = 0;
  for (const int64_t out : group.outs) outputs += out;
  const auto halves = [](int64_t count, int64_t unit, const auto& work) {
    const int64_t middle = (count / 2 + unit - 1) / unit * unit;
    executorch::extension::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
      work(begin == 0 ? 0 : middle, end == 2 ? count : middle);
    });
  };
  halves(rows, 4, [&](int64_t begin, int64_t end) { kernels.down(group, h, begin, end); });
  for (int64_t j = 0; j < members; ++j) activate(h + j * group.rank, group.gate, group.recovery, group.rank);
  halves(outputs, 64, [&](int64_t begin, int64_t end) { kernels.up(group, h, begin, end); });
}

/// Copies the columns that belong to no member, or all of them when there is no rank.
void copy_rest(const Group& group, int64_t positions) {
  if (group.out == group.y) return;
  for (int64_t s = 0; s < positions; ++s) {
    int64_t begin = 0;
    for (size_t j = 0; j <= group.outs.size(); ++j) {
      const bool last = j == group.outs.size() || group.rank == 0;
      const int64_t end = last ? group.width : group.columns[j];
      const int64_t at = s * group.width + begin;
      std::memcpy(group.out + at, group.y + at, size_t(end - begin) * sizeof(float));
      if (last) break;
      begin = end + group.outs[j];
    }
  }
}

/// Members in ascending order, apart from each other and inside y; and as many rows as they read.
bool fits(const Group& group, int64_t offset, int64_t elements) {
  if (group.columns.size() != group.outs.size() || offset < 0) return false;
  int64_t end = 0, per_rank = offset + group.inputs * int64_t(group.outs.size());
  for (size_t j = 0; j < group.outs.size(); ++j) {
    if (group.columns[j] < end || group.outs[j] < 0) return false;
    end = group.columns[j] + group.outs[j];
    per_rank += group.outs[j];
  }
  return end <= group.width && group.rank * per_rank <= elements;
}

/// Of the group's rows.
int64_t bytes(const Group& group, bool half) {
  int64_t per_rank = group.inputs * int64_t(group.outs.size());
  for (const int64_t out : group.outs) per_rank += out;
  return per_rank * group.rank * int64_t(half ? sizeof(Half) : sizeof(float));
}

bool same_positions(const Tensor& x, const Tensor& y) {
  if (x.dim() < 1 || x.dim() != y.dim()) return false;
  for (int i = 0; i + 1 < x.dim(); ++i)
    if (x.size(i) != y.size(i)) return false;
  return true;
}

Tensor& slot_out(
    KernelRuntimeContext& context, const Tensor& x, const Tensor& y, const Tensor& rows, const Tensor& gate,
    const Tensor& recovery, int64_t offset, ArrayRef<int64_t> columns, ArrayRef<int64_t> outs, Tensor& out) {
  const bool half = rows.scalar_type() == ScalarType::Half;
  ET_KERNEL_CHECK(context, half || rows.scalar_type() == ScalarType::Float, InvalidArgument, out);
  for (const Tensor* tensor : {&x, &y, &gate, &recovery, static_cast<const Tensor*>(&out)})
    ET_KERNEL_CHECK(context, tensor->scalar_type() == ScalarType::Float, InvalidArgument, out);
  ET_KERNEL_CHECK(context, same_positions(x, y), InvalidArgument, out);
  ET_KERNEL_CHECK(context, gate.numel() == recovery.numel(), InvalidArgument, out);
  ET_KERNEL_CHECK(
      context, executorch::runtime::resize_tensor(out, y.sizes()) == executorch::runtime::Error::Ok, InvalidArgument,
      out);

  const int64_t inputs = x.size(x.dim() - 1), width = y.size(y.dim() - 1), rank = gate.numel();
  Group group{
      x.const_data_ptr<float>(), y.const_data_ptr<float>(), out.mutable_data_ptr<float>(), rows.const_data_ptr(),
      gate.const_data_ptr<float>(), recovery.const_data_ptr<float>(), inputs, width, rank, columns, outs};
  ET_KERNEL_CHECK(context, fits(group, offset, rows.numel()), InvalidArgument, out);
  group.rows = static_cast<const char*>(group.rows) + rank * offset * int64_t(half ? sizeof(Half) : sizeof(float));

  const int64_t positions = width > 0 ? y.numel() / width : 0;
  copy_rest(group, positions);
  if (rank == 0) return out;
  const Kernels kernels = half ? pick<Half>() : pick<float>();
  if (positions == 1 && rank * int64_t(outs.size()) <= most_rows && bytes(group, half) >= worth_two) {
    one_position(kernels, group);
    return out;
  }
  // A block is a multiple of every tile of positions, so that only the last positions are computed one by one.
  constexpr int64_t block = 8;
  const auto run = [&](int64_t begin, int64_t end) {
    kernels.slot(group, begin * block, end * block < positions ? end * block : positions);
  };
  if (positions < 2 * block)
    run(0, (positions + block - 1) / block);
  else
    executorch::extension::parallel_for(0, (positions + block - 1) / block, 1, run);
  return out;
}

EXECUTORCH_LIBRARY(calora, "slot.out", slot_out);

} // namespace
} // namespace calora
