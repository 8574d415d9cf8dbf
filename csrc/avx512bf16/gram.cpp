// Products of pairs of bfloat16 for processors that multiply them; `avx512vnni` takes them there.
#define FEWBITS_ISA avx512bf16
#include "../avx512/lanes.h"

#include "../gram.h"

namespace fewbits {
namespace avx512bf16 {
namespace gram {
namespace {

// A word is the bfloat16 of two tokens; that of a last odd one is beside a zero.
struct Pairs {
  static constexpr int64_t per_word = 2;
  static inline Floats add(Floats sums, uint32_t a, const uint32_t* b) {
    const __m512i one = _mm512_set1_epi32(static_cast<int>(a)), other = _mm512_loadu_si512(b);
    return reinterpret_cast<Floats>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), reinterpret_cast<__m512bh>(one), reinterpret_cast<__m512bh>(other)));
  }
  static inline void pack(const Gram& gram, int64_t token, int64_t feature, int64_t count, uint32_t* to) {
    const uint16_t* from = static_cast<const uint16_t*>(gram.inputs) + token * gram.features + feature;
    const bool two = token + 1 < gram.tokens;
    for (int64_t i = 0; i < count; ++i) to[i] = from[i] | (two ? static_cast<uint32_t>(from[i + gram.features]) << 16 : 0);
  }
};

}  // namespace
}  // namespace gram
}  // namespace avx512bf16

const GramKernels& avx512bf16_gram() {
  static constexpr GramKernels made = avx512bf16::gram::make_kernels<avx512bf16::gram::Pairs>();
  return made;
}

}  // namespace fewbits
