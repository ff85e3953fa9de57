//! The index of a run's samples: where each record is, its class, its part and its shard. Built once, read by every rank.
//!
//! `DATA-1` holds because every order in it is either the source's own, that of names, or a keyed shuffle.

mod error;
mod file;
mod folder;
mod lines;
mod source;
mod split;
mod table;

pub use error::Error;
pub use file::FILE_NAME;
pub(crate) use lines::text_of as jsonl_text;
pub(crate) use source::Source;
pub(crate) use table::text_of as csv_text;

use crate::{name, random::Stream};
use serde::{Deserialize, Serialize};
use source::{LabelBook, locate, modified_ns};
use std::fmt;
use std::path::PathBuf;
use thaw_proto::plan::DataSummary;
use thaw_proto::spec::{Data, DataFormat, DataSource};

const VERSION: u32 = 1;

/// What a sample is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    Train,
    Eval,
    Test,
}

impl Part {
    /// In the order in which an index keeps them.
    pub const ALL: [Self; 3] = [Self::Train, Self::Eval, Self::Test];
}

impl fmt::Display for Part {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Train => "train",
            Self::Eval => "eval",
            Self::Test => "test",
        })
    }
}

/// Every sample of a run. Positions count within a part, from 0; a training position `p` belongs to logical shard `p % shards`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Index {
    version: u32,
    seed: u64,
    shards: u32,
    fingerprint: String,
    /// In label order, which is that of names.
    classes: Vec<String>,
    sources: Vec<Source>,
    /// In the order of [`Part::ALL`].
    parts: [PartList; 3],
}

/// Records of one source, in the part's order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PartList {
    source: u32,
    records: Vec<u32>,
}

/// Reads every source of `spec` once and divides the samples into parts and `shards` logical shards (at least 1).
///
/// # Errors
/// Whatever is wrong with the data, by file and line: see [`Error`].
pub fn build(spec: &Data, seed: u64, shards: u32) -> Result<Index, Error> {
    let mut book = LabelBook::default();
    let mut train = scan(Part::Train, &spec.train, &mut book)?;
    let classes = book.close(&mut train.labels);
    if let [class] = classes.as_slice() {
        return Err(Error::OneClass { path: train.path, class: class.clone() });
    }
    let mut divided = split::divide(&train.path, &train.labels, &classes, &spec.split, seed)?;
    Stream::new(seed, "train order", "").shuffle(&mut divided[0]);
    if divided[0].len() < shards as usize {
        return Err(Error::FewerThanShards { path: train.path, samples: divided[0].len(), shards });
    }
    let mut sources = vec![train];
    let mut parts = divided.map(|records| PartList { source: 0, records });
    for (part, own) in [(Part::Eval, &spec.eval), (Part::Test, &spec.test)] {
        if let Some(own) = own {
            let source = scan(part, own, &mut book)?;
            if is_images(&source) != is_images(&sources[0]) {
                let kind = if is_images(&source) { "an image folder" } else { "text" };
                return Err(Error::MixedKinds { path: source.path, kind });
            }
            parts[part as usize] =
                PartList { source: sources.len() as u32, records: (0..source.labels.len() as u32).collect() };
            sources.push(source);
        }
    }
    let mut index =
        Index { version: VERSION, seed, shards: shards.max(1), fingerprint: String::new(), classes, sources, parts };
    index.fingerprint = index.compute_fingerprint();
    Ok(index)
}

impl Index {
    /// What everything random of the run follows from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Class names in label order.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// Samples per class over all parts, in label order.
    pub fn class_counts(&self) -> Vec<u64> {
        let mut counts = vec![0; self.classes.len()];
        for part in Part::ALL {
            for record in self.records(part) {
                counts[self.source(part).labels[*record as usize] as usize] += 1;
            }
        }
        counts
    }

    /// Samples of a part.
    pub fn size(&self, part: Part) -> u32 {
        self.records(part).len() as u32
    }

    /// Class of the sample at a position, `None` beyond the part's end.
    pub fn label(&self, part: Part, position: u32) -> Option<u32> {
        let record = *self.records(part).get(position as usize)?;
        Some(self.source(part).labels[record as usize])
    }

    /// Source record (row or line among samples, file in order of names; from 0) at each position of a part.
    pub fn records(&self, part: Part) -> &[u32] {
        &self.parts[part as usize].records
    }

    /// Logical shards.
    pub fn shards(&self) -> u32 {
        self.shards
    }

    /// Training samples of each logical shard; they differ by at most one.
    pub fn shard_sizes(&self) -> Vec<u64> {
        let samples = u64::from(self.size(Part::Train));
        (0..u64::from(self.shards))
            .map(|shard| (samples + u64::from(self.shards) - 1 - shard) / u64::from(self.shards))
            .collect()
    }

    /// The training position of a shard's `i`-th sample.
    pub fn shard_position(&self, shard: u32, i: u32) -> u32 {
        shard + i * self.shards
    }

    /// BLAKE3 in hex of source contents, classes and split; the same wherever the files lie and however many shards there are.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// What the planner needs to know.
    pub fn summary(&self) -> DataSummary {
        DataSummary {
            train_samples: u64::from(self.size(Part::Train)),
            eval_samples: u64::from(self.size(Part::Eval)),
            test_samples: u64::from(self.size(Part::Test)),
            class_counts: self.class_counts(),
            fingerprint: self.fingerprint.clone(),
        }
    }

    pub(crate) fn source(&self, part: Part) -> &Source {
        &self.sources[self.parts[part as usize].source as usize]
    }

    fn compute_fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("thaw-data index fingerprint v1");
        let mut text = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        };
        for class in &self.classes {
            text(class);
        }
        for source in &self.sources {
            for part in [&source.hash, &source.text, &source.label] {
                text(part);
            }
        }
        for list in &self.parts {
            hasher.update(&list.source.to_le_bytes());
            hasher.update(&(list.records.len() as u64).to_le_bytes());
            for record in &list.records {
                hasher.update(&record.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// One source being read.
struct Scan<'a> {
    part: Part,
    path: PathBuf,
    format: DataFormat,
    text: &'a str,
    label: &'a str,
    size: u64,
    modified_ns: u64,
}

impl Scan<'_> {
    fn source(&self, hash: String, offsets: Vec<u64>, labels: Vec<u32>) -> Source {
        Source {
            path: self.path.clone(),
            format: self.format,
            text: self.text.to_owned(),
            label: self.label.to_owned(),
            text_column: None,
            size: self.size,
            modified_ns: self.modified_ns,
            hash,
            offsets,
            files: Vec::new(),
            labels,
        }
    }

    /// A file that grows while it is read would give an index of neither state.
    fn check_complete(&self, read: u64) -> Result<(), Error> {
        if read == self.size {
            Ok(())
        } else {
            Err(Error::Changed { path: self.path.clone(), what: "size, while it was read" })
        }
    }

    fn unseen(&self, line: Option<u64>, label: &str, book: &LabelBook) -> Error {
        let place = self.path.display().to_string() + &line.map(|line| format!(":{line}")).unwrap_or_default();
        let hint = match name::hint(label, book.names()) {
            near if near.is_empty() => format!(" (classes: {})", name::list(book.names())),
            near => near,
        };
        Error::UnseenLabel { place, part: self.part, label: label.to_owned(), hint }
    }
}

fn is_images(source: &Source) -> bool {
    source.format == DataFormat::ImageFolder
}

fn scan(part: Part, source: &DataSource, book: &mut LabelBook) -> Result<Source, Error> {
    let (path, metadata) = locate(source)?;
    let scan = Scan {
        part,
        path,
        format: source.format,
        text: &source.text,
        label: &source.label,
        size: metadata.len(),
        modified_ns: modified_ns(&metadata),
    };
    let source = match scan.format {
        DataFormat::Csv => table::scan(&scan, book)?,
        DataFormat::Jsonl => lines::scan(&scan, book)?,
        DataFormat::ImageFolder => folder::scan(&scan, book)?,
    };
    if source.labels.is_empty() {
        return Err(Error::Empty { path: scan.path });
    }
    if source.labels.len() > u32::MAX as usize {
        return Err(Error::TooMany { path: scan.path });
    }
    Ok(source)
}
