//! How a spec, a graph and its data fit together: what the coordinator tries at submit and every trainer does at its start.
//!
//! `DATA-4`: both go through here, so a run that was planned is one that its trainers can load.

use crate::batch::{ElementType, InputWant};
use std::path::{Path, PathBuf};
use thaw_graph::{Archive, Attach, GroupRule, HeadSpec, Summary};
use thaw_proto::spec::{Data, DataFormat, HeadAttach, RunSpec};

/// Why no tokenizer could be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the tokenizer {url} is not a local file; give a file:// URL")]
    NotLocal { url: String },
    #[error("cannot read the tokenizer {}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot read the archive's tokenizer")]
    Archive(#[from] thaw_graph::archive::Error),
}

/// The head that a spec asks for, for so many classes.
#[must_use]
pub fn head(spec: &RunSpec, classes: usize) -> HeadSpec {
    let head = &spec.backbone.head;
    HeadSpec {
        attach: match head.attach {
            HeadAttach::Auto => Attach::Auto,
            HeadAttach::Replace => Attach::Replace,
            HeadAttach::Append => Attach::Append,
        },
        hidden_sizes: head.hidden_sizes.iter().map(|&size| size as usize).collect(),
        dropout: head.dropout,
        batch_norm: head.batch_norm,
        classes,
    }
}

/// The spec's own layer groups; empty for those that the graph's modules give.
#[must_use]
pub fn group_rules(spec: &RunSpec) -> Vec<GroupRule> {
    let rules = spec.backbone.layer_groups.iter();
    rules.map(|rule| GroupRule { name: rule.name.clone(), pattern: rule.pattern.clone() }).collect()
}

/// The spec's data, its texts cut to what the graph can take.
#[must_use]
pub fn data(spec: &RunSpec, graph: &Summary) -> Data {
    let mut data = spec.data.clone();
    if let Some(most) = graph.max_length {
        data.max_length = data.max_length.min(u32::try_from(most).unwrap_or(u32::MAX));
    }
    data
}

/// The inputs that the graph takes, in its order.
#[must_use]
pub fn wants(graph: &Summary) -> Vec<InputWant> {
    let dtype = |float| if float { ElementType::F32 } else { ElementType::I64 };
    let inputs = graph.inputs.iter();
    inputs.map(|input| InputWant { name: input.name.clone(), dtype: dtype(input.dtype.is_float()) }).collect()
}

/// The bytes of `tokenizer.json`: named in the spec, inside the archive, or beside it. `None` for images, and where there is none.
///
/// # Errors
/// A named or found file that cannot be read.
pub fn tokenizer(spec: &RunSpec, archive: &Archive) -> Result<Option<Vec<u8>>, Error> {
    match spec.data.train.format {
        DataFormat::ImageFolder => return Ok(None),
        DataFormat::Csv | DataFormat::Jsonl => {}
    }
    let read = |path: &Path| std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source });
    if let Some(url) = &spec.data.train.tokenizer {
        let path = if url.scheme() == "file" { url.to_file_path().ok() } else { None };
        return read(&path.ok_or_else(|| Error::NotLocal { url: url.to_string() })?).map(Some);
    }
    if let Some(bytes) = archive.extra("tokenizer.json")? {
        return Ok(Some(bytes));
    }
    let beside = archive.path().with_file_name("tokenizer.json");
    if beside.is_file() { read(&beside).map(Some) } else { Ok(None) }
}
