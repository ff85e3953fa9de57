//! JSONL sources: one object on each line; blank lines are passed over.

use super::source::{HashingReader, LabelBook, Source, read_error};
use super::{Error, Scan};
use crate::name;
use serde_json::{Map, Value};
use std::io::{BufRead, BufReader};
use std::path::Path;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads the file once: offsets, labels, hash.
pub(crate) fn scan(scan: &Scan<'_>, book: &mut LabelBook) -> Result<Source, Error> {
    let path = scan.path.as_path();
    let mut reader = BufReader::with_capacity(1 << 16, HashingReader::open(path)?);
    let (mut offsets, mut labels, mut bytes) = (Vec::new(), Vec::new(), Vec::new());
    let (mut offset, mut line) = (0, 0);
    loop {
        bytes.clear();
        let read = reader.read_until(b'\n', &mut bytes).map_err(|source| read_error(path, source))?;
        if read == 0 {
            break;
        }
        line += 1;
        let marked = if line == 1 && bytes.starts_with(BYTE_ORDER_MARK) { BYTE_ORDER_MARK.len() } else { 0 };
        let body = &bytes[marked..];
        if !body.trim_ascii().is_empty() {
            let object = parse(path, line, body)?;
            text(path, line, &object, scan.text)?;
            let label = label(path, line, &object, scan.label)?;
            labels.push(book.id(&label).ok_or_else(|| scan.unseen(Some(line), &label, book))?);
            offsets.push(offset + marked as u64);
        }
        offset += read as u64;
    }
    offsets.push(offset);
    let hashed = reader.into_inner();
    scan.check_complete(hashed.bytes)?;
    Ok(scan.source(hashed.hash(), offsets, labels))
}

/// The text of one record, given its bytes.
pub(crate) fn text_of(record: &[u8], key: &str) -> Option<String> {
    let mut object: Map<String, Value> = serde_json::from_slice(record).ok()?;
    match object.remove(key)? {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn parse(path: &Path, line: u64, bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    let path = || path.to_owned();
    let text = std::str::from_utf8(bytes).map_err(|_| Error::NotUtf8 { path: path(), line })?;
    match serde_json::from_str(text).map_err(|source| Error::NotJson { path: path(), line, source })? {
        Value::Object(object) => Ok(object),
        other => Err(Error::NotObject { path: path(), line, found: kind(&other) }),
    }
}

fn text(path: &Path, line: u64, object: &Map<String, Value>, key: &str) -> Result<(), Error> {
    match get(path, line, object, key)? {
        Value::String(text) if text.trim().is_empty() => Err(empty(path, line, key)),
        Value::String(_) => Ok(()),
        other => Err(wrong(path, line, key, other, "a string")),
    }
}

/// A label's text form: a number or a truth value counts as it is written.
fn label(path: &Path, line: u64, object: &Map<String, Value>, key: &str) -> Result<String, Error> {
    match get(path, line, object, key)? {
        Value::String(label) if label.trim().is_empty() => Err(empty(path, line, key)),
        Value::String(label) => Ok(label.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(value) => Ok(value.to_string()),
        other @ (Value::Null | Value::Array(_) | Value::Object(_)) => {
            Err(wrong(path, line, key, other, "a string or a number"))
        }
    }
}

fn get<'a>(path: &Path, line: u64, object: &'a Map<String, Value>, key: &str) -> Result<&'a Value, Error> {
    object.get(key).ok_or_else(|| {
        let keys = || object.keys().map(String::as_str);
        Error::NoKey {
            path: path.to_owned(),
            line,
            key: key.to_owned(),
            hint: name::hint(key, keys()),
            keys: name::list(keys()),
        }
    })
}

fn empty(path: &Path, line: u64, key: &str) -> Error {
    Error::EmptyValue { path: path.to_owned(), line, column: key.to_owned() }
}

fn wrong(path: &Path, line: u64, key: &str, found: &Value, expected: &'static str) -> Error {
    Error::WrongType { path: path.to_owned(), line, key: key.to_owned(), found: kind(found), expected }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
