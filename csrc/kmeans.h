// The best clustering of sorted numbers, row by row.
#pragma once
#include <cstdint>

namespace fewbits {

// `weight`, `first` and `second` [rows, n + 1] are sums of the weights, and of weight * value and weight * value**2, of the values
// before each place. `edges` [rows, count + 1] gets where the `count` intervals of the least squared error begin and end. The same
// numbers, in the same order, as `best_edges` of src/fewbits/solvers/kmeans.py, so that ties end alike.
void best_edges(const double* weight, const double* first, const double* second, int64_t rows, int64_t n, int64_t count, int64_t* edges, int threads);

}  // namespace fewbits
