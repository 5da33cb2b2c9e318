// The lists of tensors that a pass of the optimizer takes, checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace dit_fast::adamw {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// shadows: none, or one for each weight, of which an empty one stands for none.
struct Lists {
  const std::vector<Tensor>&weights, &gradients, &first, &second, &ema, &shadows, &counts;
};

struct Pointers {
  float* weight;
  const float* gradient;
  float *first, *second, *ema;
  uint16_t* shadow;
};

inline void check_one(const Tensor& tensor, bool cpu, torch::headeronly::ScalarType type, int64_t count,
                      const char* what) {
  STD_TORCH_CHECK(tensor.is_cpu() == cpu && tensor.is_contiguous() && tensor.scalar_type() == type,
                  "adamw: ", what, " must be contiguous and of the dtype and device of the others");
  STD_TORCH_CHECK(tensor.numel() == count, "adamw: ", what, " has ", tensor.numel(), " elements, expected ", count);
}

inline void check(const Lists& lists, const Tensor& lr, const Maybe& factor, const Maybe& applied, bool cpu) {
  using torch::headeronly::ScalarType;
  const std::vector<Tensor>* all[] = {&lists.gradients, &lists.first, &lists.second, &lists.ema, &lists.counts};
  const char* names[] = {"a gradient", "a first moment", "a second moment", "an average", "a count"};
  const size_t size = lists.weights.size();
  for (int64_t k = 0; k < 5; ++k) {
    STD_TORCH_CHECK(all[k]->size() == size, "adamw: as many tensors in each list are expected");
    for (size_t i = 0; i < size; ++i)
      check_one((*all[k])[i], cpu, ScalarType::Float, k == 4 ? 1 : lists.weights[i].numel(), names[k]);
  }
  for (const Tensor& weight : lists.weights) check_one(weight, cpu, ScalarType::Float, weight.numel(), "a weight");
  STD_TORCH_CHECK(lists.shadows.empty() || lists.shadows.size() == size, "adamw: a shadow for each weight, or none");
  for (size_t i = 0; i < lists.shadows.size(); ++i)
    if (lists.shadows[i].numel() > 0)
      check_one(lists.shadows[i], cpu, ScalarType::BFloat16, lists.weights[i].numel(), "a shadow");
  check_one(lr, cpu, ScalarType::Double, 1, "lr");
  if (factor) check_one(*factor, cpu, ScalarType::Float, 1, "factor");
  if (applied) check_one(*applied, cpu, ScalarType::Float, 1, "applied");
}

inline Pointers pointers_of(const Lists& lists, size_t i) {
  const auto floats = [](const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); };
  const bool shadowed = !lists.shadows.empty() && lists.shadows[i].numel() > 0;
  return {floats(lists.weights[i]), floats(lists.gradients[i]), floats(lists.first[i]), floats(lists.second[i]),
          floats(lists.ema[i]), shadowed ? static_cast<uint16_t*>(lists.shadows[i].data_ptr()) : nullptr};
}

}  // namespace dit_fast::adamw
