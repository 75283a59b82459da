#define SOD_ISA avx512
#include "isa_table.h"
#include "vec_avx512.h"

namespace sod {

const CpuKernels* avx512_kernels_compiled() {
  using Rows = Table<VecAvx512>;
  static const CpuKernels table = {"avx512",      Rows::stats,     Rows::second,
                                   Rows::grad, StepTable::sums, StepTable::gather};
  return &table;
}

}  // namespace sod
