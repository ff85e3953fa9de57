//! Sums over GPUs by NCCL, one call at a time; who calls when, and how long it waits, is the caller's business.
//!
//! NCCL-1: every call on a communicator comes from the one thread that owns it, and none after [`Driver::abort`], which takes it away.
//! NCCL-2: initialisation and sums never block: [`Driver::state`] says when a call has done what it was to do.
//! NCCL-3: a sum is over only when its event was reached, the status is clean and nobody aborted: an abort makes the GPU look finished,
//!         with garbage in the buffer.
//! NCCL-4: memory that a sum uses lives until then, or until the abort has returned.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use tch::{Device, Kind, Tensor};

pub use crate::cuda::Error;
use crate::cuda::{Context, Event, Stream, library};

/// The oldest NCCL whose configuration is the one written here.
const OLDEST: Version = Version(2, 28, 0);
const FILE: &str = "libnccl.so.2";
const REMEDY: &str = "it comes with a CUDA build of PyTorch 2.11 (package nvidia-nccl-cu13)";

const SUCCESS: c_uint = ncclResult_t::ncclSuccess as c_uint;
const IN_PROGRESS: c_uint = ncclResult_t::ncclInProgress as c_uint;
const INVALID_ARGUMENT: c_uint = ncclResult_t::ncclInvalidArgument as c_uint;
const INVALID_USAGE: c_uint = ncclResult_t::ncclInvalidUsage as c_uint;

library! {
    /// NCCL.
    Library {
        ncclGetVersion as version(*mut c_int) -> c_uint;
        ncclGetUniqueId as unique_id(*mut ncclUniqueId) -> c_uint;
        ncclCommInitRankConfig as init(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_uint;
        ncclCommGetAsyncError as status(ncclComm_t, *mut c_uint) -> c_uint;
        ncclAllReduce as all_reduce(*const c_void, *mut c_void, usize, c_uint, c_uint, ncclComm_t, *mut c_void) -> c_uint;
        ncclCommAbort as abort(ncclComm_t) -> c_uint;
        ncclGetErrorString as name(c_uint) -> *const c_char;
        ncclGetLastError as last_error(ncclComm_t) -> *const c_char;
    }
}

impl Library {
    /// NCCL of this process, looked for once: the one that libtorch has loaded, where it has.
    fn get() -> Result<&'static Self, Error> {
        static NCCL: OnceLock<Result<Library, Error>> = OnceLock::new();
        let open = || Self::open(FILE, REMEDY).and_then(Self::checked);
        NCCL.get_or_init(open).as_ref().map_err(Clone::clone)
    }

    fn checked(self) -> Result<Self, Error> {
        let version = self.read_version()?;
        if version < OLDEST {
            return Err(Error::not_available(format!("{FILE} is NCCL {version}; {OLDEST} or newer is needed")));
        }
        Ok(self)
    }

    fn read_version(&self) -> Result<Version, Error> {
        let mut code = 0;
        // SAFETY: points to an integer that outlives the call.
        self.check("ncclGetVersion", unsafe { (self.version)(&raw mut code) })?;
        Ok(Version(code / 10_000, code / 100 % 100, code % 100))
    }

    fn check(&self, call: &'static str, code: c_uint) -> Result<(), Error> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both return static strings, or null; the communicator is not looked at.
        let (name, last) = unsafe { (text((self.name)(code)), text((self.last_error)(std::ptr::null_mut()))) };
        let text = if last.is_empty() { name } else { format!("{name}: {last}") };
        Err(Error::Call { call, text, misuse: matches!(code, INVALID_ARGUMENT | INVALID_USAGE) })
    }
}

/// # Safety
/// Null, or a string that ends in zero.
unsafe fn text(start: *const c_char) -> String {
    if start.is_null() {
        return String::new();
    }
    // SAFETY: as the caller promises; it is copied at once.
    unsafe { std::ffi::CStr::from_ptr(start) }.to_string_lossy().trim().to_owned()
}

/// NCCL's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(i32, i32, i32);

impl std::fmt::Display for Version {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}.{}.{}", self.0, self.1, self.2)
    }
}

/// What sums over GPUs can be made with here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capability {
    /// GPUs that this process sees.
    pub devices: usize,
    /// NCCL's version; ranks must agree on it.
    pub version: Version,
}

/// Whether this process can sum over GPUs. Makes no context on any.
///
/// # Errors
/// [`Error::NotAvailable`] naming the first thing that is missing: driver, GPU or NCCL.
pub fn capability() -> Result<Capability, Error> {
    let devices = crate::cuda::devices()?;
    Ok(Capability { devices, version: Library::get()?.read_version()? })
}

/// What the ranks of one communicator know each other by. Made by one of them, used once by each.
#[derive(Debug, PartialEq, Eq)]
pub struct UniqueId([u8; 128]);

impl UniqueId {
    /// A new one, which no other communicator has.
    ///
    /// # Errors
    /// As [`capability`], or what NCCL says.
    pub fn new() -> Result<Self, Error> {
        Self::of(Library::get()?)
    }

    fn of(library: &Library) -> Result<Self, Error> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: points to what outlives the call.
        library.check("ncclGetUniqueId", unsafe { (library.unique_id)(&raw mut id) })?;
        Ok(Self(id.internal.map(c_char::cast_unsigned)))
    }

    /// For the other ranks.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// From another rank; `None` where it is none.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    fn raw(&self) -> ncclUniqueId {
        ncclUniqueId { internal: self.0.map(u8::cast_signed) }
    }
}

/// Whether a communicator can take the next call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// The last call still does its part on the host.
    Busy,
    /// It has done it.
    Ready,
}

/// What the thread that owns a communicator does with it. The real one is [`Communicator`].
pub trait Driver: Send + 'static {
    /// Memory on the GPU that is summed in place.
    type Buffer: Send + 'static;
    /// A place behind the sums that were started so far.
    type Mark: Send;

    /// How much is summed.
    fn bytes(buffer: &Self::Buffer) -> u64;

    /// Begins to join the other ranks.
    ///
    /// # Errors
    /// What the library says; as for all that follow. Then only [`Driver::abort`] may come.
    fn join(&mut self) -> Result<(), Error>;

    /// Whether the last call has done its part on the host, and nothing went wrong since.
    ///
    /// # Errors
    /// What went wrong, then or since.
    fn state(&mut self) -> Result<State, Error>;

    /// Starts the sum of a buffer over all ranks, in place. Only while [`State::Ready`].
    ///
    /// # Errors
    /// As [`Driver::join`].
    fn start(&mut self, buffer: &Self::Buffer) -> Result<(), Error>;

    /// Marks what was started so far. Only while [`State::Ready`].
    ///
    /// # Errors
    /// As [`Driver::join`].
    fn mark(&mut self) -> Result<Self::Mark, Error>;

    /// Whether the GPU has come to a mark. That alone does not mean success (NCCL-3).
    ///
    /// # Errors
    /// As [`Driver::join`].
    fn reached(&mut self, mark: &Self::Mark) -> Result<bool, Error>;

    /// Ends everything that is in flight and frees the communicator. It is also how an idle one ends: destroying it in an orderly way would
    /// wait for the other ranks. May block for as long as the library likes.
    ///
    /// # Errors
    /// What the library says.
    fn abort(self) -> Result<(), Error>;
}

/// A contiguous tensor on a GPU, and when what is in it is there.
#[derive(Debug)]
pub struct DeviceBuffer {
    tensor: Tensor,
    ready: Event,
}

/// Makes [`DeviceBuffer`]s of one GPU.
#[derive(Debug, Clone)]
pub struct Gpu {
    index: usize,
    context: Arc<Context>,
}

impl Gpu {
    /// The GPU that libtorch calls `device`.
    ///
    /// # Errors
    /// [`Error::NotAvailable`] for another device than a GPU, or without a driver.
    pub fn of(device: Device) -> Result<Self, Error> {
        let Device::Cuda(index) = device else {
            return Err(Error::not_available(format!("{device:?} is no GPU of NVIDIA's")));
        };
        Ok(Self { index, context: Arc::new(Context::of(index)?) })
    }

    /// A tensor as the calling thread's work so far leaves it, to be summed in place: contiguous, fp32 or fp64, on this GPU.
    ///
    /// # Errors
    /// [`Error::Call`] for any other tensor, or what CUDA says.
    pub fn buffer(&self, tensor: Tensor) -> Result<DeviceBuffer, Error> {
        if tensor.device() != Device::Cuda(self.index) || !tensor.is_contiguous() || data_type(tensor.kind()).is_none()
        {
            let (kind, device) = (tensor.kind(), tensor.device());
            let text =
                format!("a tensor of {kind:?} on {device:?}, or one that is not contiguous, cannot be summed here");
            return Err(Error::Call { call: "ncclAllReduce", text, misuse: true });
        }
        let ready = Event::behind_libtorch(&self.context)?;
        Ok(DeviceBuffer { tensor, ready })
    }
}

impl DeviceBuffer {
    /// The tensor, once its sum is over.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }
}

fn data_type(kind: Kind) -> Option<ncclDataType_t> {
    match kind {
        Kind::Float => Some(ncclDataType_t::ncclFloat32),
        Kind::Double => Some(ncclDataType_t::ncclFloat64),
        _ => None,
    }
}

/// One rank's part of a communicator over GPUs, with a stream of its own.
#[derive(Debug)]
pub struct Communicator {
    gpu: Gpu,
    rank: u32,
    world_size: u32,
    /// Taken by [`Driver::join`].
    id: Option<UniqueId>,
    joined: Option<Joined>,
}

#[derive(Debug)]
struct Joined {
    library: &'static Library,
    raw: ncclComm_t,
    stream: Stream,
}

// SAFETY: the communicator is used by the thread that owns the value, one at a time (NCCL-1).
unsafe impl Send for Joined {}

impl Communicator {
    /// Calls nothing yet: all calls come from the thread that will own it.
    #[must_use]
    pub fn new(gpu: Gpu, id: UniqueId, rank: u32, world_size: u32) -> Self {
        Self { gpu, rank, world_size, id: Some(id), joined: None }
    }

    fn joined(&self, call: &'static str) -> Result<&Joined, Error> {
        let early = || Error::Call { call, text: "the communicator was never joined".to_owned(), misuse: true };
        self.joined.as_ref().ok_or_else(early)
    }
}

impl Driver for Communicator {
    type Buffer = DeviceBuffer;
    type Mark = Mark;

    fn bytes(buffer: &Self::Buffer) -> u64 {
        let tensor = &buffer.tensor;
        (tensor.numel() * tensor.kind().elt_size_in_bytes()) as u64
    }

    fn join(&mut self) -> Result<(), Error> {
        let library = Library::get()?;
        let again = || Error::Call { call: "ncclCommInitRankConfig", text: "the id was used".to_owned(), misuse: true };
        let id = self.id.take().ok_or_else(again)?;
        // The stream's context is this thread's from here on, and with it the GPU that NCCL takes.
        let stream = Stream::new(&self.gpu.context)?;
        let mut config = non_blocking();
        let signed = |number: u32| c_int::try_from(number).unwrap_or(c_int::MAX);
        let mut raw = std::ptr::null_mut();
        // SAFETY: all pointers outlive the call; the configuration is copied by it.
        let code = unsafe {
            (library.init)(&raw mut raw, signed(self.world_size), id.raw(), signed(self.rank), &raw mut config)
        };
        if !raw.is_null() {
            // Also where it failed: it is freed by the abort.
            self.joined = Some(Joined { library, raw, stream });
        }
        library.check("ncclCommInitRankConfig", code)
    }

    fn state(&mut self) -> Result<State, Error> {
        let joined = self.joined("ncclCommGetAsyncError")?;
        let mut status = SUCCESS;
        // SAFETY: the communicator is alive; the pointer outlives the call.
        let code = unsafe { (joined.library.status)(joined.raw, &raw mut status) };
        joined.library.check("ncclCommGetAsyncError", code)?;
        joined.library.check("NCCL", status)?;
        Ok(if status == IN_PROGRESS { State::Busy } else { State::Ready })
    }

    fn start(&mut self, buffer: &DeviceBuffer) -> Result<(), Error> {
        let joined = self.joined("ncclAllReduce")?;
        joined.stream.wait(&buffer.ready)?;
        let kind = data_type(buffer.tensor.kind()).expect("a buffer was checked when it was made");
        let place = buffer.tensor.data_ptr();
        // SAFETY: the memory is on this GPU, holds so many elements, and lives until the sum is over (NCCL-4).
        let code = unsafe {
            (joined.library.all_reduce)(
                place,
                place,
                buffer.tensor.numel(),
                kind as c_uint,
                ncclRedOp_t::ncclSum as c_uint,
                joined.raw,
                joined.stream.raw(),
            )
        };
        joined.library.check("ncclAllReduce", code)
    }

    fn mark(&mut self) -> Result<Mark, Error> {
        self.joined("cuEventRecord")?.stream.mark().map(Mark)
    }

    fn reached(&mut self, mark: &Mark) -> Result<bool, Error> {
        mark.0.reached()
    }

    fn abort(self) -> Result<(), Error> {
        let Some(Joined { library, raw, stream }) = self.joined else { return Ok(()) };
        // SAFETY: the communicator is alive, and gone with this value.
        let aborted = library.check("ncclCommAbort", unsafe { (library.abort)(raw) });
        drop(stream);
        aborted
    }
}

/// A place in a communicator's stream.
#[derive(Debug)]
pub struct Mark(Event);

/// What the header's initialiser gives, but for `blocking`.
fn non_blocking() -> ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    let nowhere = std::ptr::null();
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 22_800,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: nowhere,
        splitShare: UNDEFINED,
        trafficClass: UNDEFINED,
        commName: nowhere,
        collnetEnable: UNDEFINED,
        CTAPolicy: UNDEFINED,
        shrinkShare: UNDEFINED,
        nvlsCTAs: UNDEFINED,
        nChannelsPerNetPeer: UNDEFINED,
        nvlinkCentricSched: UNDEFINED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PyTorch's own NCCL, where the libtorch linked with is a CUDA build from the wheel.
    fn shipped() -> Option<Library> {
        let torch = std::fs::canonicalize(concat!(env!("CARGO_MANIFEST_DIR"), "/../../.libtorch/lib/libtorch_cpu.so"));
        let file = torch.ok()?.parent()?.join("../../nvidia/nccl/lib").join(FILE);
        if !file.exists() {
            eprintln!("skipped: this libtorch came without NCCL");
            return None;
        }
        Some(Library::open(file.to_str()?, REMEDY).and_then(Library::checked).unwrap())
    }

    #[test]
    fn capability_says_what_is_missing() {
        match capability() {
            Ok(found) => assert!(found.devices > 0 && found.version >= OLDEST),
            Err(Error::NotAvailable { what }) => {
                assert!(what.contains("NVIDIA's driver") || what.contains(FILE), "{what}");
            }
            Err(other) => panic!("{other}"),
        }
        let Err(Error::NotAvailable { what }) = Library::open("/nowhere/libnccl.so.2", REMEDY) else {
            panic!("there is no such library")
        };
        assert!(what.starts_with("/nowhere/libnccl.so.2 cannot be loaded; it comes with"), "{what}");
        assert!(Gpu::of(Device::Cpu).is_err());
    }

    #[test]
    fn the_library_answers_without_a_gpu() {
        let Some(library) = shipped() else { return };
        assert!(library.read_version().unwrap() >= OLDEST);
        let (first, second) = (UniqueId::of(&library).unwrap(), UniqueId::of(&library).unwrap());
        assert_ne!(first, second, "an id belongs to one communicator");
        assert_eq!(UniqueId::from_bytes(first.as_bytes()), Some(first));
        assert_eq!(UniqueId::from_bytes(&[0; 7]), None);
        let Err(Error::Call { call, text, misuse }) = library.check("ncclAllReduce", INVALID_USAGE) else {
            panic!("that is an error")
        };
        assert_eq!((call, misuse), ("ncclAllReduce", true));
        assert!(text.starts_with("invalid usage"), "{text}");
        assert!(library.check("ncclAllReduce", IN_PROGRESS).is_ok());
    }

    #[test]
    fn another_library_is_refused_as_a_whole() {
        // Any library will do that has none of the functions.
        let Err(Error::NotAvailable { what }) = Library::open("libm.so.6", REMEDY) else { panic!("that is not NCCL") };
        assert!(what.starts_with("libm.so.6 has no ncclGetVersion; it is too old"), "{what}");
    }
}
