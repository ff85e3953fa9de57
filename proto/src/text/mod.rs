//! Messages as YAML and JSON: the proto's canonical mapping, with snake_case beside lowerCamelCase keys and short enum names.
//!
//! Reading goes from text to a tree that keeps lines (`tree`), and from there along the message's descriptor (`read`): every unknown
//! key, repeated key, wrong type and number that does not fit is reported at once. Nothing here panics, whatever the text.
//!
//! - TEXT-1: what [`to_yaml`] and [`to_json`] write reads back as the same message.
//! - TEXT-2: one mistake is reported once; a field that could not be read is not also reported as missing.

mod read;
mod scalar;
mod tree;
mod write;

use crate::violation::Violations;
use crate::{FILE_DESCRIPTOR_SET, convert, pb, spec};
use prost_reflect::{DescriptorPool, MessageDescriptor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::LazyLock;

pub use write::{to_json, to_json_value, to_yaml};

/// The descriptors of [`FILE_DESCRIPTOR_SET`].
pub static DESCRIPTOR_POOL: LazyLock<DescriptorPool> =
    LazyLock::new(|| DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the build script compiled it"));

/// A message that can be read from and written as text: every generated one.
pub trait Printable: prost::Message + prost::Name + Default {}

impl<M: prost::Message + prost::Name + Default> Printable for M {}

fn descriptor<M: Printable>() -> MessageDescriptor {
    DESCRIPTOR_POOL.get_message_by_name(&M::full_name()).expect("the pool holds every generated message")
}

/// A message as far as it could be read, with what was wrong and where its fields stand in the text.
#[derive(Debug, Clone, Default)]
pub struct Reading<M> {
    /// Fields that could not be read are absent; enums among them have the number -1.
    pub message: M,
    pub violations: Violations,
    /// Line of each field, from 1, by path.
    pub lines: BTreeMap<String, usize>,
    /// Paths of fields that stand in the text but could not be read.
    unread: BTreeSet<String>,
}

impl<M> Reading<M> {
    /// Gives violations that were found after reading the lines of their fields, or of the nearest field around them.
    #[must_use]
    pub fn with_lines(&self, mut violations: Violations) -> Violations {
        for violation in &mut violations.0 {
            if violation.line.is_none() {
                violation.line = around(&violation.path).find_map(|path| self.lines.get(path).copied());
            }
        }
        violations
    }

    /// Whether what is said about a field may only be due to one that could not be read: the field itself, one around or one within it.
    fn misses(&self, path: &str) -> bool {
        let is_within = |inner: &str, outer: &str| !outer.is_empty() && around(inner).any(|path| path == outer);
        self.unread.iter().any(|unread| is_within(path, unread) || is_within(unread, path))
    }
}

/// The path, then the paths of the fields around it, innermost first.
fn around(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| path.rfind(['.', '[']).map(|end| &path[..end]))
}

/// Reads any message of package `thaw.v1`, going on after mistakes.
#[must_use]
pub fn read<M: Printable>(text: &str) -> Reading<M> {
    let mut reader = read::Reader::default();
    let dynamic = match tree::parse(text) {
        Ok(root) => reader.message(&descriptor::<M>(), &root),
        Err(violations) => {
            return Reading { violations, ..Reading::default() };
        }
    };
    let message = dynamic.transcode_to().expect("the dynamic message follows the same descriptor");
    Reading { message, violations: reader.violations, lines: reader.lines, unread: reader.unread }
}

/// Reads any message of package `thaw.v1`.
///
/// # Errors
/// Every mistake, with path and line. Ranges of fields are not the reader's: see [`crate::convert`].
pub fn parse<M: Printable>(text: &str) -> Result<M, Violations> {
    let reading = read::<M>(text);
    reading.violations.or_ok(reading.message)
}

/// Reads a run spec as it is written; see [`check_spec_at`] for a file.
///
/// # Errors
/// Every mistake, with path and line.
pub fn parse_spec(text: &str) -> Result<pb::RunSpec, Violations> {
    parse(text)
}

/// Reads a run spec from a file's text; relative paths in it start at `base_dir`, the file's folder.
///
/// # Errors
/// Every mistake, with path and line.
pub fn parse_spec_at(text: &str, base_dir: &Path) -> Result<pb::RunSpec, Violations> {
    let mut raw = parse_spec(text)?;
    resolve_paths(&mut raw, base_dir);
    Ok(raw)
}

/// Reads and checks a run spec from a file's text: the message to submit, and what it means.
///
/// # Errors
/// Every mistake at once, those of the text and those of [`convert::spec::check`], in the order of their lines.
pub fn check_spec_at(text: &str, base_dir: &Path) -> Result<(pb::RunSpec, spec::RunSpec), Violations> {
    let mut reading = read::<pb::RunSpec>(text);
    // Nothing was read: what the check would miss says nothing.
    if reading.lines.is_empty() && !reading.violations.is_empty() {
        return Err(reading.violations);
    }
    resolve_paths(&mut reading.message, base_dir);
    match convert::spec::check(&reading.message) {
        Ok(spec) => reading.violations.or_ok((reading.message, spec)),
        Err(found) => {
            let mut found = reading.with_lines(found);
            found.0.retain(|violation| !reading.misses(&violation.path));
            let mut all = reading.violations;
            all.0.extend(found.0);
            all.0.sort_by_key(|violation| violation.line.unwrap_or(usize::MAX));
            Err(all)
        }
    }
}

/// Makes the relative paths of a spec `file` URLs below `base_dir`; URLs and absolute paths stay.
fn resolve_paths(raw: &mut pb::RunSpec, base_dir: &Path) {
    let Ok(base_dir) = std::path::absolute(base_dir) else {
        return;
    };
    let mut fields: Vec<&mut String> = Vec::new();
    fields.extend(raw.backbone.as_mut().map(|backbone| &mut backbone.graph));
    if let Some(data) = &mut raw.data {
        for source in [&mut data.train, &mut data.eval, &mut data.test].into_iter().flatten() {
            fields.extend([&mut source.path, &mut source.tokenizer]);
        }
    }
    fields.extend(raw.checkpoint.as_mut().map(|checkpoint| &mut checkpoint.url));
    for field in fields {
        if field.is_empty() || field.starts_with('/') || field.contains("://") {
            continue;
        }
        if let Ok(url) = url::Url::from_file_path(base_dir.join(&*field)) {
            // Parsing again folds `.` and `..`.
            *field = url::Url::parse(url.as_str()).map_or_else(|_| url.to_string(), |url| url.to_string());
        }
    }
}
