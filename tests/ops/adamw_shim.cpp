// csrc/adamw_cuda.cu for a CPU: blocks and threads one after the other. A wide load or store of an address that a GPU
// refuses raises. Built by tests/ops/test_adamw.py.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __grid_constant__
#define DIT_FAST_LIBRARY dit_fast_shim
#define DIT_FAST_DEVICE CPU
#define DIT_FAST_ON_CPU true

// The barrier: else the compiler takes for granted what is asked.
inline void check_aligned(const void* address, uintptr_t bytes) {
  asm volatile("" : "+r"(address));
  if (reinterpret_cast<uintptr_t>(address) % bytes) throw std::runtime_error("shim: a wide access is not aligned");
}
struct alignas(16) float4 {
  float x, y, z, w;
  float4(float x, float y, float z, float w) : x(x), y(y), z(z), w(w) {}
  float4(const float4& other) { *this = other; }
  float4& operator=(const float4& other) {
    check_aligned(this, sizeof(float4));
    check_aligned(&other, sizeof(float4));
    x = other.x, y = other.y, z = other.z, w = other.w;
    return *this;
  }
};
struct alignas(8) uint2 {
  uint32_t x, y;
  uint2(uint32_t x, uint32_t y) : x(x), y(y) {}
  uint2& operator=(const uint2& other) {
    check_aligned(this, sizeof(uint2));
    x = other.x, y = other.y;
    return *this;
  }
};
struct Index {
  int x;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
static thread_local Index threadIdx, blockIdx;
static int64_t launched = 0;

#define DIT_FAST_LAUNCH(kernel, blocks, threads, stream, ...)               \
  do {                                                                      \
    ++launched;                                                             \
    for (blockIdx.x = 0; blockIdx.x < (blocks); ++blockIdx.x)               \
      for (threadIdx.x = 0; threadIdx.x < (threads); ++threadIdx.x) kernel(__VA_ARGS__); \
  } while (false)

#include "adamw_cuda.cu"

int64_t launches() { return launched; }

STABLE_TORCH_LIBRARY(dit_fast_shim, m) {
  m.def(
      "adamw_ema_(Tensor(a!)[] weights, Tensor[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, Tensor(d!)[] ema, "
      "Tensor(e!)[] shadows, Tensor(f!)[] counts, Tensor lr, Tensor? factor, Tensor? applied, float beta1, float beta2, "
      "float eps, float weight_decay, float ema_decay, Tensor(g!)? scratch, int stream) -> ()");
  m.def("launches() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_shim, CompositeExplicitAutograd, m) { m.impl("launches", TORCH_BOX(&launches)); }
