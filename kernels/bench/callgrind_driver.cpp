// Runs one pass of the CPU kernels under callgrind, so that instructions per pair can be counted.
//   callgrind_driver rows columns        the instruction set comes from SOD_CPU_ISA
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sod/cpu_api.h"
#include "sod/portable.h"

// Named so that --toggle-collect can find it; everything it calls is counted, nothing else.
extern "C" __attribute__((noinline)) void counted_scoring_pass(const sod::CpuKernels& table,
                                                               const sod::StatsArgs& args,
                                                               int64_t rows) {
  table.stats(args, 0, rows);
}

int main(int argc, char** argv) {
  const int64_t rows = argc > 1 ? std::atoll(argv[1]) : 2;
  const int64_t cols = argc > 2 ? std::atoll(argv[2]) : 151936;
  const char* problem = nullptr;
  const sod::CpuKernels* table = sod::chosen_kernels(&problem);
  if (table == nullptr) {
    std::fprintf(stderr, "%s\n", problem);
    return 1;
  }
  std::vector<uint16_t> student(rows * cols), teacher(rows * cols);
  uint32_t state = 1;
  for (int64_t i = 0; i < rows * cols; ++i) {  // bf16 bits of numbers in about -8..8
    state = state * 1664525u + 1013904223u;
    student[i] = uint16_t(0x3f80u | ((state >> 16) & 0x817fu));
    state = state * 1664525u + 1013904223u;
    teacher[i] = uint16_t(0x3f80u | ((state >> 16) & 0x817fu));
  }
  std::vector<int64_t> targets(rows, 7);
  std::vector<float> partials(rows * sod::kNumPartials);
  const sod::StatsArgs args = {{student.data(), teacher.data(), cols, cols, targets.data(), 0, cols,
                                1.0, 1.0 / sod::kLn2, sod::DType::kBFloat16},
                               partials.data()};
  counted_scoring_pass(*table, args, rows);
  std::printf("%s %lld pairs, Z = %g\n", table->name, (long long)(rows * cols), partials[1]);
  return 0;
}
