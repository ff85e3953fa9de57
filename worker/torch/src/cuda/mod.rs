//! GPUs: whether there are any, which one is a trainer's, and when work on one is done.
//!
//! CUDA-1: nothing of CUDA is needed to build or to start; it is looked for when it is asked for, and what is missing is an
//!         [`Error::NotAvailable`] that says so.
//! CUDA-2: libtorch's CUDA part is loaded before anything else asks libtorch about devices: it looks for them once.

mod library;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys::{CUcontext, CUdevice, CUevent, CUstream};
use tch::{Cuda, Device};

use crate::ffi;
pub(crate) use library::{library, missing_symbol, open as open_library};

/// Why a GPU, or NCCL, cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// This machine or this libtorch lacks something.
    #[error("not available here: {what}")]
    NotAvailable {
        /// What is missing, and what to do about it.
        what: String,
    },
    /// A call into a library went wrong.
    #[error("{call} failed: {text}")]
    Call {
        /// The function's name.
        call: &'static str,
        /// What the library says.
        text: String,
        /// Whether it was called wrongly, so that trying again cannot help.
        misuse: bool,
    },
}

impl Error {
    pub(crate) fn not_available(what: impl Into<String>) -> Self {
        Self::NotAvailable { what: what.into() }
    }
}

const SUCCESS: c_uint = 0;
const NOT_READY: c_uint = cudarc::driver::sys::CUresult::CUDA_ERROR_NOT_READY as c_uint;
const STUB: c_uint = cudarc::driver::sys::CUresult::CUDA_ERROR_STUB_LIBRARY as c_uint;
const NO_DEVICE: c_uint = cudarc::driver::sys::CUresult::CUDA_ERROR_NO_DEVICE as c_uint;
const DISABLE_TIMING: c_uint = cudarc::driver::sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
const NON_BLOCKING: c_uint = cudarc::driver::sys::CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint;

library! {
    /// CUDA's driver.
    Driver {
        cuInit as init(c_uint) -> c_uint;
        cuDeviceGetCount as device_count(*mut c_int) -> c_uint;
        cuDeviceGet as device(*mut CUdevice, c_int) -> c_uint;
        cuDevicePrimaryCtxRetain as retain_context(*mut CUcontext, CUdevice) -> c_uint;
        cuDevicePrimaryCtxRelease_v2 as release_context(CUdevice) -> c_uint;
        cuCtxSetCurrent as set_context(CUcontext) -> c_uint;
        cuCtxGetStreamPriorityRange as priorities(*mut c_int, *mut c_int) -> c_uint;
        cuStreamCreateWithPriority as create_stream(*mut CUstream, c_uint, c_int) -> c_uint;
        cuStreamDestroy_v2 as destroy_stream(CUstream) -> c_uint;
        cuStreamWaitEvent as wait_event(CUstream, CUevent, c_uint) -> c_uint;
        cuEventCreate as create_event(*mut CUevent, c_uint) -> c_uint;
        cuEventRecord as record_event(CUevent, CUstream) -> c_uint;
        cuEventQuery as query_event(CUevent) -> c_uint;
        cuEventDestroy_v2 as destroy_event(CUevent) -> c_uint;
        cuGetErrorName as error_name(c_uint, *mut *const c_char) -> c_uint;
    }
}

impl Driver {
    /// The driver of this process, looked for once.
    fn get() -> Result<&'static Self, Error> {
        static DRIVER: OnceLock<Result<Driver, Error>> = OnceLock::new();
        DRIVER.get_or_init(Self::start).as_ref().map_err(Clone::clone)
    }

    fn start() -> Result<Self, Error> {
        let driver = Self::open("libcuda.so.1", "it comes with NVIDIA's driver")?;
        // SAFETY: takes flags, of which there are none.
        match unsafe { (driver.init)(0) } {
            SUCCESS => Ok(driver),
            STUB => Err(Error::not_available("libcuda.so.1 is the toolkit's stub, not NVIDIA's driver")),
            NO_DEVICE => Err(Error::not_available("NVIDIA's driver sees no GPU; CUDA_VISIBLE_DEVICES may hide it")),
            code => Err(Error::not_available(format!("NVIDIA's driver does not start: {}", driver.describe(code)))),
        }
    }

    fn describe(&self, code: c_uint) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: points to a pointer that outlives the call.
        let found = unsafe { (self.error_name)(code, &raw mut name) };
        if found != SUCCESS || name.is_null() {
            return format!("error {code}");
        }
        // SAFETY: the driver's names are static strings that end in zero.
        unsafe { std::ffi::CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    fn check(&self, call: &'static str, code: c_uint) -> Result<(), Error> {
        if code == SUCCESS {
            return Ok(());
        }
        Err(Error::Call { call, text: self.describe(code), misuse: false })
    }
}

/// How many GPUs NVIDIA's driver shows to this process. Makes no context on any.
///
/// # Errors
/// [`Error::NotAvailable`] where there is no driver, or no GPU.
pub fn devices() -> Result<usize, Error> {
    let driver = Driver::get()?;
    let mut count = 0;
    // SAFETY: points to an integer that outlives the call.
    driver.check("cuDeviceGetCount", unsafe { (driver.device_count)(&raw mut count) })?;
    match usize::try_from(count) {
        Ok(count) if count > 0 => Ok(count),
        Ok(_) | Err(_) => Err(Error::not_available("NVIDIA's driver shows no GPU; CUDA_VISIBLE_DEVICES may hide it")),
    }
}

/// Loads libtorch's CUDA part. Lies beside `libtorch_cpu.so` in a CUDA build of PyTorch.
fn load() -> Result<(), Error> {
    static LOADED: OnceLock<Result<(), Error>> = OnceLock::new();
    // Its initialisers register operators, which is what it is loaded for.
    let open = || library::open("libtorch_cuda.so", "LIBTORCH must be a CUDA build of PyTorch 2.11 for --device cuda");
    LOADED.get_or_init(|| open().map(|_| ())).clone()
}

/// Makes a GPU this thread's own, for libtorch too. Call it before anything else of libtorch (CUDA-2).
///
/// # Errors
/// [`Error::NotAvailable`] where the driver, libtorch's CUDA part or that GPU is missing.
pub fn select(index: usize) -> Result<Device, Error> {
    let count = devices()?;
    if index >= count {
        return Err(Error::not_available(format!("GPU {index} does not exist; this machine shows {count}, from 0")));
    }
    load()?;
    if !Cuda::is_available() {
        return Err(Error::not_available(
            "libtorch finds no GPU, though NVIDIA's driver does: the driver may be too old for this PyTorch's CUDA",
        ));
    }
    // SAFETY: takes a number.
    if unsafe { ffi::thaw_select_device(c_int::try_from(index).unwrap_or(c_int::MAX)) } < 0 {
        return Err(Error::Call { call: "setDeviceIndex", text: ffi::last_error(), misuse: false });
    }
    Ok(Device::Cuda(index))
}

/// A GPU's primary context, the one libtorch uses.
#[derive(Debug)]
pub(crate) struct Context {
    driver: &'static Driver,
    index: usize,
    device: CUdevice,
    context: CUcontext,
}

// SAFETY: CUDA's driver lets every thread use a context and what belongs to it.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(crate) fn of(index: usize) -> Result<Self, Error> {
        let driver = Driver::get()?;
        let ordinal = c_int::try_from(index).unwrap_or(c_int::MAX);
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: both point to what outlives the calls; the context is released when this is dropped.
        unsafe {
            driver.check("cuDeviceGet", (driver.device)(&raw mut device, ordinal))?;
            driver.check("cuDevicePrimaryCtxRetain", (driver.retain_context)(&raw mut context, device))?;
        }
        Ok(Self { driver, index, device, context })
    }

    /// Makes it the calling thread's.
    pub(crate) fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context is retained.
        self.driver.check("cuCtxSetCurrent", unsafe { (self.driver.set_context)(self.context) })
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: it was retained once.
        let _code = unsafe { (self.driver.release_context)(self.device) };
    }
}

/// A stream of its own, ahead of libtorch's where both have work.
#[derive(Debug)]
pub(crate) struct Stream {
    context: std::sync::Arc<Context>,
    raw: CUstream,
}

// SAFETY: as for `Context`.
unsafe impl Send for Stream {}

impl Stream {
    pub(crate) fn new(context: &std::sync::Arc<Context>) -> Result<Self, Error> {
        context.enter()?;
        let driver = context.driver;
        let (mut least, mut greatest, mut raw) = (0, 0, std::ptr::null_mut());
        // SAFETY: all point to what outlives the calls.
        unsafe {
            driver
                .check("cuCtxGetStreamPriorityRange", (driver.priorities)(&raw mut least, &raw mut greatest))
                .and_then(|()| {
                    let code = (driver.create_stream)(&raw mut raw, NON_BLOCKING, greatest);
                    driver.check("cuStreamCreateWithPriority", code)
                })?;
        }
        Ok(Self { context: std::sync::Arc::clone(context), raw })
    }

    pub(crate) fn raw(&self) -> *mut c_void {
        self.raw.cast()
    }

    /// Has what comes next on this stream wait for an event.
    pub(crate) fn wait(&self, event: &Event) -> Result<(), Error> {
        let driver = self.context.driver;
        // SAFETY: both are alive.
        driver.check("cuStreamWaitEvent", unsafe { (driver.wait_event)(self.raw, event.raw, 0) })
    }

    /// An event behind what this stream has been given so far.
    pub(crate) fn mark(&self) -> Result<Event, Error> {
        Event::record(&self.context, self.raw)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made here, and not used after this; the driver waits for its work before it frees it.
        let _code = unsafe { (self.context.driver.destroy_stream)(self.raw) };
    }
}

/// A place in a stream's work.
#[derive(Debug)]
pub(crate) struct Event {
    context: std::sync::Arc<Context>,
    raw: CUevent,
}

// SAFETY: as for `Context`.
unsafe impl Send for Event {}

impl Event {
    fn record(context: &std::sync::Arc<Context>, stream: CUstream) -> Result<Self, Error> {
        context.enter()?;
        let driver = context.driver;
        let mut raw = std::ptr::null_mut();
        // SAFETY: points to what outlives the call; from here on the event is destroyed with `event`.
        driver.check("cuEventCreate", unsafe { (driver.create_event)(&raw mut raw, DISABLE_TIMING) })?;
        let event = Self { context: std::sync::Arc::clone(context), raw };
        // SAFETY: both are alive and of this context.
        driver.check("cuEventRecord", unsafe { (driver.record_event)(event.raw, stream) })?;
        Ok(event)
    }

    /// Behind what the calling thread has given libtorch's stream so far.
    pub(crate) fn behind_libtorch(context: &std::sync::Arc<Context>) -> Result<Self, Error> {
        let mut stream: *mut c_void = std::ptr::null_mut();
        // SAFETY: points to a pointer that outlives the call.
        let code =
            unsafe { ffi::thaw_current_stream(c_int::try_from(context.index).unwrap_or(c_int::MAX), &raw mut stream) };
        if code < 0 {
            return Err(Error::Call { call: "getCurrentStream", text: ffi::last_error(), misuse: false });
        }
        Self::record(context, stream.cast())
    }

    /// Whether the GPU has come to it.
    pub(crate) fn reached(&self) -> Result<bool, Error> {
        let driver = self.context.driver;
        // SAFETY: the event is alive.
        match unsafe { (driver.query_event)(self.raw) } {
            NOT_READY => Ok(false),
            code => driver.check("cuEventQuery", code).map(|()| true),
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made here, and not used after this; the driver frees it once it is reached.
        let _code = unsafe { (self.context.driver.destroy_event)(self.raw) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine without a GPU every question has the same kind of answer; with one, a device.
    #[test]
    fn what_is_missing_is_named() {
        match devices() {
            Ok(count) => assert!(count > 0),
            Err(Error::NotAvailable { what }) => {
                assert!(what.contains("NVIDIA's driver"), "{what}");
                let Err(Error::NotAvailable { what: again }) = select(0) else { panic!("there is no GPU to select") };
                assert_eq!(what, again);
            }
            Err(other) => panic!("{other}"),
        }
        let Err(Error::NotAvailable { what }) = library::open("libthaw-is-not-here.so.7", "make it so") else {
            panic!("there is no such library")
        };
        assert!(what.starts_with("libthaw-is-not-here.so.7 cannot be loaded; make it so ("), "{what}");
    }

    /// A thread that a library has started must not find it gone.
    #[test]
    fn a_library_stays_when_it_is_refused() {
        let maps = || std::fs::read_to_string("/proc/self/maps").unwrap();
        let all = maps();
        let any = all.split_whitespace().find(|word| word.ends_with("/libm.so.6")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("libno-driver.so");
        std::fs::copy(any, &copy).unwrap();
        let copy = copy.to_str().unwrap();
        assert!(Driver::open(copy, "make it so").is_err());
        assert!(maps().contains(copy), "its code is there no more");
    }

    /// Of a CUDA build also where there is no GPU; of a CPU build it is missed by its name.
    #[test]
    fn libtorch_goes_on_with_its_cuda_part_loaded() {
        match load() {
            Ok(()) => assert!(devices().is_ok() || !Cuda::is_available()),
            Err(Error::NotAvailable { what }) => {
                assert!(what.starts_with("libtorch_cuda.so cannot be loaded"), "{what}")
            }
            Err(other) => panic!("{other}"),
        }
        crate::runtime::manual_seed(1).unwrap();
        assert_eq!(tch::Tensor::from_slice(&[1.0, 2.0]).sum(tch::Kind::Double).double_value(&[]), 3.0);
    }

    #[test]
    fn a_gpu_beyond_the_last_is_refused() {
        let Ok(count) = devices() else { return };
        let Err(Error::NotAvailable { what }) = select(count) else { panic!("there is no such GPU") };
        assert!(what.contains(&format!("GPU {count} does not exist")), "{what}");
    }
}
