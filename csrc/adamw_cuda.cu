// AdamW, the average of the weights and their bfloat16 copies in one pass over a list of tensors, on CUDA.
//
// Two kernels: the first makes the numbers of each tensor's update from counts, rate, factor and `applied`, which lie on
// the device, so the host reads nothing and a captured graph replays with what they hold then. In the second a block takes
// kChunk elements of one tensor, 16 bytes per load and store where addresses allow. Addresses travel with the launch,
// kTensors at a time. Every element is updated by itself: no order of blocks changes a bit.
//
// Compiled with -fmad=false: products and sums are fused where adamw_element.inc says so, and only there.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "adamw.h"
#include "adamw_lists.h"
#include "cuda_launch.h"

namespace dit_fast::adamw {

constexpr int kThreads = 256, kLanesOfThread = 4, kTurns = 4;
constexpr int64_t kChunk = int64_t{kThreads} * kLanesOfThread * kTurns;
constexpr int kTensors = 48;  // of a launch: its arguments are limited to 4 KB

struct Vec {
  float value;
  static DIT_FAST_BOTH Vec set(float value) { return {value}; }
  DIT_FAST_BOTH Vec operator+(const Vec& other) const { return {value + other.value}; }
  DIT_FAST_BOTH Vec operator-(const Vec& other) const { return {value - other.value}; }
  DIT_FAST_BOTH Vec operator*(const Vec& other) const { return {value * other.value}; }
  DIT_FAST_BOTH Vec operator/(const Vec& other) const { return {value / other.value}; }
  DIT_FAST_BOTH Vec times_plus(const Vec& factor, const Vec& addend) const {
    return {fmaf(value, factor.value, addend.value)};
  }
  DIT_FAST_BOTH Vec root() const { return {sqrtf(value)}; }
};

#include "adamw_element.inc"

struct Counts {
  float* at[kTensors];
};

struct Chunks {
  Pointers at[kTensors];
  int64_t size[kTensors];
  int32_t first[kTensors + 1];  // chunk of each tensor; the last one: how many there are
};

__device__ uint16_t bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ Element element(float weight, float first, float second, float ema) {
  return {{weight}, {first}, {second}, {ema}};
}

__global__ void adamw_numbers(Counts counts, int tensors, Rules rules, const double* lr, const float* factor,
                              const float* applied, Numbers* out) {
  const int i = threadIdx.x;
  if (i >= tensors) return;
  const bool moves = applied == nullptr || *applied != 0.0f;
  if (moves) *counts.at[i] += 1.0f;
  out[i] = numbers(rules, *lr, *counts.at[i], factor == nullptr ? 1.0f : *factor, moves);
}

__global__ void __launch_bounds__(kThreads) adamw_update(const __grid_constant__ Chunks chunks, int tensors,
                                                         const Numbers* __restrict__ all) {
  const int chunk = blockIdx.x;
  int tensor = 0;
  for (int step = 32; step > 0; step >>= 1)
    if (tensor + step < tensors && chunks.first[tensor + step] <= chunk) tensor += step;
  const Numbers n = all[tensor];
  if (n.moves == 0) return;
  const Pointers at = chunks.at[tensor];
  const int64_t size = chunks.size[tensor], begin = (chunk - chunks.first[tensor]) * kChunk;
  const uintptr_t bits = reinterpret_cast<uintptr_t>(at.weight) | reinterpret_cast<uintptr_t>(at.gradient) |
                         reinterpret_cast<uintptr_t>(at.first) | reinterpret_cast<uintptr_t>(at.second) |
                         reinterpret_cast<uintptr_t>(at.ema) | reinterpret_cast<uintptr_t>(at.shadow) << 1;
  if ((bits & 15) == 0 && begin + kChunk <= size) {
#pragma unroll 1
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t i = begin + (turn * kThreads + threadIdx.x) * kLanesOfThread;
      const float4 g = *reinterpret_cast<const float4*>(at.gradient + i);
      float4 w = *reinterpret_cast<const float4*>(at.weight + i);
      float4 m = *reinterpret_cast<const float4*>(at.first + i);
      float4 v = *reinterpret_cast<const float4*>(at.second + i);
      float4 e = *reinterpret_cast<const float4*>(at.ema + i);
      const Element a = updated(n, {g.x}, element(w.x, m.x, v.x, e.x));
      const Element b = updated(n, {g.y}, element(w.y, m.y, v.y, e.y));
      const Element c = updated(n, {g.z}, element(w.z, m.z, v.z, e.z));
      const Element d = updated(n, {g.w}, element(w.w, m.w, v.w, e.w));
      w = make_float4(a.weight.value, b.weight.value, c.weight.value, d.weight.value);
      m = make_float4(a.first.value, b.first.value, c.first.value, d.first.value);
      v = make_float4(a.second.value, b.second.value, c.second.value, d.second.value);
      e = make_float4(a.ema.value, b.ema.value, c.ema.value, d.ema.value);
      *reinterpret_cast<float4*>(at.weight + i) = w;
      *reinterpret_cast<float4*>(at.first + i) = m;
      *reinterpret_cast<float4*>(at.second + i) = v;
      *reinterpret_cast<float4*>(at.ema + i) = e;
      if (at.shadow != nullptr)
        *reinterpret_cast<uint2*>(at.shadow + i) =
            make_uint2(bfloat16(w.x) | uint32_t{bfloat16(w.y)} << 16, bfloat16(w.z) | uint32_t{bfloat16(w.w)} << 16);
    }
    return;
  }
  for (int64_t i = begin + threadIdx.x; i < size && i < begin + kChunk; i += kThreads) {
    const Element next = updated(n, {at.gradient[i]}, element(at.weight[i], at.first[i], at.second[i], at.ema[i]));
    at.weight[i] = next.weight.value;
    at.first[i] = next.first.value;
    at.second[i] = next.second.value;
    at.ema[i] = next.ema.value;
    if (at.shadow != nullptr) at.shadow[i] = bfloat16(next.weight.value);
  }
}

// scratch: float64 for the `Numbers` of every tensor; made by the caller, whose allocator knows the stream.
void step_cuda(std::vector<Tensor> weights, std::vector<Tensor> gradients, std::vector<Tensor> first,
               std::vector<Tensor> second, std::vector<Tensor> ema, std::vector<Tensor> shadows,
               std::vector<Tensor> counts, Tensor lr, Maybe factor, Maybe applied, double beta1, double beta2, double eps,
               double weight_decay, double ema_decay, Maybe scratch, int64_t stream) {
  const Lists lists{weights, gradients, first, second, ema, shadows, counts};
  check(lists, lr, factor, applied, DIT_FAST_ON_CPU);
  STD_TORCH_CHECK(scratch && scratch->is_contiguous() &&
                      scratch->numel() * int64_t{sizeof(double)} >= int64_t{sizeof(Numbers)} * int64_t(weights.size()),
                  "adamw: the scratch is too small");
  const Rules rules{beta1, beta2, eps, weight_decay, ema_decay};
  const auto floats = [](const Maybe& given) {
    return given ? static_cast<const float*>(given->data_ptr()) : nullptr;
  };
  Numbers* made = static_cast<Numbers*>(scratch->data_ptr());
  size_t done = 0;
  while (done < weights.size()) {
    Counts own{};
    Chunks chunks{};
    int tensors = 0;
    int64_t blocks = 0;
    for (; done < weights.size() && tensors < kTensors; ++done) {
      const int64_t size = weights[done].numel();
      if (size > 0 && blocks > 0 && blocks + (size + kChunk - 1) / kChunk > INT32_MAX) break;
      own.at[tensors] = static_cast<float*>(counts[done].data_ptr());
      chunks.at[tensors] = pointers_of(lists, done);
      chunks.size[tensors] = size;
      chunks.first[tensors++] = static_cast<int32_t>(blocks);
      blocks += (size + kChunk - 1) / kChunk;
    }
    chunks.first[tensors] = static_cast<int32_t>(blocks);
    DIT_FAST_LAUNCH(adamw_numbers, 1, 64, stream, own, tensors, rules, static_cast<const double*>(lr.data_ptr()),
                    floats(factor), floats(applied), made);
    if (blocks > 0) DIT_FAST_LAUNCH(adamw_update, blocks, kThreads, stream, chunks, tensors, made);
    made += tensors;
  }
}

}  // namespace dit_fast::adamw

STABLE_TORCH_LIBRARY_IMPL(DIT_FAST_LIBRARY, DIT_FAST_DEVICE, m) {
  m.impl("adamw_ema_", TORCH_BOX(&dit_fast::adamw::step_cuda));
}
