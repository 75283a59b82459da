// K1: the partial sums of every row over this rank's columns, one row per block at a time.
// Each thread keeps online sums of its own columns, fixed by its index; threads, then warps, merge by
// a fixed shuffle tree: the same inputs give the same bits.
#pragma once
#include "sod/cpu_api.h"
#include "sod/partials.h"
#include "sod/vector_io.cuh"

namespace sod {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// float64 logits serve checking, not speed: one block per multiprocessor, no vectors in flight.
template <typename E>
constexpr int kBlocksPerProcessor = sizeof(typename Element<E>::T) == 8 ? 1 : 2;
template <typename E>
constexpr int kInFlight = sizeof(typename Element<E>::T) == 8 ? 1 : 4;

template <typename T>
__device__ __forceinline__ T from_lane(T x, int offset) {
  return __shfl_xor_sync(0xffffffffu, x, offset);
}

template <typename T>
__device__ __forceinline__ Partials<T> warp_merged(Partials<T> x) {
#pragma unroll 1
  for (int offset = 16; offset > 0; offset /= 2) {
    const Partials<T> y = {from_lane(x.m, offset), from_lane(x.Z, offset), from_lane(x.A, offset),
                           from_lane(x.R, offset), from_lane(x.u, offset), from_lane(x.Y, offset),
                           from_lane(x.C, offset), from_lane(x.F, offset)};
    x = merged(x, y);
  }
  return x;
}

// One pair into the running sums; the maxima already cover it.
template <bool kTeacher, typename T>
__device__ __forceinline__ void add_pair(Partials<T>& sum, T z, T y, T scale) {
  const T zs = at_least(fma(z, scale, -sum.m), T(kSentinel));
  const T ez = exp2_any(zs);
  sum.Z += ez;
  sum.A = fma(ez, zs, sum.A);
  if (kTeacher) {
    const T ys = at_least(fma(y, scale, -sum.u), T(kSentinel));
    const T ey = exp2_any(ys), gap = zs - ys;
    sum.R = fma(ez, gap, sum.R);
    sum.Y += ey;
    sum.C = fma(ey, ys, sum.C);
    sum.F = fma(ey, gap, sum.F);
  }
}

// The maxima move rarely after the first few vectors: one branch, taken by few.
template <typename T>
__device__ __forceinline__ void raise_max(Partials<T>& sum, T m, T u) {
  if (m > sum.m || u > sum.u) sum = rescaled(sum, larger(m, sum.m), larger(u, sum.u));
}

template <typename E, bool kTeacher>
__device__ __forceinline__ void add_vector(Partials<typename Element<E>::T>& sum, const Raw16& z,
                                           const Raw16& y, typename Element<E>::T scale) {
  using T = typename Element<E>::T;
  using L = Lanes<E>;
  T m = L::get(z, 0), u = L::get(y, 0);
#pragma unroll
  for (int i = 1; i < L::kLanes; ++i) {
    m = fmax(m, L::get(z, i));  // skips NaN; the sums below do not
    if (kTeacher) u = fmax(u, L::get(y, i));
  }
  raise_max(sum, m * scale, kTeacher ? u * scale : T(kSentinel));
#pragma unroll
  for (int i = 0; i < L::kLanes; ++i) add_pair<kTeacher>(sum, L::get(z, i), L::get(y, i), scale);
}

// Columns [0, cols): 16-byte vectors where every row starts on 16 bytes, kUnroll of each tensor in
// flight per thread; otherwise, and past the last whole vector, element by element.
template <typename E, bool kTeacher, bool kAligned, int kUnroll>
__device__ __forceinline__ Partials<typename Element<E>::T> thread_sums(
    const E* z, const E* y, int64_t cols, typename Element<E>::T scale) {
  using T = typename Element<E>::T;
  constexpr int kLanes = Lanes<E>::kLanes;
  Partials<T> sum = empty_partials<T>();
  const int vectors = kAligned ? int(cols / kLanes) : 0;
  int v = threadIdx.x;
  for (; v + (kUnroll - 1) * kThreads < vectors; v += kUnroll * kThreads) {
    Raw16 zr[kUnroll], yr[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      zr[i] = load_readonly(z + int64_t(v + i * kThreads) * kLanes);
      yr[i] = kTeacher ? load_readonly(y + int64_t(v + i * kThreads) * kLanes) : zr[i];
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) add_vector<E, kTeacher>(sum, zr[i], yr[i], scale);
  }
  for (; v < vectors; v += kThreads) {
    const Raw16 zr = load_readonly(z + int64_t(v) * kLanes);
    const Raw16 yr = kTeacher ? load_readonly(y + int64_t(v) * kLanes) : zr;
    add_vector<E, kTeacher>(sum, zr, yr, scale);
  }
  for (int c = vectors * kLanes + int(threadIdx.x); c < int(cols); c += kThreads) {
    const T zc = to_number(z[c]), yc = kTeacher ? to_number(y[c]) : T(0);
    raise_max(sum, zc * scale, kTeacher ? yc * scale : T(kSentinel));
    add_pair<kTeacher>(sum, zc, yc, scale);
  }
  return sum;
}

template <typename E, bool kTeacher, bool kAligned>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<E>)
    vocab_stats_kernel(const StatsArgs args, int64_t rows) {
  using T = typename Element<E>::T;
  __shared__ Partials<T> of_warp[kWarps];
  const Logits& in = args.logits;
  const T scale = T(in.scale);
  for (int64_t r = blockIdx.x; r < rows; r += gridDim.x) {
    const int64_t target = in.targets[r];
    const E* z = static_cast<const E*>(in.student) + r * in.student_stride;
    const E* y = kTeacher ? static_cast<const E*>(in.teacher) + r * in.teacher_stride : z;
    const int64_t cols = target < 0 ? 0 : in.valid_cols;  // ignored rows are not read
    const Partials<T> mine =
        warp_merged(thread_sums<E, kTeacher, kAligned, kInFlight<E>>(z, y, cols, scale));
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    Partials<T> sum = empty_partials<T>();
    if (threadIdx.x < 32) {
      if (threadIdx.x < kWarps) sum = of_warp[threadIdx.x];
      sum = warp_merged(sum);
    }
    if (threadIdx.x == 0) {
      T* out = static_cast<T*>(args.partials) + r * kNumPartials;
      out[0] = sum.m, out[1] = sum.Z, out[2] = sum.A, out[3] = sum.R;
      out[4] = sum.u, out[5] = sum.Y, out[6] = sum.C, out[7] = sum.F;
      const int64_t label = target - in.vocab_start;
      const bool owner = label >= 0 && label < cols;
      out[8] = out[9] = T(kNotMine);
      if (owner) out[8] = at_least(fma(T(to_number(z[label])), scale, -sum.m), T(kSentinel));
      if (owner && kTeacher) {
        out[9] = at_least(fma(T(to_number(y[label])), scale, -sum.u), T(kSentinel));
      }
    }
    __syncthreads();  // of_warp is written again for the next row
  }
}

}  // namespace sod
