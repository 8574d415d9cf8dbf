// The module fewbits.kernels._native: addresses and sizes in, numbers out. Everything is checked here, before a kernel reads.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <list>
#include <stdexcept>

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
    require(at_ == layout_.size() && buffer_ == buffers_.size(), "a layout describes less than was given");
    return found;
  }

 private:
  int64_t next(int64_t low, int64_t high) {
    require(at_ < layout_.size(), "a layout ends too early");
    const int64_t value = layout_[at_++];
    require(value >= low && value <= high, "a size in a layout is out of range");
    return value;
  }

  const void* next_buffer(int64_t bytes) {
    require(buffer_ + 2 <= buffers_.size(), "a layout needs more buffers than were given");
    const uint64_t address = buffers_[buffer_], size = buffers_[buffer_ + 1];
    buffer_ += 2;
    require(size == static_cast<uint64_t>(bytes), "a buffer is not of the size that its layout says");
    require(address != 0 || bytes == 0, "a buffer has no memory");
    return reinterpret_cast<const void*>(address);
  }

  // Numbers as they are, or compressed sparse rows.
  const Coded& read_other(Coded& matrix) {
    matrix.form = static_cast<Coded::Form>(next(1, 2));
    matrix.number = to_number(next(0, 2));
    require(matrix.columns <= largest / matrix.rows, "a matrix is too large");
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
    require(coded.levels.kind != Values::none || coded.scales.kind != Values::none, "a matrix has neither levels nor scales");
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
    values.kind = static_cast<Values::Kind>(next(0, 4));
    if (values.kind == Values::none) return values;
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
    if (values.kind == Values::dense) values.data = next_buffer(count * size_of(values.number));
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

uint64_t read_pass(uint64_t address, int64_t bytes, int threads) {
  nb::gil_scoped_release released;
  return fewbits::read_pass(reinterpret_cast<const void*>(address), bytes, threads);
}

}  // namespace

NB_MODULE(_native, module) {
  module.def("available", &available, "Names of the instruction sets that can be used, best first.");
  module.def("multiply", &multiply, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("inputs"), nb::arg("outputs"), nb::arg("vectors"),
             nb::arg("number"), nb::arg("threads"), nb::arg("digits") = 3, "outputs [vectors, rows] = inputs [vectors, columns] times the matrix, transposed.");
  module.def("decode", &decode, nb::arg("isa"), nb::arg("layout"), nb::arg("buffers"), nb::arg("first"), nb::arg("last"), nb::arg("outputs"),
             nb::arg("number"), nb::arg("threads"), "Rows first to last of the matrix, dense.");
  module.def("read_pass", &read_pass, nb::arg("address"), nb::arg("bytes"), nb::arg("threads"), "Reads all bytes: what memory can give.");
}
