//! Memory that two processes of one host share, and waiting on a word in it.
//!
//! SHM-1: a segment has no name in any file system: it is reached through its owner's open file, and is gone when the last process that
//!        has it mapped is, however that ends.
//! SHM-2: only numbers lie in a segment, so whatever another process writes there is a valid value. Who may write which part when is the
//!        users' protocol, kept by counters that are stored with `release` and loaded with `acquire`.
//! SHM-3: a segment's size is address space: pages come when they are first used, in large ones where that is possible, and go when the part
//!        of the segment that they belong to is given back.
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a test may panic"))]

mod arena;

pub use arena::{Arena, Lease};

use bytemuck::Pod;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Of the system's memory.
const PAGE: usize = 4096;
const LARGE_PAGE: usize = 2 << 20;

/// Where another process of this host finds a segment: `process:descriptor`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentAddress {
    process: u32,
    descriptor: u32,
}

impl From<(u32, u32)> for SegmentAddress {
    /// From what [`Segment::address`] gives.
    fn from((process, descriptor): (u32, u32)) -> Self {
        Self { process, descriptor }
    }
}

impl From<SegmentAddress> for (u32, u32) {
    /// For [`Segment::open`].
    fn from(address: SegmentAddress) -> Self {
        (address.process, address.descriptor)
    }
}

impl fmt::Display for SegmentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.process, self.descriptor)
    }
}

impl FromStr for SegmentAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once(':').and_then(|(one, other)| Some((one.parse().ok()?, other.parse().ok()?)));
        numbers
            .map(|(process, descriptor)| Self { process, descriptor })
            .ok_or_else(|| format!("`{text}` is not process:descriptor"))
    }
}

/// A mapped segment.
#[derive(Debug)]
pub struct Segment {
    start: NonNull<u8>,
    bytes: usize,
    /// Of the owner: peers open it through `/proc`.
    file: File,
}

// SAFETY: the mapping belongs to the process, not to a thread, and all access goes through atomics or through copies of numbers (SHM-2).
unsafe impl Send for Segment {}
// SAFETY: as for `Send`.
unsafe impl Sync for Segment {}

impl Segment {
    /// A new segment of so many bytes, all zero.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(bytes: usize) -> io::Result<Self> {
        // SAFETY: the name is a C string; the result is checked.
        let descriptor = unsafe { libc::memfd_create(c"thaw".as_ptr(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is open and nobody else owns it.
        let file = unsafe { File::from_raw_fd(descriptor) };
        file.set_len(bytes as u64)?;
        Self::map(file, bytes)
    }

    /// Another process's segment, from the address that its owner gave: [`Segment::address`]. The caller checks that it is the right one.
    ///
    /// # Errors
    /// What the system says: that process is not on this host, or is gone; or its segment is shorter.
    pub fn open(address: (u32, u32), bytes: usize) -> io::Result<Self> {
        let path = format!("/proc/{}/fd/{}", address.0, address.1);
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() < bytes as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a segment of that size"));
        }
        Self::map(file, bytes)
    }

    /// Process and descriptor under which others of this host find it.
    #[must_use]
    pub fn address(&self) -> (u32, u32) {
        (std::process::id(), u32::try_from(self.file.as_raw_fd()).unwrap_or(u32::MAX))
    }

    /// Bytes of it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Puts bytes into pages that nobody has used, which so need not be zeroed and mapped first; else as [`Segment::write`].
    ///
    /// # Errors
    /// What the system says: there is no memory left.
    ///
    /// # Panics
    /// If they are outside.
    pub fn fill(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let _inside = self.at(offset, bytes.len(), 1);
        self.file.write_all_at(bytes, offset as u64)
    }

    /// Maps the file where large pages begin, so that it can have them.
    fn map(file: File, bytes: usize) -> io::Result<Self> {
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the system chooses; the result is checked.
        let room = unsafe { libc::mmap(std::ptr::null_mut(), bytes + LARGE_PAGE, libc::PROT_NONE, anonymous, -1, 0) };
        if room == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let skipped = room.cast::<u8>().align_offset(LARGE_PAGE);
        // SAFETY: fewer than `LARGE_PAGE` bytes are skipped, so the place is inside the room.
        let place = unsafe { room.cast::<u8>().add(skipped) };
        let (readable, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
        // SAFETY: it takes the place of a part of the room, which nobody else knows of; the result is checked.
        let start = unsafe { libc::mmap(place.cast(), bytes, readable, shared, file.as_raw_fd(), 0) };
        let failed = (start == libc::MAP_FAILED).then(io::Error::last_os_error);
        // The room around it is left over, all of it where the file could not be mapped.
        let end = bytes.next_multiple_of(PAGE);
        let left = if failed.is_some() {
            [(0, bytes + LARGE_PAGE), (0, 0)]
        } else {
            [(0, skipped), (skipped + end, (bytes + LARGE_PAGE).next_multiple_of(PAGE) - skipped - end)]
        };
        for (from, length) in left.into_iter().filter(|(_, length)| *length > 0) {
            // SAFETY: these pages of the room are mapped and unused.
            let _unmapped = unsafe { libc::munmap(room.cast::<u8>().add(from).cast(), length) };
        }
        if let Some(error) = failed {
            return Err(error);
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("the system mapped at address 0"))?;
        Ok(Self { start, bytes, file })
    }

    /// Has the pages of a part ready, large ones where the system has them. Where it cannot, they come when they are first used.
    ///
    /// # Panics
    /// If the part is outside.
    pub fn touch(&self, offset: usize, bytes: usize) {
        let from = offset / PAGE * PAGE;
        let place = self.at(from, bytes + (offset - from), 1);
        // SAFETY: a part of the mapping; neither call changes what is in memory.
        let _advised = unsafe {
            libc::madvise(place.cast(), bytes / LARGE_PAGE * LARGE_PAGE, libc::MADV_HUGEPAGE);
            libc::madvise(place.cast(), bytes + (offset - from), libc::MADV_POPULATE_WRITE)
        };
    }

    /// Gives the pages of a part back to the system, for every process that has it mapped; it is zero then.
    fn forget(&self, offset: usize, bytes: usize) {
        let (Ok(offset), Ok(bytes)) = (libc::off_t::try_from(offset), libc::off_t::try_from(bytes)) else { return };
        // SAFETY: a call on an open file; only the pages go, the mapping stays.
        let _given_back = unsafe {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            libc::fallocate(self.file.as_raw_fd(), mode, offset, bytes)
        };
    }

    fn at(&self, offset: usize, bytes: usize, alignment: usize) -> *mut u8 {
        let inside = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(inside && offset.is_multiple_of(alignment), "{bytes} bytes at {offset} of a segment of {}", self.bytes);
        // SAFETY: the offset is inside the mapping.
        unsafe { self.start.as_ptr().add(offset) }
    }

    /// A counter in the segment.
    ///
    /// # Panics
    /// If the offset is outside, or no multiple of four.
    #[must_use]
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        let place = self.at(offset, size_of::<AtomicU32>(), align_of::<AtomicU32>());
        // SAFETY: inside the mapping, aligned, and alive as long as `self`; every process uses it as an atomic.
        unsafe { &*place.cast::<AtomicU32>() }
    }

    /// A word of 64 bits in the segment.
    ///
    /// # Panics
    /// If the offset is outside, or no multiple of eight.
    #[must_use]
    pub fn long(&self, offset: usize) -> &AtomicU64 {
        let place = self.at(offset, size_of::<AtomicU64>(), align_of::<AtomicU64>());
        // SAFETY: inside the mapping, aligned, and alive as long as `self`; every process uses it as an atomic.
        unsafe { &*place.cast::<AtomicU64>() }
    }

    /// Numbers in the segment, while the protocol says that nobody writes there (SHM-2).
    ///
    /// # Panics
    /// If they are outside, or the offset is not aligned.
    #[must_use]
    pub fn numbers<E: Pod>(&self, offset: usize, count: usize) -> &[E] {
        let place = self.at(offset, count * size_of::<E>(), align_of::<E>());
        // SAFETY: inside the mapping, aligned, alive as long as `self`; any bits are a valid `E`.
        unsafe { std::slice::from_raw_parts(place.cast::<E>(), count) }
    }

    /// Writes numbers into the segment, while the protocol says that nobody else uses that part (SHM-2).
    ///
    /// # Panics
    /// If they are outside, or the offset is not aligned.
    pub fn write<E: Pod>(&self, offset: usize, numbers: &[E]) {
        let place = self.at(offset, size_of_val(numbers), align_of::<E>());
        // SAFETY: inside the mapping and aligned; `numbers` is ordinary memory, so the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr(), place.cast::<E>(), numbers.len()) }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        // SAFETY: this is the mapping made in `map`, and nothing borrows from it any more.
        let _unmapped = unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// Sleeps while the word holds `value`, at most so long; may return earlier. The word may be in shared memory.
pub fn wait(word: &AtomicU32, value: u32, limit: Duration) {
    let timeout = libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(limit.subsec_nanos().cast_signed()),
    };
    // SAFETY: the word is alive during the call, and the timeout is a valid one; the kernel only reads both.
    let _reason = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            &raw const timeout,
            std::ptr::null::<u32>(),
            0,
        )
    };
}

/// Wakes everybody who waits on the word, in any process.
pub fn wake(word: &AtomicU32) {
    // SAFETY: the kernel uses the address only to find waiters.
    let _woken = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE,
            i32::MAX,
            std::ptr::null::<u32>(),
            std::ptr::null::<u32>(),
            0,
        )
    };
}

/// Stores a counter for others, and wakes them.
pub fn post(word: &AtomicU32, value: u32) {
    word.store(value, Ordering::Release);
    wake(word);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn numbers_and_counters_are_seen_by_the_other_mapping() {
        let own = Segment::create(4096).unwrap();
        let other = Segment::open(own.address(), 4096).unwrap();
        own.write(64, &[1.5_f32, -2.0]);
        post(own.word(0), 7);
        assert_eq!(other.word(0).load(Ordering::Acquire), 7);
        own.long(8).store(1 << 40, Ordering::Release);
        assert_eq!(other.long(8).load(Ordering::Acquire), 1 << 40);
        assert_eq!(other.numbers::<f32>(64, 2), [1.5, -2.0]);
        drop(own);
        assert_eq!(other.numbers::<f32>(64, 2), [1.5, -2.0], "it lives as long as anybody has it mapped");
    }

    #[test]
    fn a_wait_ends_with_a_wake_or_its_limit() {
        let segment = Segment::create(4096).unwrap();
        let began = Instant::now();
        wait(segment.word(0), 0, Duration::from_millis(10));
        assert!(began.elapsed() >= Duration::from_millis(9));
        std::thread::scope(|scope| {
            scope.spawn(|| post(segment.word(0), 1));
            while segment.word(0).load(Ordering::Acquire) == 0 {
                wait(segment.word(0), 0, Duration::from_secs(30));
            }
        });
    }

    #[test]
    fn pages_come_when_they_are_used_and_go_when_they_are_forgotten() {
        let own = Segment::create(1 << 36).unwrap();
        let other = Segment::open(own.address(), 1 << 36).unwrap();
        let pages = || std::os::unix::fs::MetadataExt::blocks(&own.file.metadata().unwrap()) * 512;
        assert_eq!(pages(), 0, "64 GiB of it cost nothing");
        assert!(own.start.addr().get().is_multiple_of(LARGE_PAGE));
        own.touch(1 << 35, 5 << 20);
        assert!((5 << 20..8 << 20).contains(&pages()), "{} bytes", pages());
        own.write(1 << 35, &[7_u64]);
        own.forget(1 << 35, 6 << 20);
        assert_eq!(pages(), 0);
        assert_eq!(other.numbers::<u64>(1 << 35, 1), [0]);
    }

    #[test]
    fn what_it_is_filled_with_is_seen_like_what_is_written() {
        let own = Segment::create(8192).unwrap();
        own.fill(4090, b"over two pages").unwrap();
        let address: SegmentAddress = SegmentAddress::from(own.address()).to_string().parse().unwrap();
        let other = Segment::open(address.into(), 8192).unwrap();
        assert_eq!((other.numbers::<u8>(4090, 14), other.len()), (&b"over two pages"[..], 8192));
        assert!(own.numbers::<u8>(0, 4090).iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_is_no_segment_is_refused() {
        assert!(Segment::open((std::process::id(), 99_999), 64).is_err());
        let small = Segment::create(64).unwrap();
        assert!(Segment::open(small.address(), 4096).is_err());
    }

    #[test]
    #[should_panic(expected = "of a segment of 64")]
    fn nothing_outside_is_reached() {
        let _outside = Segment::create(64).unwrap().numbers::<f32>(60, 2);
    }
}
