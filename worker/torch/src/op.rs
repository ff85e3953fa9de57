//! Operators of libtorch, found by name at run time and called boxed through its dispatcher.
//!
//! OP-1: an operator is resolved once; a call looks nothing up.
//! OP-2: arguments follow the schema: integers widen to floats, numbers become zero-dimensional tensors that take no part in type
//!       promotion where a tensor is expected (as in Python), and what is not given takes the schema's default.
//! OP-3: a failure in libtorch is an [`Error`] with its text; nothing unwinds.

use std::ffi::{CStr, CString, c_void};

use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::ffi::{self, RawPayload, RawValue, tag};

/// Why an operator could not be found or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot resolve the operator {operator}: libtorch does not know it")]
    Unknown { operator: String },
    #[error("cannot call {operator}: {message}")]
    Call { operator: String, message: String },
    #[error("cannot call {operator}: {given} arguments given, its schema has {expected}")]
    Arguments { operator: String, given: usize, expected: usize },
    #[error("cannot use the result of {operator}: expected {expected}")]
    Result { operator: String, expected: &'static str },
}

/// One argument of a call.
#[derive(Clone, Copy)]
pub enum Value<'a> {
    /// What the schema says.
    Default,
    None,
    Tensor(&'a Tensor),
    Int(i64),
    Float(f64),
    Bool(bool),
    String(&'a str),
    Ints(&'a [i64]),
    Floats(&'a [f64]),
    Bools(&'a [bool]),
    Tensors(&'a [&'a Tensor]),
    OptionalTensors(&'a [Option<&'a Tensor>]),
    DType(Kind),
    /// As libtorch numbers them (strided is 0).
    Layout(i64),
    /// As libtorch numbers them (contiguous 0, preserve 1, channels last 2).
    MemoryFormat(i64),
    Device(Device),
    Constant(&'a Constant),
}

/// One result of a call.
#[derive(Debug)]
pub enum Output {
    /// An undefined tensor, or nothing.
    None,
    Tensor(Tensor),
    Tensors(Vec<Tensor>),
    Int(i64),
    Float(f64),
    Bool(bool),
}

/// How floating tensors among the arguments are cast before the call; mixed precision's rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cast {
    AsIs,
    /// fp32 down to bf16.
    ToBf16,
    /// bf16 and fp16 up to fp32.
    ToFp32,
    /// Up to fp32 where any argument is fp32.
    Widest,
}

impl Cast {
    fn code(self) -> i32 {
        match self {
            Self::AsIs => 0,
            Self::ToBf16 => 1,
            Self::ToFp32 => 2,
            Self::Widest => 3,
        }
    }
}

/// An argument of a schema.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArgumentInfo {
    pub name: String,
    /// A result may share its memory.
    pub aliased: bool,
    /// The operator writes to it.
    pub written: bool,
}

/// A resolved operator.
pub struct Operator {
    raw: *mut ffi::RawOperator,
    name: String,
    arguments: Vec<ArgumentInfo>,
    returns: Vec<Option<usize>>,
    returns_list: bool,
}

// SAFETY: the C++ side is read-only after it was resolved, and the dispatcher may be called from any thread.
unsafe impl Send for Operator {}
// SAFETY: as above.
unsafe impl Sync for Operator {}

impl std::fmt::Debug for Operator {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Operator").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // SAFETY: `raw` came from thaw_resolve and is freed once.
        unsafe { ffi::thaw_operator_free(self.raw) }
    }
}

/// An argument converted to libtorch's form once, for many calls.
pub struct Constant {
    raw: *mut ffi::RawConstant,
}

// SAFETY: a call only copies the value, whose reference counts are atomic.
unsafe impl Send for Constant {}
// SAFETY: as above.
unsafe impl Sync for Constant {}

impl std::fmt::Debug for Constant {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Constant").finish_non_exhaustive()
    }
}

impl Drop for Constant {
    fn drop(&mut self) {
        // SAFETY: `raw` came from thaw_constant and is freed once.
        unsafe { ffi::thaw_constant_free(self.raw) }
    }
}

/// Finds an operator, e.g. `("aten::add", "Tensor")`; the overload is empty for the default one.
///
/// # Errors
/// [`Error::Unknown`] where libtorch has none of that name.
pub fn resolve(operator: &str, overload: &str) -> Result<Operator, Error> {
    let name = if overload.is_empty() { operator.to_owned() } else { format!("{operator}.{overload}") };
    let (Ok(c_operator), Ok(c_overload)) = (CString::new(operator), CString::new(overload)) else {
        return Err(Error::Unknown { operator: name });
    };
    // SAFETY: both strings end in zero and outlive the call.
    let raw = unsafe { ffi::thaw_resolve(c_operator.as_ptr(), c_overload.as_ptr()) };
    if raw.is_null() {
        return Err(Error::Unknown { operator: name });
    }
    // SAFETY: `raw` is a resolved operator, and every index below is smaller than the count it reported.
    let (arguments, returns, returns_list) = unsafe { describe(raw) };
    Ok(Operator { raw, name, arguments, returns, returns_list })
}

/// # Safety
/// `raw` must come from `thaw_resolve`.
unsafe fn describe(raw: *mut ffi::RawOperator) -> (Vec<ArgumentInfo>, Vec<Option<usize>>, bool) {
    // SAFETY: indices lie below the counts; names end in zero and live as long as the operator.
    unsafe {
        let arguments = (0..ffi::thaw_argument_count(raw))
            .map(|index| {
                let alias = ffi::thaw_argument_alias(raw, index);
                let name = CStr::from_ptr(ffi::thaw_argument_name(raw, index)).to_string_lossy().into_owned();
                ArgumentInfo { name, aliased: alias & 1 != 0, written: alias & 2 != 0 }
            })
            .collect();
        let count = ffi::thaw_return_count(raw);
        let returns = (0..count).map(|index| usize::try_from(ffi::thaw_return_alias(raw, index)).ok()).collect();
        let returns_list = count == 1 && ffi::thaw_return_is_list(raw, 0) != 0;
        (arguments, returns, returns_list)
    }
}

/// The most arguments that are passed without a heap allocation.
const INLINE_ARGUMENTS: usize = 24;
/// The most results any operator has.
const MAX_RESULTS: usize = 16;

impl Operator {
    /// `namespace::name.overload`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The schema's arguments, in order.
    #[must_use]
    pub fn arguments(&self) -> &[ArgumentInfo] {
        &self.arguments
    }

    /// Per result the argument whose memory it may share.
    #[must_use]
    pub fn returns(&self) -> &[Option<usize>] {
        &self.returns
    }

    /// Whether the one result is a list.
    #[must_use]
    pub fn returns_list(&self) -> bool {
        self.returns_list
    }

    /// Whether it draws from a generator.
    #[must_use]
    pub fn is_random(&self) -> bool {
        // SAFETY: the operator is alive.
        unsafe { ffi::thaw_is_random(self.raw) != 0 }
    }

    /// The argument's place in the schema.
    #[must_use]
    pub fn position(&self, argument: &str) -> Option<usize> {
        self.arguments.iter().position(|info| info.name == argument)
    }

    /// Converts a value for the argument at `index`, to be given as [`Value::Constant`].
    ///
    /// # Errors
    /// [`Error::Call`] where the schema's type does not take it.
    pub fn constant(&self, index: usize, value: Value<'_>) -> Result<Constant, Error> {
        if index >= self.arguments.len() {
            return Err(Error::Arguments {
                operator: self.name.clone(),
                given: index + 1,
                expected: self.arguments.len(),
            });
        }
        let mut pointers = Vec::new();
        let raw_value = lower(&value, &mut pointers);
        // SAFETY: the operator is alive, the index was checked, and what the value points to outlives the call.
        let raw =
            unsafe { ffi::thaw_constant(self.raw, i32::try_from(index).unwrap_or(i32::MAX), &raw const raw_value) };
        if raw.is_null() { Err(self.failure()) } else { Ok(Constant { raw }) }
    }

    /// Calls it and returns its results.
    ///
    /// # Errors
    /// [`Error::Arguments`] where there are more arguments than in the schema, [`Error::Call`] with libtorch's text.
    pub fn call(&self, arguments: &[Value<'_>]) -> Result<Vec<Output>, Error> {
        let mut outputs = Vec::new();
        self.call_into(arguments, Cast::AsIs, &mut outputs)?;
        Ok(outputs)
    }

    /// Calls an operator with one tensor as its result.
    ///
    /// # Errors
    /// As [`Operator::call`], and [`Error::Result`] where the result is another.
    pub fn call_tensor(&self, arguments: &[Value<'_>]) -> Result<Tensor, Error> {
        let mut outputs = self.call(arguments)?;
        match (outputs.pop(), outputs.len()) {
            (Some(Output::Tensor(tensor)), 0) => Ok(tensor),
            _ => Err(Error::Result { operator: self.name.clone(), expected: "one tensor" }),
        }
    }

    /// Calls it and puts its results into `outputs`, whose earlier content is dropped. Arguments left out at the end take their defaults.
    ///
    /// # Errors
    /// As [`Operator::call`].
    pub fn call_into(&self, arguments: &[Value<'_>], cast: Cast, outputs: &mut Vec<Output>) -> Result<(), Error> {
        outputs.clear();
        let expected = self.arguments.len();
        if arguments.len() > expected {
            return Err(Error::Arguments { operator: self.name.clone(), given: arguments.len(), expected });
        }
        let mut pointers = Vec::new();
        let mut inline = [RawValue::DEFAULT; INLINE_ARGUMENTS];
        let mut heap;
        let lowered: &mut [RawValue] = if expected <= INLINE_ARGUMENTS {
            &mut inline[..expected]
        } else {
            heap = vec![RawValue::DEFAULT; expected];
            &mut heap
        };
        for (slot, value) in lowered.iter_mut().zip(arguments) {
            *slot = lower(value, &mut pointers);
        }
        let mut results = [RawValue::DEFAULT; MAX_RESULTS];
        // SAFETY: `lowered` has one entry per schema argument, and all that it points to (tensors, slices, `pointers`) outlives the call;
        // `results` has room for MAX_RESULTS.
        let count = unsafe {
            ffi::thaw_call(self.raw, lowered.as_ptr(), cast.code(), results.as_mut_ptr(), MAX_RESULTS as i32)
        };
        let Ok(count) = usize::try_from(count) else {
            return Err(self.failure());
        };
        for result in &results[..count] {
            // SAFETY: the call wrote this result and handed over what it points to; each is taken once.
            outputs.push(unsafe { take(result) });
        }
        Ok(())
    }

    fn failure(&self) -> Error {
        Error::Call { operator: self.name.clone(), message: ffi::last_error() }
    }
}

fn length(count: usize) -> i32 {
    i32::try_from(count).expect("an argument list has fewer than 2^31 entries")
}

fn pointing(kind: i32, count: usize, pointer: *const c_void) -> RawValue {
    RawValue { tag: kind, length: length(count), payload: RawPayload { pointer } }
}

fn number(kind: i32, integer: i64) -> RawValue {
    RawValue { tag: kind, length: 0, payload: RawPayload { integer } }
}

/// The C form of a value. Pointer arrays that it needs are kept in `pointers`, boxed so that they stay where they are.
fn lower(value: &Value<'_>, pointers: &mut Vec<Box<[*const C_tensor]>>) -> RawValue {
    let mut keep = |list: Box<[*const C_tensor]>| {
        let raw = pointing(tag::TENSORS, list.len(), list.as_ptr().cast());
        pointers.push(list);
        raw
    };
    match *value {
        Value::Default => RawValue::DEFAULT,
        Value::None => number(tag::NONE, 0),
        Value::Tensor(tensor) => pointing(tag::TENSOR, 0, tensor.as_ptr().cast()),
        Value::Int(integer) | Value::Layout(integer) | Value::MemoryFormat(integer) => number(tag::INT, integer),
        Value::Float(real) => RawValue { tag: tag::FLOAT, length: 0, payload: RawPayload { real } },
        Value::Bool(flag) => number(tag::BOOL, i64::from(flag)),
        Value::String(text) => pointing(tag::STRING, text.len(), text.as_ptr().cast()),
        Value::Ints(list) => pointing(tag::INTS, list.len(), list.as_ptr().cast()),
        Value::Floats(list) => pointing(tag::FLOATS, list.len(), list.as_ptr().cast()),
        Value::Bools(list) => pointing(tag::BOOLS, list.len(), list.as_ptr().cast()),
        Value::Tensors(list) => keep(list.iter().map(|tensor| tensor.as_ptr()).collect()),
        Value::OptionalTensors(list) => {
            keep(list.iter().map(|tensor| tensor.map_or(std::ptr::null(), Tensor::as_ptr)).collect())
        }
        Value::DType(kind) => number(tag::INT, i64::from(kind_code(kind))),
        Value::Device(device) => number(tag::DEVICE, device_code(device)),
        Value::Constant(constant) => pointing(tag::CONSTANT, 0, constant.raw.cast_const().cast()),
    }
}

/// libtorch's number of an element type.
fn kind_code(kind: Kind) -> i32 {
    match kind {
        Kind::Uint8 => 0,
        Kind::Int8 => 1,
        Kind::Int16 => 2,
        Kind::Int => 3,
        Kind::Int64 => 4,
        Kind::Half => 5,
        Kind::Float => 6,
        Kind::Double => 7,
        Kind::ComplexHalf => 8,
        Kind::ComplexFloat => 9,
        Kind::ComplexDouble => 10,
        Kind::Bool => 11,
        Kind::QInt8 => 12,
        Kind::QUInt8 => 13,
        Kind::QInt32 => 14,
        Kind::BFloat16 => 15,
        Kind::Float8e5m2 => 23,
        Kind::Float8e4m3fn => 24,
        Kind::Float8e5m2fnuz => 25,
        Kind::Float8e4m3fnuz => 26,
    }
}

/// Device type in the upper bits, index + 1 in the lower eight (0: none).
pub(crate) fn device_code(device: Device) -> i64 {
    match device {
        Device::Cpu => 0,
        Device::Cuda(index) => (1 << 8) | (i64::try_from(index).unwrap_or(0) + 1),
        Device::Mps => 13 << 8,
        Device::Vulkan => 10 << 8,
    }
}

/// # Safety
/// `result` must have been written by a successful call, and be taken once.
unsafe fn take(result: &RawValue) -> Output {
    // SAFETY: the tag says which member of the payload was written.
    unsafe {
        match result.tag {
            tag::TENSOR => Output::Tensor(Tensor::from_ptr(result.payload.pointer.cast_mut().cast())),
            tag::INT => Output::Int(result.payload.integer),
            tag::FLOAT => Output::Float(result.payload.real),
            tag::BOOL => Output::Bool(result.payload.integer != 0),
            tag::TENSORS => {
                let pointer: *mut *mut C_tensor = result.payload.pointer.cast_mut().cast();
                let tensors = (0..result.length as usize).map(|index| Tensor::from_ptr(*pointer.add(index))).collect();
                ffi::thaw_pointers_free(pointer.cast());
                Output::Tensors(tensors)
            }
            _ => Output::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_given_for_tensors_take_no_part_in_promotion() {
        let add = resolve("aten::add", "Tensor").unwrap();
        let x = Tensor::from_slice(&[1_i32, 2]);
        let sum = add.call_tensor(&[Value::Tensor(&x), Value::Int(1)]).unwrap();
        assert_eq!(sum.kind(), Kind::Int);
        assert_eq!(Vec::<i32>::try_from(sum).unwrap(), [2, 3]);
        let x = Tensor::from_slice(&[1.0_f32, 2.0]);
        let sum = add.call_tensor(&[Value::Tensor(&x), Value::Float(0.5), Value::Int(2)]).unwrap();
        assert_eq!(sum.kind(), Kind::Float);
        assert_eq!(Vec::<f32>::try_from(sum).unwrap(), [2.0, 3.0]);
    }

    #[test]
    fn lists_optionals_devices_and_types_are_converted() {
        let zeros = resolve("aten::zeros", "").unwrap();
        let device = zeros.position("device").unwrap();
        let mut arguments = vec![Value::Default; zeros.arguments().len()];
        arguments[0] = Value::Ints(&[2, 3]);
        arguments[1] = Value::DType(Kind::Double);
        arguments[device] = Value::Device(Device::Cpu);
        let x = zeros.call_tensor(&arguments).unwrap();
        assert_eq!((x.size(), x.kind()), (vec![2, 3], Kind::Double));

        let size = resolve("aten::sym_size", "int").unwrap();
        assert!(matches!(size.call(&[Value::Tensor(&x), Value::Int(1)]).unwrap()[..], [Output::Int(3)]));

        let cat = resolve("aten::cat", "").unwrap();
        assert_eq!(cat.call_tensor(&[Value::Tensors(&[&x, &x])]).unwrap().size(), [4, 3]);

        let index = resolve("aten::index", "Tensor").unwrap();
        let rows = Tensor::from_slice(&[1_i64]);
        let picked = index.call_tensor(&[Value::Tensor(&x), Value::OptionalTensors(&[None, Some(&rows)])]).unwrap();
        assert_eq!(picked.size(), [2, 1]);

        let split = resolve("aten::split", "Tensor").unwrap();
        assert!(split.returns_list());
        let outputs = split.call(&[Value::Tensor(&x), Value::Int(2), Value::Int(1)]).unwrap();
        assert!(matches!(&outputs[..], [Output::Tensors(parts)] if parts.len() == 2));
    }

    #[test]
    fn schemas_tell_what_is_written_and_shared() {
        let add = resolve("aten::add_", "Tensor").unwrap();
        assert!(add.arguments()[0].written && !add.arguments()[1].written);
        assert_eq!(add.returns(), [Some(0)]);
        let view = resolve("aten::view", "").unwrap();
        assert!(view.arguments()[0].aliased && !view.arguments()[0].written);
        assert_eq!(view.returns(), [Some(0)]);
    }

    #[test]
    fn failures_come_back_as_text() {
        assert!(matches!(resolve("aten::no_such", "").unwrap_err(), Error::Unknown { .. }));
        let mm = resolve("aten::mm", "").unwrap();
        let x = Tensor::from_slice(&[1.0_f32, 2.0]);
        let error = mm.call_tensor(&[Value::Tensor(&x), Value::Tensor(&x)]).unwrap_err().to_string();
        assert!(error.starts_with("cannot call aten::mm: ") && error.contains("must be a matrix"), "{error}");
        let error = mm.call_tensor(&[Value::Tensor(&x)]).unwrap_err().to_string();
        assert!(error.contains("`mat2`") && error.contains("missing"), "{error}");
        let error = mm.call_tensor(&[Value::Tensor(&x), Value::String("x")]).unwrap_err();
        assert!(matches!(error, Error::Call { .. }));
    }
}
