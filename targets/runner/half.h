// fp16 on processors and compilers that may not know it.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace calora {

inline float from_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = half & 0x7fff;
  float value;
  uint32_t bits = sign | ((magnitude << 13) + ((127u - 15u) << 23));
  if (magnitude >= 0x7c00) bits = sign | 0x7f800000 | (magnitude << 13); // infinite, or no number
  std::memcpy(&value, &bits, sizeof value);
  if (magnitude >= 0x0400) return value;
  const float subnormal = float(magnitude) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

/// An fp16 number in memory.
struct Half {
  uint16_t bits;
  operator float() const { return from_half(bits); }
};

/// To the nearest; of two, to the even one.
inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00; // too large: infinite
  if (bits < 0x38800000) { // subnormal: counted in steps of 2^-24, rounded by the addition
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f; // whose last bit is 2^-24
    std::memcpy(&bits, &magnitude, sizeof bits);
    return sign | uint16_t(bits - 0x3f000000);
  }
  bits += 0x0fff + ((bits >> 13) & 1);
  return sign | uint16_t((bits - ((127u - 15u) << 23)) >> 13);
}

/// The bytes of numbers, as fp16 or as they are.
inline std::vector<char> packed(const std::vector<float>& values, bool half) {
  std::vector<char> bytes(values.size() * (half ? sizeof(Half) : sizeof(float)));
  if (!half && !values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
  for (size_t i = 0; half && i < values.size(); ++i) {
    const Half narrow{to_half(values[i])};
    std::memcpy(bytes.data() + i * sizeof narrow, &narrow, sizeof narrow);
  }
  return bytes;
}

} // namespace calora
