//! [`Arena`]: parts of a segment, lent out as memory.
//!
//! ARENA-1: two leases never overlap; the pages of one that is dropped go back to the system.

use super::{LARGE_PAGE, PAGE, Segment};
use bytemuck::Pod;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// A segment whose end is lent out.
#[derive(Debug)]
pub struct Arena {
    segment: Segment,
    /// What may be lent.
    room: Range<usize>,
    /// Offset → bytes of each lease.
    leases: Mutex<BTreeMap<usize, usize>>,
}

/// Memory in an arena, as long as it lives. Its bytes are zero at first.
#[derive(Debug)]
pub struct Lease {
    arena: Arc<Arena>,
    offset: usize,
    bytes: usize,
}

impl Arena {
    /// Lends what lies behind the first `kept` bytes of the segment.
    #[must_use]
    pub fn new(segment: Segment, kept: usize) -> Self {
        let room = kept.next_multiple_of(LARGE_PAGE)..segment.bytes;
        Self { segment, room, leases: Mutex::default() }
    }

    /// What it lends of.
    #[must_use]
    pub fn segment(&self) -> &Segment {
        &self.segment
    }

    /// So many bytes, at the first place where they fit; none where they do not.
    #[must_use]
    pub fn lease(self: &Arc<Self>, bytes: usize) -> Option<Lease> {
        let mut leases = self.leases();
        let place = self.first_place(&leases, bytes)?;
        leases.insert(place.start, place.len());
        drop(leases);
        self.segment.touch(place.start, place.len());
        Some(Lease { arena: Arc::clone(self), offset: place.start, bytes })
    }

    /// Has pages ready where the next leases will lie that come to so many bytes, if there is such a place. Nothing is held afterwards.
    pub fn prepare(&self, bytes: usize) {
        let place = self.first_place(&self.leases(), bytes);
        if let Some(place) = place {
            self.segment.touch(place.start, place.len());
        }
    }

    fn first_place(&self, leases: &BTreeMap<usize, usize>, bytes: usize) -> Option<Range<usize>> {
        // Small ones share what would be one large page.
        let alignment = if bytes < LARGE_PAGE { PAGE } else { LARGE_PAGE };
        let size = bytes.max(1).checked_next_multiple_of(PAGE)?;
        let mut offset = self.room.start;
        for (start, taken) in leases {
            if offset.checked_add(size)? <= *start {
                break;
            }
            offset = (start + taken).next_multiple_of(alignment);
        }
        (offset.checked_add(size)? <= self.room.end).then_some(offset..offset + size)
    }

    /// Where numbers lie in the segment; none where they are not in one lease.
    #[must_use]
    pub fn place_of<E>(&self, numbers: &[E]) -> Option<usize> {
        let offset = numbers.as_ptr().addr().checked_sub(self.segment.start.addr().get())?;
        let leases = self.leases();
        let (start, bytes) = leases.range(..=offset).next_back()?;
        (offset + size_of_val(numbers) <= start + bytes).then_some(offset)
    }

    fn leases(&self) -> MutexGuard<'_, BTreeMap<usize, usize>> {
        self.leases.lock().expect("no code that holds the lock panics")
    }
}

impl Lease {
    /// Its first byte, aligned to a page.
    #[must_use]
    pub fn start(&self) -> *mut u8 {
        self.arena.segment.at(self.offset, self.bytes, 1)
    }

    /// It as numbers, as many as fit. Nobody else may use it meanwhile, but in an operation that these are given to.
    #[must_use]
    pub fn numbers_mut<E: Pod>(&mut self) -> &mut [E] {
        const { assert!(align_of::<E>() <= PAGE) };
        let numbers = self.bytes / size_of::<E>().max(1);
        // SAFETY: the memory is mapped as long as the lease lives, begins at a page, and overlaps no other lease; any bytes are such numbers.
        unsafe { std::slice::from_raw_parts_mut(self.start().cast::<E>(), numbers) }
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = self.arena.leases();
        // Before the place is free, so that nobody finds old numbers in it.
        if let Some(size) = leases.get(&self.offset).copied() {
            self.arena.segment.forget(self.offset, size);
        }
        leases.remove(&self.offset);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena() -> Arc<Arena> {
        Arc::new(Arena::new(Segment::create(64 << 20).unwrap(), 4096))
    }

    #[test]
    fn leases_do_not_overlap_and_places_are_used_again() {
        let arena = arena();
        let sizes = [1, 4096, 5000, 3 << 20, 2 << 20, 10];
        let leases = sizes.map(|bytes| arena.lease(bytes).unwrap());
        let mut places: Vec<_> = leases.iter().map(|lease| lease.offset..lease.offset + lease.bytes).collect();
        assert!(
            places
                .iter()
                .zip(&leases)
                .filter(|(_, lease)| lease.bytes >= LARGE_PAGE)
                .all(|(place, _)| { place.start.is_multiple_of(LARGE_PAGE) })
        );
        places.sort_by_key(|place| place.start);
        assert!(places.windows(2).all(|pair| pair[0].end <= pair[1].start), "{places:?}");
        assert!(places[0].start >= 4096);
        let [first, .., big, _, _] = leases;
        let place = big.offset;
        drop(big);
        arena.prepare(3 << 20);
        assert_eq!(arena.lease(3 << 20).unwrap().offset, place, "what is prepared is not held");
        assert!(arena.lease(64 << 20).is_none());
        assert!(arena.lease(usize::MAX).is_none());
        drop(first);
    }

    #[test]
    fn numbers_are_found_where_they_are_lent() {
        let arena = arena();
        let lease = arena.lease(64).unwrap();
        arena.segment().write(lease.offset + 8, &[5_u64, 6]);
        let numbers = arena.segment().numbers::<u64>(lease.offset, 8);
        assert_eq!(arena.place_of(&numbers[1..3]), Some(lease.offset + 8));
        assert_eq!(lease.start().addr(), numbers.as_ptr().addr());
        assert_eq!(arena.place_of(&[0_u64]), None, "on the stack");
        assert_eq!(arena.place_of(arena.segment().numbers::<u64>(0, 2)), None, "not lent");
        let (again, old) = (lease.offset, lease);
        drop(old);
        let lease = arena.lease(64).unwrap();
        assert_eq!(lease.offset, again);
        assert_eq!(arena.segment().numbers::<u64>(again, 2), [0, 0], "nobody sees what was there before");
    }
}
