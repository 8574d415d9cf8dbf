// Numbers of a type that is known when loops are compiled: reading, rounding, writing. Included after FEWBITS_ISA was defined.
#pragma once
#include <type_traits>

#include "numbers.h"

namespace fewbits {
namespace FEWBITS_ISA {

template <Number Is>
using Type = std::integral_constant<Number, Is>;

// Calls a function with the type of `number`.
template <typename Function>
static inline void for_number(Number number, Function function) {
  if (number == Number::f32) function(Type<Number::f32>{});
  else if (number == Number::f16) function(Type<Number::f16>{});
  else function(Type<Number::bf16>{});
}

template <Number Is>
static inline float read_number(Type<Is>, const void* data, int64_t at) {
  if constexpr (Is == Number::f32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  if constexpr (Is == Number::f16) return half_to_float(bits);
  return as_float(static_cast<uint32_t>(bits) << 16);
}

template <Number Is>
static inline void write_number(Type<Is>, float value, void* data, int64_t at) {
  if constexpr (Is == Number::f32) static_cast<float*>(data)[at] = value;
  else if constexpr (Is == Number::f16) static_cast<uint16_t*>(data)[at] = float_to_half(value);
  else static_cast<uint16_t*>(data)[at] = float_to_bf16(value);
}

// A float as it is read again after it was written.
template <Number Is>
static inline float rounded(Type<Is>, float value) {
  if constexpr (Is == Number::f32) return value;
  else if constexpr (Is == Number::f16) return half_to_float(float_to_half(value));
  else return as_float(static_cast<uint32_t>(float_to_bf16(value)) << 16);
}

template <Number Is>
static inline void write_numbers(Type<Is> type, const float* values, int64_t count, void* data, int64_t at) {
  for (int64_t i = 0; i < count; ++i) write_number(type, values[i], data, at + i);
}

// Adds numbers of another type, which are rounded to this one before, to `count` that were written.
template <Number Is>
static inline void add_numbers(Type<Is> type, const void* others, Number number, int64_t from, int64_t count, void* data, int64_t at) {
  for_number(number, [&](auto other) {
    for (int64_t i = 0; i < count; ++i) {
      const float more = rounded(type, read_number(other, others, from + i));
      write_number(type, read_number(type, data, at + i) + more, data, at + i);
    }
  });
}

}  // namespace FEWBITS_ISA
using namespace FEWBITS_ISA;
}  // namespace fewbits
