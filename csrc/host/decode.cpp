// Latent shards without Python: members of open shards by pread, crc32, header comparison, and rows of arrays in
// place: float32 of float32 and float16, integers as they are.
//
// Needs no torch. Anything that is not plainly right ends the call at that sample; Python reads it again and says what
// is wrong in its own words, so there is one text per error.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace py = pybind11;

namespace {

// CRC-32 of zlib (reflected 0xEDB88320), eight bytes at a time.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0xEDB88320u : 0u);
    tables[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  return tables;
}();

uint32_t crc32(const unsigned char* data, size_t size) {
  uint32_t crc = ~0u;
  for (; size >= 8; size -= 8, data += 8) {
    const uint32_t low = crc ^ (data[0] | data[1] << 8 | data[2] << 16 | uint32_t{data[3]} << 24);
    crc = kTables[7][low & 0xFF] ^ kTables[6][(low >> 8) & 0xFF] ^ kTables[5][(low >> 16) & 0xFF] ^
          kTables[4][low >> 24] ^ kTables[3][data[4]] ^ kTables[2][data[5]] ^ kTables[1][data[6]] ^ kTables[0][data[7]];
  }
  for (; size; --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data++) & 0xFF];
  return ~crc;
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

template <typename T>
const T* column(const py::array& array, const char* name, py::ssize_t count) {
  if (!py::isinstance<py::array_t<T>>(array) || array.ndim() != 1 || array.shape(0) != count ||
      !(array.flags() & py::array::c_style))
    throw py::value_error(std::string(name) + " must be a contiguous array of its type, one entry per sample");
  return static_cast<const T*>(array.data());
}

// Number of samples, from the first on, that were right and lie in `out` [any, items], each in its row. Floats, and only
// they, are looked at.
py::ssize_t read_npy(const py::array& files, const py::array& offsets, const py::array& lengths, const py::array& crcs,
                     const py::array& rows, bool check_crc, std::string_view header, bool half, py::ssize_t signless,
                     py::array out) {
  const py::ssize_t count = offsets.size();
  const auto* file = column<int32_t>(files, "files", count);
  const auto* offset = column<uint64_t>(offsets, "offsets", count);
  const auto* length = column<uint32_t>(lengths, "lengths", count);
  const auto* crc = column<uint32_t>(crcs, "crcs", count);
  const auto* row = column<int64_t>(rows, "rows", count);
  const bool floats = py::isinstance<py::array_t<float>>(out);
  const bool whole = out.dtype().kind() == 'i' || out.dtype().kind() == 'u';
  if (!(floats || (whole && !half)) || out.ndim() != 2 || !(out.flags() & py::array::c_style))
    throw py::value_error("out must be a contiguous array [rows, items] of float32 or integers");
  auto* target = static_cast<unsigned char*>(out.mutable_data());  // raises for a read-only array
  const size_t items = out.shape(1), stride = items * out.itemsize();
  const size_t payload_size = half ? items * 2 : stride, size = header.size() + payload_size;
  if (signless < 0 || signless > out.shape(1)) throw py::value_error("signless must lie in a row of out");
  for (py::ssize_t i = 0; i < count; ++i)
    if (row[i] < 0 || row[i] >= out.shape(0)) throw py::value_error("rows must lie in out");

  py::gil_scoped_release without_python;
  std::vector<unsigned char> member(size);
  for (py::ssize_t i = 0; i < count; ++i) {
    if (length[i] != size || !read_all(file[i], member.data(), size, offset[i])) return i;
    if (check_crc && crc32(member.data(), size) != crc[i]) return i;
    if (std::memcmp(member.data(), header.data(), header.size()) != 0) return i;
    const unsigned char* payload = member.data() + header.size();
    unsigned char* place = target + row[i] * stride;
    auto* to = reinterpret_cast<float*>(place);
    if (half) {
      for (size_t k = 0; k < items; ++k) {
        uint16_t value;
        std::memcpy(&value, payload + 2 * k, 2);
        to[k] = from_half(value);
      }
    } else {
      std::memcpy(place, payload, payload_size);
    }
    if (floats && !plausible(to, items, signless)) return i;
  }
  return count;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  module.doc() = "Reads members of latent shards; no torch inside.";
  module.attr("build_info") = "source=" DIT_FAST_SOURCE_HASH "pybind11 " PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR);
  module.def("read_npy", &read_npy, py::arg("files"), py::arg("offsets"), py::arg("lengths"), py::arg("crcs"),
             py::arg("rows"), py::arg("check_crc"), py::arg("header"), py::arg("half"), py::arg("signless"),
             py::arg("out"), "Number of samples, from the first on, that were right and lie in `out` [any, items].");
}
