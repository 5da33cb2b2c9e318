// What the operators share: element types, the choice of the instruction set, checks of tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace dit_fast {

enum class Type { kFloat, kBfloat16, kHalf };

inline int64_t element_size(Type type) { return type == Type::kFloat ? 4 : 2; }

inline Type read_type(const torch::stable::Tensor& tensor, const char* what) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, what,
                  " must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? Type::kFloat : type == ScalarType::BFloat16 ? Type::kBfloat16 : Type::kHalf;
}

inline float* read_floats(const torch::stable::Tensor& tensor, int64_t count, const char* what) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Float, what,
                  " must be a contiguous float32 CPU tensor");
  STD_TORCH_CHECK(tensor.numel() == count, what, " has ", tensor.numel(), " elements, expected ", count);
  return static_cast<float*>(tensor.data_ptr());
}

enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline int64_t best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return kAvx512;
  if (avx2) return kAvx2;
#endif
  return kPortable;
}

// Negative: the best of this machine.
inline Level resolve(int64_t level) {
  const int64_t best = best_level();
  STD_TORCH_CHECK(level <= best, "instruction set level ", level, " is above this machine's ", best);
  return static_cast<Level>(level < 0 ? best : level);
}

}  // namespace dit_fast

// Calls the version of a kernel function that was compiled for `level` (see each_level.inc).
#if defined(__x86_64__)
#define DIT_FAST_AT_LEVEL(level, ...) \
  ((level) == kAvx512 ? avx512::__VA_ARGS__ : (level) == kAvx2 ? avx2::__VA_ARGS__ : portable::__VA_ARGS__)
#else
#define DIT_FAST_AT_LEVEL(level, ...) (portable::__VA_ARGS__)
#endif
