// Mixed precision's casts of an operator's arguments.
#pragma once

#include <cstdint>

#include <ATen/core/stack.h>

namespace thaw {

// Casts the floating tensors among an operator's arguments, as `cast` (a ThawCast) says.
void cast_stack(torch::jit::Stack& stack, int32_t cast);

}  // namespace thaw
