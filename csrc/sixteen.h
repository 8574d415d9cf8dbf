// Scales, zero points and offsets of sixteen rows side by side, group by group. Included by one instruction set at a time.
#pragma once
#include "grid.h"

namespace fewbits {
namespace FEWBITS_ISA {

// Words `[16, stride]` to `[count, apart]`, the sixteen at the beginning of each; `count` is a multiple of 16.
static void transpose_words(const uint32_t* from, int64_t stride, int64_t count, uint32_t* to, int64_t apart);

static inline int64_t padded_groups(const Coded& w) { return rounded_up(w.groups, 16); }

// What an instruction set reads in a way of its own, to the same places: whether it did.
template <class Row>
static bool read_faster(const Values& values, const Row& row, float* to, float* room, int64_t stride);

// Floats that `read_sixteen` needs.
static inline int64_t sixteen_room(const Coded& w) { return 16 * (padded_groups(w) + lanes) + decode_floats(w); }

// Scales, zero points or offsets of sixteen rows, `[padded groups, 16]`, a row a lane; `stride` floats from a group to the next.
template <class Row>
static void read_sixteen(const Coded& w, const Values& values, const Row& row, float* to, float* room, int64_t stride = 16) {
  if (read_faster(values, row, to, room, stride)) return;
  const int64_t groups = padded_groups(w);
  for (int64_t r = 0; r < 16; ++r) {
    read_values(values, w.bits, row(r), room + r * groups, room + 16 * groups);
    for (int64_t g = w.groups; g < groups; ++g) room[r * groups + g] = 0.0f;
  }
  transpose_words(reinterpret_cast<const uint32_t*>(room), groups, groups, reinterpret_cast<uint32_t*>(to), stride);
}

}  // namespace FEWBITS_ISA
}  // namespace fewbits
