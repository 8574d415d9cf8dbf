// Memory that is kept from one call to the next.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace fewbits {

constexpr int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

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
