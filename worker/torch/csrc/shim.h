// The C face of libtorch's dispatcher and autograd engine. `src/ffi.rs` mirrors every declaration here; keep both in step.
//
// SHIM-1: no exception leaves a function; a failure returns -1 or null, and thaw_last_error() then holds its text (per thread).
// SHIM-2: a `void*` tensor is an `at::Tensor*` as torch-sys hands it out; results are new ones that the caller owns.
// SHIM-3: arguments follow the schema found at run time; nothing here names an operator.
#pragma once

#include <stdint.h>

extern "C" {

enum ThawTag : int32_t {
  THAW_DEFAULT = 0,  // what the schema says
  THAW_NONE = 1,
  THAW_TENSOR = 2,
  THAW_INT = 3,
  THAW_FLOAT = 4,
  THAW_BOOL = 5,
  THAW_STRING = 6,   // bytes, length
  THAW_INTS = 7,     // int64_t*, length
  THAW_FLOATS = 8,   // double*, length
  THAW_BOOLS = 9,    // uint8_t*, length
  THAW_TENSORS = 10, // at::Tensor**, length; null entries are absent
  THAW_DEVICE = 11,  // integer: type << 8 | (index + 1)
  THAW_CONSTANT = 12 // c10::IValue* from thaw_constant
};

// How floating tensors are cast before a call.
enum ThawCast : int32_t {
  THAW_AS_IS = 0,
  THAW_TO_BF16 = 1,  // fp32 down to bf16
  THAW_TO_FP32 = 2,  // bf16 and fp16 up to fp32
  THAW_WIDEST = 3    // up to fp32 where any argument is fp32
};

struct ThawValue {
  int32_t tag;
  int32_t length;
  union {
    int64_t integer;
    double real;
    const void* pointer;
  };
};

const char* thaw_last_error();

// Operators. Null where the dispatcher does not know the name.
void* thaw_resolve(const char* name, const char* overload);
void thaw_operator_free(void* op);
int32_t thaw_argument_count(const void* op);
const char* thaw_argument_name(const void* op, int32_t index);
// Bit 0: the schema lets a result share this argument's memory. Bit 1: the operator writes to it.
int32_t thaw_argument_alias(const void* op, int32_t index);
int32_t thaw_return_count(const void* op);
// Whether it draws from a generator.
int32_t thaw_is_random(const void* op);
// The argument whose memory this result may share, or -1.
int32_t thaw_return_alias(const void* op, int32_t index);
int32_t thaw_return_is_list(const void* op, int32_t index);

// An argument converted once for many calls. Null on failure.
void* thaw_constant(const void* op, int32_t index, const ThawValue* value);
void thaw_constant_free(void* constant);

// `arguments` has one entry per schema argument. Returns the number of results written, or -1.
int32_t thaw_call(const void* op, const ThawValue* arguments, int32_t cast, ThawValue* results, int32_t capacity);
void thaw_pointers_free(void* pointers);

// Gradients of sum(outputs * grad_outputs) by `inputs`; null in `results` where an input was not used. A null gradient means one.
int32_t thaw_grad(void* const* outputs, void* const* grad_outputs, int32_t n_outputs, void* const* inputs, int32_t n_inputs,
                  void** results);

// Returns what it was before.
// A tensor of one dimension over memory of the caller, fp64 or else fp32, owned by the caller; `release(context)` is called when nothing
// refers to the memory any more. Null on failure; then it is not called.
void* thaw_tensor_over(void* data, int64_t elements, int32_t is_double, void (*release)(void*), void* context);
int32_t thaw_set_grad_mode(int32_t enabled);
int32_t thaw_manual_seed(uint64_t seed);
// The state of a device's default generator, as a tensor that the caller owns; null on failure. `device` as THAW_DEVICE's integer.
void* thaw_generator_state(int64_t device);
int32_t thaw_set_generator_state(int64_t device, const void* state);
int32_t thaw_get_num_threads();
int32_t thaw_set_num_threads(int32_t threads);
int32_t thaw_set_deterministic(int32_t enabled);
// Makes a GPU the calling thread's own.
int32_t thaw_select_device(int32_t index);
// The stream on which the calling thread puts a GPU's work, as CUDA's driver knows it (null: the default one).
int32_t thaw_current_stream(int32_t index, void** stream);

// kernels.cpp. Puts our kernels in libtorch's place, once a process. -1 where it refuses them.
int32_t thaw_register_kernels();
// Where the gradient of a leaf that one operator reads is written, if that operator can; null: anywhere.
void thaw_set_gradient_home(const void* parameter, const void* home);

// cast.cpp. From now on the copy in bf16 that casts make of a leaf is kept until it changes.
void thaw_keep_half_copy(const void* weight);
// To be called after memory was written without libtorch, or by a fused update, which does not count as a write there.
void thaw_bump_version(const void* tensor);

// allocator.cpp. From now on freed memory of tensors on the CPU stays with the process. 1 where malloc's own limits could not be set.
int32_t thaw_keep_memory();
// Gives the pages of what is free back to the system.
void thaw_release_memory();
// Has so many bytes more ready for large tensors.
void thaw_touch_memory(int64_t bytes);
// Bytes of large tensors now, and the most since the last reset.
void thaw_memory(int64_t* in_use, int64_t* peak, int32_t reset);
}
