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
  if (a.form == Coded::plain) return a.number == b.number;
  if (a.form == Coded::sparse) return true;
  const bool packed = a.form == Coded::packed && a.bits == b.bits && a.group == b.group && a.lines == b.lines;
  return packed && a.counts == b.counts && a.levels.kind == b.levels.kind && a.level_groups == b.level_groups;
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

// Whether kernels add what a matrix gives to outputs that are there.
bool can_add(const Coded& matrix) { return matrix.form == Coded::plain || matrix.form == Coded::sparse; }

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

// Rows that are best taken together, or a multiple of them: of what is looked up in tables as many as share those in registers.
int64_t whole_rows(const std::vector<const Sum*>& sums) {
  int64_t whole = chunk_rows;
  for (const Sum* sum : sums) {
    for (const Summand& term : sum->terms) {
      const Coded& matrix = *term.matrix;
      if (in_word_lines(matrix)) return 4 * word_rows;
      const bool summed = matrix.bits == base_three || matrix.counts == Coded::as_signs || matrix.form == Coded::signed_product;
      if (matrix.lines && summed) whole = 4 * line_rows;
    }
  }
  return whole;
}

// Whether the first term of a sum is there before its rows are asked for: a stream of codes that nothing comes between is read fastest.
bool has_base(const Sum& sum) { return sum.terms.size() > 1 && sum.terms[0].inner == nullptr; }

// What is read of some rows of a sum's first term.
Stretch stretch_of(const Sum& sum, int64_t first, int64_t last) {
  const Coded& matrix = *sum.terms[0].matrix;
  if (matrix.form != Coded::packed && !matrix.lines) return {};
  return {matrix.codes + first * matrix.row_bytes, (last - first) * matrix.row_bytes};
}

// Where one run of rows for each thread ends.
std::vector<int64_t> ends_of_runs(int64_t rows, int threads, int64_t whole) {
  const int64_t each = ((rows + threads - 1) / threads + whole - 1) / whole * whole;
  std::vector<int64_t> ends;
  for (int64_t done = 0; done < rows; ends.push_back(done)) done = std::min(rows, done + each);
  return ends;
}

using Ends = std::vector<int64_t>(int64_t rows, int threads, int64_t whole);
using Work = std::function<void(size_t sum, int64_t first, int64_t last, int worker)>;

Stage stage_of(const std::vector<const Sum*>& sums, int threads, Ends* find_ends, Stretch (*stretch)(const Sum&, int64_t first, int64_t last), Work work) {
  const int64_t whole = whole_rows(sums);
  std::vector<int64_t> begins{0};  // of each sum's rows: tasks have whole chunks of each
  for (const Sum* sum : sums) begins.push_back(begins.back() + (sum->rows + whole - 1) / whole * whole);
  const std::vector<int64_t> ends = find_ends(begins.back(), threads, whole);
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
    parts(task, [&](size_t sum, int64_t first, int64_t last) { if (found.bytes == 0) found = stretch(*sums[sum], first, last); });
    return found;
  };
  return {static_cast<int64_t>(ends.size()), run, reads};
}

}  // namespace

Stage stage_of_rows(const std::vector<const Sum*>& sums, int threads, Work work) {
  // What is added to first terms is far less than these, and costs least in one run of rows for each thread.
  const bool based = std::all_of(sums.begin(), sums.end(), [](const Sum* sum) { return has_base(*sum); });
  const auto stretch = [](const Sum& sum, int64_t first, int64_t last) { return has_base(sum) ? Stretch{} : stretch_of(sum, first, last); };
  return stage_of(sums, threads, based ? ends_of_runs : ends_of_tasks, stretch, std::move(work));
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
    if (entries_[i].inner >= 0) floats_ += whole_lines(kernels_.prepared_floats(product(i, nullptr, nullptr, Number::f32))) + page_floats;
    scratch_ = std::max(scratch_, whole_lines(kernels_.scratch_floats(matrix, vectors_)));
  }
}

size_t Products::layout_for(const Coded& matrix) {
  const auto found = std::find_if(layouts_.begin(), layouts_.end(), [&](const Layout& layout) { return same_layout(*layout.matrix, matrix); });
  if (found != layouts_.end()) return static_cast<size_t>(found - layouts_.begin());
  layouts_.push_back({&matrix, nullptr});
  floats_ += whole_lines(kernels_.prepared_floats(made_ready(layouts_.back(), nullptr))) + page_floats;
  return layouts_.size() - 1;
}

Product Products::product(size_t entry, const void* inputs, void* outputs, Number number) const {
  return {entries_[entry].matrix, inputs, outputs, vectors_, number, digits_, &broken_[entry], entries_[entry].inner < 0 ? number_ : Number::f32};
}

Product Products::made_ready(const Layout& layout, const void* inputs) const {
  return {layout.matrix, inputs, nullptr, vectors_, number_, digits_, nullptr, number_};
}

void Products::place(float* room) {
  const auto take = [&room](int64_t count) {
    float* taken = room;
    room += whole_lines(count);
    return taken;
  };
  const auto take_pages = [&](int64_t count) { return room = first_page(room), take(count); };
  for (Layout& layout : layouts_) layout.prepared = take_pages(kernels_.prepared_floats(made_ready(layout, nullptr)));
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].direct) entries_[i].outputs = take(vectors_ * entries_[i].matrix->rows);
    if (entries_[i].inner >= 0) entries_[i].prepared = take_pages(kernels_.prepared_floats(product(i, nullptr, nullptr, Number::f32)));
  }
}

void Products::prepare(const void* inputs, int64_t vector) const {
  for (const Layout& layout : layouts_) kernels_.prepare(made_ready(layout, inputs), vector, layout.prepared);
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

// What an entry gives, in its own float32 outputs.
void Products::multiply_entry(size_t entry, int64_t first, int64_t last, float* scratch) const {
  kernels_.multiply(product(entry, nullptr, entries_[entry].outputs, Number::f32), prepared(entry), first, last, scratch);
}

void Products::add_stages(std::vector<Stage>& stages, int threads, float* scratch) const {
  std::vector<std::pair<Product, float*>> made;
  for (const Layout& layout : layouts_) made.push_back({made_ready(layout, nullptr), layout.prepared});
  add_parts(stages, made);
  std::vector<int64_t> begins{0};  // of each factor's tasks, which come before first terms'
  for (size_t i = 0; i < inner_.size(); ++i) {
    const Coded& matrix = *entries_[i].matrix;
    const int64_t rows = inner_rows(matrix, threads);
    begins.push_back(begins.back() + (matrix.rows + rows - 1) / rows);
  }
  std::vector<const Sum*> based;
  std::vector<size_t> firsts;  // of those sums
  for (size_t i = 0; i < sums_.size(); ++i) if (has_base(*sums_[i])) based.push_back(sums_[i]), firsts.push_back(first_terms_[i]);
  const Stage bases = stage_of(based, threads, ends_of_tasks, stretch_of, [=](size_t sum, int64_t first, int64_t last, int worker) {
    multiply_entry(firsts[sum], first, last, scratch + worker * scratch_);
  });
  const int64_t before = begins.back();
  if (before + bases.tasks == 0) return;
  const auto run = [=](int64_t task, int worker) {
    if (task >= before) return bases.work(task - before, worker);
    const size_t i = place_of(begins, task);
    const Coded& matrix = *entries_[i].matrix;
    const int64_t rows = inner_rows(matrix, threads), first = (task - begins[i]) * rows;
    multiply_entry(i, first, std::min(first + rows, matrix.rows), scratch + worker * scratch_);
  };
  stages.push_back({before + bases.tasks, run, [=](int64_t task) { return task < before ? Stretch{} : bases.reads(task - before); }});
  if (inner_.empty()) return;
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
  const size_t begin = first_terms_[index], end = begin + sum.terms.size();
  if (rounds_itself(sum)) {
    return kernels_.multiply(product(begin, nullptr, outputs, number_), prepared(begin), first, last, scratch);
  }
  float* total = entries_[begin].outputs;
  if (!has_base(sum)) multiply_entry(begin, first, last, scratch);
  bool rounded = false;
  for (size_t i = begin + 1; i < end; ++i) {
    if (can_add(*entries_[i].matrix)) {
      rounded = i + 1 == end;  // by the last one, where it adds
      Product adding = rounded ? product(i, nullptr, outputs, number_) : product(i, nullptr, total, Number::f32);
      adding.base = total;
      kernels_.multiply(adding, prepared(i), first, last, scratch);
      continue;
    }
    multiply_entry(i, first, last, scratch);
    const float* more = entries_[i].outputs;
    for (int64_t v = 0; v < vectors_; ++v) for (int64_t at = v * sum.rows + first; at < v * sum.rows + last; ++at) total[at] += more[at];
  }
  for_number(number_, [&](auto type) {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t from = v * sum.rows;
      if (!rounded) write_numbers(type, total + from + first, last - first, outputs, from + first);
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
  products.add_stages(stages, threads, scratch);
  stages.push_back(stage_of_rows(given, threads, [&](size_t sum, int64_t first, int64_t last, int worker) {
    products.multiply(sum, first, last, outputs[sum], scratch + worker * products.scratch_floats());
  }));
  run_stages(threads, stages);
  products.check();
}

}  // namespace fewbits
