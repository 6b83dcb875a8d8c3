// What the operators of our own compute, on a runtime's own threads. Foremost what adapters add to linears that share
// an input, the slots of a group:
//
//   h_j = gate · act(x · down_jᵀ)   out_j = y_j + h_j · up_j   act: exact GELU on recovery rows
//
// int8 rows have a scale each.
//
// Rows stay where they are, in the mapped adapter file: nothing is packed, converted ahead or copied. With one position
// this is as fast as memory delivers the rows; with many, blocks of positions are spread over threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace calora {

enum class Rows { fp32, fp16, int8 };

/// One linear: up [rank, outputs]; y and out [positions, outputs], whose positions lie `stride` floats apart, may be
/// one.
struct Member {
  const void* up;
  const float *down_scale, *up_scale; // [rank] each for int8, else null
  const float* y;
  float* out;
  int64_t outputs, stride;
};

/// The linears of one x [positions, inputs]: down [count · rank, inputs], member below member; gate and recovery
/// [rank], or null for ones and for none; own: from one position's gates to the next's, 0 where they share them.
struct Group {
  const float* x;
  const void* down;
  const float *gate, *recovery;
  int64_t inputs, rank;
  const Member* members;
  int64_t count;
  Rows type; // of down and all up
  int64_t own = 0;
};

/// A runtime's thread pool: calls task(data, i) for every i < count and returns when all are done.
struct Threads {
  void* pool;
  void (*run)(void* pool, void (*task)(void* data, size_t i), size_t count, void* data);
};

/// Every out of the group. A position has the same bits whatever the others and the threads are.
void add_slots(const Group& group, int64_t positions, const Threads& threads);

/// sum += skip, and out = sum / √(mean(sum²) + epsilon) · weight, for sum, skip and out [positions, width]. Zhang and
/// Sennrich, arXiv:1910.07467.
struct Norm {
  const float *skip, *weight;
  float* out;
  float epsilon;
};
void add_and_norm(const Norm& norm, float* sum, int64_t width, int64_t positions, const Threads& threads);

/// out[s, i] = silu(y[s, i]) · y[s, width + i], for y [positions, 2 · width]. Shazeer, arXiv:2002.05202.
void gate_linear_units(const float* y, float* out, int64_t width, int64_t positions, const Threads& threads);

} // namespace calora
