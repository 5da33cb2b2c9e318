// What the library says of itself.

#include <torch/csrc/stable/library.h>

#include <string>

#include "native.h"

namespace dit_fast {

int64_t isa_level() { return best_level(); }

std::string build_info() { return std::string("source=" DIT_FAST_SOURCE_HASH " compiler=" __VERSION__); }

}  // namespace dit_fast

STABLE_TORCH_LIBRARY(dit_fast_native, m) {
  m.def("isa_level() -> int");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dit_fast_native, CompositeExplicitAutograd, m) {
  m.impl("isa_level", TORCH_BOX(&dit_fast::isa_level));
  m.impl("build_info", TORCH_BOX(&dit_fast::build_info));
}
