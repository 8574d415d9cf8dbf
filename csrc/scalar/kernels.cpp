#define FEWBITS_ISA scalar
#include "lanes.h"

#include "../chosen.h"

namespace fewbits {
const Kernels& scalar_kernels() {
  static constexpr Kernels kernels = scalar::make_kernels("scalar");
  return kernels;
}
}  // namespace fewbits
