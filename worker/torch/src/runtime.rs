//! What holds for the whole process: threads, seed, determinism; and a tensor's memory as a slice.

use bytes::Bytes;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, Ordering};
use tch::{Device, Kind, TchError, Tensor};
use thaw_shm::Lease;

use crate::ffi;
use crate::op::device_code;

/// Why the process could not be set up, or a tensor's memory not be lent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot set {what}: {message}")]
    Set { what: &'static str, message: String },
    #[error(
        "cannot read a tensor of {kind:?} on {device:?} as a slice of {expected:?}: it must be contiguous, on the CPU and of that type"
    )]
    Slice { kind: Kind, device: Device, expected: Kind },
}

fn checked(what: &'static str, code: i32) -> Result<(), Error> {
    if code < 0 { Err(Error::Set { what, message: ffi::last_error() }) } else { Ok(()) }
}

/// Seeds every generator (CPU and devices), as `torch.manual_seed`.
///
/// # Errors
/// With libtorch's text.
pub fn manual_seed(seed: u64) -> Result<(), Error> {
    // SAFETY: takes a number.
    checked("the seed", unsafe { ffi::thaw_manual_seed(seed) })
}

/// Where a device's default generator stands.
#[derive(Debug)]
pub struct GeneratorState {
    device: Device,
    state: Tensor,
}

impl GeneratorState {
    /// Where the generator stands now.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn of(device: Device) -> Result<Self, Error> {
        // SAFETY: takes a number; a pointer that is not null is a new tensor handed over by the call.
        let pointer = unsafe { ffi::thaw_generator_state(device_code(device)) };
        if pointer.is_null() {
            return Err(Error::Set { what: "aside the generator's state", message: ffi::last_error() });
        }
        // SAFETY: as above.
        Ok(Self { device, state: unsafe { Tensor::from_ptr(pointer) } })
    }

    /// Puts the generator back to where it stood.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn restore(&self) -> Result<(), Error> {
        // SAFETY: the tensor is alive; its state is copied.
        let code = unsafe { ffi::thaw_set_generator_state(device_code(self.device), self.state.as_ptr()) };
        checked("the generator's state", code)
    }
}

/// Threads within one operator.
#[must_use]
pub fn num_threads() -> usize {
    // SAFETY: takes nothing.
    usize::try_from(unsafe { ffi::thaw_get_num_threads() }).unwrap_or(1)
}

/// Sets the threads within one operator.
///
/// # Errors
/// With libtorch's text.
pub fn set_num_threads(threads: usize) -> Result<(), Error> {
    // SAFETY: takes a number.
    checked("the number of threads", unsafe { ffi::thaw_set_num_threads(i32::try_from(threads).unwrap_or(i32::MAX)) })
}

/// Whether operators without a deterministic form fail, as `torch.use_deterministic_algorithms`.
///
/// # Errors
/// With libtorch's text.
pub fn set_deterministic(enabled: bool) -> Result<(), Error> {
    // SAFETY: takes a flag.
    checked("deterministic algorithms", unsafe { ffi::thaw_set_deterministic(i32::from(enabled)) })
}

/// Keeps the memory of freed CPU tensors in the process, on huge pages, instead of giving it back to the system and faulting it in anew at
/// each step. For the whole process; call it first. `false` where malloc did not take its part of the settings.
#[must_use]
pub fn keep_memory() -> bool {
    // SAFETY: replaces libtorch's allocator by one that lives as long as the process; earlier memory keeps its own deleter (MEM-2).
    unsafe { ffi::thaw_keep_memory() == 0 }
}

/// Gives kept memory that is free back to the system, e.g. between stages.
pub fn release_memory() {
    // SAFETY: touches only memory that nobody holds.
    unsafe { ffi::thaw_release_memory() }
}

/// Has the system find pages for `bytes` more of CPU tensors, where [`keep_memory`] was called: who takes them later does not wait for it, which
/// for fresh memory takes about a second a gigabyte on a virtual machine. Nothing is held afterwards.
pub fn touch_memory(bytes: u64) {
    // SAFETY: touches only memory that nobody holds.
    unsafe { ffi::thaw_touch_memory(bytes.cast_signed()) }
}

/// Bytes of tensors made by [`tensor_in`].
static LEASED: AtomicU64 = AtomicU64::new(0);

/// Bytes held by CPU tensors of 16 KiB and more, where [`keep_memory`] was called, and by those in leased memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryUse {
    pub now: u64,
    /// The most since the last call with `reset`.
    pub peak: u64,
}

/// What CPU tensors hold; `reset` starts the peak anew from now.
#[must_use]
pub fn memory_use(reset: bool) -> MemoryUse {
    let (mut now, mut peak) = (0, 0);
    // SAFETY: both point to integers that outlive the call.
    unsafe { ffi::thaw_memory(&raw mut now, &raw mut peak, i32::from(reset)) };
    // Leases last as long as a stage, so what they come to now is what they came to at the peak.
    let leased = LEASED.load(Ordering::Relaxed);
    MemoryUse { now: now.unsigned_abs() + leased, peak: peak.unsigned_abs() + leased }
}

fn check_slice(tensor: &Tensor, expected: Kind) -> Result<(), Error> {
    let (kind, device) = (tensor.kind(), tensor.device());
    if kind == expected && device == Device::Cpu && tensor.is_contiguous() {
        Ok(())
    } else {
        Err(Error::Slice { kind, device, expected })
    }
}

/// The tensor on a device, in a type. From host to GPU through pinned memory and without waiting: the copy is ordered before what follows on
/// the device, and libtorch keeps the pinned memory until it is done.
pub(crate) fn send(tensor: &Tensor, device: Device, kind: Kind) -> Result<Tensor, TchError> {
    if device.is_cuda() && tensor.device() == Device::Cpu {
        return tensor.f_pin_memory(device)?.f_to_device_(device, kind, true, false);
    }
    tensor.f_to_device_(device, kind, false, false)
}

/// Tells whoever keeps something computed from this memory that it has changed. For writes that libtorch does not count: its fused updates, and
/// those without it.
pub(crate) fn note_write(tensor: &Tensor) {
    // SAFETY: raises a counter of a tensor that is alive.
    unsafe { ffi::thaw_bump_version(tensor.as_ptr()) }
}

/// A contiguous tensor's memory. What it points to lives as long as the tensor.
fn memory<Element>(tensor: &Tensor) -> *mut [Element] {
    let elements = tensor.numel();
    // An empty tensor may have no memory, and a slice must not be null.
    let start =
        if elements == 0 { std::ptr::NonNull::dangling().as_ptr() } else { tensor.data_ptr().cast::<Element>() };
    std::ptr::slice_from_raw_parts_mut(start, elements)
}

/// A tensor that is read as bytes.
struct Memory(Tensor);

impl AsRef<[u8]> for Memory {
    fn as_ref(&self) -> &[u8] {
        let elements: *mut [u8] = memory(&self.0);
        let bytes = self.0.numel() * self.0.kind().elt_size_in_bytes();
        let memory = std::ptr::slice_from_raw_parts(elements.cast::<u8>(), bytes);
        // SAFETY: as for a slice of elements; every byte of a tensor's storage may be read, and it lives as long as the tensor.
        unsafe { &*memory }
    }
}

/// The memory of a contiguous CPU tensor that nobody writes to while the bytes live.
pub(crate) fn into_bytes(tensor: Tensor) -> Bytes {
    assert!(tensor.is_contiguous() && tensor.device() == Device::Cpu, "memory is lent of contiguous CPU tensors");
    Bytes::from_owner(Memory(tensor))
}

/// A tensor `[elements]` of fp32 or fp64 on the CPU, in leased memory, which it keeps. Its elements are zero.
///
/// # Errors
/// With libtorch's text; or where the lease is too small, or the kind another.
pub fn tensor_in(lease: Lease, kind: Kind, elements: usize) -> Result<Tensor, Error> {
    /// Ends a lease that a tensor kept.
    unsafe extern "C" fn release(lease: *mut c_void) {
        // SAFETY: libtorch calls it once, with what was made from a box below.
        let lease = unsafe { Box::from_raw(lease.cast::<Lease>()) };
        LEASED.fetch_sub(lease.bytes() as u64, Ordering::Relaxed);
    }

    let failed = |message: String| Error::Set { what: "aside shared memory", message };
    let bytes = elements.checked_mul(kind.elt_size_in_bytes());
    if !matches!(kind, Kind::Float | Kind::Double) || bytes.is_none_or(|bytes| bytes > lease.bytes()) {
        return Err(failed(format!("{elements} elements of {kind:?} do not fit into {} bytes", lease.bytes())));
    }
    let start = lease.start().cast::<c_void>();
    LEASED.fetch_add(lease.bytes() as u64, Ordering::Relaxed);
    let lease = Box::into_raw(Box::new(lease)).cast::<c_void>();
    let is_double = i32::from(kind == Kind::Double);
    // SAFETY: the memory is as long as that, aligned to a page, holds valid numbers of either type, and lives until `release`.
    let pointer = unsafe { ffi::thaw_tensor_over(start, elements.cast_signed() as i64, is_double, release, lease) };
    if pointer.is_null() {
        let message = ffi::last_error();
        // SAFETY: no tensor was made, so nobody else ends the lease.
        unsafe { release(lease) };
        return Err(failed(message));
    }
    // SAFETY: a new tensor handed over by the call.
    Ok(unsafe { Tensor::from_ptr(pointer) })
}

macro_rules! slices {
    ($read:ident, $read_all:ident, $write:ident, $element:ty, $kind:expr) => {
        #[doc = concat!("Lends the memory of a contiguous CPU tensor of `", stringify!($element), "`.")]
        ///
        /// # Errors
        /// [`Error::Slice`] for any other tensor.
        pub fn $read<R>(tensor: &Tensor, body: impl FnOnce(&[$element]) -> R) -> Result<R, Error> {
            check_slice(tensor, $kind)?;
            // SAFETY: the tensor is contiguous, on the CPU and of this type; libtorch runs nothing in the background on the CPU, and
            // `body` only reads.
            Ok(body(unsafe { &*memory::<$element>(tensor) }))
        }

        #[doc = concat!("Lends the memory of several contiguous CPU tensors of `", stringify!($element), "`.")]
        ///
        /// # Errors
        /// [`Error::Slice`] where one is any other tensor.
        pub fn $read_all<R>(tensors: &[Tensor], body: impl FnOnce(&[&[$element]]) -> R) -> Result<R, Error> {
            tensors.iter().try_for_each(|tensor| check_slice(tensor, $kind))?;
            let lend = |tensor: &Tensor| {
                let memory = memory::<$element>(tensor);
                // SAFETY: as for one tensor; the borrow of `tensors` outlives `body`.
                unsafe { &*memory }
            };
            let slices: Vec<&[$element]> = tensors.iter().map(lend).collect();
            Ok(body(&slices))
        }

        #[doc = concat!("Lends the memory of a contiguous CPU tensor of `", stringify!($element), "`, to be written.")]
        /// The tensor is taken exclusively; other handles to the same storage must not be used inside `body`.
        ///
        /// # Errors
        /// [`Error::Slice`] for any other tensor.
        pub fn $write<R>(tensor: &mut Tensor, body: impl FnOnce(&mut [$element]) -> R) -> Result<R, Error> {
            check_slice(tensor, $kind)?;
            // SAFETY: the tensor is contiguous, on the CPU and of this type; the caller keeps other handles to the storage out of `body`.
            let result = body(unsafe { &mut *memory::<$element>(tensor) });
            note_write(tensor);
            Ok(result)
        }
    };
}

slices!(with_slice_f32, with_slices_f32, with_slice_f32_mut, f32, Kind::Float);
slices!(with_slice_f64, with_slices_f64, with_slice_f64_mut, f64, Kind::Double);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_the_tensors_memory() {
        let mut x = Tensor::from_slice(&[1.0_f32, 2.0, 3.0]);
        with_slice_f32_mut(&mut x, |values| values[1] = 7.0).unwrap();
        assert_eq!(with_slice_f32(&x, <[f32]>::to_vec).unwrap(), [1.0, 7.0, 3.0]);
        assert!(with_slice_f64(&x, |_| ()).is_err());
        let transposed = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu)).transpose(0, 1);
        assert!(with_slice_f32(&transposed, |_| ()).is_err());
    }

    /// What is leased and what is kept are counted together.
    static COUNTED: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn a_tensor_keeps_the_memory_it_lies_in() {
        let _alone = COUNTED.lock().unwrap();
        let arena = std::sync::Arc::new(thaw_shm::Arena::new(thaw_shm::Segment::create(64 << 20).unwrap(), 0));
        let lease = arena.lease(4 << 20).unwrap();
        let start = lease.start();
        let tensor = tensor_in(lease, Kind::Double, 1 << 19).unwrap();
        let view = tensor.narrow(0, 8, 8);
        drop(tensor);
        let _ = view.shallow_clone().fill_(3.0);
        assert_eq!(start.addr() + 64, view.data_ptr().addr());
        assert_eq!(arena.lease(4 << 20).unwrap().start().addr(), start.addr() + (4 << 20), "it is still in use");
        assert_eq!(view.sum(Kind::Double).double_value(&[]), 24.0);
        drop(view);
        assert_eq!(arena.lease(4 << 20).unwrap().start(), start);
        assert!(tensor_in(arena.lease(4).unwrap(), Kind::Float, 2).is_err());
        assert!(tensor_in(arena.lease(64).unwrap(), Kind::Int64, 2).is_err());
    }

    #[test]
    fn kept_memory_is_reused_and_counted() {
        let _alone = COUNTED.lock().unwrap();
        assert!(keep_memory());
        let options = (Kind::Float, Device::Cpu);
        let before = memory_use(true).now;
        let elements = 3_i64 << 18;
        let bytes = 3_u64 << 20;
        let sum = |tensor: &Tensor| tensor.sum(Kind::Float).double_value(&[]);
        let first = Tensor::zeros([elements], options);
        let start = first.data_ptr();
        assert_eq!(start as usize % 64, 0);
        assert!(memory_use(false).now >= before + bytes);
        drop(first);
        // Neighbours that are free are one block again, however they were cut.
        let parts: Vec<Tensor> = (0..5).map(|_| Tensor::ones([elements / 8], options)).collect();
        assert!(parts.iter().all(|part| sum(part) == f64::from(3 << 15)));
        drop(parts);
        let second = Tensor::zeros([elements], options);
        assert_eq!(second.data_ptr(), start);
        drop(second);
        release_memory();
        let used = memory_use(true);
        assert!(used.peak >= before + bytes);
        // Given back pages are there again when they are needed.
        assert_eq!(sum(&Tensor::ones([elements], options)), f64::from(3 << 18));
    }
}
