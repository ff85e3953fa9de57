//! One source on disk: where its records begin, which label each has, and what its bytes hash to.

use super::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;
use thaw_proto::spec::{DataFormat, DataSource};

/// One indexed file or folder. Record `i` is bytes `offsets[i]..offsets[i + 1]`, or file `files[i]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) format: DataFormat,
    /// Name of the text column or key; empty for images.
    pub(crate) text: String,
    pub(crate) label: String,
    /// Position of the text column; CSV only.
    pub(crate) text_column: Option<u32>,
    /// Bytes, over all files.
    pub(crate) size: u64,
    pub(crate) modified_ns: u64,
    /// BLAKE3, hex: of the file, or of a folder's relative paths, sizes and contents.
    pub(crate) hash: String,
    /// One more than there are records; empty for images.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) offsets: Vec<u64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) files: Vec<FileEntry>,
    /// Class of each record.
    pub(crate) labels: Vec<u32>,
}

/// Relative path, bytes, modification time in ns, and the first 128 bits of BLAKE3 in hex. A tuple, to keep the JSON small.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileEntry(pub(crate) String, pub(crate) u64, pub(crate) u64, pub(crate) String);

impl Source {
    /// Path of an image record.
    pub(crate) fn file(&self, record: u32) -> PathBuf {
        self.path.join(&self.files[record as usize].0)
    }

    /// Bytes of a CSV or JSONL record: (offset, length).
    pub(crate) fn range(&self, record: u32) -> (u64, usize) {
        let start = self.offsets[record as usize];
        (start, (self.offsets[record as usize + 1] - start) as usize)
    }
}

/// Class names by order of appearance while training data is read; afterwards fixed.
#[derive(Default)]
pub(crate) struct LabelBook {
    ids: BTreeMap<String, u32>,
    closed: bool,
}

impl LabelBook {
    /// The label's number, or `None` where the book is closed and does not have it.
    pub(crate) fn id(&mut self, label: &str) -> Option<u32> {
        if let Some(id) = self.ids.get(label) {
            return Some(*id);
        }
        if self.closed {
            return None;
        }
        let id = self.ids.len() as u32;
        self.ids.insert(label.to_owned(), id);
        Some(id)
    }

    /// Renumbers by name, fixes the book, and rewrites the labels given out so far.
    pub(crate) fn close(&mut self, labels: &mut [u32]) -> Vec<String> {
        let mut renumbered = vec![0; self.ids.len()];
        for (new, old) in self.ids.values_mut().enumerate() {
            renumbered[*old as usize] = new as u32;
            *old = new as u32;
        }
        for label in labels {
            *label = renumbered[*label as usize];
        }
        self.closed = true;
        self.names().map(str::to_owned).collect()
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.ids.keys().map(String::as_str)
    }
}

/// Reads through to the file and hashes what passes, so that one pass gives both records and fingerprint.
pub(crate) struct HashingReader {
    file: File,
    hasher: blake3::Hasher,
    pub(crate) bytes: u64,
}

impl HashingReader {
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self {
            file: File::open(path).map_err(|source| read_error(path, source))?,
            hasher: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    pub(crate) fn hash(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

impl Read for HashingReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        self.bytes += read as u64;
        Ok(read)
    }
}

/// The local path of a source, which exists and is of the kind its format needs.
pub(crate) fn locate(source: &DataSource) -> Result<(PathBuf, Metadata), Error> {
    let refused = || Error::Scheme { url: source.path.to_string() };
    if source.path.scheme() != "file" {
        return Err(refused());
    }
    let path = source.path.to_file_path().map_err(|()| refused())?;
    let metadata = fs::metadata(&path).map_err(|source| read_error(&path, source))?;
    match source.format {
        DataFormat::Csv if !metadata.is_file() => Err(Error::Kind { path, expected: "file", format: "csv" }),
        DataFormat::Jsonl if !metadata.is_file() => Err(Error::Kind { path, expected: "file", format: "jsonl" }),
        DataFormat::ImageFolder if !metadata.is_dir() => {
            Err(Error::Kind { path, expected: "folder", format: "image_folder" })
        }
        DataFormat::Csv | DataFormat::Jsonl | DataFormat::ImageFolder => Ok((path, metadata)),
    }
}

pub(crate) fn read_error(path: &Path, source: io::Error) -> Error {
    match source.kind() {
        io::ErrorKind::NotFound => Error::Missing { path: path.to_owned() },
        _ => Error::Read { path: path.to_owned(), source },
    }
}

/// Nanoseconds since 1970; 0 where the file system does not say.
pub(crate) fn modified_ns(metadata: &Metadata) -> u64 {
    let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    modified.map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}
