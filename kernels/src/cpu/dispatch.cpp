// Which instruction set serves on this machine.
#include <cstdlib>
#include <cstring>

#include "sod/cpu_api.h"

namespace sod {

const CpuKernels* scalar_kernels_compiled();
const CpuKernels* scalar_kernels() { return scalar_kernels_compiled(); }

#if defined(SOD_HAVE_X86)
const CpuKernels* avx512_kernels_compiled();
const CpuKernels* avx2_kernels_compiled();

const CpuKernels* avx512_kernels() {
  const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return here ? avx512_kernels_compiled() : nullptr;
}
const CpuKernels* avx2_kernels() {
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  return here ? avx2_kernels_compiled() : nullptr;
}
#else
const CpuKernels* avx512_kernels() { return nullptr; }
const CpuKernels* avx2_kernels() { return nullptr; }
#endif

const CpuKernels* chosen_kernels(const char** problem) {
  *problem = nullptr;
  const char* wanted = std::getenv("SOD_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    if (const CpuKernels* table = avx512_kernels()) return table;
    if (const CpuKernels* table = avx2_kernels()) return table;
    return scalar_kernels();
  }
  const CpuKernels* table = nullptr;
  if (std::strcmp(wanted, "avx512") == 0) table = avx512_kernels();
  if (std::strcmp(wanted, "avx2") == 0) table = avx2_kernels();
  if (std::strcmp(wanted, "scalar") == 0) table = scalar_kernels();
  if (table == nullptr) {
    *problem = "SOD_CPU_ISA must be avx512, avx2 or scalar, and the machine must have it";
  }
  return table;
}

}  // namespace sod
