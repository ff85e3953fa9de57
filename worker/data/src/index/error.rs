//! What can be wrong with a run's data. Every variant names the file or class, the place in it, and what to do.

use super::Part;
use std::io;
use std::path::PathBuf;

/// Why data could not be indexed, or an index could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    #[error("data source {url}: only local files (file:///…) can be read")]
    Scheme { url: String },
    #[error("data source {}: there is no such file or folder", path.display())]
    Missing { path: PathBuf },
    #[error("data source {}: expected a {expected}, which the format {format} needs", path.display())]
    Kind { path: PathBuf, expected: &'static str, format: &'static str },
    #[error("data source {}: {kind} cannot stand beside a training source of another kind; give text with text, images with images", path.display())]
    MixedKinds { path: PathBuf, kind: &'static str },
    #[error("read {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{}: holds no samples", path.display())]
    Empty { path: PathBuf },

    #[error("{}: no column {column:?}{hint} (columns: {columns})", path.display())]
    NoColumn { path: PathBuf, column: String, hint: String, columns: String },
    #[error("{}: column {column:?} appears more than once; rename one", path.display())]
    RepeatedColumn { path: PathBuf, column: String },
    #[error("{}:{line}: {found} fields where the header has {expected}; quote texts that hold commas", path.display())]
    Ragged { path: PathBuf, line: u64, found: u64, expected: u64 },
    #[error("{}:{line}: a quote opens here and never closes", path.display())]
    OpenQuote { path: PathBuf, line: u64 },
    #[error("{}:{line}: not UTF-8; convert the file to UTF-8", path.display())]
    NotUtf8 { path: PathBuf, line: u64 },

    #[error("{}:{line}: not valid JSON; each line must hold one object", path.display())]
    NotJson { path: PathBuf, line: u64, source: serde_json::Error },
    #[error("{}:{line}: {found} where an object is expected; each line must hold one object", path.display())]
    NotObject { path: PathBuf, line: u64, found: &'static str },
    #[error("{}:{line}: no key {key:?}{hint} (keys: {keys})", path.display())]
    NoKey { path: PathBuf, line: u64, key: String, hint: String, keys: String },
    #[error("{}:{line}: {key:?} is {found}, expected {expected}", path.display())]
    WrongType { path: PathBuf, line: u64, key: String, found: &'static str, expected: &'static str },
    #[error("{}:{line}: {column:?} is empty; fill it in or remove the record", path.display())]
    EmptyValue { path: PathBuf, line: u64, column: String },

    #[error("{}: has no class folders; put the images into one folder per class", path.display())]
    NoClassFolders { path: PathBuf },
    #[error("{}: an image outside the class folders; move it into the folder of its class", path.display())]
    OutsideClass { path: PathBuf },
    #[error("{}: class {class:?} has no images; add some or remove the folder", path.display())]
    EmptyClass { path: PathBuf, class: String },
    #[error("{}: the name is not UTF-8; rename it", path.display())]
    Name { path: PathBuf },
    #[error("image {} cannot be used; replace or remove it", path.display())]
    Image { path: PathBuf, source: crate::image::Error },

    #[error("{}: all samples are of class {class:?}; at least two classes are needed", path.display())]
    OneClass { path: PathBuf, class: String },
    #[error("{}: class {class:?} has {samples} sample(s), too few for {parts} parts; add samples or give evaluation and test sources of their own", path.display())]
    ClassTooSmall { path: PathBuf, class: String, samples: usize, parts: usize },
    #[error("{}: class {class:?} ({samples} samples) would have none to train on; raise split.train, or set split.stratified", path.display())]
    NoTrainSample { path: PathBuf, class: String, samples: usize },
    #[error("{}: the {part} part would be empty: {share} of {samples} samples; raise split.{part} or add samples", path.display())]
    EmptyPart { path: PathBuf, part: Part, share: f64, samples: usize },
    #[error("{place}: label {label:?} of the {part} part does not occur in training{hint}")]
    UnseenLabel { place: String, part: Part, label: String, hint: String },
    #[error("{}: {samples} training samples are fewer than {shards} logical shards; lower logical_shards", path.display())]
    FewerThanShards { path: PathBuf, samples: usize, shards: u32 },
    #[error("{}: more than {} samples in one source", path.display(), u32::MAX)]
    TooMany { path: PathBuf },

    #[error("{}: changed since the run was indexed ({what}); restore it, or submit a new run", path.display())]
    Changed { path: PathBuf, what: &'static str },
    #[error("index {}: {message}; remove it and index again", path.display())]
    Corrupt { path: PathBuf, message: String },
    #[error("index {}: not an index", path.display())]
    NotAnIndex { path: PathBuf, source: serde_json::Error },
    #[error("write index {}", path.display())]
    Write { path: PathBuf, source: io::Error },
}
