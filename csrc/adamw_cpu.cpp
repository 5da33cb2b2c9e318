// AdamW, the average of the weights and their bfloat16 copies in one pass over a list of tensors, on the CPU.
//
// Every element is updated by itself, so threads and chunks change no bit; AVX2 and AVX-512 agree (see simd.h).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "adamw.h"
#include "adamw_lists.h"
#include "native.h"
#include "simd.h"

namespace dit_fast::adamw {

constexpr int64_t kChunk = 16384;  // elements of a task

#define DIT_FAST_KERNEL "adamw_kernel.inc"
#include "each_level.inc"

void step_cpu(std::vector<Tensor> weights, std::vector<Tensor> gradients, std::vector<Tensor> first,
              std::vector<Tensor> second, std::vector<Tensor> ema, std::vector<Tensor> shadows,
              std::vector<Tensor> counts, Tensor lr, Maybe factor, Maybe applied, double beta1, double beta2, double eps,
              double weight_decay, double ema_decay, Maybe, int64_t) {
  const Lists lists{weights, gradients, first, second, ema, shadows, counts};
  check(lists, lr, factor, applied, true);
  const Rules rules{beta1, beta2, eps, weight_decay, ema_decay};
  if (applied && *static_cast<const float*>(applied->data_ptr()) == 0.0f) return;
  const float scale = factor ? *static_cast<const float*>(factor->data_ptr()) : 1.0f;
  const double rate = *static_cast<const double*>(lr.data_ptr());
  struct Task {
    int64_t tensor, begin, end;
  };
  std::vector<Task> tasks;
  std::vector<Pointers> pointers;
  std::vector<Numbers> own;
  for (size_t i = 0; i < weights.size(); ++i) {
    float* count = static_cast<float*>(counts[i].data_ptr());
    *count += 1.0f;
    pointers.push_back(pointers_of(lists, i));
    own.push_back(numbers(rules, rate, *count, scale, true));
    const int64_t size = weights[i].numel();
    for (int64_t begin = 0; begin < size; begin += kChunk)
      tasks.push_back({static_cast<int64_t>(i), begin, std::min(size, begin + kChunk)});
  }
  const Level isa = resolve(-1);
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 2, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; ++t) {
      const Task& task = tasks[t];
      DIT_FAST_AT_LEVEL(isa, update(own[task.tensor], pointers[task.tensor], task.begin, task.end));
    }
  });
}

}  // namespace dit_fast::adamw

STABLE_TORCH_LIBRARY_FRAGMENT(dit_fast_native, m) {
  m.def(
      "adamw_ema_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] ema, "
      "Tensor(e!)[] shadows, Tensor(f!)[] counts, Tensor lr, Tensor? factor, Tensor? applied, float beta1, float beta2, "
      "float eps, float weight_decay, float ema_decay, Tensor(g!)? scratch, int stream) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CPU, m) {
  m.impl("adamw_ema_", TORCH_BOX(&dit_fast::adamw::step_cpu));
}
