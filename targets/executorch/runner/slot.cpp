// calora::slot.out: what the adapters add to a group of linears that share an input (operators.h), as one matrix y
// [positions, width] whose columns belong to some members.
#include "operators.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <array>
#include <cstring>

namespace calora {
namespace {

using executorch::aten::ArrayRef;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

constexpr size_t most_members = 8;

void run(void*, void (*task)(void*, size_t), size_t count, void* data) {
  executorch::extension::parallel_for(0, int64_t(count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(data, size_t(i));
  });
}

/// Where the members lie: columns [positions, outs[j]] of y from columns[j] on.
struct Columns {
  ArrayRef<int64_t> begin, outs;
  int64_t width;

  /// In ascending order, apart from each other and inside y.
  bool fit() const {
    if (begin.size() != outs.size() || outs.size() > most_members) return false;
    int64_t end = 0;
    for (size_t j = 0; j < outs.size(); ++j) {
      if (begin[j] < end || outs[j] < 0) return false;
      end = begin[j] + outs[j];
    }
    return end <= width;
  }

  int64_t outputs() const {
    int64_t sum = 0;
    for (const int64_t out : outs) sum += out;
    return sum;
  }

  /// The columns that belong to no member.
  void copy_rest(const float* y, float* out, int64_t positions) const {
    for (int64_t s = 0; out != y && s < positions; ++s, y += width, out += width) {
      int64_t from = 0;
      for (size_t j = 0; j <= outs.size(); ++j) {
        const int64_t to = j == outs.size() ? width : begin[j];
        std::memcpy(out + from, y + from, size_t(to - from) * sizeof(float));
        if (j < outs.size()) from = to + outs[j];
      }
    }
  }
};

bool same_positions(const Tensor& x, const Tensor& y) {
  if (x.dim() < 1 || x.dim() != y.dim()) return false;
  for (int i = 0; i + 1 < x.dim(); ++i)
    if (x.size(i) != y.size(i)) return false;
  return true;
}

Tensor& slot_out(
    KernelRuntimeContext& context, const Tensor& x, const Tensor& y, const Tensor& rows, const Tensor& gate,
    const Tensor& recovery, int64_t offset, ArrayRef<int64_t> begin, ArrayRef<int64_t> outs, Tensor& out) {
  const bool half = rows.scalar_type() == ScalarType::Half;
  ET_KERNEL_CHECK(context, half || rows.scalar_type() == ScalarType::Float, InvalidArgument, out);
  for (const Tensor* tensor : {&x, &y, &gate, &recovery, static_cast<const Tensor*>(&out)})
    ET_KERNEL_CHECK(context, tensor->scalar_type() == ScalarType::Float, InvalidArgument, out);
  ET_KERNEL_CHECK(context, same_positions(x, y), InvalidArgument, out);
  ET_KERNEL_CHECK(
      context, executorch::runtime::resize_tensor(out, y.sizes()) == executorch::runtime::Error::Ok, InvalidArgument,
      out);

  const int64_t inputs = x.size(x.dim() - 1), width = y.size(y.dim() - 1), rank = recovery.numel();
  const int64_t count = int64_t(outs.size()), positions = width > 0 ? y.numel() / width : 0;
  const bool shared = gate.numel() == rank; // else each position has its own
  ET_KERNEL_CHECK(context, shared || gate.numel() == positions * rank, InvalidArgument, out);
  const Columns columns{begin, outs, width};
  ET_KERNEL_CHECK(context, columns.fit() && offset >= 0, InvalidArgument, out);
  const int64_t needed = rank * (offset + inputs * count + columns.outputs());
  ET_KERNEL_CHECK(context, needed <= rows.numel(), InvalidArgument, out);

  const int64_t bytes = half ? 2 : 4;
  const char* const down = static_cast<const char*>(rows.const_data_ptr()) + rank * offset * bytes;
  const char* up = down + rank * inputs * count * bytes;
  const float* const from = y.const_data_ptr<float>();
  float* const to = out.mutable_data_ptr<float>();
  std::array<Member, most_members> members;
  for (size_t j = 0; j < outs.size(); up += rank * outs[j] * bytes, ++j)
    members[j] = {up, nullptr, nullptr, from + begin[j], to + begin[j], outs[j], width};
  columns.copy_rest(from, to, positions);
  const Group group{
      x.const_data_ptr<float>(), down, gate.const_data_ptr<float>(), recovery.const_data_ptr<float>(),
      inputs, rank, members.data(), count, half ? Rows::fp16 : Rows::fp32, shared ? 0 : rank};
  add_slots(group, positions, {nullptr, run});
  return out;
}

EXECUTORCH_LIBRARY(calora, "slot.out", slot_out);

} // namespace
} // namespace calora
