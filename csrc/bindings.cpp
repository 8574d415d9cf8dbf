// The module fewbits.kernels._native: addresses and sizes in, numbers out. Everything is checked here, before a kernel reads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "decoder_bindings.h"
#include "feedback_job.h"
#include "gram_job.h"
#include "kmeans.h"
#include "panels.h"
#include "reader.h"
#include "runtime.h"
#include "sum_bindings.h"
#include "watch_bindings.h"

namespace nb = nanobind;
using fewbits::Coded;
using fewbits::largest;
using fewbits::Reader;
using fewbits::require;
using fewbits::size_of;
using fewbits::to_number;

namespace {

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const fewbits::Kernels* kernels : fewbits::available_kernels()) names.emplace_back(kernels->name);
  return names;
}

bool takes_many(const std::string& isa, int64_t number) { return fewbits::takes_many(fewbits::find_kernels(isa), to_number(number)); }

bool reads_lines(const std::string& isa, const std::vector<int64_t>& layout, const std::vector<uint64_t>& buffers) {
  Reader reader(layout, buffers);
  const Coded& matrix = reader.read_whole(true);
  const fewbits::Kernels& kernels = fewbits::find_kernels(isa);
  return matrix.lines && kernels.reads_lines != nullptr && kernels.reads_lines(matrix);
}

void decode(const std::string& isa, const std::vector<int64_t>& layout, const std::vector<uint64_t>& buffers, int64_t first, int64_t last,
            uint64_t outputs, int64_t number, int threads) {
  Reader reader(layout, buffers);
  const Coded& matrix = reader.read_whole(true);
  const bool words = matrix.form == Coded::vectors && !matrix.transposed && matrix.entries == int64_t{1} << matrix.bits;
  require(matrix.form == Coded::packed || words, "only codes are decoded, each of which says a number or a codeword along rows");
  require(0 <= first && first <= last && last <= matrix.rows, "rows to decode are not in the matrix");
  const fewbits::Kernels& kernels = fewbits::find_kernels(isa);
  nb::gil_scoped_release released;
  fewbits::decode(kernels, matrix, first, last, reinterpret_cast<void*>(outputs), to_number(number), threads);
}

fewbits::Segment read_segment(Reader& reader, const fewbits::Attention& attention, bool keys) {
  fewbits::Segment segment;
  const int64_t channels = attention.heads * attention.width;
  if (reader.next(0, 1) == 1) {
    const Coded& matrix = reader.read_matrix();
    require((keys ? matrix.rows : matrix.columns) == channels, "packed keys or values do not have the channels of the heads");
    require(fewbits::attends_packed(matrix), "attention cannot read keys or values that are stored like this");
    segment.packed = &matrix;
    segment.tokens = keys ? matrix.columns : matrix.rows;
    return segment;
  }
  segment.tokens = reader.next(1, largest);
  segment.number = to_number(reader.next(0, 2));
  segment.token_stride = reader.next(0, largest);
  segment.head_stride = reader.next(0, largest);
  require(segment.token_stride <= largest / segment.tokens && segment.head_stride <= largest / attention.heads, "plain keys or values are too large");
  const int64_t numbers = (segment.tokens - 1) * segment.token_stride + (attention.heads - 1) * segment.head_stride + attention.width;
  segment.plain = reader.next_buffer(numbers * size_of(segment.number), false);
  return segment;
}

std::vector<fewbits::Segment> read_segments(Reader& reader, const fewbits::Attention& attention, bool keys) {
  std::vector<fewbits::Segment> segments;
  int64_t tokens = 0;
  for (int64_t left = reader.next(0, largest); left > 0; --left) {
    segments.push_back(read_segment(reader, attention, keys));
    tokens += segments.back().tokens;
    require(tokens <= attention.tokens, "there are more keys or values than tokens");
  }
  require(tokens == attention.tokens, "there are fewer keys or values than tokens");
  return segments;
}

// `layout` begins with the sizes; then, for each sequence, how many segments of keys there are and each of them, and those of values.
void attend(const std::string& isa, const std::vector<int64_t>& layout, const std::vector<uint64_t>& buffers, double scale, int threads) {
  Reader reader(layout, buffers);
  fewbits::Attention attention{};
  attention.sequences = reader.next(1, largest);
  attention.heads = reader.next(1, 1 << 16);
  attention.share = reader.next(1, 1 << 16);
  attention.queries = reader.next(1, 1 << 16);
  attention.width = reader.next(8, 1 << 16);
  attention.tokens = reader.next(1, largest);
  require(attention.width % 8 == 0, "a head must have a multiple of 8 channels");
  attention.number = to_number(reader.next(0, 2));
  attention.scale = static_cast<float>(scale);
  const int64_t mask = reader.next(0, 2);  // none, bytes, float32
  attention.mask_sequence = reader.next(0, largest);
  attention.mask_query = reader.next(0, largest);
  const int64_t numbers = attention.heads * attention.share * attention.queries * attention.width;
  require(attention.sequences <= largest / numbers && attention.tokens <= largest / attention.sequences, "queries are too large");
  attention.query = reader.next_buffer(attention.sequences * numbers * size_of(attention.number));
  attention.output = const_cast<void*>(reader.next_buffer(attention.sequences * numbers * size_of(attention.number)));
  if (mask != 0) {
    require(attention.mask_sequence <= largest / attention.sequences && attention.mask_query <= largest / attention.queries, "a mask is too large");
    const int64_t seen = (attention.sequences - 1) * attention.mask_sequence + (attention.queries - 1) * attention.mask_query + attention.tokens;
    attention.mask = reader.next_buffer(seen * (mask == 2 ? 4 : 1), false);
    attention.additive = mask == 2;
  }
  for (int64_t sequence = 0; sequence < attention.sequences; ++sequence) {
    attention.keys.push_back(read_segments(reader, attention, true));
    attention.values.push_back(read_segments(reader, attention, false));
  }
  reader.finish();
  nb::gil_scoped_release released;
  fewbits::attend(isa, attention, threads);
}

uint64_t read_pass(uint64_t address, int64_t bytes, int threads) {
  nb::gil_scoped_release released;
  return fewbits::read_pass(reinterpret_cast<const void*>(address), bytes, threads);
}

// Addresses of three arrays of float64 [rows, n + 1], and of one of int64 [rows, count + 1] that is written.
void best_edges(const std::vector<uint64_t>& sums, int64_t rows, int64_t n, int64_t count, uint64_t edges, int threads) {
  require(rows >= 0 && n >= 1 && n < int64_t{1} << 31 && count >= 1 && count <= n && rows <= largest / (n + 1), "sizes are out of range");
  require(sums.size() == 3 && sums[0] && sums[1] && sums[2] && edges, "an array has no memory");
  const auto at = [&](int place) { return reinterpret_cast<const double*>(sums[place]); };
  nb::gil_scoped_release released;
  fewbits::best_edges(at(0), at(1), at(2), rows, n, count, reinterpret_cast<int64_t*>(edges), threads);
}

// `sizes`: rows, columns, first, last, end and the largest code; addresses in the order of the fields.
void feed_back(const std::string& isa, const std::vector<int64_t>& sizes, const std::vector<uint64_t>& buffers, int threads) {
  require(sizes.size() == 6, "six sizes are needed");
  const int64_t rows = sizes[0], columns = sizes[1];
  require(rows >= 1 && columns >= 1 && rows <= largest / columns && columns <= largest / columns, "sizes are out of range");
  require(0 <= sizes[2] && sizes[2] <= sizes[3] && sizes[3] <= sizes[4] && sizes[4] <= columns, "columns to round are not in the matrix");
  require(sizes[5] >= 1 && sizes[5] <= 255, "the largest code must be of 1 to 8 bits");
  const int64_t bytes[] = {rows * columns * 4, rows * columns * 4, rows * columns, columns * columns * 4, rows * 4, rows * 4};
  require(buffers.size() == 12, "six buffers are needed");
  for (int i = 0; i < 6; ++i) require(buffers[2 * i] != 0 && buffers[2 * i + 1] == static_cast<uint64_t>(bytes[i]), "a buffer is not of the size that it must have");
  const auto floats = [&](int place) { return reinterpret_cast<float*>(buffers[2 * place]); };
  const fewbits::FeedBack job{floats(0), floats(1), reinterpret_cast<uint8_t*>(buffers[4]), floats(3), floats(4), floats(5),
                              rows,      columns,   sizes[2],                               sizes[3],  sizes[4],  static_cast<float>(sizes[5])};
  const fewbits::Kernels& kernels = fewbits::find_kernels(isa);
  nb::gil_scoped_release released;
  fewbits::feed_back(kernels, job, threads);
}

// `sizes`: tokens, features and type of the inputs; buffers are inputs and sums. False where nothing was done: no kernel serves.
bool add_products(const std::string& isa, const std::vector<int64_t>& sizes, const std::vector<uint64_t>& buffers, int threads) {
  Reader reader(sizes, buffers);
  fewbits::Gram job{};
  job.tokens = reader.next(0, largest);
  job.features = reader.next(1, int64_t{1} << 24);
  job.number = to_number(reader.next(0, 2));
  require(job.tokens <= largest / job.features, "there are too many tokens");
  job.inputs = reader.next_buffer(job.tokens * job.features * size_of(job.number));
  job.sums = static_cast<float*>(const_cast<void*>(reader.next_buffer(job.features * job.features * 4)));
  reader.finish();
  const fewbits::Kernels& kernels = fewbits::find_kernels(isa);
  nb::gil_scoped_release released;
  return fewbits::add_products(kernels, job, threads);
}

// `sizes`: vectors, features, type of the numbers, order of the seed, and whether the signs come last. Buffers are inputs, outputs, signs
// of one bit a feature and the seed; signs may be none, and the seed of order 1.
void rotate(const std::string& isa, const std::vector<int64_t>& sizes, const std::vector<uint64_t>& buffers, int threads) {
  Reader reader(sizes, buffers);
  fewbits::Rotation job{};
  job.vectors = reader.next(0, largest);
  job.size = reader.next(1, int64_t{1} << 31);
  job.number = to_number(reader.next(0, 2));
  job.order = reader.next(1, 1 << 10);
  job.signs_last = reader.next(0, 1) == 1;
  const int64_t power = job.size / job.order;
  require(power * job.order == job.size && power > 0 && (power & (power - 1)) == 0, "features must be the order of the seed times a power of two");
  require(job.vectors <= largest / job.size, "there are too many vectors");
  const int64_t bytes = job.vectors * job.size * size_of(job.number);
  job.inputs = reader.next_buffer(bytes);
  job.outputs = const_cast<void*>(reader.next_buffer(bytes));
  if (reader.next(0, 1) == 1) job.signs = static_cast<const uint8_t*>(reader.next_buffer((job.size + 7) / 8));
  if (job.order > 1) job.seed = static_cast<const float*>(reader.next_buffer(job.order * job.order * 4));
  reader.finish();
  const fewbits::Kernels& kernels = fewbits::find_kernels(isa);
  nb::gil_scoped_release released;
  fewbits::rotate(kernels, job, threads);
}

// `sizes`: vectors, features, bytes of a number and bits of an index. Buffers are inputs, outputs and the packed indices.
void reorder(const std::vector<int64_t>& sizes, const std::vector<uint64_t>& buffers, int threads) {
  Reader reader(sizes, buffers);
  fewbits::Reordering job{};
  job.vectors = reader.next(0, largest);
  job.features = reader.next(1, int64_t{1} << 31);
  job.item = reader.next(2, 4);
  job.bits = reader.next(1, 32);
  require(job.item != 3, "numbers must be of 2 or 4 bytes");
  require(job.vectors <= largest / job.features, "there are too many vectors");
  const int64_t bytes = job.vectors * job.features * job.item;
  job.inputs = reader.next_buffer(bytes);
  job.outputs = const_cast<void*>(reader.next_buffer(bytes));
  job.bytes = (job.features * job.bits + 7) / 8;
  job.order = static_cast<const uint8_t*>(reader.next_buffer(job.bytes));
  reader.finish();
  nb::gil_scoped_release released;
  fewbits::reorder(job, threads);
}

// `sizes`: blocks, rows and columns of each, and bytes of a number. Buffers are inputs and outputs.
void transpose_blocks(const std::vector<int64_t>& sizes, const std::vector<uint64_t>& buffers, int threads) {
  Reader reader(sizes, buffers);
  fewbits::Transposition job{};
  job.blocks = reader.next(0, largest);
  job.rows = reader.next(1, largest);
  job.columns = reader.next(1, largest);
  job.item = reader.next(1, 4);
  require(job.item != 3, "numbers must be of 1, 2 or 4 bytes");
  require(job.columns <= largest / job.rows && job.blocks <= largest / (job.rows * job.columns), "blocks are too large");
  const int64_t bytes = job.blocks * job.rows * job.columns * job.item;
  job.inputs = reader.next_buffer(bytes);
  job.outputs = const_cast<void*>(reader.next_buffer(bytes));
  reader.finish();
  nb::gil_scoped_release released;
  fewbits::transpose_blocks(job, threads);
}

bool bring_in(uint64_t address, int64_t bytes) {
  require(bytes >= 0 && (address != 0 || bytes == 0), "memory has no address");
  nb::gil_scoped_release released;
  return fewbits::bring_in(reinterpret_cast<const void*>(address), bytes);
}

int64_t prefer_large_pages(uint64_t address, int64_t bytes) {
  require(bytes >= 0 && (address != 0 || bytes == 0), "memory has no address");
  return fewbits::prefer_large_pages(reinterpret_cast<void*>(address), bytes);
}

}  // namespace

NB_MODULE(_native, module) {
  module.def("available", &available, "Names of the instruction sets that can be used, best first.");
  module.def("takes_many", &takes_many, nb::arg("isa"), nb::arg("number"), "Whether codes are multiplied with any number of vectors of a type.");
  module.def("reads_lines", &reads_lines, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), "Whether codes that lie in lines are read as they are.");
  module.def("decode", &decode, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("first"), nb::arg("last"), nb::arg("outputs"),
             nb::arg("number"), nb::arg("threads"), "Rows first to last of the matrix, dense.");
  module.def("attend", &attend, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("scale"), nb::arg("threads"),
             "Attention of a few queries over keys and values that lie packed.");
  module.def("best_edges", &best_edges, nb::arg("sums"), nb::arg("rows"), nb::arg("n"), nb::arg("count"), nb::arg("edges"), nb::arg("threads"),
             "Where the clusters of sorted numbers begin and end.");
  module.def("prefer_large_pages", &prefer_large_pages, nb::arg("address"), nb::arg("bytes"),
             "Asks for large pages under memory that is not written yet; the bytes that it was asked for.");
  module.def("bring_in", &bring_in, nb::arg("address"), nb::arg("bytes"), "Brings mapped memory in at once; whether its file reaches that far.");
  module.def("feed_back", &feed_back, nb::arg("isa"), nb::arg("sizes"), nb::arg("buffers"), nb::arg("threads"),
             "Rounds columns one after another and moves each one's error into those after it.");
  module.def("add_products", &add_products, nb::arg("isa"), nb::arg("sizes"), nb::arg("buffers"), nb::arg("threads"),
             "Adds inputs^T inputs to sums, on and above the diagonal; whether a kernel serves.");
  module.def("rotate", &rotate, nb::arg("isa"), nb::arg("sizes"), nb::arg("buffers"), nb::arg("threads"),
             "Vectors times a Hadamard matrix, with signs or without.");
  module.def("reorder", &reorder, nb::arg("sizes"), nb::arg("buffers"), nb::arg("threads"), "Features of vectors in another order.");
  module.def("transpose_blocks", &transpose_blocks, nb::arg("sizes"), nb::arg("buffers"), nb::arg("threads"), "Matrices the other way round.");
  fewbits::bind_sums(module);
  fewbits::bind_decoder(module);
  fewbits::bind_watch(module);
  module.def("read_pass", &read_pass, nb::arg("address"), nb::arg("bytes"), nb::arg("threads"), "Reads all bytes: what memory can give.");
}
