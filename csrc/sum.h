// Sums of matrices that are multiplied with the same inputs. Inputs are laid out once for all matrices that read them in one order, terms
// are added up in float32 and rounded once.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "matrix.h"
#include "threads.h"

namespace fewbits {

// A matrix, or the product of two: `inner` is what inputs meet first.
struct Summand {
  const Coded* matrix = nullptr;
  const Coded* inner = nullptr;
};

// Numbers [rows] that are added to outputs after these were rounded, as a layer does that adds them to a product.
struct Bias {
  const void* numbers = nullptr;
  Number number = Number::f32;
};

struct Sum {
  std::vector<Summand> terms;
  std::vector<Bias> biases;
  int64_t rows = 0, columns = 0;
};

// The products of some sums with the same inputs, in steps that threads share. Inputs are made ready first, then what the inner factors
// make of them; then any rows of any sum.
class Products {
 public:
  Products(const Kernels& kernels, const std::vector<const Sum*>& sums, int64_t vectors, Number number, int digits);

  int64_t floats() const { return floats_; }  // room that `place` hands out
  int64_t scratch_floats() const { return scratch_; }  // that each thread needs for itself
  void place(float* room);

  // How many vectors there are to make ready: kernels may take some more than there are, whose numbers nobody reads.
  int64_t padded_vectors() const { return kernels_.padded_vectors(vectors_); }
  void prepare(const void* inputs, int64_t vector) const;
  // What comes before the rows, divided among threads: what kernels make of inputs that are ready, inner factors, and first terms that others
  // are added to.
  void add_stages(std::vector<Stage>& stages, int threads, float* scratch) const;
  // Rows first to last of a sum, of all vectors, in `outputs` [vectors, rows] of the inputs' type.
  void multiply(size_t sum, int64_t first, int64_t last, void* outputs, float* scratch) const;
  // Raises std::invalid_argument where a matrix was found to point outside of itself.
  void check() const;

 private:
  struct Entry {
    const Coded* matrix;
    size_t layout;  // of its inputs
    int64_t inner = -1;    // the place of its inner factor, which makes its inputs
    bool direct = false;   // whether it is a sum by itself, that needs no room for outputs
    float *outputs = nullptr, *prepared = nullptr;
  };
  struct Layout {
    const Coded* matrix;
    float* prepared;
  };

  size_t layout_for(const Coded& matrix);
  void multiply_entry(size_t entry, int64_t first, int64_t last, float* scratch) const;
  void add_parts(std::vector<Stage>& stages, std::vector<std::pair<Product, float*>> made) const;
  Product product(size_t entry, const void* inputs, void* outputs, Number number) const;
  Product made_ready(const Layout& layout, const void* inputs) const;
  float* prepared(size_t entry) const { return entries_[entry].inner < 0 ? layouts_[entries_[entry].layout].prepared : entries_[entry].prepared; }

  const Kernels& kernels_;
  const std::vector<const Sum*> sums_;
  const int64_t vectors_;
  const Number number_;
  const int digits_;
  int64_t floats_ = 0, scratch_ = 0;
  std::vector<Layout> layouts_;
  std::vector<Entry> entries_;               // inner factors first, then the terms of all sums
  std::vector<size_t> inner_, first_terms_;  // places of the terms that have one; of each sum's first term
  std::unique_ptr<std::atomic<bool>[]> broken_;  // of each entry
};

// outputs[i] = inputs times sum i, transposed; both of type `number`, inputs [vectors, columns].
void multiply_sums(const Kernels& kernels, const std::vector<Sum>& sums, const void* inputs, const std::vector<void*>& outputs, int64_t vectors,
                   Number number, int threads, int digits);

// Rows at a time where all tasks are as long.
int64_t rows_of_task(int64_t rows, int threads);
// The rows of some sums, one sum behind the other, in tasks that get shorter; `work` is told a sum, some of its rows and the thread.
Stage stage_of_rows(const std::vector<const Sum*>& sums, int threads, std::function<void(size_t sum, int64_t first, int64_t last, int worker)> work);

}  // namespace fewbits
