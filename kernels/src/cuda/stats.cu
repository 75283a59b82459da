// Launchers of K1 and of the rank merge.
#include "launch.h"
#include "sod/vocab_stats.cuh"

namespace sod {
namespace {

template <typename E, bool kTeacher>
void stats_of(const StatsArgs& args, int64_t rows, cudaStream_t stream) {
  const int blocks = persistent_blocks(rows);
  if (aligned(args.logits)) {
    vocab_stats_kernel<E, kTeacher, true><<<blocks, kThreads, 0, stream>>>(args, rows);
  } else {
    vocab_stats_kernel<E, kTeacher, false><<<blocks, kThreads, 0, stream>>>(args, rows);
  }
}

template <typename E>
void stats_for(const StatsArgs& args, int64_t rows, cudaStream_t stream) {
  if (args.logits.teacher) {
    stats_of<E, true>(args, rows, stream);
  } else {
    stats_of<E, false>(args, rows, stream);
  }
}

template <typename T>
__global__ void finish_kernel(const T* partials, int64_t ranks, int64_t rows, const int64_t* targets,
                              T* out) {
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= rows) return;
  finish_row(partials + t * kNumPartials, ranks, rows * kNumPartials, targets[t],
             out + t * kNumRowStats);
}

}  // namespace

const char* launch_stats(const StatsArgs& args, int64_t rows, void* stream) {
  if (rows == 0) return nullptr;
  SOD_DISPATCH(args.logits.dtype, stats_for, args, rows, static_cast<cudaStream_t>(stream))
  return launch_error();
}

const char* launch_finish(const void* partials, int64_t ranks, int64_t rows, const int64_t* targets,
                          void* out, bool is_double, void* stream) {
  if (rows == 0) return nullptr;
  const int threads = 128, blocks = int((rows + threads - 1) / threads);
  const auto s = static_cast<cudaStream_t>(stream);
  if (is_double) {
    finish_kernel<<<blocks, threads, 0, s>>>(static_cast<const double*>(partials), ranks, rows,
                                             targets, static_cast<double*>(out));
  } else {
    finish_kernel<<<blocks, threads, 0, s>>>(static_cast<const float*>(partials), ranks, rows,
                                             targets, static_cast<float*>(out));
  }
  return launch_error();
}

}  // namespace sod
