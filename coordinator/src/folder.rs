//! A run's folder: what the coordinator writes there. (Trainers write blobs, manifests and the model.)
//!
//! FOLDER-1: a file that readers open by name appears whole (temporary, fsync, rename, fsync of the folder) or not at
//!           all.
//! FOLDER-2: lines are appended whole, one JSON document each.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use thaw_proto::ids::RunId;
use url::Url;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("write {} in the run's folder; check that the disk has space and the folder can be written", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("folder {url} is not on a local disk; use a file:// URL")]
    NotLocal { url: Url },
}

/// One run's folder on a local or shared disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    path: PathBuf,
}

/// A file of lines in a run's folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lines {
    Events,
    Metrics,
    Logs,
}

impl Lines {
    fn file_name(self) -> &'static str {
        match self {
            Self::Events => "events.jsonl",
            Self::Metrics => "metrics.jsonl",
            Self::Logs => "logs.jsonl",
        }
    }
}

impl RunFolder {
    /// The folder of `run`, below the checkpoint URL of its spec, or below the data folder where it has none.
    pub fn of(run: &RunId, checkpoint_url: Option<&Url>, data_dir: &Path) -> Result<Self, Error> {
        let root = match checkpoint_url {
            None => data_dir.to_owned(),
            Some(url) => local_path(url)?,
        };
        Ok(Self { path: root.join("runs").join(run.as_str()) })
    }

    /// The one at an absolute path.
    #[must_use]
    pub fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its URL, as trainers get it.
    #[must_use]
    pub fn url(&self) -> Url {
        Url::from_directory_path(&self.path).expect("the data folder and every file URL are absolute")
    }

    /// Makes the folder with those above it.
    pub fn create(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.path).map_err(|source| Error::Write { path: self.path.clone(), source })
    }

    /// Removes the folder with all in it; used to undo a submission that failed. No error where it is gone.
    pub fn remove(&self) -> Result<(), Error> {
        match fs::remove_dir_all(&self.path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Write { path: self.path.clone(), source })
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Writes a whole file (FOLDER-1), making the folders above it.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let path = self.path.join(name);
        write_whole(&path, bytes).map_err(|source| Error::Write { path, source })
    }

    /// Opens a file of lines for appending.
    pub fn open_lines(&self, lines: Lines) -> Result<File, Error> {
        let path = self.lines_path(lines);
        let opened =
            fs::create_dir_all(&self.path).and_then(|()| OpenOptions::new().create(true).append(true).open(&path));
        opened.map_err(|source| Error::Write { path, source })
    }

    /// Path of a file of lines.
    #[must_use]
    pub fn lines_path(&self, lines: Lines) -> PathBuf {
        self.path.join(lines.file_name())
    }
}

/// The path of a `file://` URL.
pub fn local_path(url: &Url) -> Result<PathBuf, Error> {
    let refuse = || Error::NotLocal { url: url.clone() };
    if url.scheme() != "file" {
        return Err(refuse());
    }
    url.to_file_path().map_err(|()| refuse())
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent)?;
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    });
    if let Err(error) = written {
        // On a full disk even a part of it is too much.
        let _ = fs::remove_file(&temporary);
        return Err(error);
    }
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkpoint_url_wins_over_the_data_folder() {
        let run = RunId("a-1".to_owned());
        let url = Url::parse("file:///lab").unwrap();
        assert_eq!(RunFolder::of(&run, Some(&url), Path::new("/data")).unwrap().path(), Path::new("/lab/runs/a-1"));
        let folder = RunFolder::of(&run, None, Path::new("/data")).unwrap();
        assert_eq!(folder.url().as_str(), "file:///data/runs/a-1/");
        let remote = Url::parse("s3://lab/runs").unwrap();
        assert!(matches!(RunFolder::of(&run, Some(&remote), Path::new("/data")), Err(Error::NotLocal { .. })));
    }

    #[test]
    fn a_file_appears_whole() {
        let root = tempfile::tempdir().unwrap();
        let folder = RunFolder::of(&RunId("a-1".to_owned()), None, root.path()).unwrap();
        folder.write("report/summary.json", b"{}").unwrap();
        assert_eq!(fs::read(folder.path().join("report/summary.json")).unwrap(), b"{}");
        assert_eq!(fs::read_dir(folder.path().join("report")).unwrap().count(), 1, "no temporary is left");
        folder.remove().unwrap();
        folder.remove().unwrap();
        assert!(!folder.path().exists());
    }
}
