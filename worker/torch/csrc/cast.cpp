// Mixed precision's casts. A weight's copy in bf16 is kept until the weight changes.
//
// CAST-1: a kept copy is used only while the weight's version is the one that it was made of. Operators that write raise it, but for the
//         fused updates: who calls those, or writes without libtorch, calls thaw_bump_version.
// CAST-2: the gradient of a kept copy goes home in one pass (KERN-2).
#include "cast.h"
#include "kernels.h"
#include "shim.h"

#include <mutex>
#include <unordered_map>

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/ivalue.h>
#include <torch/csrc/autograd/custom_function.h>

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace {

bool is_half(const at::Tensor& tensor) {
  return tensor.defined() && (tensor.scalar_type() == at::kBFloat16 || tensor.scalar_type() == at::kHalf);
}

bool is_single(const at::Tensor& tensor) { return tensor.defined() && tensor.scalar_type() == at::kFloat; }

bool is_plain_single(const at::Tensor& tensor) {
  return is_single(tensor) && !tensor.unsafeGetTensorImpl()->is_wrapped_number();
}

struct Kept {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> weight;
  uint32_t version = 0;
  at::Tensor copy;
};

class Copies {
 public:
  void add(const at::Tensor& weight) {
    const std::lock_guard<std::mutex> guard(lock_);
    for (auto entry = kept_.begin(); entry != kept_.end();) {
      entry = entry->second.weight.expired() ? kept_.erase(entry) : std::next(entry);
    }
    kept_.insert_or_assign(weight.unsafeGetTensorImpl(), Kept{decltype(Kept::weight)(weight.getIntrusivePtr()), 0, at::Tensor()});
  }

  // The weight's copy in bf16; undefined where it is no weight that was added. Autograd sees nothing of it.
  at::Tensor of(const at::Tensor& weight) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = kept_.find(weight.unsafeGetTensorImpl());
    if (found == kept_.end() || found->second.weight.expired()) {
      return {};
    }
    Kept& kept = found->second;
    const auto version = static_cast<uint32_t>(weight._version());
    if (!kept.copy.defined() || kept.version != version) {
      const at::AutoDispatchBelowADInplaceOrView below;
      kept.copy = weight.to(at::kBFloat16);
      kept.version = version;
    }
    return kept.copy;
  }

 private:
  std::mutex lock_;
  std::unordered_map<const c10::TensorImpl*, Kept> kept_;
};

Copies& copies() {
  static auto* const instance = new Copies();
  return *instance;
}

// A weight's kept copy, for autograd a cast.
struct CastWeight : torch::autograd::Function<CastWeight> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const thaw::Homes& homes, const thaw::Homes& copy) {
    context->saved_data["home"] = homes.first;
    context->saved_data["dtype"] = weight.scalar_type();
    return copy.first.detach();
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const at::Tensor home = context->saved_data["home"].toTensor();
    if (home.defined()) {
      return {home.copy_(gradients[0]), at::Tensor(), at::Tensor()};
    }
    return {gradients[0].to(context->saved_data["dtype"].toScalarType()), at::Tensor(), at::Tensor()};
  }
};

at::Tensor to_half(const at::Tensor& tensor) {
  if (tensor.is_leaf()) {
    if (const at::Tensor copy = copies().of(tensor); copy.defined()) {
      const bool recorded = at::GradMode::is_enabled() && tensor.requires_grad();
      return recorded ? CastWeight::apply(tensor, thaw::Homes{thaw::home_of(tensor), {}}, thaw::Homes{copy, {}}) : copy;
    }
  }
  return tensor.to(at::kBFloat16);
}

at::Tensor cast_tensor(const at::Tensor& tensor, bool down) {
  if (down) {
    return is_single(tensor) ? to_half(tensor) : tensor;
  }
  return is_half(tensor) ? tensor.to(at::kFloat) : tensor;
}

}  // namespace

namespace thaw {

void cast_stack(torch::jit::Stack& stack, int32_t cast) {
  if (cast == THAW_WIDEST) {
    bool any_single = false;
    for (const auto& value : stack) {
      any_single = any_single || (value.isTensor() && is_plain_single(value.toTensor()));
      if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorVector()) {
          any_single = any_single || is_plain_single(tensor);
        }
      }
    }
    if (!any_single) {
      return;
    }
  }
  const bool down = cast == THAW_TO_BF16;
  for (auto& value : stack) {
    if (value.isTensor()) {
      value = cast_tensor(value.toTensor(), down);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) {
        list.push_back(cast_tensor(tensor, down));
      }
      value = list;
    }
  }
}

}  // namespace thaw

extern "C" {

void thaw_keep_half_copy(const void* weight) { copies().add(*static_cast<const at::Tensor*>(weight)); }

void thaw_bump_version(const void* tensor) {
  static_cast<const at::Tensor*>(tensor)->unsafeGetTensorImpl()->bump_version();
}
}
