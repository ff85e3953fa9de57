//! Image folders: one folder per class, PNG and JPEG files inside, at any depth. Names that begin with a dot are passed over.

use super::source::{FileEntry, LabelBook, Source, modified_ns, read_error};
use super::{Error, Scan};
use crate::image;
use std::fs;
use std::path::{Path, PathBuf};

/// Images decoded whole while indexing, in bytes of their files. Beyond it only headers and ends are looked at: decoding a large
/// set takes hours, and a small one is where a broken file is worth finding before the run starts.
const DECODED_BYTES: u64 = 64 << 20;

/// Reads every file once: sizes, labels, hashes; headers are parsed.
pub(crate) fn scan(scan: &Scan<'_>, book: &mut LabelBook) -> Result<Source, Error> {
    let root = scan.path.as_path();
    let mut hasher = blake3::Hasher::new();
    let (mut files, mut labels, mut size) = (Vec::new(), Vec::new(), 0_u64);
    for (class, folder) in class_folders(root)? {
        let mut paths = Vec::new();
        walk(&folder, &mut paths)?;
        if paths.is_empty() {
            return Err(Error::EmptyClass { path: folder, class });
        }
        let label = book.id(&class).ok_or_else(|| scan.unseen(None, &class, book))?;
        for path in paths {
            let entry = examine(root, &path, size < DECODED_BYTES)?;
            size += entry.1;
            hasher.update(&(entry.0.len() as u64).to_le_bytes());
            hasher.update(entry.0.as_bytes());
            hasher.update(&entry.1.to_le_bytes());
            hasher.update(entry.3.as_bytes());
            files.push(entry);
            labels.push(label);
        }
    }
    let hash = hasher.finalize().to_hex().to_string();
    Ok(Source { files, size, modified_ns: 0, ..scan.source(hash, Vec::new(), labels) })
}

/// The first 128 bits of BLAKE3, in hex.
pub(crate) fn short_hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

fn examine(root: &Path, path: &Path, decode: bool) -> Result<FileEntry, Error> {
    let metadata = fs::metadata(path).map_err(|source| read_error(path, source))?;
    let bytes = fs::read(path).map_err(|source| read_error(path, source))?;
    image::inspect(&bytes, decode).map_err(|source| Error::Image { path: path.to_owned(), source })?;
    let relative = path.strip_prefix(root).expect("the walk began at the root");
    let name = relative.to_str().ok_or_else(|| Error::Name { path: path.to_owned() })?;
    Ok(FileEntry(name.to_owned(), bytes.len() as u64, modified_ns(&metadata), short_hash(&bytes)))
}

fn class_folders(root: &Path) -> Result<Vec<(String, PathBuf)>, Error> {
    let mut folders = Vec::new();
    for path in entries(root)? {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or_else(|| Error::Name { path: path.clone() })?
            .to_owned();
        if is_folder(&path)? {
            folders.push((name, path));
        } else if image_name(&path) {
            return Err(Error::OutsideClass { path });
        }
    }
    if folders.is_empty() {
        return Err(Error::NoClassFolders { path: root.to_owned() });
    }
    Ok(folders)
}

fn walk(folder: &Path, paths: &mut Vec<PathBuf>) -> Result<(), Error> {
    for path in entries(folder)? {
        if is_folder(&path)? {
            walk(&path, paths)?;
        } else {
            paths.push(path);
        }
    }
    Ok(())
}

/// In order of names: a directory's own order differs between machines.
fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let listing = fs::read_dir(folder).map_err(|source| read_error(folder, source))?;
    let mut paths = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| read_error(folder, source))?;
        if !entry.file_name().as_encoded_bytes().starts_with(b".") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

fn is_folder(path: &Path) -> Result<bool, Error> {
    Ok(fs::metadata(path).map_err(|source| read_error(path, source))?.is_dir())
}

fn image_name(path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    ["png", "jpg", "jpeg"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}
