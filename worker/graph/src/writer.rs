//! Writes an archive back: the same graph, new weights.
//!
//! WRITE-1: everything that is not a weight is copied byte for byte, extra files and sample inputs included.
//! WRITE-2: the file appears complete or not at all: temporary file, fsync, rename, fsync of the folder.
//! WRITE-3: entries are stored uncompressed and aligned to 64 bytes, as PyTorch writes them.

use std::fs::{File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use zip::result::ZipError;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use crate::archive::{self, Archive, CONSTANTS, TensorBytes, WEIGHTS};
use crate::ir::DType;
use crate::payload::Payload;

const ALIGNMENT: u16 = 64;
/// From here on an entry needs 64-bit sizes.
const LARGE: u64 = u32::MAX as u64;

/// Why an archive could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot write the model archive {path}: check the folder's permissions and space")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot write the model archive {path}: check the folder's permissions and space")]
    Zip { path: PathBuf, source: ZipError },
    #[error("cannot read the archive that is being rewritten")]
    Source(#[from] archive::Error),
    #[error("cannot write the graph document as JSON")]
    Json(#[from] serde_json::Error),
    #[error("the new head's tensor `{name}` has no values: give every new parameter its bytes")]
    Missing { name: String },
    #[error(
        "the values for `{name}` are {actual_dtype:?} {actual:?} and the archive holds {dtype:?} {expected:?}: convert them to that form"
    )]
    Mismatch { name: String, actual_dtype: DType, actual: Vec<i64>, dtype: DType, expected: Vec<i64> },
    #[error(
        "the values for `{name}` are {actual} bytes and the tensor takes {expected}: give contiguous little-endian elements"
    )]
    Length { name: String, expected: usize, actual: usize },
}

impl Archive {
    /// Writes the archive to `path` with the tensors that `weights` gives by dotted name (dtype, shape, contiguous little-endian bytes in
    /// row-major order); the others keep their values. Tied names share their storage, so one of them is enough. Python's
    /// `torch.export.load` reads the result.
    ///
    /// # Errors
    /// A tensor of the wrong form, a new head's tensor without values, or the file system.
    pub fn write(&self, path: &Path, weights: impl Fn(&str) -> Option<TensorBytes>) -> Result<(), Error> {
        let write = |source| Error::Write { path: path.to_owned(), source };
        let zip_error = |source| Error::Zip { path: path.to_owned(), source };
        let folder = match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        // The umask applies: without this a temporary file is its owner's alone.
        let shared = Permissions::from_mode(0o666);
        let temporary = tempfile::Builder::new()
            .prefix(".thaw-")
            .suffix(".tmp")
            .permissions(shared)
            .tempfile_in(folder)
            .map_err(write)?;
        let mut zip = ZipWriter::new(BufWriter::with_capacity(1 << 20, temporary.as_file()));
        for entry in self.ordered_entries() {
            let bytes = self.new_entry(&entry, &weights)?;
            let options = SimpleFileOptions::default()
                .compression_method(CompressionMethod::Stored)
                .large_file(bytes.len() as u64 >= LARGE)
                .with_alignment(ALIGNMENT);
            zip.start_file(format!("{}/{entry}", self.root), options).map_err(zip_error)?;
            zip.write_all(&bytes).map_err(write)?;
        }
        let buffered = zip.finish().map_err(zip_error)?;
        buffered.into_inner().map_err(|error| write(error.into_error()))?;
        temporary.as_file().sync_all().map_err(write)?;
        temporary.persist(path).map_err(|error| write(error.error))?;
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(write)
    }

    /// Entries of the new file: those of the old in their order, without storages that nothing names, and new storages with the weights.
    fn ordered_entries(&self) -> Vec<String> {
        let is_named = |entry: &str| self.payloads.values().any(|payload| payload.entry == entry);
        let is_storage = |entry: &str| {
            [WEIGHTS, CONSTANTS].iter().any(|folder| entry.starts_with(folder)) && !entry.ends_with("_config.json")
        };
        let config = self.config_entry(WEIGHTS);
        let mut entries = Vec::new();
        let prefix = format!("{}/", self.root);
        for name in self.zip.file_names() {
            let Some(entry) = name.strip_prefix(&prefix).filter(|entry| !entry.is_empty() && !entry.ends_with('/'))
            else {
                continue;
            };
            if entry == config {
                entries.extend(
                    self.new_parameters.iter().filter_map(|new| Some(self.payloads.get(&new.name)?.entry.clone())),
                );
            }
            if !is_storage(entry) || is_named(entry) {
                entries.push(entry.to_owned());
            }
        }
        entries
    }

    fn new_entry(&self, entry: &str, weights: &impl Fn(&str) -> Option<TensorBytes>) -> Result<Vec<u8>, Error> {
        if entry == self.program_entry() {
            return Ok(serde_json::to_vec(&self.program)?);
        }
        if entry == self.config_entry(WEIGHTS) {
            return Ok(serde_json::to_vec(&self.weights_config)?);
        }
        if let Some(new) = self
            .new_parameters
            .iter()
            .find(|new| self.payloads.get(&new.name).is_some_and(|payload| payload.entry == entry))
        {
            let payload = self.payload(&new.name)?;
            let values = weights(&new.name).ok_or_else(|| Error::Missing { name: new.name.clone() })?;
            return checked(&new.name, payload, values);
        }
        let mut bytes = self.entry(entry)?;
        for (name, payload) in self.payloads.iter().filter(|(_, payload)| payload.entry == entry) {
            if let Some(values) = weights(name) {
                payload.scatter(&checked(name, payload, values)?, &mut bytes);
            }
        }
        Ok(bytes)
    }
}

fn checked(name: &str, payload: &Payload, values: TensorBytes) -> Result<Vec<u8>, Error> {
    let (dtype, shape, bytes) = values;
    if dtype != payload.dtype || shape != payload.shape {
        return Err(Error::Mismatch {
            name: name.to_owned(),
            actual_dtype: dtype,
            actual: shape,
            dtype: payload.dtype,
            expected: payload.shape.clone(),
        });
    }
    let expected = payload.elements() as usize * dtype.size();
    if bytes.len() != expected {
        return Err(Error::Length { name: name.to_owned(), expected, actual: bytes.len() });
    }
    Ok(bytes)
}
