#define SOD_ISA scalar
#include "isa_table.h"

namespace sod {

const CpuKernels* scalar_kernels_compiled() {
  using Rows = Table<VecScalar<float>>;
  static const CpuKernels table = {"scalar",      Rows::stats,     Rows::second,
                                   Rows::grad, StepTable::sums, StepTable::gather};
  return &table;
}

}  // namespace sod
