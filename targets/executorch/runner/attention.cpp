// llama::update_cache.out and llama::custom_sdpa.out, which ExecuTorch's LLM frameworks bring and its C++ SDK lacks.
// Same schemas and results; fp32, [B, S, H, D] and caches [B, context, KV, D]. They are linked into programs and not
// into libcalora_kernels: where the framework's are loaded too, the second registration would abort.
#include "lanes.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/thread_parallel_interface.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

namespace calora {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::KernelRuntimeContext;

/// Rows of one head, or the heads that share keys at one position; q and out have the same `stride` between rows.
/// Row i sees keys 0 … first_visible + i · grows - 1.
struct Queries {
  const float *q, *k, *v, *mask;
  float* out;
  int64_t count, depth, stride, key_stride, mask_stride, first_visible, grows;
  float scale;

  int64_t visible(int64_t row) const { return first_visible + row * grows; }
};

struct Softmax {
  float maximum = -INFINITY, sum = 0.0f;
};

#define CALORA_KERNEL "attention_kernel.h"
#include "instruction_sets.h"

void attend(const Queries& queries) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return avx512::attend(queries);
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::attend(queries);
#endif
  baseline::attend(queries);
}

bool is_float4(const Tensor& tensor) {
  return tensor.dim() == 4 && tensor.scalar_type() == ScalarType::Float &&
      executorch::runtime::is_contiguous_dim_order(tensor.dim_order().data(), 4);
}

Tensor& update_cache_out(
    KernelRuntimeContext& context, const Tensor& value, Tensor& cache, int64_t start, Tensor& out) {
  ET_KERNEL_CHECK(context, is_float4(value) && is_float4(cache), InvalidArgument, out);
  for (int dim : {0, 2, 3}) ET_KERNEL_CHECK(context, value.size(dim) == cache.size(dim), InvalidArgument, out);
  ET_KERNEL_CHECK(context, start >= 0 && start + value.size(1) <= cache.size(1), InvalidArgument, out);
  const int64_t position = cache.size(2) * cache.size(3), length = value.size(1) * position;
  for (int64_t b = 0; b < value.size(0); ++b)
    std::memcpy(
        cache.mutable_data_ptr<float>() + (b * cache.size(1) + start) * position,
        value.const_data_ptr<float>() + b * length, size_t(length) * sizeof(float));
  return out; // a placeholder of the schema that nobody reads
}

Tensor& custom_sdpa_out(
    KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v, int64_t start,
    const std::optional<Tensor>& mask, double /* dropout */, bool causal, std::optional<double> scale, Tensor& out) {
  for (const Tensor* tensor : {&q, &k, &v}) ET_KERNEL_CHECK(context, is_float4(*tensor), InvalidArgument, out);
  ET_KERNEL_CHECK(context, executorch::runtime::tensors_have_same_shape(k, v), InvalidArgument, out);
  const int64_t length = q.size(1), heads = q.size(2), depth = q.size(3), kv_heads = k.size(2);
  ET_KERNEL_CHECK(
      context, q.size(0) == k.size(0) && depth == k.size(3) && kv_heads > 0 && heads % kv_heads == 0, InvalidArgument,
      out);
  const int64_t keys = mask ? k.size(1) : start + length;
  ET_KERNEL_CHECK(context, start >= 0 && keys <= k.size(1) && !(mask && causal), InvalidArgument, out);
  if (mask) {
    const bool fits = mask->dim() == 2 && mask->size(0) == length && mask->size(1) == keys;
    ET_KERNEL_CHECK(context, fits && mask->scalar_type() == ScalarType::Float, InvalidArgument, out);
  }
  ET_KERNEL_CHECK(
      context, executorch::runtime::resize_tensor(out, q.sizes()) == executorch::runtime::Error::Ok, InvalidArgument,
      out);

  Queries all{};
  all.mask = mask ? mask->const_data_ptr<float>() : nullptr;
  all.depth = depth;
  all.key_stride = kv_heads * depth;
  all.scale = scale ? float(*scale) : 1.0f / std::sqrt(float(depth));
  const int64_t shared = heads / kv_heads;
  /// The rows that begin at one position and head, and the keys that this head reads.
  const auto rows = [&](int64_t batch, int64_t position, int64_t head) {
    const int64_t at = ((batch * length + position) * heads + head) * depth;
    const int64_t cached = (batch * k.size(1) * kv_heads + head / shared) * depth;
    Queries queries = all;
    queries.q = q.const_data_ptr<float>() + at;
    queries.out = out.mutable_data_ptr<float>() + at;
    queries.k = k.const_data_ptr<float>() + cached;
    queries.v = v.const_data_ptr<float>() + cached;
    queries.first_visible = causal ? start + position + 1 : keys;
    if (mask) queries.mask += position * keys;
    return queries;
  };
  // Work worth waking a thread for, in multiplications.
  constexpr int64_t worth = 1 << 17;
  const auto grain = [&](int64_t rows_each) { return std::max<int64_t>(1, worth / (2 * rows_each * keys * depth)); };
  if (length == 1) { // the heads that share keys go together, so that these are read once
    executorch::extension::parallel_for(
        0, q.size(0) * kv_heads, grain(shared), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            Queries queries = rows(i / kv_heads, 0, i % kv_heads * shared);
            queries.count = shared;
            queries.stride = depth;
            attend(queries);
          }
        });
    return out;
  }
  constexpr int64_t block = 16;
  const int64_t blocks = (length + block - 1) / block;
  executorch::extension::parallel_for(
      0, q.size(0) * heads * blocks, grain(block), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t position = i % blocks * block, head = i / blocks;
          Queries queries = rows(head / heads, position, head % heads);
          queries.count = std::min(block, length - position);
          queries.stride = heads * depth;
          queries.mask_stride = keys;
          queries.grows = causal ? 1 : 0;
          attend(queries);
        }
      });
  return out;
}

EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache_out);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa_out);

} // namespace
} // namespace calora
