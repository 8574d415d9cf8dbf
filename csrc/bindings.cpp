// The module fewbits.kernels._native: addresses and sizes in, numbers out. Everything is checked here, before a kernel reads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <list>
#include <stdexcept>

#include "attention.h"
#include "feedback_job.h"
#include "kmeans.h"
#include "runtime.h"

namespace nb = nanobind;
using fewbits::Coded;
using fewbits::Number;
using fewbits::Values;

namespace {

constexpr int64_t largest = int64_t{1} << 40;

void require(bool right, const char* what) {
  if (!right) throw std::invalid_argument(what);
}

Number to_number(int64_t code) {
  require(code >= 0 && code <= 2, "a number must be of type 0 (float32), 1 (float16) or 2 (bfloat16)");
  return static_cast<Number>(code);
}

int64_t size_of(Number number) { return number == Number::f32 ? 4 : 2; }

// A matrix as Python describes it: `layout` in the order of the fields, `buffers` an address and a size for each in turn.
class Reader {
 public:
  Reader(const std::vector<int64_t>& layout, const std::vector<uint64_t>& buffers) : layout_(layout), buffers_(buffers) {}

  const Coded& read_whole(bool others = false) {
    const Coded& found = read_coded(0, others);
    finish();
    return found;
  }

  const Coded& read_matrix() { return read_coded(0); }

  void finish() const { require(at_ == layout_.size() && buffer_ == buffers_.size(), "a layout describes less than was given"); }

  int64_t next(int64_t low, int64_t high) {
    require(at_ < layout_.size(), "a layout ends too early");
    const int64_t value = layout_[at_++];
    require(value >= low && value <= high, "a size in a layout is out of range");
    return value;
  }

  const void* next_buffer(int64_t bytes, bool exactly = true) {
    require(buffer_ + 2 <= buffers_.size(), "a layout needs more buffers than were given");
    const uint64_t address = buffers_[buffer_], size = buffers_[buffer_ + 1];
    buffer_ += 2;
    require(exactly ? size == static_cast<uint64_t>(bytes) : size >= static_cast<uint64_t>(bytes), "a buffer is not of the size that its layout says");
    require(address != 0 || bytes == 0, "a buffer has no memory");
    return reinterpret_cast<const void*>(address);
  }

 private:
  // Numbers as they are, compressed sparse rows, or codewords.
  const Coded& read_other(Coded& matrix) {
    matrix.form = static_cast<Coded::Form>(next(1, 3));
    matrix.number = to_number(next(0, 2));
    require(matrix.columns <= largest / matrix.rows, "a matrix is too large");
    if (matrix.form == Coded::vectors) return read_vectors(matrix);
    if (matrix.form == Coded::plain) {
      matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.rows * matrix.columns * size_of(matrix.number)));
      return matrix;
    }
    matrix.index_bytes = next(2, 4);
    require(matrix.index_bytes != 3, "the columns of entries must be of 2 or 4 bytes");
    matrix.entries = next(0, largest);
    matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.entries * size_of(matrix.number)));
    matrix.indices = next_buffer(matrix.entries * matrix.index_bytes);
    matrix.pointers = static_cast<const int32_t*>(next_buffer((matrix.rows + 1) * 4));
    return matrix;
  }

  const Coded& read_vectors(Coded& matrix) {
    matrix.unit = next(4, 16);
    require(matrix.unit == 4 || matrix.unit == 8 || matrix.unit == 16, "codewords must be of 4, 8 or 16 numbers");
    matrix.books = next(1, 64);
    matrix.bits = static_cast<int>(next(1, 16));
    matrix.entries = next(1, int64_t{1} << matrix.bits);
    matrix.transposed = next(0, 1) == 1;
    const int64_t rows = matrix.transposed ? matrix.columns : matrix.rows, along = matrix.transposed ? matrix.rows : matrix.columns;
    matrix.row_bytes = ((along + matrix.unit - 1) / matrix.unit * matrix.books * matrix.bits + 7) / 8;
    require(matrix.row_bytes <= largest / rows, "a matrix is too large");
    matrix.code_bytes = matrix.row_bytes * rows;
    matrix.codes = static_cast<const uint8_t*>(next_buffer(matrix.code_bytes));
    matrix.indices = next_buffer(matrix.books * matrix.entries * matrix.unit * size_of(matrix.number));
    matrix.scales = read_values(matrix, 0);
    const bool fits = matrix.scales.kind == Values::dense && matrix.scales.rows == rows && matrix.scales.columns == 1;
    require(matrix.scales.kind == Values::none || fits, "scales of codewords must be plain numbers, one for each row of codes");
    return matrix;
  }

  const Coded& read_coded(int depth, bool others = false) {
    require(depth < 3, "scales of scales of scales are not known");
    Coded& coded = made_.emplace_back();
    coded.rows = next(1, largest);
    coded.columns = next(1, largest);
    coded.bits = static_cast<int>(next(depth == 0 && others ? 0 : 1, 8));
    if (coded.bits == 0) return read_other(coded);
    coded.group = std::min(next(1, largest), coded.columns);
    coded.groups = (coded.columns + coded.group - 1) / coded.group;
    coded.row_bytes = (coded.columns * coded.bits + 7) / 8;
    require(coded.row_bytes <= largest / coded.rows, "a matrix is too large");
    coded.code_bytes = coded.row_bytes * coded.rows;
    coded.codes = static_cast<const uint8_t*>(next_buffer(coded.code_bytes));
    coded.levels = read_values(coded, depth);
    coded.scales = read_values(coded, depth);
    coded.zeros = read_values(coded, depth);
    check(coded);
    return coded;
  }

  static void check(Coded& coded) {
    const auto fits = [&coded](const Values& values) {
      return values.kind == Values::none || ((values.rows == 1 || values.rows == coded.rows) && values.columns == coded.groups);
    };
    require(fits(coded.scales) && fits(coded.zeros), "scales or zero points do not fit the groups of a matrix");
    const bool signs = coded.zeros.kind == Values::signs;
    require(coded.scales.kind != Values::signs && coded.levels.kind != Values::signs, "signs are a kind of zero points");
    require(!signs || coded.bits == 1, "signs must be of one bit");
    require(signs || coded.levels.kind != Values::none || coded.scales.kind != Values::none, "a matrix has neither levels nor scales");
    require(coded.scales.kind != Values::packed, "scales cannot be packed integers");
    if (coded.levels.kind == Values::none) return;
    require(coded.levels.kind == Values::dense && coded.zeros.kind == Values::none, "levels must be plain numbers, without zero points");
    const int64_t book = int64_t{1} << coded.bits;
    coded.level_groups = coded.levels.columns / book;
    require(coded.levels.rows == 1 || coded.levels.rows == coded.rows, "levels do not fit the rows of a matrix");
    require(coded.levels.columns == book || coded.levels.columns == book * coded.groups, "levels do not fit the groups of a matrix");
  }

  Values read_values(const Coded& owner, int depth) {
    Values values;
    values.kind = static_cast<Values::Kind>(next(0, 5));
    if (values.kind == Values::none) return values;
    if (values.kind == Values::signs && next(0, 1) == 0) {  // without offsets
      values.rows = 1;
      values.columns = owner.groups;
      return values;
    }
    if (values.kind == Values::coded) {
      values.inner = &read_coded(depth + 1);
      values.rows = values.inner->rows;
      values.columns = values.inner->columns;
      return values;
    }
    values.rows = next(1, largest);
    values.columns = next(1, largest);
    values.number = to_number(next(0, 2));
    require(values.columns <= largest / values.rows, "a table is too large");
    const int64_t count = values.rows * values.columns;
    if (values.kind == Values::dense || values.kind == Values::signs) values.data = next_buffer(count * size_of(values.number));
    else if (values.kind == Values::table) values.data = next_buffer(count);
    else values.data = next_buffer(values.rows * ((values.columns * owner.bits + 7) / 8));
    if (values.kind == Values::table) values.lookup = static_cast<const float*>(next_buffer(256 * 4));
    return values;
  }

  const std::vector<int64_t>& layout_;
  const std::vector<uint64_t>& buffers_;
  std::list<Coded> made_;  // whose addresses stay
  size_t at_ = 0, buffer_ = 0;
};

std::vector<std::string> available() {
  std::vector<std::string> names;
  for (const fewbits::Kernels* kernels : fewbits::available_kernels()) names.emplace_back(kernels->name);
  return names;
}

void multiply(const std::string& isa, const std::vector<int64_t>& layout, const std::vector<uint64_t>& buffers, uint64_t inputs, uint64_t outputs,
              int64_t vectors, int64_t number, int threads, int digits) {
  Reader reader(layout, buffers);
  const Coded& matrix = reader.read_whole(true);
  require(digits >= 1 && digits <= 3, "inputs must have 1 to 3 digits");
  require(vectors >= 0 && vectors <= largest / std::max(matrix.rows, matrix.columns), "the number of vectors is out of range");
  const fewbits::Product product{&matrix, reinterpret_cast<const void*>(inputs), reinterpret_cast<void*>(outputs), vectors, to_number(number), digits};
  const fewbits::Kernels& kernels = fewbits::find_kernels(isa);
  nb::gil_scoped_release released;
  fewbits::multiply(kernels, product, threads);
}

void decode(const std::string& isa, const std::vector<int64_t>& layout, const std::vector<uint64_t>& buffers, int64_t first, int64_t last,
            uint64_t outputs, int64_t number, int threads) {
  Reader reader(layout, buffers);
  const Coded& matrix = reader.read_whole();
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

int64_t prefer_large_pages(uint64_t address, int64_t bytes) {
  require(bytes >= 0 && (address != 0 || bytes == 0), "memory has no address");
  return fewbits::prefer_large_pages(reinterpret_cast<void*>(address), bytes);
}

}  // namespace

NB_MODULE(_native, module) {
  module.def("available", &available, "Names of the instruction sets that can be used, best first.");
  module.def("multiply", &multiply, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("inputs"), nb::arg("outputs"), nb::arg("vectors"),
             nb::arg("number"), nb::arg("threads"), nb::arg("digits") = 3, "outputs [vectors, rows] = inputs [vectors, columns] times the matrix, transposed.");
  module.def("decode", &decode, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("first"), nb::arg("last"), nb::arg("outputs"),
             nb::arg("number"), nb::arg("threads"), "Rows first to last of the matrix, dense.");
  module.def("attend", &attend, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("scale"), nb::arg("threads"),
             "Attention of a few queries over keys and values that lie packed.");
  module.def("best_edges", &best_edges, nb::arg("sums"), nb::arg("rows"), nb::arg("n"), nb::arg("count"), nb::arg("edges"), nb::arg("threads"),
             "Where the clusters of sorted numbers begin and end.");
  module.def("prefer_large_pages", &prefer_large_pages, nb::arg("address"), nb::arg("bytes"),
             "Asks for large pages under memory that is not written yet; the bytes that it was asked for.");
  module.def("feed_back", &feed_back, nb::arg("isa"), nb::arg("sizes"), nb::arg("buffers"), nb::arg("threads"),
             "Rounds columns one after another and moves each one's error into those after it.");
  module.def("read_pass", &read_pass, nb::arg("address"), nb::arg("bytes"), nb::arg("threads"), "Reads all bytes: what memory can give.");
}
