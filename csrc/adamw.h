// The numbers of an update by AdamW with an average of the weights: what the C++ and the CUDA pass share, with
// adamw_element.inc.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define DIT_FAST_BOTH __host__ __device__ inline
#else
#define DIT_FAST_BOTH inline
#endif

namespace dit_fast::adamw {

struct Rules {
  double beta1, beta2, eps, weight_decay, ema_decay;
};

// a + weight (b - a), as coefficient * (b - a) + (a or b), whichever is nearer.
struct Blend {
  float coefficient;
  bool from_end;
};

// The numbers of one tensor's update, in float32. moves: 0 where the update is not applied.
struct Numbers {
  float factor, decay, beta2, square, root, step, eps;
  Blend first, ema;
  int32_t moves;
};

DIT_FAST_BOTH Blend blend(double weight) {
  const float narrow = static_cast<float>(weight);
  const bool small = narrow < 0.5f && narrow > -0.5f;
  return {small ? narrow : narrow - 1.0f, !small};
}

// count: updates applied, this one included.
DIT_FAST_BOTH Numbers numbers(const Rules& rules, double lr, double count, float factor, bool moves) {
  const double bias1 = 1.0 - pow(rules.beta1, count), bias2 = 1.0 - pow(rules.beta2, count);
  return {factor,
          static_cast<float>(1.0 - lr * rules.weight_decay),
          static_cast<float>(rules.beta2),
          static_cast<float>(1.0 - rules.beta2),
          static_cast<float>(sqrt(bias2)),
          static_cast<float>(-lr / bias1),
          static_cast<float>(rules.eps),
          blend(1.0 - rules.beta1),
          blend(1.0 - rules.ema_decay),
          moves};
}

}  // namespace dit_fast::adamw
