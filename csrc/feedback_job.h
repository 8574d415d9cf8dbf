// What the column loop of error feedback works on. No torch, no Python.
#pragma once
#include <cstdint>

namespace fewbits {

// Matrices lie column after column. Columns `first` to `last` are rounded on the grids of their rows; each one's error, over the factor's
// diagonal, is kept, and taken from the columns after it, up to `end`, in shares of the factor's row.
struct FeedBack {
  float* current;       // [columns, rows]: weights as they stand; rounded ones are left where they were
  float* errors;        // [columns, rows]
  uint8_t* codes;       // [columns, rows]
  const float* upper;   // [columns, columns]
  const float* scales;  // [rows]
  const float* zeros;   // [rows], whole numbers
  int64_t rows, columns, first, last, end;
  float largest;  // code
};

}  // namespace fewbits
