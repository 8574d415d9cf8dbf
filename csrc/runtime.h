// Which instruction sets there are, and the work of a product divided among threads.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "matrix.h"
#include "rotation_job.h"

namespace fewbits {

// The instruction sets that were compiled and that this processor has, best first.
const std::vector<const Kernels*>& available_kernels();

// Raises std::invalid_argument where the name is none of the available ones.
const Kernels& find_kernels(const std::string& name);

void multiply(const Kernels& kernels, const Product& product, int threads);

// Rows first to last of the matrix, dense, into `out [last - first, columns]`.
void decode(const Kernels& kernels, const Coded& matrix, int64_t first, int64_t last, void* out, Number number, int threads);

// The column loop of error feedback, rows divided among threads: results do not depend on how many there are.
void feed_back(const Kernels& kernels, const FeedBack& job, int threads);

// Every vector of a rotation, vectors divided among threads.
void rotate(const Kernels& kernels, const Rotation& job, int threads);

// Features in another order. Raises std::invalid_argument where an index is none of theirs.
void reorder(const Reordering& job, int threads);

// Blocks the other way round, divided among threads.
void transpose_blocks(const Transposition& job, int threads);

// Reads all bytes and does nothing with them: what memory can give. The result is there so that nothing is left out.
uint64_t read_pass(const void* data, int64_t bytes, int threads);

// Brings what is mapped of a file into memory all at once, so that reading does not stop at each of its pages. False where the file ends
// before; where systems cannot do so nothing is done.
bool bring_in(const void* data, int64_t bytes);

// Asks the system for large pages under memory that is not written yet: fewer of their addresses are looked up anew, which
// costs a product of large matrices a sixth to a third of its time. Returns the bytes that it was asked for; 0 where systems have none.
int64_t prefer_large_pages(void* data, int64_t bytes);

}  // namespace fewbits
