// Launchers of K2 and of the second statistics pass.
#include "launch.h"
#include "sod/vocab_grad.cuh"

namespace sod {
namespace {

template <typename E, bool kTeacher, bool kMixture>
void grad_of(const GradArgs& args, int64_t rows, cudaStream_t stream) {
  const int blocks = persistent_blocks(rows);
  const bool vectors =
      aligned(args.logits) && on_16_bytes(args.out, args.out_stride, args.logits.dtype);
  if (vectors) {
    vocab_grad_kernel<E, kTeacher, kMixture, true><<<blocks, kThreads, 0, stream>>>(args, rows);
  } else {
    vocab_grad_kernel<E, kTeacher, kMixture, false><<<blocks, kThreads, 0, stream>>>(args, rows);
  }
}

template <typename E>
void grad_for(const GradArgs& args, int64_t rows, bool mixture, cudaStream_t stream) {
  if (args.logits.teacher == nullptr) {
    grad_of<E, false, false>(args, rows, stream);
  } else if (mixture) {
    grad_of<E, true, true>(args, rows, stream);
  } else {
    grad_of<E, true, false>(args, rows, stream);
  }
}

template <typename E>
void second_for(const SecondArgs& args, int64_t rows, cudaStream_t stream) {
  vocab_second_kernel<E><<<persistent_blocks(rows), kThreads, 0, stream>>>(args, rows);
}

}  // namespace

const char* launch_grad(const GradArgs& args, int64_t rows, void* stream) {
  if (rows == 0) return nullptr;
  // beta 0 says that no row asks for a JSD gradient
  SOD_DISPATCH(args.logits.dtype, grad_for, args, rows, args.beta != 0.0,
               static_cast<cudaStream_t>(stream))
  return launch_error();
}

const char* launch_second(const SecondArgs& args, int64_t rows, void* stream) {
  if (rows == 0) return nullptr;
  SOD_DISPATCH(args.logits.dtype, second_for, args, rows, static_cast<cudaStream_t>(stream))
  return launch_error();
}

}  // namespace sod
