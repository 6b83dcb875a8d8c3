// The operators of our own for ONNX Runtime, domain `calora`, version 1:
//
//   Slot     x, down, recovery?, up_0, up_1?, up_2?, y_0, y_1?, y_2? → out_0, out_1?, out_2?
//            What adapters add to up to three linears that share x (targets/runner/operators.h). Every linear has a y of
//            its own, or they are columns of y_0, from left to right.
//   SlotGlu  x, down, recovery?, up_0, up_1, y → out, sum
//            The same for two linears that are the halves of y; then out = silu(left half) · right half, the gated linear
//            unit of a Llama's MLP. sum is y with the slots' part, which nobody needs.
//
//   y_j is written over, so no other node may read it.
//
//   x [batch, positions, in], down [linears · rank, in], recovery [rank], up_j [rank, outs_j], y_j [batch, positions, …];
//   down and up are fp16 or fp32, everything else fp32.
#pragma once

#include "ort.h"

namespace calora::ort {

/// Makes sessions with these options know the operators. Null, or why the library refuses.
Status* register_kernels(const Api& api, SessionOptions* options);

} // namespace calora::ort
