// Compares instruction sets with plain sums in float64. Arguments: the instruction sets that there must be, best first, and no others.
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdio>

#include "compare.h"

namespace comparison {

namespace {

std::string now;

void tell_and_end(int) {
  const auto put = [](const char* text, size_t size) { (void)!write(STDOUT_FILENO, text, size); };
  put(now.data(), now.size());
  put(": memory was touched that is not its own\n", 41);
  _exit(1);
}

}  // namespace

void begin(const std::string& where) { now = where; }

void Count::look(double difference, double limit, const std::string& where) {
  if (std::fabs(difference) <= limit) {
    if (limit > 0.0) closest = std::fmax(closest, std::fabs(difference) / limit);
  } else if (++wrong <= 10) {
    std::printf("%s: off by %g, where %g would be right\n", where.c_str(), difference, limit);
    std::fflush(stdout);
  }
}

}  // namespace comparison

int main(int count, char** given) {
  std::string found, asked;
  for (const fewbits::Kernels* kernels : fewbits::available_kernels()) found += std::string(" ") + kernels->name;
  for (int i = 1; i < count; ++i) asked += std::string(" ") + given[i];
  if (found != asked) {
    std::printf("there are%s, not%s\n", found.c_str(), asked.c_str());
    return 1;
  }
  std::signal(SIGSEGV, comparison::tell_and_end);
  comparison::Count all;
  for (const fewbits::Kernels* kernels : fewbits::available_kernels()) {
    comparison::Count of;
    comparison::compare_products(*kernels, of);
    comparison::compare_attention(kernels->name, of);
    comparison::compare_rotations(*kernels, of);
    comparison::compare_feedback(*kernels, of);
    comparison::compare_sums_of_products(*kernels, of);
    std::printf("%s: %ld products, %ld decoded, %ld attended, %ld rotated, %ld fed back, %ld summed; at most %.2f of a limit; %ld wrong\n", kernels->name,
                static_cast<long>(of.products), static_cast<long>(of.decoded), static_cast<long>(of.attended), static_cast<long>(of.rotated),
                static_cast<long>(of.fed_back), static_cast<long>(of.summed), of.closest, static_cast<long>(of.wrong));
    std::fflush(stdout);
    all.wrong += of.wrong;
  }
  return all.wrong == 0 ? 0 : 1;
}
