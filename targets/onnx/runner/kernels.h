// The operators of our own for ONNX Runtime, domain `calora`, version 1:
//
//   Slot      x, rows, scales?, recovery?, gate?, y_0, y_1?, y_2? → out_0, …
//             What adapters add to up to three linears that share x (targets/runner/operators.h). Every linear has a
//             y of its own, or they are columns of y_0, from left to right.
//   SlotGlu   the same inputs → out, sum
//             The same for two linears that are the halves of y_0; then out = silu(left half) · right half, the gated
//             linear unit of a Llama's MLP. sum is y_0 with the slots' part, which nobody needs.
//   SlotNorm  the same inputs, skip, weight, epsilon → norm, sum
//             The same for one linear; then sum is that and skip, the residual, and norm = sum / √(mean(sum²) +
//             epsilon) · weight, the norm before what comes next.
//
//   y_j is written over, so no other node may read it.
//
//   x [batch, positions, in], gate [batch, positions, R], y_j [batch, positions, …], skip as y_0, weight [outs_0],
//   epsilon [1]. rows [R · width] holds the matrices of all slots of a graph, one after the other, in fp32, fp16 or
//   int8; int8 rows have a scale each: scales [R · matrices]. recovery is [R]; everything but rows is fp32.
//
// Attributes: outs, the linears' outputs; width and matrices, of all slots; offset and first, of the matrices before
// this node's. These are down_j [R, in] for every linear, then up_j [R, outs_j].
#pragma once

#include "ort.h"

namespace calora::ort {

/// Makes sessions with these options know the operators. Null, or why the library refuses.
Status* register_kernels(const ApiBase& base, SessionOptions* options);

} // namespace calora::ort
