#define SOD_ISA avx2
#include "isa_table.h"
#include "vec_avx2.h"

namespace sod {

const CpuKernels* avx2_kernels_compiled() {
  using Rows = Table<VecAvx2>;
  static const CpuKernels table = {"avx2",      Rows::stats,     Rows::second,
                                   Rows::grad, StepTable::sums, StepTable::gather};
  return &table;
}

}  // namespace sod
