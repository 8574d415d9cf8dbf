#define FEWBITS_ISA avx512vnni
#include "../avx512/lanes.h"

#include "bytes.h"
#include "trits.h"
#define FEWBITS_FIXED
#define FEWBITS_LINES "avx512vnni/lines.h"
#define FEWBITS_TABLES

#include "../chosen.h"

namespace fewbits {
const Panels* avx512vnni_panels(const Product&);
const GramKernels& avx512bf16_gram();

namespace {

const GramKernels* find_gram(Number number) {
#ifdef FEWBITS_AVX512BF16
  if (number == Number::bf16 && __builtin_cpu_supports("avx512bf16")) return &avx512bf16_gram();
#endif
  return avx512vnni::chosen::find_gram(number);
}

}  // namespace

const Kernels& avx512vnni_kernels() {
  static constexpr Kernels kernels = avx512vnni::make_kernels("avx512vnni", avx512vnni_panels, find_gram);
  return kernels;
}
}  // namespace fewbits
