// Compiles CALORA_KERNEL, a header on the include path, once per instruction set: in namespace baseline and, for x86-64,
// in avx2 and avx512 too, since the library must run on every one and picks at run time. lanes.h comes before.
#if defined(__x86_64__)
namespace avx2 {
CALORA_TARGET(CALORA_AVX2)
using Lanes = Avx2;
#include "tiles.h"
#include "exponential.h"
#include CALORA_KERNEL
CALORA_TARGET_END
} // namespace avx2

namespace avx512 {
CALORA_TARGET(CALORA_AVX512)
using Lanes = Avx512;
#include "tiles.h"
#include "exponential.h"
#include CALORA_KERNEL
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
#include "exponential.h"
#include CALORA_KERNEL
} // namespace baseline
