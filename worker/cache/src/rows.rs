//! Rows in a file: a header, then what describes the row, then its bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

/// Begins every row. A file that has been made longer but not written to holds zeros.
const MAGIC: u32 = 0x7468_7732;
pub(crate) const HEADER_BYTES: u64 = 24;
/// Longest row, so that a flipped length cannot make a reader ask for the machine's memory.
pub(crate) const MAX_BYTES: u32 = 1 << 30;
/// Longest description.
pub(crate) const MAX_META_BYTES: u32 = 1 << 16;

/// Sample and view.
pub(crate) type Name = (u32, u32);

/// Where a row lies in its file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) offset: u64,
    pub(crate) meta_bytes: u32,
    pub(crate) data_bytes: u32,
}

impl Place {
    pub(crate) fn bytes(self) -> u64 {
        HEADER_BYTES + u64::from(self.meta_bytes) + u64::from(self.data_bytes)
    }
}

/// A whole row as it is written, into `row`.
pub(crate) fn encode(name: Name, meta: &[u8], data: &[u8], row: &mut Vec<u8>) {
    row.clear();
    row.extend(MAGIC.to_le_bytes());
    row.extend(name.0.to_le_bytes());
    row.extend(name.1.to_le_bytes());
    // Both lengths are below their limits: the caller saw to it.
    row.extend((meta.len() as u32).to_le_bytes());
    row.extend((data.len() as u32).to_le_bytes());
    row.extend([0; 4]);
    row.extend_from_slice(meta);
    row.extend_from_slice(data);
    let sum = checksum(row);
    row[20..24].copy_from_slice(&sum.to_le_bytes());
}

/// Of everything but the checksum itself.
fn checksum(row: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&row[..20]);
    hasher.update(&row[24..]);
    hasher.finalize()
}

/// The header at an offset; `None` where no whole row of this format can begin there.
pub(crate) fn header_at(file: &File, offset: u64, end: u64) -> io::Result<Option<(Name, Place)>> {
    if offset + HEADER_BYTES > end {
        return Ok(None);
    }
    let mut bytes = [0; HEADER_BYTES as usize];
    if let Err(error) = file.read_exact_at(&mut bytes, offset) {
        return if error.kind() == io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let place = Place { offset, meta_bytes: number(12), data_bytes: number(16) };
    let fits = place.meta_bytes <= MAX_META_BYTES && place.data_bytes <= MAX_BYTES && offset + place.bytes() <= end;
    Ok((number(0) == MAGIC && fits).then_some(((number(4), number(8)), place)))
}

/// Reads a row's data behind what `into` holds, and returns its description. `None`, with `into` as it was, where it is damaged or another's.
pub(crate) fn read(file: &File, name: Name, place: Place, into: &mut Vec<u8>) -> io::Result<Option<Vec<u8>>> {
    let start = into.len();
    let mut front = vec![0; HEADER_BYTES as usize + place.meta_bytes as usize];
    into.resize(start + place.data_bytes as usize, 0);
    let data_at = place.offset + front.len() as u64;
    let found =
        file.read_exact_at(&mut front, place.offset).and_then(|()| file.read_exact_at(&mut into[start..], data_at));
    if let Err(error) = found {
        into.truncate(start);
        return if error.kind() == io::ErrorKind::UnexpectedEof { Ok(None) } else { Err(error) };
    }
    let mut expected = Vec::with_capacity(20);
    for number in [MAGIC, name.0, name.1, place.meta_bytes, place.data_bytes] {
        expected.extend(number.to_le_bytes());
    }
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&front[..20]);
    hasher.update(&front[24..]);
    hasher.update(&into[start..]);
    if front[..20] != expected[..] || front[20..24] != hasher.finalize().to_le_bytes() {
        into.truncate(start);
        return Ok(None);
    }
    Ok(Some(front.split_off(HEADER_BYTES as usize)))
}
