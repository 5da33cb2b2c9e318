// Latent shards without Python: members of open shards by pread, crc32, header comparison, and rows of arrays in
// place: float32 of float32 and float16, integers as they are.
//
// Needs no torch. Anything that is not plainly right ends the call at that sample; Python reads it again and says what
// is wrong in its own words, so there is one text per error. Checksums and halves have a second version for x86-64
// processors with carry-less products, AVX2 and F16C; what comes out is the same.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace {

// CRC-32 of zlib, reflected: bit 31 of a word is the constant term.
constexpr uint32_t kPolynomial = 0xEDB88320u;

constexpr uint32_t times_x(uint32_t word) { return (word >> 1) ^ (word & 1 ? kPolynomial : 0u); }

constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = times_x(crc);
    tables[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  return tables;
}();

// The remainder `crc` after more bytes, eight at a time; not inverted at either end.
uint32_t remainder(uint32_t crc, const unsigned char* data, size_t size) {
  for (; size >= 8; size -= 8, data += 8) {
    const uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | uint32_t{data[3]} << 24);
    crc = kTables[7][low & 0xFF] ^ kTables[6][(low >> 8) & 0xFF] ^ kTables[5][(low >> 16) & 0xFF] ^
          kTables[4][low >> 24] ^ kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^ kTables[0][data[7]];
  }
  for (; size; --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data++) & 0xFF];
  return crc;
}

#if defined(__x86_64__)
#define DIT_FAST_HAS_QUICK 1

bool quick_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
}

// x^exponent modulo the polynomial, in the place that a product of reflected words wants.
constexpr int64_t power(int exponent) {
  uint32_t word = 0x80000000u;
  for (; exponent; --exponent) word = times_x(word);
  return int64_t{word} << 1;
}

// `remainder` of at least 64 bytes: four lanes are multiplied by x^512, the next 64 bytes added, until fewer are left
// (Gopal et al., Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction, 2009). The lanes are then a
// message of 64 bytes with the remainder of all that went in.
__attribute__((target("pclmul,sse4.1"))) uint32_t remainder_by_products(uint32_t crc, const unsigned char* data,
                                                                        size_t size) {
  const auto load = [](const unsigned char* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
  const __m128i factors = _mm_set_epi64x(power(512 - 32), power(512 + 32));
  __m128i lanes[4];
  for (int k = 0; k < 4; ++k) lanes[k] = load(data + 16 * k);
  lanes[0] = _mm_xor_si128(lanes[0], _mm_cvtsi32_si128(static_cast<int>(crc)));
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64)
    for (int k = 0; k < 4; ++k) {
      const __m128i early = _mm_clmulepi64_si128(lanes[k], factors, 0x00);
      const __m128i late = _mm_clmulepi64_si128(lanes[k], factors, 0x11);
      lanes[k] = _mm_xor_si128(_mm_xor_si128(early, late), load(data + 16 * k));
    }
  unsigned char folded[64];
  std::memcpy(folded, lanes, sizeof folded);
  return remainder(remainder(0, folded, sizeof folded), data, size);
}
#else
#define DIT_FAST_HAS_QUICK 0
bool quick_here() { return false; }
#endif

uint32_t crc32(const unsigned char* data, size_t size, [[maybe_unused]] bool quick) {
#if DIT_FAST_HAS_QUICK
  if (quick && size >= 64) return ~remainder_by_products(~0u, data, size);
#endif
  return ~remainder(~0u, data, size);
}

bool read_all(int file, unsigned char* to, size_t size, uint64_t offset) {
  while (size) {
    const ssize_t got = pread(file, to, size, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got, offset += got, size -= got;
  }
  return true;
}

float from_half(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, exponent = (half >> 10) & 31, fraction = half & 0x3FF;
  uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = sign | 0x7F800000u | fraction << 13;
  float value;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact
    value = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -value : value;
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Whether `count` floats are finite and, from `signless` on, none is below zero (-0 is not).
bool plausible(const float* values, size_t count, size_t signless) {
  const auto wrong = [values](size_t first, size_t last, int32_t sign) {
    int32_t bad = 0;  // on the bits, so that the loop is made of vector instructions
    for (size_t k = first; k < last; ++k) {
      int32_t bits;
      std::memcpy(&bits, values + k, 4);
      const int32_t magnitude = bits & 0x7FFFFFFF;
      bad |= (magnitude > 0x7F7FFFFF) | ((bits & sign) != 0 & magnitude != 0);
    }
    return bad != 0;
  };
  return !wrong(0, signless, 0) && !wrong(signless, count, INT32_MIN);
}

// Floats of halves, and whether they are plausible.
bool floats_of_halves(const unsigned char* from, float* to, size_t count, size_t signless) {
  for (size_t k = 0; k < count; ++k) {
    uint16_t half;
    std::memcpy(&half, from + 2 * k, 2);
    to[k] = from_half(half);
  }
  return plausible(to, count, signless);
}

#if DIT_FAST_HAS_QUICK
// The same, all of one kind: `sign` -1 where none may be below zero, else 0.
__attribute__((target("avx2,f16c"))) bool floats_by_eights(const unsigned char* from, float* to, size_t count,
                                                           int16_t sign) {
  const __m128i signs = _mm_set1_epi16(sign), zero = _mm_setzero_si128();
  __m128i bad = zero;
  size_t k = 0;
  for (; k + 8 <= count; k += 8) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * k));
    const __m128i magnitude = _mm_and_si128(half, _mm_set1_epi16(0x7FFF));
    const __m128i below = _mm_and_si128(_mm_srai_epi16(half, 15), _mm_cmpgt_epi16(magnitude, zero));  // -0 is not
    bad = _mm_or_si128(bad, _mm_cmpgt_epi16(magnitude, _mm_set1_epi16(0x7BFF)));
    bad = _mm_or_si128(bad, _mm_and_si128(below, signs));
    _mm256_storeu_ps(to + k, _mm256_cvtph_ps(half));
  }
  return floats_of_halves(from + 2 * k, to + k, count - k, sign ? 0 : count - k) && _mm_testz_si128(bad, bad);
}
#endif

bool floats(const unsigned char* from, float* to, size_t count, size_t signless, [[maybe_unused]] bool quick) {
#if DIT_FAST_HAS_QUICK
  if (quick)
    return floats_by_eights(from, to, signless, 0) &&
           floats_by_eights(from + 2 * signless, to + signless, count - signless, -1);
#endif
  return floats_of_halves(from, to, count, signless);
}

template <typename T>
const T* vector(const py::array& array, const char* name, py::ssize_t count) {
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 1 || array.shape(0) != count ||
      !(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + " must be a contiguous array of its type, one entry per sample");
  return static_cast<const T*>(array.data());
}

// A shard's table [samples, members].
template <typename T>
const T* table(const py::handle& object, py::ssize_t samples, py::ssize_t members) {
  const auto array = py::reinterpret_borrow<py::object>(object);
  if (!py::isinstance<py::array_t<T>>(array)) throw py::value_error("tables must be arrays of their types");
  const auto found = py::reinterpret_borrow<py::array>(array);
  if (found.ndim() != 2 || found.shape(0) != samples || found.shape(1) != members ||
      !(found.flags() & py::array::c_style))
    throw py::value_error("tables of a shard must be contiguous arrays [samples, members] of one shape");
  return static_cast<const T*>(found.data());
}

struct Shard {
  int file;
  py::ssize_t member, samples, members;
  const uint64_t* offset;
  const uint32_t *length, *crc;
};

// `shards`: (open file, member, offset, length, crc) of each, tables [samples, members]. Sample i is row rows[i] of
// shard slots[i] and goes to row places[i] of `out` [any, items]. Returns how many, from the first on, were right and lie
// there. Floats, and only they, are looked at. quick: by instructions that not every processor has.
py::ssize_t read_npy(const py::sequence& shards, const py::array& slots, const py::array& rows, const py::array& places,
                     bool check_crc, std::string_view header, bool half, py::ssize_t signless, py::array out,
                     bool quick) {
  const py::ssize_t count = slots.size();
  const auto* slot = vector<int64_t>(slots, "slots", count);
  const auto* row = vector<int64_t>(rows, "rows", count);
  const auto* place = vector<int64_t>(places, "places", count);
  std::vector<Shard> found;
  for (const py::handle& each : shards) {
    const auto parts = py::reinterpret_borrow<py::object>(each).cast<py::tuple>();
    if (parts.size() != 5) throw py::value_error("a shard must be (file, member, offset, length, crc)");
    const auto offset = parts[2].cast<py::array>();
    if (offset.ndim() != 2) throw py::value_error("tables of a shard must be arrays [samples, members]");
    const auto member = parts[1].cast<py::ssize_t>();
    const py::ssize_t samples = offset.shape(0), members = offset.shape(1);
    if (member < 0 || member >= members) throw py::value_error("a shard's member must lie in its tables");
    found.push_back({parts[0].cast<int>(), member, samples, members, table<uint64_t>(parts[2], samples, members),
                     table<uint32_t>(parts[3], samples, members), table<uint32_t>(parts[4], samples, members)});
  }
  const bool is_float = py::isinstance<py::array_t<float>>(out);
  const bool whole = out.dtype().kind() == 'i' || out.dtype().kind() == 'u';
  if (!(is_float || (whole && !half)) || out.ndim() != 2 || !(out.flags() & py::array::c_style))
    throw py::value_error("out must be a contiguous array [rows, items] of float32 or integers");
  auto* target = static_cast<unsigned char*>(out.mutable_data());  // raises for a read-only array
  const size_t items = out.shape(1), stride = items * out.itemsize();
  const size_t payload_size = half ? items * 2 : stride, size = header.size() + payload_size;
  if (signless < 0 || signless > out.shape(1)) throw py::value_error("signless must lie in a row of out");
  for (py::ssize_t i = 0; i < count; ++i) {
    if (place[i] < 0 || place[i] >= out.shape(0)) throw py::value_error("places must lie in out");
    if (slot[i] < 0 || slot[i] >= static_cast<py::ssize_t>(found.size()))
      throw py::value_error("slots must be numbers of shards");
    if (row[i] < 0 || row[i] >= found[slot[i]].samples) throw py::value_error("rows must lie in the tables");
  }

  py::gil_scoped_release without_python;
  quick = quick && quick_here();
  std::vector<unsigned char> bytes(size);
  for (py::ssize_t i = 0; i < count; ++i) {
    const Shard& shard = found[slot[i]];
    const py::ssize_t entry = row[i] * shard.members + shard.member;
    if (shard.length[entry] != size || !read_all(shard.file, bytes.data(), size, shard.offset[entry])) return i;
    if (check_crc && crc32(bytes.data(), size, quick) != shard.crc[entry]) return i;
    if (std::memcmp(bytes.data(), header.data(), header.size()) != 0) return i;
    const unsigned char* payload = bytes.data() + header.size();
    unsigned char* to = target + place[i] * stride;
    if (half) {
      if (!floats(payload, reinterpret_cast<float*>(to), items, signless, quick)) return i;
    } else {
      std::memcpy(to, payload, payload_size);
      if (is_float && !plausible(reinterpret_cast<float*>(to), items, signless)) return i;
    }
  }
  return count;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Reads members of latent shards; no torch inside.";
  module.attr("build_info") = "source=" DIT_FAST_SOURCE_HASH "pybind11 " PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR);
  module.def("read_npy", &read_npy, py::arg("shards"), py::arg("slots"), py::arg("rows"),
             py::arg("places"), py::arg("check_crc"), py::arg("header"), py::arg("half"), py::arg("signless"),
             py::arg("out"), py::arg("quick") = true,
             "Number of samples, from the first on, that were right and lie in `out` [any, items].");
}
