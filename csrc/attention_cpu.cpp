// Self-attention over packed queries, keys and values, forward and backward, on the CPU.
//
// A head at a time, by blocks of 64 queries, in float32; every result is rounded once. Threads take different heads, so
// results have the same bits for any thread count, and on AVX2 and AVX-512 alike (see simd.h).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "native.h"
#include "simd.h"

namespace dit_fast::attention {

using torch::stable::Tensor;

constexpr int64_t kBlock = 64;  // queries whose weights are in memory at once: part of the definition
constexpr int64_t kLine = 64;   // bytes that a cache fetches at once

// One head of one sample; strides are in elements from token to token.
struct Head {
  Type type;
  int64_t tokens, width, padded;  // padded: tokens, rounded up to lanes
  float scale;
  const char *query, *key, *value;
  int64_t token_stride;
  char* mixed;
  int64_t mixed_stride;
  float* log_sums;
  const char* grad;
  int64_t grad_stride;
  char *grad_query, *grad_key, *grad_value;
};

#define DIT_FAST_KERNEL "attention_kernel.inc"
#include "each_level.inc"

struct Packed {
  Type type;
  int64_t samples, tokens, heads, width, padded;
  char *qkv, *mixed;
  float* log_sums;
};

char* read_same(const Tensor& tensor, const Tensor& qkv, int64_t numel, const char* what) {
  const bool same = tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == qkv.scalar_type() &&
                    tensor.numel() == numel;
  STD_TORCH_CHECK(same, what, " must be a contiguous CPU tensor of qkv's type and shape");
  return static_cast<char*>(tensor.data_ptr());
}

// qkv [N, T, 3 H d], mixed [N, T, H d], log_sums [N, H, T].
Packed read(const Tensor& qkv, const Tensor& mixed, const Tensor& log_sums, int64_t heads) {
  STD_TORCH_CHECK(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, "qkv must be [N, T, 3 H d]");
  const int64_t samples = qkv.size(0), tokens = qkv.size(1), width = qkv.size(2) / (3 * heads);
  STD_TORCH_CHECK(width > 0 && width % kLanes == 0, "heads must be a multiple of ", kLanes, " wide");
  return {read_type(qkv, "qkv"),
          samples,
          tokens,
          heads,
          width,
          (tokens + kLanes - 1) / kLanes * kLanes,
          read_same(qkv, qkv, qkv.numel(), "qkv"),
          read_same(mixed, qkv, qkv.numel() / 3, "mixed"),
          read_floats(log_sums, samples * heads * tokens, "log_sums")};
}

// Calls work(head, scratch) for every head of every sample.
template <typename Work>
void each_head(const Packed& all, int64_t floats, char* grad, char* grad_qkv, const Work& work) {
  const int64_t size = element_size(all.type), row = all.heads * all.width;
  torch::stable::parallel_for(0, all.samples * all.heads, 1, [&](int64_t first, int64_t last) {
    const auto scratch = std::make_unique_for_overwrite<float[]>(floats);
    for (int64_t number = first; number < last; ++number) {
      const int64_t sample = number / all.heads, offset = number % all.heads * all.width;
      const int64_t packed = (sample * all.tokens * 3 * row + offset) * size;
      const int64_t plain = (sample * all.tokens * row + offset) * size;
      Head head{all.type, all.tokens, all.width, all.padded, 1.0f / std::sqrt(static_cast<float>(all.width))};
      head.query = all.qkv + packed, head.key = head.query + row * size, head.value = head.key + row * size;
      head.token_stride = 3 * row;
      head.mixed = all.mixed + plain, head.mixed_stride = row;
      head.log_sums = all.log_sums + number * all.tokens;
      if (grad != nullptr) {
        head.grad = grad + plain, head.grad_stride = row;
        head.grad_query = grad_qkv + packed;
        head.grad_key = head.grad_query + row * size, head.grad_value = head.grad_key + row * size;
      }
      work(head, scratch.get());
    }
  });
}

void attention_forward(Tensor qkv, Tensor mixed, Tensor log_sums, int64_t heads, int64_t level) {
  const Packed all = read(qkv, mixed, log_sums, heads);
  const Level isa = resolve(level);
  const int64_t floats = 3 * all.tokens * all.width + (all.width + kBlock) * all.padded;
  each_head(all, floats, nullptr, nullptr,
            [&](const Head& head, float* scratch) { DIT_FAST_AT_LEVEL(isa, forward(head, scratch)); });
}

void attention_backward(Tensor grad, Tensor qkv, Tensor mixed, Tensor log_sums, Tensor grad_qkv, int64_t heads,
                        int64_t level) {
  const Packed all = read(qkv, mixed, log_sums, heads);
  const Level isa = resolve(level);
  const int64_t floats = 7 * all.tokens * all.width + 2 * (all.width + kBlock) * all.padded;
  char* from = read_same(grad, qkv, qkv.numel() / 3, "grad");
  each_head(all, floats, from, read_same(grad_qkv, qkv, qkv.numel(), "grad_qkv"),
            [&](const Head& head, float* scratch) { DIT_FAST_AT_LEVEL(isa, backward(head, scratch)); });
}

}  // namespace dit_fast::attention

STABLE_TORCH_LIBRARY_FRAGMENT(dit_fast_native, m) {
  m.def("attention_forward(Tensor qkv, Tensor(a!) mixed, Tensor(b!) log_sums, int heads, int level) -> ()");
  m.def(
      "attention_backward(Tensor grad, Tensor qkv, Tensor mixed, Tensor log_sums, Tensor(a!) grad_qkv, int heads, "
      "int level) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&dit_fast::attention::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&dit_fast::attention::attention_backward));
}
