//! The declarations of `csrc/shim.h`, nothing else. Keep both in step.

use std::ffi::{c_char, c_void};

use torch_sys::C_tensor;

/// A resolved operator, owned by C++.
#[repr(C)]
pub(crate) struct RawOperator {
    _private: [u8; 0],
}

/// An argument converted once, owned by C++.
#[repr(C)]
pub(crate) struct RawConstant {
    _private: [u8; 0],
}

pub(crate) mod tag {
    pub(crate) const DEFAULT: i32 = 0;
    pub(crate) const NONE: i32 = 1;
    pub(crate) const TENSOR: i32 = 2;
    pub(crate) const INT: i32 = 3;
    pub(crate) const FLOAT: i32 = 4;
    pub(crate) const BOOL: i32 = 5;
    pub(crate) const STRING: i32 = 6;
    pub(crate) const INTS: i32 = 7;
    pub(crate) const FLOATS: i32 = 8;
    pub(crate) const BOOLS: i32 = 9;
    pub(crate) const TENSORS: i32 = 10;
    pub(crate) const DEVICE: i32 = 11;
    pub(crate) const CONSTANT: i32 = 12;
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) union RawPayload {
    pub(crate) integer: i64,
    pub(crate) real: f64,
    pub(crate) pointer: *const c_void,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct RawValue {
    pub(crate) tag: i32,
    pub(crate) length: i32,
    pub(crate) payload: RawPayload,
}

impl RawValue {
    pub(crate) const DEFAULT: Self = Self { tag: tag::DEFAULT, length: 0, payload: RawPayload { integer: 0 } };
}

unsafe extern "C" {
    pub(crate) fn thaw_last_error() -> *const c_char;

    pub(crate) fn thaw_resolve(name: *const c_char, overload: *const c_char) -> *mut RawOperator;
    pub(crate) fn thaw_operator_free(op: *mut RawOperator);
    pub(crate) fn thaw_argument_count(op: *const RawOperator) -> i32;
    pub(crate) fn thaw_argument_name(op: *const RawOperator, index: i32) -> *const c_char;
    pub(crate) fn thaw_argument_alias(op: *const RawOperator, index: i32) -> i32;
    pub(crate) fn thaw_is_random(op: *const RawOperator) -> i32;
    pub(crate) fn thaw_return_count(op: *const RawOperator) -> i32;
    pub(crate) fn thaw_return_alias(op: *const RawOperator, index: i32) -> i32;
    pub(crate) fn thaw_return_is_list(op: *const RawOperator, index: i32) -> i32;

    pub(crate) fn thaw_constant(op: *const RawOperator, index: i32, value: *const RawValue) -> *mut RawConstant;
    pub(crate) fn thaw_constant_free(constant: *mut RawConstant);

    pub(crate) fn thaw_call(
        op: *const RawOperator,
        arguments: *const RawValue,
        cast: i32,
        results: *mut RawValue,
        capacity: i32,
    ) -> i32;
    pub(crate) fn thaw_pointers_free(pointers: *mut c_void);

    pub(crate) fn thaw_grad(
        outputs: *const *const C_tensor,
        grad_outputs: *const *const C_tensor,
        n_outputs: i32,
        inputs: *const *const C_tensor,
        n_inputs: i32,
        results: *mut *mut C_tensor,
    ) -> i32;

    pub(crate) fn thaw_tensor_over(
        data: *mut c_void,
        elements: i64,
        is_double: i32,
        release: unsafe extern "C" fn(*mut c_void),
        context: *mut c_void,
    ) -> *mut C_tensor;
    pub(crate) fn thaw_set_grad_mode(enabled: i32) -> i32;
    pub(crate) fn thaw_manual_seed(seed: u64) -> i32;
    pub(crate) fn thaw_generator_state(device: i64) -> *mut C_tensor;
    pub(crate) fn thaw_set_generator_state(device: i64, state: *const C_tensor) -> i32;
    pub(crate) fn thaw_get_num_threads() -> i32;
    pub(crate) fn thaw_set_num_threads(threads: i32) -> i32;
    pub(crate) fn thaw_set_deterministic(enabled: i32) -> i32;
    pub(crate) fn thaw_select_device(index: i32) -> i32;
    pub(crate) fn thaw_current_stream(index: i32, stream: *mut *mut c_void) -> i32;

    pub(crate) fn thaw_register_kernels() -> i32;
    pub(crate) fn thaw_set_gradient_home(parameter: *const C_tensor, home: *const C_tensor);

    pub(crate) fn thaw_keep_half_copy(weight: *const C_tensor);
    pub(crate) fn thaw_bump_version(tensor: *const C_tensor);

    pub(crate) fn thaw_keep_memory() -> i32;
    pub(crate) fn thaw_release_memory();
    pub(crate) fn thaw_touch_memory(bytes: i64);
    pub(crate) fn thaw_memory(in_use: *mut i64, peak: *mut i64, reset: i32);
}

/// The text of this thread's last failure.
pub(crate) fn last_error() -> String {
    // SAFETY: the function returns a string that ends in zero and lives until this thread's next failure; it is copied here.
    let text = unsafe { std::ffi::CStr::from_ptr(thaw_last_error()) };
    text.to_string_lossy().trim_end().to_owned()
}
