// Operators that libtorch puts together from several passes over memory, in one pass each.
//
// KERN-1: same bits as libtorch's own, forward, backward and in what they draw from the generator; where a case is not one of those handled
//         here, libtorch's own runs.
// KERN-2: a matrix's gradient goes straight to its home, where one was given (`thaw_set_gradient_home`): the parameter must be read by
//         one operator only, since a second gradient would overwrite the first.
// They take libtorch's place in the dispatcher, for this process, so that operators made of others (attention) use them too.
#include "shim.h"
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/dropout_native.h>
#include <ATen/ops/linear_native.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

// The widest vectors of the machine that it runs on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define WIDEST
#endif

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

namespace thaw {

at::Tensor home_of(const at::Tensor& parameter) {
  if (!parameter.requires_grad() || !parameter.is_leaf()) {
    return {};
  }
  const at::Tensor& home = parameter.grad();
  // The layout is the parameter's own, which the home was made for.
  const bool fits = home.defined() && home.sizes() == parameter.sizes() && home.strides() == parameter.strides() &&
                    home.scalar_type() == parameter.scalar_type();
  return fits ? home : at::Tensor();
}

}  // namespace thaw

namespace {

using thaw::home_of;
using thaw::Homes;

// ---- The generator, many draws at once. ----

constexpr int kState = at::MERSENNE_STATE_N;
constexpr int kShift = at::MERSENNE_STATE_M;

inline uint32_t twist(uint32_t u, uint32_t v) {
  const uint32_t mixed = (u & 0x80000000U) | (v & 0x7fffffffU);
  return (mixed >> 1) ^ (0U - (v & 1U) & 0x9908b0dfU);
}

// The next 624 words of the Mersenne Twister (Matsumoto and Nishimura 1998).
WIDEST void next_state(uint32_t* state) {
  for (int i = 0; i < kState - kShift; ++i) {
    state[i] = state[i + kShift] ^ twist(state[i], state[i + 1]);
  }
  for (int i = kState - kShift; i < kState - 1; ++i) {
    state[i] = state[i + kShift - kState] ^ twist(state[i], state[i + 1]);
  }
  state[kState - 1] = state[kShift - 1] ^ twist(state[kState - 1], state[0]);
}

WIDEST void temper(const uint32_t* state, uint32_t* drawn, int count) {
  for (int i = 0; i < count; ++i) {
    uint32_t y = state[i];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680U;
    y ^= (y << 15) & 0xefc60000U;
    drawn[i] = y ^ (y >> 18);
  }
}

// What `count` calls of the engine return.
void draw(at::mt19937_data_pod& engine, uint32_t* drawn, int count) {
  while (count > 0) {
    if (engine.left_ == 1) {
      next_state(engine.state_.data());
      engine.left_ = kState + 1;
      engine.next_ = 0;
    }
    const int ready = std::min(count, engine.left_ - 1);
    temper(engine.state_.data() + engine.next_, drawn, ready);
    engine.next_ += ready;
    engine.left_ -= ready;
    drawn += ready;
    count -= ready;
  }
}

// Two draws a number: the first is the upper half. A uniform number of 53 bits is below `keep` where its integer is below `threshold`.
WIDEST void compare(const uint32_t* drawn, uint64_t threshold, uint8_t* kept, int count) {
  constexpr uint64_t kMask = (uint64_t{1} << 53) - 1;
  for (int i = 0; i < count; ++i) {
    const uint64_t number = ((uint64_t{drawn[2 * i]} << 32) | drawn[2 * i + 1]) & kMask;
    kept[i] = number < threshold ? 1 : 0;
  }
}

// As `empty.bernoulli_(keep)` draws them.
void keep_mask(at::CPUGeneratorImpl& generator, double keep, uint8_t* kept, int64_t count) {
  constexpr int kChunk = 1024;
  uint32_t drawn[2 * kChunk];
  const auto threshold = static_cast<uint64_t>(std::ceil(std::ldexp(keep, 53)));
  at::mt19937 engine = generator.engine();
  at::mt19937_data_pod data = engine.data();
  for (int64_t start = 0; start < count; start += kChunk) {
    const int length = static_cast<int>(std::min<int64_t>(kChunk, count - start));
    draw(data, drawn, 2 * length);
    compare(drawn, threshold, kept + start, length);
  }
  engine.set_data(data);
  generator.set_engine(engine);
}

// ---- Dropout. ----

constexpr int64_t kGrain = 32768;

WIDEST void scale_kept(const float* from, const uint8_t* kept, float scale, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    // A product, not a choice: what is not finite stays so.
    to[i] = from[i] * (kept[i] != 0 ? scale : 0.0F);
  }
}

// The same in bf16, given as its bits: a product in fp32, rounded to the nearest, ties to even.
WIDEST void scale_kept(const uint16_t* from, const uint8_t* kept, float scale, uint16_t* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t wide = uint32_t{from[i]} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    value *= kept[i] != 0 ? scale : 0.0F;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    to[i] = static_cast<uint16_t>(value != value ? 0x7fc0U : rounded);
  }
}

template <typename Element>
void scale_kept(const at::Tensor& from, const at::Tensor& kept, float scale, const at::Tensor& to) {
  const auto* source = static_cast<const Element*>(from.const_data_ptr());
  auto* target = static_cast<Element*>(to.mutable_data_ptr());
  const auto* mask = kept.const_data_ptr<uint8_t>();
  at::parallel_for(0, from.numel(), kGrain, [&](int64_t start, int64_t end) {
    scale_kept(source + start, mask + start, scale, target + start, end - start);
  });
}

bool is_handled(const at::Tensor& tensor) {
  return (tensor.scalar_type() == at::kFloat || tensor.scalar_type() == at::kBFloat16) && tensor.is_contiguous();
}

at::Tensor apply_mask(const at::Tensor& tensor, const at::Tensor& kept, float scale) {
  at::Tensor result = at::empty_like(tensor);
  if (tensor.scalar_type() == at::kFloat) {
    scale_kept<float>(tensor, kept, scale, result);
  } else {
    scale_kept<uint16_t>(tensor, kept, scale, result);
  }
  return result;
}

struct Dropout : torch::autograd::Function<Dropout> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, double p) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor kept = at::empty(input.sizes(), input.options().dtype(at::kByte));
    {
      auto generator = at::detail::getDefaultCPUGenerator();
      const std::lock_guard<std::mutex> lock(generator.mutex());
      keep_mask(*at::check_generator<at::CPUGeneratorImpl>(generator), 1 - p, kept.mutable_data_ptr<uint8_t>(), kept.numel());
    }
    float scale = 1.0F / static_cast<float>(1 - p);
    if (input.scalar_type() == at::kBFloat16) {
      // libtorch keeps the scaled mask in the input's type.
      scale = static_cast<float>(c10::BFloat16(scale));
    }
    context->saved_data["kept"] = kept;
    context->saved_data["scale"] = static_cast<double>(scale);
    return apply_mask(input, kept, scale);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const at::Tensor kept = context->saved_data["kept"].toTensor();
    const auto scale = static_cast<float>(context->saved_data["scale"].toDouble());
    const at::Tensor& gradient = gradients[0];
    if (!is_handled(gradient)) {
      // The result's layout follows the gradient's.
      return {gradient.mul(kept.to(gradient.scalar_type()).mul_(scale)), at::Tensor()};
    }
    return {apply_mask(gradient, kept, scale), at::Tensor()};
  }
};

at::Tensor dropout(const at::Tensor& input, double p, bool train) {
  if (!train || !(p > 0 && p < 1) || input.numel() == 0 || !is_handled(input)) {
    return at::native::dropout(input, p, train);
  }
  return Dropout::apply(input, p);
}

// ---- Softmax whose rows without any allowed entry are zero. ----

at::Tensor safe_softmax(const at::Tensor& input, int64_t dim, std::optional<at::ScalarType> dtype) {
  at::Tensor result = at::softmax(input, dim, dtype);
  const bool last = input.dim() > 0 && (dim == -1 || dim == input.dim() - 1);
  if (last && input.numel() > 0 && input.scalar_type() == at::kFloat && input.is_contiguous() && result.is_contiguous() &&
      result.scalar_type() == at::kFloat) {
    // A row of minus infinities has become a row of NaN, so a look at each row's first entry is enough.
    const int64_t length = input.size(-1);
    const auto* from = input.const_data_ptr<float>();
    auto* to = result.mutable_data_ptr<float>();
    for (int64_t row = 0; row < input.numel() / length; ++row) {
      const float* start = from + row * length;
      if (std::isnan(to[row * length]) &&
          std::all_of(start, start + length, [](float value) { return value == -std::numeric_limits<float>::infinity(); })) {
        std::fill_n(to + row * length, length, 0.0F);
      }
    }
    return result;
  }
  const at::Tensor masked = at::all(input.eq(-std::numeric_limits<double>::infinity()), dim, /*keepdim=*/true);
  return at::where(masked, at::scalar_tensor(0, result.options()), result);
}

// ---- Layers whose gradients go home. ----

struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias,
                            const Homes& homes) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({input, weight});
    context->saved_data["weight"] = homes.first;
    context->saved_data["bias"] = homes.second;
    return at::native::linear(input, weight, bias);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor& input = saved[0];
    const at::Tensor& weight = saved[1];
    const at::Tensor rows = input.reshape({-1, weight.size(1)});
    const at::Tensor gradient = gradients[0].reshape({-1, weight.size(0)});
    at::Tensor by_input;
    at::Tensor by_weight;
    at::Tensor by_bias;
    if (context->needs_input_grad(0)) {
      const bool column_major = rows.stride(0) == 1 && rows.stride(1) == rows.size(0);
      by_input = column_major ? weight.t().mm(gradient.t()).t() : gradient.mm(weight);
      by_input = by_input.reshape(input.sizes());
    }
    if (context->needs_input_grad(1)) {
      by_weight = context->saved_data["weight"].toTensor();
      if (by_weight.defined()) {
        at::mm_out(by_weight, gradient.t(), rows);
      } else {
        by_weight = gradient.t().mm(rows);
      }
    }
    if (context->needs_input_grad(2)) {
      by_bias = context->saved_data["bias"].toTensor();
      if (by_bias.defined()) {
        at::Tensor row = by_bias.unsqueeze(0);
        at::sum_out(row, gradient, {0}, /*keepdim=*/true);
      } else {
        by_bias = at::sum_to(gradient, at::IntArrayRef({weight.size(0)}));
      }
    }
    return {by_input, by_weight, by_bias, at::Tensor()};
  }
};

at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  const bool recorded = at::GradMode::is_enabled() && (weight.requires_grad() || input.requires_grad());
  const bool shaped = weight.dim() == 2 && weight.is_contiguous() && weight.numel() > 0 && input.numel() > 0 &&
                      (input.dim() == 2 || (input.dim() == 3 && input.is_contiguous()));
  // Without a bias libtorch takes another path, which depends on more.
  if (!recorded || !shaped || !bias.has_value() || !bias->defined() || bias->dim() != 1 ||
      input.scalar_type() != weight.scalar_type() || bias->scalar_type() != weight.scalar_type()) {
    return at::native::linear(input, weight, bias);
  }
  return Linear::apply(input, weight, *bias, Homes{home_of(weight), home_of(*bias)});
}

WIDEST void add_row(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] += from[i];
  }
}

// As embedding_dense_backward: each row's gradients are added in the order of the indices.
void add_rows(const at::Tensor& gradient, const at::Tensor& indices, int64_t padding, at::Tensor& home) {
  const int64_t width = home.size(1);
  const at::Tensor rows = gradient.contiguous().view({-1, width});
  const at::Tensor places = indices.contiguous();
  const auto* from = rows.const_data_ptr<float>();
  const auto* place = places.const_data_ptr<int64_t>();
  auto* to = home.mutable_data_ptr<float>();
  home.zero_();
  at::parallel_for(0, home.size(0), 1000, [&](int64_t start, int64_t end) {
    for (int64_t i = 0; i < places.numel(); ++i) {
      if (place[i] != padding && place[i] >= start && place[i] < end) {
        add_row(from + i * width, to + place[i] * width, width);
      }
    }
  });
}

struct Embedding : torch::autograd::Function<Embedding> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& weight, const at::Tensor& indices, int64_t padding, bool scale,
                            bool sparse, const Homes& homes) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    context->saved_data["indices"] = indices;
    context->saved_data["padding"] = padding;
    context->saved_data["scale"] = scale;
    context->saved_data["sparse"] = sparse;
    context->saved_data["rows"] = weight.size(0);
    context->saved_data["home"] = homes.first;
    return at::embedding(weight, indices, padding, scale, sparse);
  }

  static variable_list backward(AutogradContext* context, variable_list gradients) {
    auto& saved = context->saved_data;
    const at::Tensor indices = saved["indices"].toTensor();
    const int64_t padding = saved["padding"].toInt();
    at::Tensor result = saved["home"].toTensor();
    if (result.defined()) {
      add_rows(gradients[0], indices, padding, result);
    } else {
      result = at::embedding_backward(gradients[0], indices, saved["rows"].toInt(), padding, saved["scale"].toBool(),
                                      saved["sparse"].toBool());
    }
    return {result, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

at::Tensor embedding(const at::Tensor& weight, const at::Tensor& indices, int64_t padding, bool scale, bool sparse) {
  if (!at::GradMode::is_enabled() || !weight.requires_grad()) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return at::embedding(weight, indices, padding, scale, sparse);
  }
  const bool plain = !scale && !sparse && indices.scalar_type() == at::kLong && weight.scalar_type() == at::kFloat;
  return Embedding::apply(weight, indices, padding, scale, sparse, Homes{plain ? home_of(weight) : at::Tensor(), at::Tensor()});
}

// ---- Into the dispatcher. ----

// Whether our draws are this libtorch's, number for number.
bool draws_alike() {
  constexpr int64_t kCount = 2000;
  at::Generator theirs = at::detail::createCPUGenerator(11);
  at::Generator ours = theirs.clone();
  at::empty({7}, at::kFloat).bernoulli_(0.5, theirs);
  at::empty({7}, at::kFloat).bernoulli_(0.5, ours);
  const at::Tensor expected = at::empty({kCount}, at::kFloat).bernoulli_(0.9, theirs);
  at::Tensor kept = at::empty({kCount}, at::kByte);
  keep_mask(*at::check_generator<at::CPUGeneratorImpl>(ours), 0.9, kept.mutable_data_ptr<uint8_t>(), kCount);
  return at::equal(kept.to(at::kFloat), expected) && at::check_generator<at::CPUGeneratorImpl>(theirs)->random64() ==
                                                         at::check_generator<at::CPUGeneratorImpl>(ours)->random64();
}

// That a kernel is replaced is what we want.
struct Silent final : c10::WarningHandler {
  void process(const c10::Warning& /*warning*/) override {}
};

void register_kernels() {
  Silent silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  // Never freed: the dispatcher refers to them to the end.
  auto* recorded = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradCPU, __FILE__, __LINE__);
  if (draws_alike()) {
    recorded->impl("dropout", TORCH_FN(dropout));
  }
  recorded->impl("linear", TORCH_FN(linear));
  recorded->impl("embedding", TORCH_FN(embedding));
  auto* plain = new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  plain->impl("_safe_softmax", TORCH_FN(safe_softmax));
}

}  // namespace

extern "C" {

int32_t thaw_register_kernels() {
  static std::once_flag once;
  try {
    std::call_once(once, register_kernels);
    return 0;
  } catch (const std::exception&) {
    return -1;
  }
}

void thaw_set_gradient_home(const void* parameter, const void* home) {
  const auto& tensor = *static_cast<const at::Tensor*>(parameter);
  tensor.mutable_grad() = home == nullptr ? at::Tensor() : *static_cast<const at::Tensor*>(home);
}
}
