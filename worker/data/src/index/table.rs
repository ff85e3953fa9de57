//! CSV sources: a header, then records of as many fields; quoted fields may span lines.

use super::source::{HashingReader, LabelBook, Source, read_error};
use super::{Error, Scan};
use crate::name;
use csv::{ByteRecord, ErrorKind, Reader, ReaderBuilder};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Reads the file once: offsets, labels, hash.
pub(crate) fn scan(scan: &Scan<'_>, book: &mut LabelBook) -> Result<Source, Error> {
    let path = scan.path.as_path();
    let mut reader = ReaderBuilder::new().buffer_capacity(1 << 16).from_reader(HashingReader::open(path)?);
    let (text_column, label_column) = columns(path, &mut reader, scan)?;
    let (mut offsets, mut labels) = (Vec::new(), Vec::new());
    let mut record = ByteRecord::new();
    while reader.read_byte_record(&mut record).map_err(|error| broken(path, error))? {
        let offset = record.position().expect("a record that was read has a position").byte();
        value(path, offset, &record, text_column, scan.text)?;
        let label = value(path, offset, &record, label_column, scan.label)?;
        labels.push(book.id(label).ok_or_else(|| scan.unseen(Some(line_at(path, offset)), label, book))?);
        offsets.push(offset);
    }
    let hashed = reader.into_inner();
    scan.check_complete(hashed.bytes)?;
    if let Some(last) = offsets.last() {
        check_closed(path, *last)?;
    }
    offsets.push(hashed.bytes);
    Ok(Source { text_column: Some(text_column as u32), ..scan.source(hashed.hash(), offsets, labels) })
}

/// The text of one record, given its bytes.
pub(crate) fn text_of(record: &[u8], column: u32) -> Option<String> {
    let mut reader = ReaderBuilder::new().has_headers(false).from_reader(record);
    let mut fields = ByteRecord::new();
    if !reader.read_byte_record(&mut fields).ok()? {
        return None;
    }
    String::from_utf8(fields.get(column as usize)?.to_vec()).ok()
}

fn columns(path: &Path, reader: &mut Reader<HashingReader>, scan: &Scan<'_>) -> Result<(usize, usize), Error> {
    let header = reader.byte_headers().map_err(|error| broken(path, error))?;
    if header.is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    let names = header
        .iter()
        .map(|field| std::str::from_utf8(field).map_err(|_| Error::NotUtf8 { path: path.to_owned(), line: 1 }))
        .collect::<Result<Vec<_>, _>>()?;
    let find = |column: &str| {
        let mut found = names.iter().enumerate().filter(|(_, name)| **name == column);
        let Some((position, _)) = found.next() else {
            return Err(Error::NoColumn {
                path: path.to_owned(),
                column: column.to_owned(),
                hint: name::hint(column, names.iter().copied()),
                columns: name::list(names.iter().copied()),
            });
        };
        match found.next() {
            Some(_) => Err(Error::RepeatedColumn { path: path.to_owned(), column: column.to_owned() }),
            None => Ok(position),
        }
    };
    Ok((find(scan.text)?, find(scan.label)?))
}

fn value<'a>(path: &Path, offset: u64, record: &'a ByteRecord, column: usize, name: &str) -> Result<&'a str, Error> {
    let field = record.get(column).expect("the reader refuses records shorter than the header");
    let value = std::str::from_utf8(field)
        .map_err(|_| Error::NotUtf8 { path: path.to_owned(), line: line_at(path, offset) })?;
    if value.trim().is_empty() {
        return Err(Error::EmptyValue { path: path.to_owned(), line: line_at(path, offset), column: name.to_owned() });
    }
    Ok(value)
}

/// An open quote swallows the rest of the file into the last record, which then looks well formed. With a further line
/// behind it, a closed record stays one of two; an open one swallows that line as well.
fn check_closed(path: &Path, offset: u64) -> Result<(), Error> {
    let mut bytes = Vec::new();
    let mut file = File::open(path).map_err(|source| read_error(path, source))?;
    file.seek(SeekFrom::Start(offset)).map_err(|source| read_error(path, source))?;
    file.read_to_end(&mut bytes).map_err(|source| read_error(path, source))?;
    bytes.extend_from_slice(b"\nnext");
    let mut reader = ReaderBuilder::new().has_headers(false).flexible(true).from_reader(bytes.as_slice());
    match reader.byte_records().count() {
        1 => Err(Error::OpenQuote { path: path.to_owned(), line: line_at(path, offset) }),
        _ => Ok(()),
    }
}

/// The line, from 1, on which the record at `offset` begins. The parser's own count is behind by one after `\r\n` and blank lines,
/// so errors count for themselves.
fn line_at(path: &Path, offset: u64) -> u64 {
    let Ok(file) = File::open(path) else { return 0 };
    let (mut line, mut position) = (1, 0_u64);
    for byte in BufReader::new(file).bytes().map_while(Result::ok) {
        if position >= offset && !matches!(byte, b'\r' | b'\n') {
            break;
        }
        line += u64::from(byte == b'\n');
        position += 1;
    }
    line
}

fn broken(path: &Path, error: csv::Error) -> Error {
    let path = path.to_owned();
    let line = line_at(&path, error.position().map_or(0, csv::Position::byte));
    match error.into_kind() {
        ErrorKind::UnequalLengths { expected_len, len, .. } => {
            Error::Ragged { path, line, found: len, expected: expected_len }
        }
        ErrorKind::Io(source) => read_error(&path, source),
        // The rest comes of decoding to text or to structs, which is not done through the parser.
        _ => Error::NotUtf8 { path, line },
    }
}
