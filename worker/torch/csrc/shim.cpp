#include "shim.h"
#include "cast.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/ScalarOps.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

namespace {

thread_local std::string last_error;

// Runs `body`; on an exception keeps its text and returns `failed`.
template <typename Result, typename Body>
Result guarded(Result failed, Body&& body) {
  try {
    return body();
  } catch (const c10::Error& error) {
    last_error = error.what_without_backtrace();
  } catch (const std::exception& error) {
    last_error = error.what();
  } catch (...) {
    last_error = "unknown C++ exception";
  }
  return failed;
}

enum class Kind { Tensor, Int, Float, Bool, Scalar, String, Device, Ints, Floats, Bools, Tensors, OptionalTensors, Other };

struct Parameter {
  std::string name;
  Kind kind;
  std::string type;
  int32_t broadcast;  // N of int[N], 0 if none
  std::optional<c10::IValue> fallback;
  bool optional;
  int32_t alias;
};

struct Operator {
  c10::OperatorHandle handle;
  std::string name;
  std::vector<Parameter> parameters;
  std::vector<int32_t> return_alias;
  std::vector<bool> return_list;
};

Kind element_kind(const c10::TypePtr& type) {
  switch (type->kind()) {
    case c10::TypeKind::TensorType:
      return Kind::Tensors;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      return Kind::Ints;
    case c10::TypeKind::FloatType:
    case c10::TypeKind::SymFloatType:
      return Kind::Floats;
    case c10::TypeKind::BoolType:
      return Kind::Bools;
    case c10::TypeKind::OptionalType:
      return type->expectRef<c10::OptionalType>().getElementType()->kind() == c10::TypeKind::TensorType ? Kind::OptionalTensors
                                                                                                     : Kind::Other;
    default:
      return Kind::Other;
  }
}

Kind kind_of(const c10::TypePtr& type) {
  switch (type->kind()) {
    case c10::TypeKind::TensorType:
      return Kind::Tensor;
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
    case c10::TypeKind::ScalarTypeType:
    case c10::TypeKind::LayoutType:
    case c10::TypeKind::MemoryFormatType:
      return Kind::Int;
    case c10::TypeKind::FloatType:
    case c10::TypeKind::SymFloatType:
      return Kind::Float;
    case c10::TypeKind::BoolType:
    case c10::TypeKind::SymBoolType:
      return Kind::Bool;
    case c10::TypeKind::NumberType:
      return Kind::Scalar;
    case c10::TypeKind::StringType:
      return Kind::String;
    case c10::TypeKind::DeviceObjType:
      return Kind::Device;
    case c10::TypeKind::ListType:
      return element_kind(type->expectRef<c10::ListType>().getElementType());
    default:
      return Kind::Other;
  }
}

Parameter describe(const c10::Argument& argument) {
  Parameter parameter;
  parameter.name = argument.name();
  c10::TypePtr type = argument.real_type();
  parameter.type = type->str();
  parameter.optional = type->kind() == c10::TypeKind::OptionalType;
  if (parameter.optional) {
    type = type->expectRef<c10::OptionalType>().getElementType();
  }
  parameter.kind = kind_of(type);
  parameter.broadcast = argument.N().value_or(0);
  parameter.fallback = argument.default_value();
  parameter.alias = 0;
  if (const c10::AliasInfo* alias = argument.alias_info()) {
    parameter.alias = alias->isWrite() ? 3 : 1;
  }
  return parameter;
}

int32_t aliased_argument(const c10::FunctionSchema& schema, const c10::Argument& result) {
  const c10::AliasInfo* alias = result.alias_info();
  if (alias == nullptr) {
    return -1;
  }
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const c10::AliasInfo* other = schema.arguments()[i].alias_info();
    if (other == nullptr) {
      continue;
    }
    for (const auto& set : alias->beforeSets()) {
      if (other->beforeSets().count(set) != 0) {
        return static_cast<int32_t>(i);
      }
    }
  }
  return -1;
}

[[noreturn]] void mismatch(const Parameter& parameter, const ThawValue& value) {
  TORCH_CHECK(false, "argument `", parameter.name, "` of type ", parameter.type, " cannot take a value of kind ", value.tag);
}

const at::Tensor& tensor_of(const void* pointer) { return *static_cast<const at::Tensor*>(pointer); }

// A Python number where a tensor is expected: a zero-dimensional one that takes no part in type promotion.
c10::IValue number_as_tensor(const c10::Scalar& number) { return at::native::wrapped_scalar_tensor(number); }

c10::IValue convert_int(const Parameter& parameter, int64_t integer, const ThawValue& value) {
  switch (parameter.kind) {
    case Kind::Int:
    case Kind::Scalar:
      return integer;
    case Kind::Float:
      return static_cast<double>(integer);
    case Kind::Bool:
      return integer != 0;
    case Kind::Tensor:
      return number_as_tensor(integer);
    case Kind::Ints: {
      c10::List<int64_t> list;
      for (int32_t i = 0; i < std::max(parameter.broadcast, 1); ++i) {
        list.push_back(integer);
      }
      return list;
    }
    default:
      mismatch(parameter, value);
  }
}

c10::IValue convert_float(const Parameter& parameter, double real, const ThawValue& value) {
  switch (parameter.kind) {
    case Kind::Float:
    case Kind::Scalar:
      return real;
    case Kind::Tensor:
      return number_as_tensor(real);
    default:
      mismatch(parameter, value);
  }
}

c10::IValue convert_bool(const Parameter& parameter, bool flag, const ThawValue& value) {
  switch (parameter.kind) {
    case Kind::Bool:
    case Kind::Scalar:
      return flag;
    case Kind::Int:
      return static_cast<int64_t>(flag);
    case Kind::Tensor:
      return number_as_tensor(flag);
    default:
      mismatch(parameter, value);
  }
}

template <typename To, typename From>
c10::IValue list_of(const void* pointer, int32_t length) {
  c10::List<To> list;
  list.reserve(length);
  for (int32_t i = 0; i < length; ++i) {
    list.push_back(static_cast<To>(static_cast<const From*>(pointer)[i]));
  }
  return list;
}

c10::IValue convert_tensors(const Parameter& parameter, const ThawValue& value) {
  const auto* pointers = static_cast<void* const*>(value.pointer);
  if (parameter.kind == Kind::Tensors) {
    c10::List<at::Tensor> list;
    list.reserve(value.length);
    for (int32_t i = 0; i < value.length; ++i) {
      list.push_back(pointers[i] == nullptr ? at::Tensor() : tensor_of(pointers[i]));
    }
    return list;
  }
  if (parameter.kind == Kind::OptionalTensors) {
    c10::List<std::optional<at::Tensor>> list;
    list.reserve(value.length);
    for (int32_t i = 0; i < value.length; ++i) {
      list.push_back(pointers[i] == nullptr ? std::nullopt : std::optional<at::Tensor>(tensor_of(pointers[i])));
    }
    return list;
  }
  mismatch(parameter, value);
}

// A list with elements of the schema's type, whatever numbers were given.
c10::IValue convert_numbers(const Parameter& parameter, const ThawValue& value) {
  const bool empty = value.length == 0;
  if (empty && (parameter.kind == Kind::Tensors || parameter.kind == Kind::OptionalTensors)) {
    return convert_tensors(parameter, value);
  }
  if (parameter.kind == Kind::Ints && (empty || value.tag == THAW_INTS)) {
    return list_of<int64_t, int64_t>(value.pointer, value.length);
  }
  if (parameter.kind == Kind::Floats && value.tag == THAW_INTS) {
    return list_of<double, int64_t>(value.pointer, value.length);
  }
  if (parameter.kind == Kind::Floats && (empty || value.tag == THAW_FLOATS)) {
    return list_of<double, double>(value.pointer, value.length);
  }
  if (parameter.kind == Kind::Bools && (empty || value.tag == THAW_BOOLS)) {
    return list_of<bool, uint8_t>(value.pointer, value.length);
  }
  mismatch(parameter, value);
}

c10::Device device_of(int64_t code) {
  return c10::Device(static_cast<c10::DeviceType>(code >> 8), static_cast<c10::DeviceIndex>((code & 0xff) - 1));
}

c10::IValue convert_device(const Parameter& parameter, const ThawValue& value) {
  if (parameter.kind != Kind::Device) {
    mismatch(parameter, value);
  }
  return device_of(value.integer);
}

c10::IValue convert(const Parameter& parameter, const ThawValue& value) {
  switch (value.tag) {
    case THAW_DEFAULT:
      TORCH_CHECK(parameter.fallback.has_value() || parameter.optional, "argument `", parameter.name, "` of type ", parameter.type,
                  " is missing and has no default");
      return parameter.fallback.has_value() ? *parameter.fallback : c10::IValue();
    case THAW_NONE:
      // A tensor that a schema does not call optional may still be given as undefined (as in Python).
      return parameter.kind == Kind::Tensor && !parameter.optional ? c10::IValue(at::Tensor()) : c10::IValue();
    case THAW_TENSOR:
      if (parameter.kind != Kind::Tensor && parameter.kind != Kind::Scalar) {
        mismatch(parameter, value);
      }
      return parameter.kind == Kind::Scalar ? c10::IValue(tensor_of(value.pointer).item()) : c10::IValue(tensor_of(value.pointer));
    case THAW_INT:
      return convert_int(parameter, value.integer, value);
    case THAW_FLOAT:
      return convert_float(parameter, value.real, value);
    case THAW_BOOL:
      return convert_bool(parameter, value.integer != 0, value);
    case THAW_STRING:
      return std::string(static_cast<const char*>(value.pointer), value.length);
    case THAW_INTS:
    case THAW_FLOATS:
    case THAW_BOOLS:
      return convert_numbers(parameter, value);
    case THAW_TENSORS:
      return convert_tensors(parameter, value);
    case THAW_DEVICE:
      return convert_device(parameter, value);
    case THAW_CONSTANT:
      return *static_cast<const c10::IValue*>(value.pointer);
    default:
      mismatch(parameter, value);
  }
}

ThawValue owned_tensor(at::Tensor tensor) {
  ThawValue result{};
  if (tensor.defined()) {
    result.tag = THAW_TENSOR;
    result.pointer = new at::Tensor(std::move(tensor));
  } else {
    result.tag = THAW_NONE;
  }
  return result;
}

ThawValue result_of(c10::IValue&& value) {
  ThawValue result{};
  if (value.isTensor()) {
    return owned_tensor(std::move(value).toTensor());
  }
  if (value.isInt()) {
    result.tag = THAW_INT;
    result.integer = value.toInt();
  } else if (value.isDouble()) {
    result.tag = THAW_FLOAT;
    result.real = value.toDouble();
  } else if (value.isBool()) {
    result.tag = THAW_BOOL;
    result.integer = value.toBool() ? 1 : 0;
  } else if (value.isSymInt()) {
    result.tag = THAW_INT;
    result.integer = value.toSymInt().guard_int(__FILE__, __LINE__);
  } else if (value.isNone()) {
    result.tag = THAW_NONE;
  } else if (value.isTensorList()) {
    std::vector<at::Tensor> tensors = std::move(value).toTensorVector();
    auto pointers = std::make_unique<void*[]>(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      pointers[i] = new at::Tensor(std::move(tensors[i]));
    }
    result.tag = THAW_TENSORS;
    result.length = static_cast<int32_t>(tensors.size());
    result.pointer = pointers.release();
  } else {
    TORCH_CHECK(false, "a result of type ", value.tagKind(), " is not supported");
  }
  return result;
}

std::vector<at::Tensor> tensors_of(void* const* pointers, int32_t count) {
  std::vector<at::Tensor> tensors;
  tensors.reserve(count);
  for (int32_t i = 0; i < count; ++i) {
    tensors.push_back(pointers[i] == nullptr ? at::Tensor() : tensor_of(pointers[i]));
  }
  return tensors;
}

const Operator& operator_of(const void* op) { return *static_cast<const Operator*>(op); }

}  // namespace

extern "C" {

const char* thaw_last_error() { return last_error.c_str(); }

void* thaw_resolve(const char* name, const char* overload) {
  return guarded<void*>(nullptr, [&]() -> void* {
    auto handle = c10::Dispatcher::singleton().findSchema({name, overload});
    TORCH_CHECK(handle.has_value(), "no operator ", name, " with overload `", overload, "`");
    auto op = std::make_unique<Operator>(Operator{*handle, c10::toString(handle->operator_name()), {}, {}, {}});
    const c10::FunctionSchema& schema = handle->schema();
    for (const c10::Argument& argument : schema.arguments()) {
      op->parameters.push_back(describe(argument));
    }
    for (const c10::Argument& result : schema.returns()) {
      op->return_alias.push_back(aliased_argument(schema, result));
      op->return_list.push_back(result.type()->kind() == c10::TypeKind::ListType);
    }
    return op.release();
  });
}

void thaw_operator_free(void* op) { delete static_cast<Operator*>(op); }

int32_t thaw_argument_count(const void* op) { return static_cast<int32_t>(operator_of(op).parameters.size()); }

const char* thaw_argument_name(const void* op, int32_t index) { return operator_of(op).parameters.at(index).name.c_str(); }

int32_t thaw_argument_alias(const void* op, int32_t index) { return operator_of(op).parameters.at(index).alias; }

int32_t thaw_is_random(const void* op) { return operator_of(op).handle.hasTag(at::Tag::nondeterministic_seeded) ? 1 : 0; }

int32_t thaw_return_count(const void* op) { return static_cast<int32_t>(operator_of(op).return_alias.size()); }

int32_t thaw_return_alias(const void* op, int32_t index) { return operator_of(op).return_alias.at(index); }

int32_t thaw_return_is_list(const void* op, int32_t index) { return operator_of(op).return_list.at(index) ? 1 : 0; }

void* thaw_constant(const void* op, int32_t index, const ThawValue* value) {
  return guarded<void*>(nullptr, [&]() -> void* {
    return new c10::IValue(convert(operator_of(op).parameters.at(index), *value));
  });
}

void thaw_constant_free(void* constant) { delete static_cast<c10::IValue*>(constant); }

int32_t thaw_call(const void* pointer, const ThawValue* arguments, int32_t cast, ThawValue* results, int32_t capacity) {
  // Kept between calls for its capacity. Operators do not call back into the shim, so one per thread is enough.
  thread_local torch::jit::Stack stack;
  stack.clear();
  int32_t written = 0;
  const int32_t count = guarded<int32_t>(-1, [&]() -> int32_t {
    const Operator& op = operator_of(pointer);
    for (size_t i = 0; i < op.parameters.size(); ++i) {
      stack.push_back(convert(op.parameters[i], arguments[i]));
    }
    if (cast != THAW_AS_IS) {
      thaw::cast_stack(stack, cast);
    }
    op.handle.callBoxed(stack);
    TORCH_CHECK(static_cast<int32_t>(stack.size()) <= capacity, op.name, " has more results than fit");
    for (c10::IValue& value : stack) {
      results[written] = result_of(std::move(value));
      ++written;
    }
    return written;
  });
  stack.clear();
  if (count < 0) {
    for (int32_t i = 0; i < written; ++i) {
      if (results[i].tag == THAW_TENSOR) {
        delete static_cast<const at::Tensor*>(results[i].pointer);
      }
    }
  }
  return count;
}

void thaw_pointers_free(void* pointers) { delete[] static_cast<void**>(pointers); }

int32_t thaw_grad(void* const* outputs, void* const* grad_outputs, int32_t n_outputs, void* const* inputs, int32_t n_inputs,
                  void** results) {
  return guarded<int32_t>(-1, [&]() -> int32_t {
    std::vector<at::Tensor> gradients =
        torch::autograd::grad(tensors_of(outputs, n_outputs), tensors_of(inputs, n_inputs), tensors_of(grad_outputs, n_outputs),
                              /*retain_graph=*/false, /*create_graph=*/false, /*allow_unused=*/true);
    for (int32_t i = 0; i < n_inputs; ++i) {
      results[i] = gradients[i].defined() ? new at::Tensor(std::move(gradients[i])) : nullptr;
    }
    return 0;
  });
}

int32_t thaw_set_grad_mode(int32_t enabled) {
  const bool before = c10::GradMode::is_enabled();
  c10::GradMode::set_enabled(enabled != 0);
  return before ? 1 : 0;
}

int32_t thaw_manual_seed(uint64_t seed) {
  return guarded<int32_t>(-1, [&]() -> int32_t {
    at::manual_seed(seed);
    return 0;
  });
}

void* thaw_tensor_over(void* data, int64_t elements, int32_t is_double, void (*release)(void*), void* context) {
  return guarded<void*>(nullptr, [&]() -> void* {
    const auto options = at::TensorOptions().dtype(is_double != 0 ? at::kDouble : at::kFloat);
    return new at::Tensor(at::from_blob(data, {elements}, [release, context](void*) { release(context); }, options));
  });
}

void* thaw_generator_state(int64_t device) {
  return guarded<void*>(nullptr, [&]() -> void* {
    at::Generator generator = at::globalContext().defaultGenerator(device_of(device));
    const std::lock_guard<std::mutex> lock(generator.mutex());
    return new at::Tensor(generator.get_state());
  });
}

int32_t thaw_set_generator_state(int64_t device, const void* state) {
  return guarded<int32_t>(-1, [&]() -> int32_t {
    at::Generator generator = at::globalContext().defaultGenerator(device_of(device));
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(tensor_of(state));
    return 0;
  });
}

int32_t thaw_get_num_threads() { return at::get_num_threads(); }

int32_t thaw_set_num_threads(int32_t threads) {
  return guarded<int32_t>(-1, [&]() -> int32_t {
    at::set_num_threads(threads);
    return 0;
  });
}

int32_t thaw_set_deterministic(int32_t enabled) {
  return guarded<int32_t>(-1, [&]() -> int32_t {
    at::globalContext().setDeterministicAlgorithms(enabled != 0, /*warn_only=*/false);
    return 0;
  });
}

int32_t thaw_select_device(int32_t index) {
  return guarded<int32_t>(-1, [&]() -> int32_t {
    at::accelerator::setDeviceIndex(static_cast<c10::DeviceIndex>(index));
    return 0;
  });
}

int32_t thaw_current_stream(int32_t index, void** stream) {
  return guarded<int32_t>(-1, [&]() -> int32_t {
    *stream = at::accelerator::getCurrentStream(static_cast<c10::DeviceIndex>(index)).native_handle();
    return 0;
  });
}
}
