#define FEWBITS_ISA portable
#include "sum.h"

#include <algorithm>
#include <stdexcept>

#include "rounding.h"
#include "room.h"
#include "runtime.h"

namespace fewbits {
namespace {

thread_local Room room;

const char* what_is_broken(const Coded& matrix) {
  if (matrix.form == Coded::vectors) return "a code has no codeword";
  if (matrix.form == Coded::mixed) return "rows have different numbers of wide groups";
  return "a sparse matrix has entries outside of it";
}

// Whether kernels lay inputs out for both in the same way.
bool same_layout(const Coded& a, const Coded& b) {
  if (&a == &b) return true;
  if (a.form != b.form || a.columns != b.columns) return false;
  if (a.form == Coded::plain || a.form == Coded::sparse) return true;
  const bool packed = a.form == Coded::packed && a.bits == b.bits && a.group == b.group && a.lines == b.lines;
  return packed && a.levels.kind == b.levels.kind && a.level_groups == b.level_groups;
}

bool in_word_lines(const Coded& matrix) { return matrix.form == Coded::vectors && matrix.lines; }

// Whether a sum adds nothing up, so that the kernel writes what it rounded where it belongs.
bool rounds_itself(const Sum& sum) { return sum.terms.size() == 1 && sum.biases.empty(); }

// Of a factor there may be few rows, and long ones.
int64_t inner_rows(const Coded& matrix, int threads) {
  const int64_t least = matrix.form == Coded::plain ? 4 : chunk_rows;
  return std::max(matrix.rows / (4 * threads) / least * least, least);
}

// Whose task it is, of those that begin there.
size_t place_of(const std::vector<int64_t>& begins, int64_t task) {
  return static_cast<size_t>(std::upper_bound(begins.begin(), begins.end(), task) - begins.begin()) - 1;
}

// Asks for what a term has for some rows, where that lies apart and is too short to be fetched well while it is read.
void fetch_rows(const Coded& matrix, int64_t first, int64_t last) {
  constexpr int64_t most = 1 << 16;
  const auto fetch = [](const void* data, int64_t from, int64_t to) {
    for (int64_t at = from; at < std::min(to, from + most); at += 64) __builtin_prefetch(static_cast<const char*>(data) + at, 0, 2);
  };
  const int64_t item = matrix.number == Number::f32 ? 4 : 2;
  if (matrix.form == Coded::plain) fetch(matrix.codes, first * matrix.columns * item, last * matrix.columns * item);
  if (matrix.form != Coded::sparse) return;
  const auto inside = [&](int64_t entry) { return std::clamp<int64_t>(entry, 0, matrix.entries); };
  const int64_t begin = inside(matrix.pointers[first]), end = inside(matrix.pointers[last]);
  fetch(matrix.codes, begin * item, end * item);
  fetch(matrix.indices, begin * matrix.index_bytes, end * matrix.index_bytes);
}

}  // namespace

int64_t rows_of_task(int64_t rows, int threads) {
  // Long runs of rows are fetched better than short ones; a part of a sixteenth at a time leaves no thread waiting for long.
  return std::max(rows / (16 * threads) / chunk_rows * chunk_rows, chunk_rows);
}

namespace {

// Where tasks of so many rows end: long ones come first, as long runs are fetched best, and then shorter ones, so that no thread waits for long.
std::vector<int64_t> ends_of_tasks(int64_t rows, int threads, int64_t whole) {
  std::vector<int64_t> ends;
  for (int64_t done = 0; done < rows; ends.push_back(done)) {
    const int64_t next = 2 * (rows - done) / (3 * threads) / whole * whole;
    done = threads == 1 ? rows : std::min(rows, done + std::max(next, whole));
  }
  return ends;
}

// Rows that are best taken together, or a multiple of them: of codewords in lines as many as share a table in registers.
int64_t whole_rows(const std::vector<const Sum*>& sums) {
  for (const Sum* sum : sums) for (const Summand& term : sum->terms) if (in_word_lines(*term.matrix)) return 4 * word_rows;
  return chunk_rows;
}

// What is read of some rows of a sum, but for what is short.
Stretch stretch_of(const Sum& sum, int64_t first, int64_t last) {
  const Coded& matrix = *sum.terms[0].matrix;
  if (matrix.form != Coded::packed && !in_word_lines(matrix)) return {};
  return {matrix.codes + first * matrix.row_bytes, (last - first) * matrix.row_bytes};
}

}  // namespace

Stage stage_of_rows(const std::vector<const Sum*>& sums, int threads, std::function<void(size_t sum, int64_t first, int64_t last, int worker)> work) {
  const int64_t whole = whole_rows(sums);
  std::vector<int64_t> begins{0};  // of each sum's rows: tasks have whole chunks of each
  for (const Sum* sum : sums) begins.push_back(begins.back() + (sum->rows + whole - 1) / whole * whole);
  const std::vector<int64_t> ends = ends_of_tasks(begins.back(), threads, whole);
  const auto parts = [=](int64_t task, auto each) {
    const int64_t first = task == 0 ? 0 : ends[static_cast<size_t>(task - 1)], last = ends[static_cast<size_t>(task)];
    for (size_t sum = 0; sum < sums.size(); ++sum) {
      const int64_t from = std::max(first - begins[sum], int64_t{0}), to = std::min(last - begins[sum], sums[sum]->rows);
      if (from < to) each(sum, from, to);
    }
  };
  const auto run = [=](int64_t task, int worker) { parts(task, [&](size_t sum, int64_t first, int64_t last) { work(sum, first, last, worker); }); };
  const auto reads = [=](int64_t task) {
    Stretch found;
    parts(task, [&](size_t sum, int64_t first, int64_t last) { if (found.bytes == 0) found = stretch_of(*sums[sum], first, last); });
    return found;
  };
  return {static_cast<int64_t>(ends.size()), run, reads};
}

Products::Products(const Kernels& kernels, const std::vector<const Sum*>& sums, int64_t vectors, Number number, int digits)
    : kernels_(kernels), sums_(sums), vectors_(vectors), number_(number), digits_(digits) {
  for (const Sum* sum : sums_) {
    for (const Summand& term : sum->terms) if (term.inner != nullptr) entries_.push_back({term.inner, layout_for(*term.inner)});
  }
  int64_t inner = 0;
  for (const Sum* sum : sums_) {
    first_terms_.push_back(entries_.size());
    for (const Summand& term : sum->terms) {
      const bool has_inner = term.inner != nullptr;
      if (has_inner) inner_.push_back(entries_.size());
      entries_.push_back({term.matrix, has_inner ? 0 : layout_for(*term.matrix), has_inner ? inner++ : -1, rounds_itself(*sum)});
    }
  }
  broken_.reset(new std::atomic<bool>[entries_.size()]);
  for (size_t i = 0; i < entries_.size(); ++i) {
    broken_[i].store(false);
    const Coded& matrix = *entries_[i].matrix;
    if (!entries_[i].direct) floats_ += whole_lines(vectors_ * matrix.rows);
    if (entries_[i].inner >= 0) floats_ += whole_lines(kernels_.prepared_floats(product(i, nullptr, nullptr, Number::f32)));
    scratch_ = std::max(scratch_, whole_lines(kernels_.scratch_floats(matrix, vectors_)));
  }
}

size_t Products::layout_for(const Coded& matrix) {
  const auto found = std::find_if(layouts_.begin(), layouts_.end(), [&](const Layout& layout) { return same_layout(*layout.matrix, matrix); });
  if (found != layouts_.end()) return static_cast<size_t>(found - layouts_.begin());
  layouts_.push_back({&matrix, nullptr});
  floats_ += whole_lines(kernels_.prepared_floats({&matrix, nullptr, nullptr, vectors_, number_, digits_}));
  return layouts_.size() - 1;
}

Product Products::product(size_t entry, const void* inputs, void* outputs, Number number) const {
  return {entries_[entry].matrix, inputs, outputs, vectors_, number, digits_, &broken_[entry]};
}

void Products::place(float* room) {
  const auto take = [&room](int64_t count) {
    float* taken = room;
    room += whole_lines(count);
    return taken;
  };
  for (Layout& layout : layouts_) layout.prepared = take(kernels_.prepared_floats({layout.matrix, nullptr, nullptr, vectors_, number_, digits_}));
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].direct) entries_[i].outputs = take(vectors_ * entries_[i].matrix->rows);
    if (entries_[i].inner >= 0) entries_[i].prepared = take(kernels_.prepared_floats(product(i, nullptr, nullptr, Number::f32)));
  }
}

void Products::prepare(const void* inputs, int64_t vector) const {
  for (const Layout& layout : layouts_) kernels_.prepare({layout.matrix, inputs, nullptr, vectors_, number_, digits_}, vector, layout.prepared);
}

void Products::add_parts(std::vector<Stage>& stages, std::vector<std::pair<Product, float*>> made) const {
  std::vector<int64_t> begins{0};  // of each one's tasks
  for (const auto& one : made) begins.push_back(begins.back() + kernels_.parts(one.first));
  if (begins.back() == 0) return;
  stages.push_back({begins.back(), [=](int64_t task, int) {
    const size_t i = place_of(begins, task);
    kernels_.make_part(made[i].first, task - begins[i], made[i].second);
  }});
}

void Products::add_inner_stages(std::vector<Stage>& stages, int threads, float* scratch) const {
  std::vector<std::pair<Product, float*>> made;
  for (const Layout& layout : layouts_) made.push_back({{layout.matrix, nullptr, nullptr, vectors_, number_, digits_}, layout.prepared});
  add_parts(stages, made);
  if (inner_.empty()) return;
  std::vector<int64_t> begins{0};  // of each factor's tasks
  for (size_t i = 0; i < inner_.size(); ++i) {
    const Coded& matrix = *entries_[i].matrix;
    const int64_t rows = inner_rows(matrix, threads);
    begins.push_back(begins.back() + (matrix.rows + rows - 1) / rows);
  }
  stages.push_back({begins.back(), [=](int64_t task, int worker) {
    const size_t i = place_of(begins, task);
    const Coded& matrix = *entries_[i].matrix;
    const int64_t rows = inner_rows(matrix, threads), first = (task - begins[i]) * rows;
    kernels_.multiply(product(i, nullptr, entries_[i].outputs, Number::f32), prepared(i), first, std::min(first + rows, matrix.rows),
                      scratch + worker * scratch_);
  }});
  stages.push_back({padded_vectors(), [this](int64_t vector, int) {
    for (const size_t place : inner_) {
      const float* inputs = entries_[static_cast<size_t>(entries_[place].inner)].outputs;
      kernels_.prepare(product(place, inputs, nullptr, Number::f32), vector, entries_[place].prepared);
    }
  }});
  made.clear();
  for (const size_t place : inner_) made.push_back({product(place, nullptr, nullptr, Number::f32), entries_[place].prepared});
  add_parts(stages, made);
}

void Products::multiply(size_t index, int64_t first, int64_t last, void* outputs, float* scratch) const {
  const Sum& sum = *sums_[index];
  const size_t begin = first_terms_[index];
  if (rounds_itself(sum)) {
    return kernels_.multiply(product(begin, nullptr, outputs, number_), prepared(begin), first, last, scratch);
  }
  float* total = entries_[begin].outputs;
  for (size_t i = begin + 1; i < begin + sum.terms.size(); ++i) fetch_rows(*entries_[i].matrix, first, last);
  for (size_t i = begin; i < begin + sum.terms.size(); ++i) {
    kernels_.multiply(product(i, nullptr, entries_[i].outputs, Number::f32), prepared(i), first, last, scratch);
    const float* more = entries_[i].outputs;
    if (i == begin) continue;
    for (int64_t v = 0; v < vectors_; ++v) for (int64_t at = v * sum.rows + first; at < v * sum.rows + last; ++at) total[at] += more[at];
  }
  for_number(number_, [&](auto type) {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t from = v * sum.rows;
      write_numbers(type, total + from + first, last - first, outputs, from + first);
      for (const Bias& bias : sum.biases) add_numbers(type, bias.numbers, bias.number, first, last - first, outputs, from + first);
    }
  });
}

void Products::check() const {
  for (size_t i = 0; i < entries_.size(); ++i) if (broken_[i].load()) throw std::invalid_argument(what_is_broken(*entries_[i].matrix));
}

void multiply_sums(const Kernels& kernels, const std::vector<Sum>& sums, const void* inputs, const std::vector<void*>& outputs, int64_t vectors,
                   Number number, int threads, int digits) {
  if (vectors == 0 || sums.empty()) return;
  threads = std::max(threads, 1);
  std::vector<const Sum*> given;
  for (const Sum& sum : sums) given.push_back(&sum);
  Products products(kernels, given, vectors, number, digits);
  float* scratch = room.floats(products.scratch_floats() * threads + products.floats());
  products.place(scratch + products.scratch_floats() * threads);
  std::vector<Stage> stages;
  stages.push_back({products.padded_vectors(), [&](int64_t vector, int) { products.prepare(inputs, vector); }});
  products.add_inner_stages(stages, threads, scratch);
  stages.push_back(stage_of_rows(given, threads, [&](size_t sum, int64_t first, int64_t last, int worker) {
    products.multiply(sum, first, last, outputs[sum], scratch + worker * products.scratch_floats());
  }));
  run_stages(threads, stages);
  products.check();
}

}  // namespace fewbits
