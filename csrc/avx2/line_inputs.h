// How inputs meet codes that lie in lines, with AVX2, and in which order they lie: bytes with bytes, or 16 bits with 16 bits.
//
// Up to four bits, codes are bytes that are multiplied with digits of 8 bits and summed in 16 bits as often as those hold. Codes of eight are 16 bits,
// and so are inputs then: whole where they have two digits, in halves of 12 bits where they have three. Levels are whole numbers of 16 bits, which
// meet digits of 8 bits; where inputs have three digits, both are halves of 12 bits.
#pragma once
#include "../lines_parts.h"

namespace fewbits {
namespace FEWBITS_ISA {
namespace lines {

struct Form {
  bool bytes, looked;
  int parts, planes;  // of an input, of a level
  int part_bits;      // from one part to the next
  int words;          // of four inputs
};

constexpr Form form_of(int bits, int digits, bool looked) {
  const bool bytes = !looked && bits <= 4, whole = digits == 1 || (digits == 2 && !looked);
  const int parts = bytes ? digits : whole ? 1 : 2;
  return {bytes, looked, parts, looked && digits == 3 ? 2 : 1, bytes || digits < 3 ? 8 : 12, bytes ? parts : 2 * parts};
}

static inline Form form_of(const Product& product) {
  return form_of(product.matrix->bits, product.digits, product.matrix->levels.kind != Values::none);
}

template <int Bits, int Digits, bool Looked>
struct Shape {
  static constexpr Form form = form_of(Bits, Digits, Looked);
  static constexpr bool bytes = form.bytes;
  static constexpr int parts = form.parts, planes = form.planes, words = form.words;
  static constexpr int sums = parts + planes - 1;      // of products of the same weight
  static constexpr int sides = Looked ? 2 : 1;         // a row's sum is in two lanes of one register of two
  static constexpr int most = bytes ? 32767 / (256 * ((1 << Bits) - 1)) : 1;  // products, by twos, that 16 bits hold the sum of
  static constexpr int runs = most >= 64 ? 8 : most >= 32 ? 4 : most >= 16 ? 2 : 1;  // whose products are summed so
  // Columns whose products are summed in 32 bits. Those of four columns come to 2**25 where inputs are whole, to 2**22 where they are halves, and
  // to 2**24 where levels are looked up.
  static constexpr int64_t longest = bytes ? 1 << 14 : Looked ? 256 : parts == 1 ? 128 : 1 << 11;
};

static int64_t words_of_four(const Product& product) { return form_of(product).words; }

// Part `part` of the numbers of a run, the highest first. All parts have a sign.
static void cut(const int32_t* numbers, const Form& form, int part, uint8_t* to) {
  constexpr uint32_t middle = 0x808080;  // of every digit: what makes them signed
  const int shift = 8 * (form.parts - 1 - part);
  for (int64_t c = 0; c < run; ++c) to[c] = static_cast<uint8_t>(((static_cast<uint32_t>(numbers[c]) + middle) ^ middle) >> shift);
}

static void cut(const int32_t* numbers, const Form& form, int part, int16_t* to) {
  const int bits = form.part_bits, half = 1 << (bits - 1);
  for (int64_t c = 0; c < run; ++c) {
    const int high = (numbers[c] + half) >> bits;
    to[c] = static_cast<int16_t>(form.parts == 1 ? numbers[c] : part == 0 ? high : numbers[c] - high * 2 * half);
  }
}

// A run's numbers, four after four in the order of `places`, a vector's words `stride` apart: those of levels by twos.
template <class Item>
static void lay_out_run(const int32_t* numbers, const Form& form, const uint8_t* places, int64_t stride, int32_t* to) {
  const int64_t first = form.looked ? 2 * stride : stride, second = form.looked ? 1 : form.parts * stride;
  for (int part = 0; part < form.parts; ++part) {
    Item items[run];
    cut(numbers, form, part, items);
    for (int k = 0; k < 8; ++k) {
      Item four[4];
      for (int j = 0; j < 4; ++j) four[j] = items[places[4 * k + j]];
      int32_t* word = to + k * form.words * stride + part * first;
      std::memcpy(word, four, 4);
      if constexpr (sizeof(Item) == 2) std::memcpy(word + second, four + 2, 4);
    }
  }
}

static void lay_out(const Product& product, const int32_t* numbers, int64_t tile, int64_t in_tile, int32_t* to) {
  const Coded& w = *product.matrix;
  const Form form = form_of(product);
  constexpr int by_twos[4] = {0, 2, 1, 3};  // the first and third codes of 16 bits are in one register
  uint8_t places[run];
  for (int i = 0; i < run; ++i) places[i] = static_cast<uint8_t>(column_of(w.bits, i / 4, form.bytes || form.looked ? i % 4 : by_twos[i % 4]));
  to += form.looked ? 2 * in_tile : in_tile;
  for (int64_t c = 0; c < w.columns; c += run, to += 8 * form.words * tile) {
    if (form.bytes) lay_out_run<uint8_t>(numbers + c, form, places, tile, to);
    else lay_out_run<int16_t>(numbers + c, form, places, tile, to);
  }
}

static float left_out_of(const Product&, const Levels&, const int32_t*, int64_t) { return 0.0f; }  // nothing is

}  // namespace lines
}  // namespace FEWBITS_ISA
}  // namespace fewbits
