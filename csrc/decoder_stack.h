// All decoder layers of a model for one new token: each layer's steps, and attention over the keys and values that are kept, in one call.
#pragma once
#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "decoder_step.h"

namespace fewbits {

// Of one layer: [key_heads, room for tokens, width], of which some are filled.
struct Kept {
  void *keys = nullptr, *values = nullptr;
  int64_t room = 0;
};

struct Token {
  const void* states;         // [hidden]
  const void *cosine, *sine;  // [width], of its position
  void* outputs;              // [hidden], normalized where the stack has a norm behind its layers
  int64_t before;             // tokens that are kept; the new one's keys and values are written behind them
};


class Stack {
 public:
  Stack(std::vector<const DecoderLayer*> layers, std::optional<Norm> norm, float scale);
  ~Stack();

  // Computes a token's way through all layers. Raises std::invalid_argument as the kernels of the layers' products do.
  void run(const std::string& isa, const Token& token, const std::vector<Kept>& kept, int threads, int digits);

 private:
  class Plan;
  const std::vector<const DecoderLayer*> layers_;
  const std::optional<Norm> norm_;
  const float scale_;
  std::unique_ptr<Plan> plan_;
};

}  // namespace fewbits
