#pragma once

#include <cstring>

inline unsigned short __float2bfloat16_rn(float value) {  // its bits
  unsigned bits;
  memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline unsigned short __bfloat16_as_ushort(unsigned short bits) { return bits; }
