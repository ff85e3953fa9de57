//! The `.pt2` archive: a zip of one JSON graph, raw tensors and extra files.
//!
//! ```text
//! m/models/model.json                              the graph            m/data/weights/weight_N       raw storages
//! m/data/weights/model_weights_config.json         name -> storage      m/data/constants/tensor_N     raw storages
//! m/data/constants/model_constants_config.json     name -> storage      m/extra/NAME                  files given to torch.export.save
//! ```
//!
//! ARCH-1: nothing is ever unpickled: sample inputs are copied, never read, and pickled tensors are refused.
//! ARCH-2: weights are read one by one when asked for, each checked against the zip's CRC; opening reads the JSON only.
//! ARCH-3: what is read and what is written is one JSON document; head surgery edits it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use zip::ZipArchive;
use zip::result::ZipError;

use crate::head::NewParameter;
use crate::ir::{DType, Graph};
use crate::payload::{self, Payload};
use crate::reader;
use crate::schema::PayloadConfig;

/// The graph schema this crate reads.
pub const SCHEMA_MAJOR: i64 = 8;
/// Largest JSON document accepted, in bytes.
const MAX_JSON: u64 = 256 << 20;
/// Most entries accepted.
const MAX_ENTRIES: usize = 100_000;

pub(crate) const WEIGHTS: &str = "data/weights/";
pub(crate) const CONSTANTS: &str = "data/constants/";
const EXTRA: &str = "extra/";
const MODELS: &str = "models/";

/// How to make an archive that this crate reads; the fix in most messages.
const EXPORT: &str = "export the model with thaw-export or torch.export.save of PyTorch 2.11";

/// Why an archive cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the model archive {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is a Python pickle, not a .pt2 archive, and is not opened because pickles can run code: {EXPORT}")]
    Pickle { path: PathBuf },
    #[error("{path} is a checkpoint written by torch.save, not a .pt2 archive: load it in Python and {EXPORT}")]
    Checkpoint { path: PathBuf },
    #[error("{path} is a TorchScript archive, not a .pt2 archive: {EXPORT}")]
    TorchScript { path: PathBuf },
    #[error("{path} is a .pt2 archive of PyTorch 2.7 or older: {EXPORT}")]
    OldFormat { path: PathBuf },
    #[error("{path} holds a compiled model without a graph: {EXPORT}")]
    Compiled { path: PathBuf },
    #[error("{path} is not a zip file, so not a .pt2 archive: {EXPORT}")]
    NotZip { path: PathBuf },
    #[error("{path} is cut short or damaged: copy it again or export it again")]
    Damaged { path: PathBuf, source: ZipError },
    #[error("{path} is a zip file but not a .pt2 archive: {EXPORT}")]
    NotArchive { path: PathBuf },
    #[error("{path} has {count} entries and the limit is {MAX_ENTRIES}: {EXPORT}")]
    TooManyEntries { path: PathBuf, count: usize },
    #[error("{path} holds {count} models: save one model per archive")]
    SeveralModels { path: PathBuf, count: usize },
    #[error("{path} lacks the entry `{entry}`: copy it again or export it again")]
    MissingEntry { path: PathBuf, entry: String },
    #[error("the entry `{entry}` of {path} is {size} bytes and the limit is {MAX_JSON}: export a smaller model")]
    TooLarge { path: PathBuf, entry: String, size: u64 },
    #[error("the entry `{entry}` of {path} is not the JSON that {SCHEMA_MAJOR}.x exports hold: {EXPORT}")]
    Json { path: PathBuf, entry: String, source: serde_json::Error },
    #[error("{path} has the schema {major}.{minor} and this version reads {SCHEMA_MAJOR}.x: {EXPORT}")]
    Schema { path: PathBuf, major: i64, minor: i64 },
    #[error(
        "the tensor `{name}` of {path} is pickled, and pickles can run code: convert it to a plain tensor before export"
    )]
    PickledTensor { path: PathBuf, name: String },
    #[error("the tensor `{name}` of {path} cannot be read: export the model again")]
    Tensor { path: PathBuf, name: String, source: payload::Error },
    #[error("{path} has no tensor `{name}`: use a name that the archive lists")]
    UnknownTensor { path: PathBuf, name: String },
    #[error("the new head's tensor `{name}` is not in {path} yet: initialise it by its rule")]
    NotStored { path: PathBuf, name: String },
    #[error("the graph of {path} cannot be used")]
    Graph { path: PathBuf, source: reader::Error },
}

/// An opened archive, or one with a new head that has not been written yet. Cheap to clone but for the JSON.
#[derive(Clone)]
pub struct Archive {
    pub(crate) path: PathBuf,
    pub(crate) zip: ZipArchive<SharedFile>,
    /// The one top folder, without a slash.
    pub(crate) root: String,
    /// The model's name inside the archive, mostly `model`.
    pub(crate) model: String,
    /// Sizes in bytes of all entries, by path below the top folder.
    pub(crate) entries: BTreeMap<String, u64>,
    pub(crate) program: Value,
    pub(crate) weights_config: Value,
    pub(crate) constants_config: Value,
    pub(crate) payloads: BTreeMap<String, Payload>,
    pub(crate) new_parameters: Vec<NewParameter>,
}

impl std::fmt::Debug for Archive {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Archive")
            .field("path", &self.path)
            .field("tensors", &self.payloads.len())
            .finish_non_exhaustive()
    }
}

impl Archive {
    /// Opens an archive and checks its form: kind of file, schema, and that every tensor lies inside its storage.
    ///
    /// # Errors
    /// Each names the file and what to do.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let path = path.to_owned();
        let zip = open_zip(&path)?;
        if zip.len() > MAX_ENTRIES {
            return Err(Error::TooManyEntries { path, count: zip.len() });
        }
        let root = top_folder(&path, &zip)?;
        let mut archive = Self {
            path,
            zip,
            root,
            model: String::new(),
            entries: BTreeMap::new(),
            program: Value::Null,
            weights_config: Value::Null,
            constants_config: Value::Null,
            payloads: BTreeMap::new(),
            new_parameters: Vec::new(),
        };
        archive.list_entries()?;
        archive.model = archive.model_name()?;
        archive.program = archive.json(&format!("{MODELS}{}.json", archive.model))?;
        archive.check_schema()?;
        archive.weights_config = archive.json(&archive.config_entry(WEIGHTS))?;
        archive.constants_config = archive.json(&archive.config_entry(CONSTANTS))?;
        archive.read_payloads()?;
        Ok(archive)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The stored tensors by dotted name: parameters, buffers and constants.
    #[must_use]
    pub fn payloads(&self) -> &BTreeMap<String, Payload> {
        &self.payloads
    }

    /// Tensors that the head brought in and that have no bytes in the file; to be initialised by their rules.
    #[must_use]
    pub fn new_parameters(&self) -> &[NewParameter] {
        &self.new_parameters
    }

    /// The graph in executable form.
    ///
    /// # Errors
    /// [`Error::Graph`] for anything the reader does not support, by name.
    pub fn graph(&self) -> Result<Graph, Error> {
        reader::read(&self.program, &self.payloads).map_err(|source| Error::Graph { path: self.path.clone(), source })
    }

    /// A stored tensor's dtype, shape and place.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`].
    pub fn payload(&self, name: &str) -> Result<&Payload, Error> {
        self.payloads.get(name).ok_or_else(|| Error::UnknownTensor { path: self.path.clone(), name: name.to_owned() })
    }

    /// A stored tensor's elements: little-endian, contiguous, row-major, in its own dtype.
    ///
    /// # Errors
    /// Where there is no such tensor, it belongs to a head that was just added, or the file is damaged.
    pub fn weight_bytes(&self, name: &str) -> Result<Vec<u8>, Error> {
        let payload = self.payload(name)?;
        if self.new_parameters.iter().any(|new| new.name == name) {
            return Err(Error::NotStored { path: self.path.clone(), name: name.to_owned() });
        }
        Ok(payload.gather(&self.entry(&payload.entry)?))
    }

    /// A file stored by `torch.export.save(..., extra_files={name: ...})`, such as `tokenizer.json`. `None`: there is none.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn extra(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        let entry = format!("{EXTRA}{name}");
        if self.entries.contains_key(&entry) { self.entry(&entry).map(Some) } else { Ok(None) }
    }

    /// Names of the extra files, in order.
    #[must_use]
    pub fn extra_names(&self) -> Vec<String> {
        self.entries.keys().filter_map(|entry| entry.strip_prefix(EXTRA)).map(str::to_owned).collect()
    }

    /// blake3, in hex, over the graph's JSON, the shapes and all tensors' bytes. Reads the whole file once. Tensors of a new head enter by name
    /// and shape only.
    ///
    /// # Errors
    /// [`Error::Damaged`].
    pub fn fingerprint(&self) -> Result<String, Error> {
        let mut hasher = blake3::Hasher::new();
        let documents = [&self.program, &self.weights_config, &self.constants_config];
        for document in documents {
            hasher.update(document.to_string().as_bytes());
            hasher.update(&[0]);
        }
        let stored: BTreeSet<&str> = self.payloads.values().map(|payload| payload.entry.as_str()).collect();
        for entry in stored.into_iter().filter(|entry| self.entries.contains_key(*entry)) {
            hasher.update(entry.as_bytes());
            hasher.update(&self.entry(entry)?);
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// One entry's bytes, by path below the top folder.
    pub(crate) fn entry(&self, entry: &str) -> Result<Vec<u8>, Error> {
        let size = *self
            .entries
            .get(entry)
            .ok_or_else(|| Error::MissingEntry { path: self.path.clone(), entry: entry.to_owned() })?;
        let damaged = |source| Error::Damaged { path: self.path.clone(), source };
        let mut zip = self.zip.clone();
        let mut file = zip.by_name(&format!("{}/{entry}", self.root)).map_err(damaged)?;
        let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0).min(1 << 30));
        file.read_to_end(&mut bytes).map_err(|source| damaged(source.into()))?;
        Ok(bytes)
    }

    pub(crate) fn config_entry(&self, folder: &str) -> String {
        let kind = if folder == WEIGHTS { "weights" } else { "constants" };
        format!("{folder}{}_{kind}_config.json", self.model)
    }

    pub(crate) fn program_entry(&self) -> String {
        format!("{MODELS}{}.json", self.model)
    }

    fn list_entries(&mut self) -> Result<(), Error> {
        let file_size = self.zip.clone().into_inner().file.metadata().map_or(u64::MAX, |metadata| metadata.len());
        for index in 0..self.zip.len() {
            let file =
                self.zip.by_index_raw(index).map_err(|source| Error::Damaged { path: self.path.clone(), source })?;
            // Entries are stored, not compressed, so none can be larger than the file: no bomb fits.
            if file.size() > file_size {
                let source = ZipError::InvalidArchive("an entry is larger than the file".into());
                return Err(Error::Damaged { path: self.path.clone(), source });
            }
            if let Some(name) = file.name().strip_prefix(&format!("{}/", self.root)) {
                self.entries.insert(name.to_owned(), file.size());
            }
        }
        Ok(())
    }

    fn model_name(&self) -> Result<String, Error> {
        let path = self.path.clone();
        let has = |entry: &str| self.entries.contains_key(entry);
        if !has("archive_format") {
            return Err(if has("constants.pkl") || self.entries.keys().any(|entry| entry.starts_with("code/")) {
                Error::TorchScript { path }
            } else if has("data.pkl") {
                Error::Checkpoint { path }
            } else {
                Error::NotArchive { path }
            });
        }
        if self.entry("archive_format")? != b"pt2" {
            return Err(Error::NotArchive { path });
        }
        let names: Vec<&str> =
            self.entries.keys().filter_map(|entry| entry.strip_prefix(MODELS)?.strip_suffix(".json")).collect();
        match names.as_slice() {
            [] => Err(Error::Compiled { path }),
            [name] => Ok((*name).to_owned()),
            several => Err(Error::SeveralModels { path, count: several.len() }),
        }
    }

    fn json(&self, entry: &str) -> Result<Value, Error> {
        let size = self.entries.get(entry).copied().unwrap_or(0);
        if size > MAX_JSON {
            return Err(Error::TooLarge { path: self.path.clone(), entry: entry.to_owned(), size });
        }
        let bytes = self.entry(entry)?;
        serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: self.path.clone(),
            entry: entry.to_owned(),
            source,
        })
    }

    fn check_schema(&self) -> Result<(), Error> {
        let version = |part: &str| self.program["schema_version"][part].as_i64().unwrap_or(-1);
        let (major, minor) = (version("major"), version("minor"));
        if major == SCHEMA_MAJOR { Ok(()) } else { Err(Error::Schema { path: self.path.clone(), major, minor }) }
    }

    fn read_payloads(&mut self) -> Result<(), Error> {
        for (folder, document) in [(WEIGHTS, &self.weights_config), (CONSTANTS, &self.constants_config)] {
            let config = PayloadConfig::deserialize(document).map_err(|source| Error::Json {
                path: self.path.clone(),
                entry: self.config_entry(folder),
                source,
            })?;
            for (name, meta) in config.config {
                let (false, Some(tensor)) = (meta.use_pickle, &meta.tensor_meta) else {
                    return Err(Error::PickledTensor { path: self.path.clone(), name });
                };
                let entry = format!("{folder}{}", meta.path_name);
                let stored = *self
                    .entries
                    .get(&entry)
                    .ok_or_else(|| Error::MissingEntry { path: self.path.clone(), entry: entry.clone() })?;
                let payload =
                    Payload::new(entry, tensor)
                        .and_then(|payload| payload.check(stored).map(|()| payload))
                        .map_err(|source| Error::Tensor { path: self.path.clone(), name: name.clone(), source })?;
                self.payloads.insert(name, payload);
            }
        }
        Ok(())
    }
}

/// dtype, shape and row-major little-endian bytes of a tensor to be written.
pub type TensorBytes = (DType, Vec<i64>, Vec<u8>);

fn open_zip(path: &Path) -> Result<ZipArchive<SharedFile>, Error> {
    let read = |source| Error::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(read)?;
    let mut magic = [0; 4];
    let length = file.read_at(&mut magic, 0).map_err(read)?;
    if length > 0 && magic[0] == 0x80 {
        return Err(Error::Pickle { path: path.to_owned() });
    }
    if length < 4 || !magic.starts_with(b"PK") {
        return Err(Error::NotZip { path: path.to_owned() });
    }
    ZipArchive::new(SharedFile::new(file)).map_err(|source| Error::Damaged { path: path.to_owned(), source })
}

fn top_folder(path: &Path, zip: &ZipArchive<SharedFile>) -> Result<String, Error> {
    let mut folders: BTreeSet<&str> = BTreeSet::new();
    for name in zip.file_names() {
        if name == "serialized_exported_program.json" {
            return Err(Error::OldFormat { path: path.to_owned() });
        }
        match name.split_once('/') {
            Some((folder, _)) => folders.insert(folder),
            None => return Err(Error::NotArchive { path: path.to_owned() }),
        };
    }
    match folders.into_iter().collect::<Vec<_>>().as_slice() {
        [folder] => Ok((*folder).to_owned()),
        _ => Err(Error::NotArchive { path: path.to_owned() }),
    }
}

/// A file with a position of its own, so that clones read independently through one descriptor.
#[derive(Debug, Clone)]
pub(crate) struct SharedFile {
    file: Arc<File>,
    position: u64,
}

impl SharedFile {
    fn new(file: File) -> Self {
        Self { file: Arc::new(file), position: 0 }
    }
}

impl Read for SharedFile {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for SharedFile {
    fn seek(&mut self, target: SeekFrom) -> io::Result<u64> {
        let position = match target {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(offset) => self.file.metadata()?.len().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.position.checked_add_signed(offset),
        };
        self.position = position.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "seek before the start"))?;
        Ok(self.position)
    }
}
