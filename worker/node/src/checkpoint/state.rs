//! A group's state as safetensors bytes, and back.
//!
//! Law: equal tensors give equal bytes, whatever order they come in (the blob's name is a hash of them); bytes from outside
//! are checked before a tensor is built: lengths, overlaps, gaps, header size.

use super::Error;
use bytes::Bytes;
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};
use std::borrow::Cow;
use std::collections::BTreeSet;

/// One tensor as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorBytes {
    /// Unique within the group.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Empty for a scalar.
    pub shape: Vec<usize>,
    /// Little-endian elements, row-major.
    pub data: Bytes,
}

impl View for &TensorBytes {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.data)
    }

    fn data_len(&self) -> usize {
        self.data.len()
    }
}

/// Tensors as one safetensors body, in pieces: the header, then each tensor's own bytes.
///
/// # Errors
/// [`Error::State`]: a name comes twice, or a tensor's bytes do not fit its shape.
pub fn encode(mut tensors: Vec<TensorBytes>) -> Result<Vec<Bytes>, Error> {
    let invalid = |what| Error::State { what, source: None };
    // The format's order: the types with the largest elements first, so that all are aligned.
    tensors.sort_by(|left, right| right.dtype.cmp(&left.dtype).then_with(|| left.name.cmp(&right.name)));
    let mut names = BTreeSet::new();
    let (mut infos, mut end) = (Vec::with_capacity(tensors.len()), 0);
    for TensorBytes { name, dtype, shape, data } in &tensors {
        let elements = shape.iter().try_fold(1_usize, |product, dimension| product.checked_mul(*dimension));
        let bytes = elements.and_then(|elements| elements.checked_mul(dtype.bitsize())).map(|bits| bits / 8);
        if bytes != Some(data.len()) {
            return Err(invalid(format!("{name} has {} bytes, which is not {dtype:?} of shape {shape:?}", data.len())));
        }
        if !names.insert(name) {
            return Err(invalid(format!("{name} comes twice")));
        }
        let data_offsets = (end, end + data.len());
        infos.push((name.clone(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets }));
        end = data_offsets.1;
    }
    let metadata = Metadata::new(None, infos)
        .map_err(|source| Error::State { what: "it cannot be written".to_owned(), source: Some(source) })?;
    let mut json = serde_json::to_vec(&metadata).expect("names and numbers are plain data");
    json.resize(json.len().next_multiple_of(HEADER_ALIGNMENT), b' ');
    let header = [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat();
    Ok(std::iter::once(Bytes::from(header)).chain(tensors.into_iter().map(|tensor| tensor.data)).collect())
}

/// Of the data's start, as the format has it.
const HEADER_ALIGNMENT: usize = 8;

/// Reads a safetensors body, whose memory the tensors share; they come in the order of their names.
///
/// # Errors
/// [`Error::State`]: truncated, a header that is too long or no JSON, offsets that overlap or leave gaps, or a shape that
/// does not fit its bytes.
pub fn decode(body: &Bytes) -> Result<Vec<TensorBytes>, Error> {
    let parsed = SafeTensors::deserialize(body)
        .map_err(|source| Error::State { what: describe(&source).to_owned(), source: Some(source) })?;
    let mut tensors: Vec<TensorBytes> = parsed
        .iter()
        .map(|(name, view)| TensorBytes {
            name: name.to_owned(),
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            data: body.slice_ref(view.data()),
        })
        .collect();
    tensors.sort_by(|left, right| left.name.cmp(&right.name));
    Ok(tensors)
}

fn describe(error: &SafeTensorError) -> &'static str {
    match error {
        SafeTensorError::HeaderTooLarge => "its header is too long",
        SafeTensorError::HeaderTooSmall | SafeTensorError::InvalidHeaderLength => "it is truncated in the header",
        SafeTensorError::MetadataIncompleteBuffer => "it is truncated, or has bytes that belong to no tensor",
        SafeTensorError::InvalidOffset(_) => "tensors overlap or leave gaps",
        SafeTensorError::TensorInvalidInfo => "a tensor's shape does not fit its bytes",
        _ => "its header is not valid",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, shape: &[usize], data: &[u8]) -> TensorBytes {
        TensorBytes {
            name: name.to_owned(),
            dtype: Dtype::U8,
            shape: shape.to_vec(),
            data: Bytes::copy_from_slice(data),
        }
    }

    fn whole(tensors: &[TensorBytes]) -> Vec<u8> {
        encode(tensors.to_vec()).unwrap().concat()
    }

    /// Writes a body by hand: header text, then data.
    fn body(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    fn complaint(bytes: &[u8]) -> String {
        decode(&Bytes::copy_from_slice(bytes)).unwrap_err().to_string()
    }

    #[test]
    fn tensors_come_back_and_order_does_not_matter() {
        let mut tensors = vec![tensor("a", &[2, 2], &[1, 2, 3, 4]), tensor("b", &[], &[5]), tensor("c", &[0], &[])];
        let bytes = whole(&tensors);
        assert_eq!(decode(&Bytes::copy_from_slice(&bytes)).unwrap(), tensors);
        tensors.reverse();
        assert_eq!(whole(&tensors), bytes);
    }

    #[test]
    fn a_body_is_what_the_format_s_own_library_writes() {
        let long = TensorBytes { dtype: Dtype::I64, ..tensor("z", &[1], &[7; 8]) };
        let tensors = [tensor("b", &[3], &[1, 2, 3]), long, tensor("a", &[1], &[4])];
        let theirs = safetensors::serialize(tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)), None).unwrap();
        assert_eq!(whole(&tensors), theirs);
    }

    #[test]
    fn what_does_not_fit_is_not_written() {
        let error = encode(vec![tensor("a", &[3], &[1])]).unwrap_err();
        assert!(error.to_string().contains("a has 1 bytes, which is not U8 of shape [3]"), "{error}");
        assert!(encode(vec![tensor("a", &[1], &[1]), tensor("a", &[1], &[1])]).is_err());
    }

    #[test]
    fn hostile_bytes_are_named() {
        let good = whole(&[tensor("a", &[4], &[1, 2, 3, 4])]);
        assert!(complaint(&good[..5]).contains("truncated"));
        assert!(complaint(&good[..good.len() - 1]).contains("truncated"));
        assert!(complaint(&body("[", &[])).contains("header"));
        assert!(complaint(&u64::MAX.to_le_bytes()).contains("header is too long"));
        let overlap = r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#;
        assert!(complaint(&body(overlap, &[0; 3])).contains("overlap"));
        let gap = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        assert!(complaint(&body(gap, &[0; 2])).contains("gaps"));
        let shape = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#;
        assert!(complaint(&body(shape, &[0; 4])).contains("shape"));
        let long = body(&" ".repeat(100_000_001), &[]);
        assert!(complaint(&long).contains("too long"));
    }

    #[test]
    fn no_cut_or_flipped_byte_panics() {
        let good = whole(&[tensor("a", &[4], &[1, 2, 3, 4]), tensor("b", &[2], &[5, 6])]);
        for at in 0..good.len() {
            assert!(decode(&Bytes::copy_from_slice(&good[..at])).is_err());
            let mut flipped = good.clone();
            flipped[at] ^= 0x55;
            let _either = decode(&Bytes::from(flipped));
        }
    }
}
