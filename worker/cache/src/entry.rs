//! A record's index entry, as bytes and back. Pure.
//!
//! ```text
//! magic u32 | entry bytes u16 | tensors u16 | sample u32 | view u16 | 0 u16 | payload offset u64 | payload bytes u64 | payload sum u64
//! per tensor: dtype u8 | dimensions u8 | 0 u16 | bytes u32, dimensions u32 ...
//! padding to 8 | entry sum u64
//! ```
//!
//! Little-endian. An entry's sum covers everything before it, and the key and the entry's place, so a copy elsewhere is no entry.
//! Entries start at multiples of 8: behind damage the next one is found again by its magic.

use crc_fast::{CrcAlgorithm, Digest, checksum};

use crate::Key;

/// Most tensors of one record.
pub const MAX_TENSORS: usize = 16;
/// Most dimensions of one tensor.
pub const MAX_DIMS: usize = 12;

const MAGIC: u32 = 0x5846_5054;
const FIXED: usize = 40;
/// No file is as long as this.
const LARGEST_FILE: u64 = 1 << 62;
const SUM_BYTES: usize = 8;
const SUM: CrcAlgorithm = CrcAlgorithm::Crc64Nvme;
/// Entries and the index's first entry start at multiples of this.
pub(crate) const ALIGN: u64 = 8;
/// No entry is longer.
pub(crate) const MAX_ENTRY: usize = FIXED + MAX_TENSORS * (8 + 4 * MAX_DIMS) + 8 + SUM_BYTES;

/// One value of a record: what crosses the cut for one sample, without its batch dimension.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tensor {
    /// The caller's code for the element type, kept as given.
    pub dtype: u8,
    /// Its shape without the batch dimension.
    pub dims: Vec<u32>,
    /// Its length in bytes.
    pub bytes: u32,
}

/// Where a record's payload is, and what it must sum to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) sample: u32,
    pub(crate) view: u16,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) sum: u64,
    pub(crate) tensors: Vec<Tensor>,
}

impl Entry {
    /// Appends the entry's bytes, as they stand at `place` in the index of `key`.
    pub(crate) fn encode(&self, key: &Key, place: u64, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&MAGIC.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(self.tensors.len() as u16).to_le_bytes());
        out.extend_from_slice(&self.sample.to_le_bytes());
        out.extend_from_slice(&self.view.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&self.bytes.to_le_bytes());
        out.extend_from_slice(&self.sum.to_le_bytes());
        for tensor in &self.tensors {
            out.extend_from_slice(&[tensor.dtype, tensor.dims.len() as u8, 0, 0]);
            out.extend_from_slice(&tensor.bytes.to_le_bytes());
            for dim in &tensor.dims {
                out.extend_from_slice(&dim.to_le_bytes());
            }
        }
        let length = (out.len() - start).next_multiple_of(ALIGN as usize) + SUM_BYTES;
        out.resize(start + length - SUM_BYTES, 0);
        out[start + 4..start + 6].copy_from_slice(&(length as u16).to_le_bytes());
        let sum = entry_sum(key, place, &out[start..]);
        out.extend_from_slice(&sum.to_le_bytes());
    }

    /// The entry at the start of `bytes`, which stands at `place`, and its length; `None` where there is no whole, undamaged one.
    pub(crate) fn decode(key: &Key, place: u64, bytes: &[u8]) -> Option<(Entry, usize)> {
        let mut fields = Fields(bytes);
        if fields.u32()? != MAGIC {
            return None;
        }
        let length = usize::from(fields.u16()?);
        if !(FIXED + SUM_BYTES..=MAX_ENTRY).contains(&length) || bytes.len() < length {
            return None;
        }
        let (body, sum) = bytes[..length].split_at(length - SUM_BYTES);
        if sum != entry_sum(key, place, body).to_le_bytes() {
            return None;
        }
        let count = usize::from(fields.u16()?);
        let (sample, view, _) = (fields.u32()?, fields.u16()?, fields.u16()?);
        let (offset, bytes, sum) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let tensors = (0..count).map(|_| fields.tensor()).collect::<Option<Vec<_>>>()?;
        let entry = Entry { sample, view, offset, bytes, sum, tensors };
        (entry.offset.checked_add(entry.bytes).is_some_and(|end| end < LARGEST_FILE)
            && payload_bytes(&entry.tensors) == entry.bytes)
            .then_some((entry, length))
    }
}

/// Bytes of all tensors together.
pub(crate) fn payload_bytes(tensors: &[Tensor]) -> u64 {
    tensors.iter().map(|tensor| u64::from(tensor.bytes)).sum()
}

/// The first whole entry at or after `from`, a multiple of [`ALIGN`]: the entry, where it starts, its length. `place` is that of `bytes[0]`.
pub(crate) fn next(key: &Key, place: u64, bytes: &[u8], from: usize) -> Option<(Entry, usize, usize)> {
    (from..bytes.len()).step_by(ALIGN as usize).find_map(|at| {
        let (entry, length) = Entry::decode(key, place + at as u64, &bytes[at..])?;
        Some((entry, at, length))
    })
}

/// The sum of a record's payload: its bytes in order, in any pieces, bound to key, sample and view.
pub(crate) struct PayloadSum {
    bytes: Digest,
    bound_to: u64,
}

impl PayloadSum {
    pub(crate) fn new(key: &Key, sample: u32, view: u16) -> PayloadSum {
        let bound_to = key.seed() ^ (u64::from(sample) << 16 | u64::from(view));
        PayloadSum { bytes: Digest::new(SUM), bound_to }
    }

    pub(crate) fn add(&mut self, bytes: &[u8]) {
        self.bytes.update(bytes);
    }

    pub(crate) fn finish(&self) -> u64 {
        self.bytes.finalize() ^ self.bound_to
    }
}

fn entry_sum(key: &Key, place: u64, body: &[u8]) -> u64 {
    checksum(SUM, body) ^ key.seed().rotate_left(32) ^ place
}

/// Reads little-endian fields off the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn tensor(&mut self) -> Option<Tensor> {
        let [dtype, count, _, _] = self.take()?;
        let bytes = self.u32()?;
        let dims = (0..count).map(|_| self.u32()).collect::<Option<Vec<_>>>()?;
        Some(Tensor { dtype, dims, bytes })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tensor() -> impl Strategy<Value = Tensor> {
        (any::<u8>(), proptest::collection::vec(any::<u32>(), 0..=MAX_DIMS), any::<u32>())
            .prop_map(|(dtype, dims, bytes)| Tensor { dtype, dims, bytes })
    }

    fn entry() -> impl Strategy<Value = Entry> {
        let tensors = proptest::collection::vec(tensor(), 1..=MAX_TENSORS);
        (any::<u32>(), any::<u16>(), 0..u64::MAX >> 8, any::<u64>(), tensors).prop_map(
            |(sample, view, offset, sum, tensors)| Entry {
                sample,
                view,
                offset,
                bytes: payload_bytes(&tensors),
                sum,
                tensors,
            },
        )
    }

    proptest! {
        #[test]
        fn an_entry_comes_back_from_its_place_only(entry in entry(), place in 0..1_u64 << 40, byte in any::<prop::sample::Index>()) {
            let key = Key::of(&[("prefix", b"a")]);
            let mut bytes = Vec::new();
            entry.encode(&key, place, &mut bytes);
            prop_assert!(bytes.len() <= MAX_ENTRY && (bytes.len() as u64).is_multiple_of(ALIGN));
            prop_assert_eq!(Entry::decode(&key, place, &bytes), Some((entry, bytes.len())));
            prop_assert_eq!(Entry::decode(&key, place + ALIGN, &bytes), None);
            prop_assert_eq!(Entry::decode(&Key::of(&[("prefix", b"b")]), place, &bytes), None);
            prop_assert_eq!(Entry::decode(&key, place, &bytes[..byte.index(bytes.len())]), None);
            let at = byte.index(bytes.len());
            bytes[at] ^= 16;
            prop_assert_eq!(Entry::decode(&key, place, &bytes), None);
        }

        #[test]
        fn any_bytes_are_an_entry_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut with_magic = MAGIC.to_le_bytes().to_vec();
            with_magic.extend(&bytes);
            let key = Key::of(&[]);
            prop_assert_eq!(Entry::decode(&key, 0, &bytes), None);
            prop_assert_eq!(Entry::decode(&key, 0, &with_magic), None);
        }

        #[test]
        fn a_sum_does_not_depend_on_the_pieces(bytes in proptest::collection::vec(any::<u8>(), 0..3000), cut in any::<prop::sample::Index>()) {
            let sum = |sample, pieces: [&[u8]; 2]| {
                let mut sum = PayloadSum::new(&Key::of(&[]), sample, 2);
                pieces.into_iter().for_each(|piece| sum.add(piece));
                sum.finish()
            };
            let cut = cut.index(bytes.len() + 1);
            prop_assert_eq!(sum(1, [&bytes[..cut], &bytes[cut..]]), sum(1, [&bytes, &[]]));
            prop_assert_ne!(sum(1, [&bytes, &[]]), sum(2, [&bytes, &[]]));
        }
    }
}
