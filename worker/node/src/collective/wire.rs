//! Frames between two ranks.
//!
//! A frame is a header of 32 bytes, little-endian, and a payload: the sender's number of the operation (u64), its kind (u8),
//! the phase within it (u8), six zero bytes, the operation's element count (u64) and the payload's length in bytes (u64).
//! Numbers travel as the host holds them; only little-endian hosts are supported.

use std::io::{self, Read};
use thaw_proto::worker::CollectiveKind;

const _: () = assert!(cfg!(target_endian = "little"), "gradients travel in host order, which must be little-endian");

pub(super) const HEADER_BYTES: usize = 32;

/// No frame is larger: 16 GiB. A header that claims more is not from a peer.
const MAX_PAYLOAD_BYTES: u64 = 16 << 30;

/// What two ranks must agree on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    ReduceF32 = 1,
    ReduceF64 = 2,
    AllGather = 3,
    Copy = 4,
}

impl Kind {
    pub(super) fn name(self) -> &'static str {
        self.recorded().name()
    }

    /// As it is recorded and told.
    pub(super) fn recorded(self) -> CollectiveKind {
        match self {
            Self::ReduceF32 => CollectiveKind::ReduceF32,
            Self::ReduceF64 => CollectiveKind::ReduceF64,
            Self::AllGather => CollectiveKind::AllGather,
            Self::Copy => CollectiveKind::Copy,
        }
    }

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        [Self::ReduceF32, Self::ReduceF64, Self::AllGather, Self::Copy].into_iter().find(|kind| *kind as u8 == byte)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) sequence: u64,
    pub(super) kind: Kind,
    /// The exchange within the operation; see [`super::tcp`].
    pub(super) phase: u8,
    pub(super) elements: u64,
    pub(super) payload_bytes: u64,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[8] = self.kind as u8;
        bytes[9] = self.phase;
        bytes[16..24].copy_from_slice(&self.elements.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.payload_bytes.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> io::Result<Self> {
        let number =
            |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().expect("eight bytes were taken"));
        let payload_bytes = number(24);
        match Kind::from_byte(bytes[8]) {
            Some(kind) if payload_bytes <= MAX_PAYLOAD_BYTES => {
                Ok(Self { sequence: number(0), kind, phase: bytes[9], elements: number(16), payload_bytes })
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "peer sent a frame that is none")),
        }
    }
}

/// Payload bytes, aligned for every element type. Reused from frame to frame: fresh memory costs a page fault per 4 KiB.
#[derive(Debug, Default)]
pub(super) struct Buffer {
    words: Vec<u64>,
    bytes: usize,
}

impl Buffer {
    pub(super) fn as_bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    /// Elements, where the length is a whole number of them.
    pub(super) fn as_elements<E: bytemuck::Pod>(&self) -> Option<&[E]> {
        bytemuck::try_cast_slice(self.as_bytes()).ok()
    }

    fn resize(&mut self, bytes: usize) -> &mut [u8] {
        self.bytes = bytes;
        self.words.resize(bytes.div_ceil(8), 0);
        &mut bytemuck::cast_slice_mut(&mut self.words)[..bytes]
    }
}

/// Reads one frame into `buffer`. `None`: the peer closed its end between two frames.
pub(super) fn read_frame(stream: &mut impl Read, buffer: &mut Buffer) -> io::Result<Option<Header>> {
    /// Memory is committed as it fills, so that a claimed length alone costs nothing.
    const STEP: usize = 64 << 20;

    let mut bytes = [0; HEADER_BYTES];
    let read = loop {
        match stream.read(&mut bytes) {
            Ok(0) => return Ok(None),
            Ok(read) => break read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    stream.read_exact(&mut bytes[read..])?;
    let header = Header::decode(&bytes)?;
    let length = usize::try_from(header.payload_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
    let mut filled = 0;
    buffer.bytes = 0;
    while filled < length {
        let until = (filled + STEP).min(length);
        let room = if buffer.words.len() * 8 >= length { length } else { until };
        stream.read_exact(&mut buffer.resize(room)[filled..until])?;
        filled = until;
    }
    buffer.resize(length);
    Ok(Some(header))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back() {
        let header = Header { sequence: 7, kind: Kind::ReduceF64, phase: 1, elements: 3, payload_bytes: 5 };
        let mut bytes = header.encode().to_vec();
        bytes.extend(b"abcde");
        let mut buffer = Buffer::default();
        assert_eq!(read_frame(&mut &bytes[..], &mut buffer).unwrap(), Some(header));
        assert_eq!(buffer.as_bytes(), b"abcde");
        assert!(buffer.as_elements::<f32>().is_none());
        assert_eq!(read_frame(&mut &[][..], &mut buffer).unwrap(), None);
        assert!(read_frame(&mut &bytes[..33], &mut buffer).is_err(), "cut in the payload");
        assert!(read_frame(&mut &bytes[..5], &mut buffer).is_err(), "cut in the header");
        bytes[8] = 9;
        assert!(read_frame(&mut &bytes[..], &mut buffer).is_err(), "no such kind");
    }
}
