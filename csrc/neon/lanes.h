// Four lanes of 32 bits: NEON, which every 64-bit ARM processor has.
#pragma once
#include <arm_neon.h>

#include "../numbers.h"

namespace fewbits {
namespace FEWBITS_ISA {

constexpr int lanes = 4;
typedef float Floats __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(16)));

static inline Floats zeros() { return Floats{}; }
static inline Floats load(const float* from) { return vld1q_f32(from); }
static inline void store(float* to, Floats value) { vst1q_f32(to, value); }
static inline Floats spread(float value) { return vdupq_n_f32(value); }
static inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
static inline Floats multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
static inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
static inline float sum(Floats value) { return vaddvq_f32(value); }

// The sums of four vectors' lanes.
static inline void sum_four(Floats a, Floats b, Floats c, Floats d, float* to) { vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }

// Lanes change their signs where a bit of `minus` is set: the highest of the four lowest for the first lane.
static inline Floats flip(Floats value, uint32_t minus) {
  const Words all = vshlq_u32(vdupq_n_u32(minus), int32x4_t{28, 29, 30, 31});
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(value), vandq_u32(all, vdupq_n_u32(0x80000000u))));
}

// The four bytes of each of `numbers` in a table of floats.
static inline uint8x16_t bytes_of(Words numbers) {
  return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100u), numbers, vdupq_n_u32(0x04040404u)));
}

// Lane i takes from[pick[i]], 0 <= pick[i] < 4.
static inline Floats permute(const float* from, const int32_t* pick) {
  return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(from)), bytes_of(vreinterpretq_u32_s32(vld1q_s32(pick)))));
}

// Up to 4 numbers of 2 bytes; `half` says of which kind.
static inline Floats few_numbers(const uint16_t* from, int64_t count, bool half) {
  uint16_t few[4] = {};
  if (count < 4) for (int64_t i = 0; i < count; ++i) few[i] = from[i];
  const uint16x4_t bits = vld1_u16(count < 4 ? few : from);
  return half ? vcvt_f32_f16(vreinterpret_f16_u16(bits)) : vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

// How 4 packed codes come to lie in lanes.
struct Unpacker {
  int32x4_t shift;
  uint32x4_t mask;
  int bits;

  explicit Unpacker(int width) : shift(vmulq_n_s32(int32x4_t{0, -1, -2, -3}, width)), mask(vdupq_n_u32((1u << width) - 1)), bits(width) {}

  // Up to 4 codes from place `at` on, a multiple of 4.
  Floats take(const uint8_t* row, int64_t at, int64_t count) const {
    uint64_t word = 0;
    const int64_t first = at * bits, last = (first + (count < 4 ? count : 4) * bits + 7) / 8;
    for (int64_t byte = first / 8; byte < last; ++byte) word |= static_cast<uint64_t>(row[byte]) << (8 * (byte - first / 8));
    return vcvtq_f32_u32(vandq_u32(vshlq_u32(vdupq_n_u32(static_cast<uint32_t>(word >> (first % 8))), shift), mask));
  }
};

static inline void halves_to_floats(const uint16_t* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) store(to + i, few_numbers(from + i, 4, true));
  for (; i < count; ++i) to[i] = half_to_float(from[i]);
}

// Packed codes of a row as numbers; `bytes` has room for them, one to a byte.
static inline void codes_to_floats(const uint8_t* from, int bits, int64_t count, float* to, uint8_t* bytes) {
  unpack(from, bits, count, bytes);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const uint16x8_t wide = vmovl_u8(vld1_u8(bytes + i));
    store(to + i, vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide))));
    store(to + i + 4, vcvtq_f32_u32(vmovl_high_u16(wide)));
  }
  for (; i < count; ++i) to[i] = static_cast<float>(bytes[i]);
}

// Inputs times `factor`, rounded to whole numbers; `count` is a multiple of the lanes.
static inline void to_integers(const float* from, int64_t count, float factor, int32_t* to) {
  for (int64_t i = 0; i < count; i += 4) vst1q_s32(to + i, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(from + i), factor)));
}

// The codes of a lane's columns from bit 0 of its word on. Reads 16 bytes.
template <int Bits>
static inline Words words(const uint8_t* from) {
  constexpr int width = Bits * (Bits <= 4 ? 8 : 4);  // bits that a lane takes
  const uint8x16_t all = vld1q_u8(from);
  if constexpr (width == 32) {
    return vreinterpretq_u32_u8(all);
  } else {
    constexpr uint8_t o1 = width / 8, o2 = width * 2 / 8, o3 = width * 3 / 8;
    const uint8x16_t order = {0, 1, 2, 3, o1, o1 + 1, o1 + 2, o1 + 3, o2, o2 + 1, o2 + 2, o2 + 3, o3, o3 + 1, o3 + 2, o3 + 3};
    const uint32x4_t placed = vreinterpretq_u32_u8(vqtbl1q_u8(all, order));
    if constexpr (width % 8 != 0) return vshlq_u32(placed, int32x4_t{0, -4, 0, -4});
    return placed;
  }
}

// The code of a lane's column `Index` as a number, times 2**(Bits * Index) but for the last column.
template <int Bits, int Index>
static inline Floats field(Words word) {
  constexpr int last = Bits <= 4 ? 7 : 3;
  constexpr uint32_t mask = (uint32_t{1} << Bits) - 1;
  if constexpr (Index < last) return vcvtq_f32_u32(vandq_u32(word, vdupq_n_u32(mask << (Bits * Index))));
  else if constexpr (Bits * (last + 1) == 32) return vcvtq_f32_u32(vshrq_n_u32(word, Bits * Index));
  else return vcvtq_f32_u32(vandq_u32(vshrq_n_u32(word, Bits * Index), vdupq_n_u32(mask)));
}

// A codebook of up to 32 levels in registers, four in each; a larger one in the cache.
template <int Bits>
struct Book {
  static constexpr int parts = Bits <= 2 ? 1 : Bits <= 5 ? 1 << (Bits - 2) : 0;
  uint8x16_t levels[parts > 0 ? parts : 1];
  const float* wide;
};

template <int Bits>
static inline Book<Bits> load_book(const float* levels) {
  Book<Bits> book{};
  book.wide = levels;
  for (int part = 0; part < Book<Bits>::parts; ++part) book.levels[part] = vreinterpretq_u8_f32(vld1q_f32(levels + 4 * part));
  return book;
}

template <int Bits, int Index>
static inline Floats look_up(Words word, const Book<Bits>& book) {
  const Words code = (word >> (Bits * Index)) & ((1u << Bits) - 1);
  const uint8x16_t* levels = book.levels;
  uint8x16_t found;
  if constexpr (Bits > 5) return Floats{book.wide[code[0]], book.wide[code[1]], book.wide[code[2]], book.wide[code[3]]};
  else if constexpr (Bits <= 2) found = vqtbl1q_u8(levels[0], bytes_of(code));
  else if constexpr (Bits == 3) found = vqtbl2q_u8({{levels[0], levels[1]}}, bytes_of(code));
  else found = vqtbl4q_u8({{levels[0], levels[1], levels[2], levels[3]}}, bytes_of(code));  // 0 where a code is above 15
  if constexpr (Bits == 5) {
    const uint8x16_t above = vsubq_u8(bytes_of(code), vdupq_n_u8(64));
    found = vqtbx4q_u8(found, {{levels[4], levels[5], levels[6], levels[7]}}, above);  // as found where a code is below 16
  }
  return vreinterpretq_f32_u8(found);
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
