// Memory that is kept from one call to the next.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fewbits {

constexpr int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Where a page begins, with so much room before it. Inputs in a kernel's order are read again for every few rows, while codes drive them out of the
// first cache: the processor fetches them back sooner where they are of as few pages as can be.
constexpr int64_t page_floats = 1024;
inline float* first_page(float* room) {
  constexpr uintptr_t page = 4 * page_floats;
  return room + (page - reinterpret_cast<uintptr_t>(room) % page) % page / 4;
}

// Memory of a calling thread that is kept from one product to the next, so that small products ask the system for nothing.
class Room {
 public:
  float* floats(int64_t count) {
    constexpr int64_t line = 16;
    if (count + line > size_) {
      memory_.reset();  // before the new one is asked for
      memory_.reset(new float[static_cast<size_t>(count + line)]);
      size_ = count + line;
    }
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (64 - address % 64) % 64 / 4;
  }

 private:
  std::unique_ptr<float[]> memory_;
  int64_t size_ = 0;
};

}  // namespace fewbits
