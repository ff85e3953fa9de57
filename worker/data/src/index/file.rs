//! The index on disk: `index.json`, written whole or not at all, and believed only after it was checked.

use super::source::{FileEntry, Source, modified_ns, read_error};
use super::{Error, Index, VERSION, folder};
use serde::Deserialize;
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use thaw_proto::spec::DataFormat;

/// Name of the index within a run's `data/` folder.
pub const FILE_NAME: &str = "index.json";

impl Index {
    /// Writes `index.json` into `folder` (a run's `data/`), which is created: a temporary file, fsync, rename, fsync of the folder.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&self, folder: &Path) -> Result<PathBuf, Error> {
        let path = folder.join(FILE_NAME);
        self.write(folder, &path).map_err(|source| Error::Write { path: path.clone(), source })?;
        Ok(path)
    }

    fn write(&self, folder: &Path, path: &Path) -> io::Result<()> {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        fs::create_dir_all(folder)?;
        let temporary =
            folder.join(format!(".{FILE_NAME}.{}.{}", process::id(), WRITES.fetch_add(1, Ordering::Relaxed)));
        let written = write_durably(&temporary, self).and_then(|()| fs::rename(&temporary, path));
        if written.is_err() {
            // The first error is the one to report; a leftover has a name nobody reads.
            let _ = fs::remove_file(&temporary);
        }
        written?;
        File::open(folder)?.sync_all()
    }

    /// Reads and checks the index in `folder`. The sources are not touched: see [`Index::verify`].
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::NotAnIndex`], [`Error::Corrupt`].
    pub fn load(folder: &Path) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Header {
            version: u32,
        }
        let path = folder.join(FILE_NAME);
        let bytes = fs::read(&path).map_err(|source| read_error(&path, source))?;
        let not_an_index = |source| Error::NotAnIndex { path: path.clone(), source };
        let corrupt = |message: String| Error::Corrupt { path: path.clone(), message };
        let header: Header = serde_json::from_slice(&bytes).map_err(not_an_index)?;
        if header.version != VERSION {
            return Err(corrupt(format!("has version {}, this program reads version {VERSION}", header.version)));
        }
        let index: Self = serde_json::from_slice(&bytes).map_err(not_an_index)?;
        index.check().map_err(|message| corrupt(message.to_owned()))?;
        Ok(index)
    }

    /// Checks that every source still holds what was indexed: sizes first, and contents where a modification time moved.
    ///
    /// # Errors
    /// [`Error::Changed`] or [`Error::Missing`], naming the file.
    pub fn verify(&self) -> Result<(), Error> {
        self.sources.iter().try_for_each(|source| match source.format {
            DataFormat::Csv | DataFormat::Jsonl => verify_file(source),
            DataFormat::ImageFolder => source.files.iter().try_for_each(|entry| verify_image(source, entry)),
        })
    }

    /// What must hold within any index, however it came to be.
    fn check(&self) -> Result<(), &'static str> {
        for source in &self.sources {
            let records = source.labels.len();
            let places = match source.format {
                DataFormat::Csv | DataFormat::Jsonl => source.offsets.len().checked_sub(1),
                DataFormat::ImageFolder => Some(source.files.len()),
            };
            if places != Some(records) {
                return Err("labels and records differ in number");
            }
            if !source.offsets.is_sorted() {
                return Err("offsets do not ascend");
            }
            if source.labels.iter().any(|label| *label as usize >= self.classes.len()) {
                return Err("a label has no class");
            }
        }
        for list in &self.parts {
            let source = self.sources.get(list.source as usize).ok_or("a part has no source")?;
            if list.records.iter().any(|record| *record as usize >= source.labels.len()) {
                return Err("a part names a record that is not there");
            }
        }
        if self.shards == 0 || self.fingerprint != self.compute_fingerprint() {
            return Err("the fingerprint does not match the contents");
        }
        Ok(())
    }
}

fn write_durably(path: &Path, index: &Index) -> io::Result<()> {
    let mut writer = BufWriter::new(File::create(path)?);
    serde_json::to_writer(&mut writer, index)?;
    writer.flush()?;
    writer.get_ref().sync_all()
}

fn verify_file(source: &Source) -> Result<(), Error> {
    let path = &source.path;
    let metadata = fs::metadata(path).map_err(|error| read_error(path, error))?;
    if metadata.len() != source.size {
        return Err(Error::Changed { path: path.clone(), what: "size" });
    }
    if modified_ns(&metadata) != source.modified_ns && hash_file(path)? != source.hash {
        return Err(Error::Changed { path: path.clone(), what: "contents" });
    }
    Ok(())
}

fn verify_image(source: &Source, FileEntry(name, size, modified, hash): &FileEntry) -> Result<(), Error> {
    let path = source.path.join(name);
    let metadata = fs::metadata(&path).map_err(|error| read_error(&path, error))?;
    if metadata.len() != *size {
        return Err(Error::Changed { path, what: "size" });
    }
    if modified_ns(&metadata) != *modified {
        let bytes = fs::read(&path).map_err(|error| read_error(&path, error))?;
        if folder::short_hash(&bytes) != *hash {
            return Err(Error::Changed { path, what: "contents" });
        }
    }
    Ok(())
}

fn hash_file(path: &Path) -> Result<String, Error> {
    let mut reader = BufReader::new(File::open(path).map_err(|source| read_error(path, source))?);
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match reader.read(&mut buffer).map_err(|source| read_error(path, source))? {
            0 => return Ok(hasher.finalize().to_hex().to_string()),
            read => hasher.update(&buffer[..read]),
        };
    }
}
