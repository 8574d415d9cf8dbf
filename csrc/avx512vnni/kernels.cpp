#define FEWBITS_ISA avx512vnni
#include "../avx512/lanes.h"

#include "bytes.h"
#include "trits.h"
#define FEWBITS_FIXED

#include "../chosen.h"

namespace fewbits {
const Kernels& avx512vnni_kernels() {
  static constexpr Kernels kernels = avx512vnni::make_kernels("avx512vnni");
  return kernels;
}
}  // namespace fewbits
