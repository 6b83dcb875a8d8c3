// The exponential function, for loops that become vectors.

/// exp(x) for x ≤ 0 within 2 ulp, 0 below -87. Branch-free, so that a loop of it becomes vectors.
CALORA_INLINE float exponential(float x) {
  constexpr float round = 12582912.0f; // 1.5 · 2²³: adding it leaves an integer in the last bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = (clamped * 1.44269504f + round) - round;
  const float f = (clamped - n * 0.693359375f) + n * 2.12194440e-4f; // x - n · ln 2, ln 2 in two parts
  float sum = 1.9875691500e-4f; // Cephes, expf
  sum = sum * f + 1.3981999507e-3f;
  sum = sum * f + 8.3334519073e-3f;
  sum = sum * f + 4.1665795894e-2f;
  sum = sum * f + 1.6666665459e-1f;
  sum = sum * f + 5.0000001201e-1f;
  const float mantissa = sum * f * f + f + 1.0f;
  const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : mantissa * power;
}
