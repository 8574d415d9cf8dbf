#define FEWBITS_ISA avx512vnni
#include "../avx512/lanes.h"

#include "bytes.h"
#include "trits.h"
#define FEWBITS_FIXED
#define FEWBITS_LINES

#include "../chosen.h"

namespace fewbits {
const Panels* avx512vnni_panels(const Product&);

const Kernels& avx512vnni_kernels() {
  static constexpr Kernels kernels = avx512vnni::make_kernels("avx512vnni", avx512vnni_panels);
  return kernels;
}
}  // namespace fewbits
