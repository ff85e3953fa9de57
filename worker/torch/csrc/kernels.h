// What other files need of our kernels.
#pragma once

#include <ATen/core/Tensor.h>

namespace thaw {

// Tensors that go through an autograd function without its seeing them.
struct Homes {
  at::Tensor first;
  at::Tensor second;
};

// Where the parameter's gradient is to be written (see thaw_set_gradient_home); undefined where anywhere.
at::Tensor home_of(const at::Tensor& parameter);

}  // namespace thaw
