// Codes of three values, five to a byte, out of 16 bytes: a byte over 3, 9, 27 and 81 is the high part of a product.
#pragma once

namespace fewbits {
namespace FEWBITS_ISA {
namespace ternary {

constexpr int64_t window_lanes = 4;  // lanes whose bytes lie in one window of a row
constexpr int64_t rows_at_once = 4, rows_of_tile = 2;

static inline uint8x16_t read_bytes(const uint8_t* row, const int32_t* bases, const uint8_t* order) {
  const uint8x16_t bytes = vqtbl1q_u8(vld1q_u8(row + bases[0]), vld1q_u8(order));
  return vminq_u8(bytes, vsubq_u8(bytes, vdupq_n_u8(243)));  // 243 less where that can be
}

// Every byte, below 243, over 3**Power, rounded down: times a number a little above 2**Shift / 3**Power, over 2**Shift.
template <int Power>
static inline uint8x16_t divided(uint8x16_t bytes) {
  if constexpr (Power == 0) {
    return bytes;
  } else {
    constexpr int by = Power == 1 ? 3 : Power == 2 ? 9 : Power == 3 ? 27 : 81, shift = Power == 4 ? 14 : 9, factor = (1 << shift) / by + 1;
    static_assert(factor < 256 && (factor * by - (1 << shift)) * 242 < 1 << shift, "a quotient would be off");
    const uint8x16_t times = vdupq_n_u8(static_cast<uint8_t>(factor));
    const uint16x8_t low = vmull_u8(vget_low_u8(bytes), vget_low_u8(times)), high = vmull_high_u8(bytes, times);
    return vshrq_n_u8(vuzp2q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high)), shift - 8);
  }
}

// One of the five codes of each byte: what is left over three.
template <int Place>
static inline int8x16_t take_trit(uint8x16_t bytes) {
  const uint8x16_t here = divided<Place>(bytes);
  if constexpr (Place == 4) return vreinterpretq_s8_u8(here);
  else return vreinterpretq_s8_u8(vmlsq_u8(here, divided<Place + 1>(bytes), vdupq_n_u8(3)));
}

template <int Place, int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void add_products(const uint8x16_t* bytes, const int8_t* digits, int32x4_t (*sum)[Rows][Vectors]) {
  int8x16_t code[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) code[r] = take_trit<Place>(bytes[r]);
#pragma GCC unroll 8
  for (int digit = 0; digit < Digits; ++digit) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int8x16_t input = vld1q_s8(digits + ((digit * 5 + Place) * Vectors + v) * 16);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[digit][r][v] = vdotq_s32(sum[digit][r][v], code[r], input);
    }
  }
}

// Sums of a block, lane by lane, in units of the inputs; `digits` lie [digit, trit, vector, 16], `starts` [vector, lanes].
template <int Digits, int Rows, int Vectors>
static inline __attribute__((always_inline)) void multiply_trits(const uint8_t* const* codes, const int32_t* bases, const uint8_t* order,
                                                                 const uint8_t* digits, const int32_t* starts, Floats (*found)[Vectors]) {
  uint8x16_t bytes[Rows];
  int32x4_t sum[Digits][Rows][Vectors] = {};
  const int8_t* inputs = reinterpret_cast<const int8_t*>(digits);
  for (int r = 0; r < Rows; ++r) bytes[r] = read_bytes(codes[r], bases, order);
  add_products<0, Digits, Rows, Vectors>(bytes, inputs, sum);
  add_products<1, Digits, Rows, Vectors>(bytes, inputs, sum);
  add_products<2, Digits, Rows, Vectors>(bytes, inputs, sum);
  add_products<3, Digits, Rows, Vectors>(bytes, inputs, sum);
  add_products<4, Digits, Rows, Vectors>(bytes, inputs, sum);
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < Vectors; ++v) {
      int32x4_t whole = sum[0][r][v];
      for (int digit = 1; digit < Digits; ++digit) whole = vaddq_s32(vshlq_n_s32(whole, 8), sum[digit][r][v]);
      found[r][v] = vcvtq_f32_s32(vaddq_s32(whole, vld1q_s32(starts + v * lanes)));
    }
  }
}

}  // namespace ternary
}  // namespace FEWBITS_ISA
}  // namespace fewbits
