// A torch tensor's memory without a call into Python: through the C functions of DLPack's exchange API, which
// are stable across versions of torch, unlike its C++ classes.
#pragma once
#include <nanobind/nanobind.h>

#include <cstddef>
#include <optional>

#include "core/base/dtype.h"

namespace paceline::bind {

struct TensorMemory {
  std::byte* data;
  std::size_t numel;
  DType dtype;
};

// The memory of a contiguous CPU tensor of a dtype that the core knows; nothing for any other object. Valid
// until the tensor is resized.
std::optional<TensorMemory> memory_of(nanobind::handle tensor);

}  // namespace paceline::bind
