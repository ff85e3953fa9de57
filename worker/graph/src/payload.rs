//! Tensors as the archive stores them: a raw storage and a view (shape, strides, offset) on it.
//!
//! PAY-1: a view never reaches outside its storage; that is checked when the archive is opened.
//! PAY-2: names that share a storage keep sharing it when the archive is written.

use crate::ir::DType;
use crate::schema::{self, SymInt, TensorMeta};

/// A stored tensor: which entry holds it, and how to see it there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Payload {
    /// The entry below the archive's top folder, e.g. `data/weights/weight_3`.
    pub entry: String,
    pub dtype: DType,
    pub shape: Vec<i64>,
    /// In elements, one per dimension.
    pub strides: Vec<i64>,
    /// In elements.
    pub offset: i64,
    pub requires_grad: bool,
}

/// Why a stored tensor's description cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("its dtype number {number} is not supported")]
    DType { number: i64 },
    #[error("its layout number {number} is not the dense one")]
    Layout { number: i64 },
    #[error("its shape is symbolic")]
    Symbolic,
    #[error("its shape {shape:?} with strides {strides:?} is negative or overflows 64 bits")]
    Overflow { shape: Vec<i64>, strides: Vec<i64> },
    #[error("its shape {shape:?} needs {needed} bytes and the archive holds {stored}")]
    Size { shape: Vec<i64>, needed: u64, stored: u64 },
}

impl Payload {
    pub(crate) fn new(entry: String, meta: &TensorMeta) -> Result<Self, Error> {
        if meta.layout != schema::STRIDED {
            return Err(Error::Layout { number: meta.layout });
        }
        let known = |size: &SymInt| match size {
            SymInt::AsInt(value) => Ok(*value),
            SymInt::AsExpr(_) => Err(Error::Symbolic),
        };
        let payload = Self {
            entry,
            dtype: schema::dtype(meta.dtype).ok_or(Error::DType { number: meta.dtype })?,
            shape: meta.sizes.iter().map(known).collect::<Result<_, _>>()?,
            strides: meta.strides.iter().map(known).collect::<Result<_, _>>()?,
            offset: meta.storage_offset.as_ref().map_or(Ok(0), known)?,
            requires_grad: meta.requires_grad,
        };
        payload.span()?;
        Ok(payload)
    }

    /// Contiguous at the start of its storage.
    pub(crate) fn contiguous(entry: String, dtype: DType, shape: Vec<i64>, requires_grad: bool) -> Result<Self, Error> {
        let mut strides = vec![1; shape.len()];
        for dimension in (1..shape.len()).rev() {
            strides[dimension - 1] = i64::checked_mul(strides[dimension], shape[dimension].max(1))
                .ok_or_else(|| Error::Overflow { shape: shape.clone(), strides: Vec::new() })?;
        }
        let payload = Self { entry, dtype, shape, strides, offset: 0, requires_grad };
        payload.span()?;
        Ok(payload)
    }

    /// Elements of the tensor.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&size| size.unsigned_abs()).product()
    }

    /// Bytes of storage that the view reaches, from the storage's start; 0 for an empty tensor.
    pub(crate) fn span(&self) -> Result<u64, Error> {
        let overflow = || Error::Overflow { shape: self.shape.clone(), strides: self.strides.clone() };
        if self.strides.len() != self.shape.len()
            || self.offset < 0
            || self.shape.iter().chain(&self.strides).any(|&number| number < 0)
        {
            return Err(overflow());
        }
        // The product is formed even where strides repeat elements, so that a huge expanded shape is refused before memory is asked for.
        let elements =
            self.shape.iter().try_fold(1_i64, |product, &size| product.checked_mul(size)).ok_or_else(overflow)?;
        elements.checked_mul(8).ok_or_else(overflow)?;
        if elements == 0 {
            return Ok(0);
        }
        let mut last = self.offset;
        for (&size, &stride) in self.shape.iter().zip(&self.strides) {
            last = (size - 1).checked_mul(stride).and_then(|step| last.checked_add(step)).ok_or_else(overflow)?;
        }
        let bytes =
            last.checked_add(1).and_then(|count| count.checked_mul(self.dtype.size() as i64)).ok_or_else(overflow)?;
        u64::try_from(bytes).map_err(|_| overflow())
    }

    pub(crate) fn check(&self, stored: u64) -> Result<(), Error> {
        let needed = self.span()?;
        let is_whole = stored.is_multiple_of(self.dtype.size() as u64);
        // Expanded views may repeat elements, but a file never needs to describe more than a few times what it holds.
        let is_sane = self.elements() <= stored.saturating_mul(64).saturating_add(64);
        if needed > stored || !is_whole || !is_sane {
            return Err(Error::Size { shape: self.shape.clone(), needed, stored });
        }
        Ok(())
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected *= size;
            fits
        })
    }

    /// The tensor's elements in row-major order, out of its storage.
    pub(crate) fn gather(&self, storage: &[u8]) -> Vec<u8> {
        let size = self.dtype.size();
        let start = self.offset as usize * size;
        let length = self.elements() as usize * size;
        if length == 0 {
            return Vec::new();
        }
        if self.is_contiguous() {
            return storage[start..start + length].to_vec();
        }
        let mut bytes = Vec::with_capacity(length);
        self.for_each_element(|position| bytes.extend_from_slice(&storage[position * size..(position + 1) * size]));
        bytes
    }

    /// Puts row-major `bytes` where the tensor lies in its storage.
    pub(crate) fn scatter(&self, bytes: &[u8], storage: &mut [u8]) {
        let size = self.dtype.size();
        if self.is_contiguous() {
            let start = self.offset as usize * size;
            storage[start..start + bytes.len()].copy_from_slice(bytes);
            return;
        }
        let mut source = bytes.chunks_exact(size);
        self.for_each_element(|position| {
            if let Some(element) = source.next() {
                storage[position * size..(position + 1) * size].copy_from_slice(element);
            }
        });
    }

    fn for_each_element(&self, mut visit: impl FnMut(usize)) {
        if self.elements() == 0 {
            return;
        }
        let mut index = vec![0_i64; self.shape.len()];
        let mut position = self.offset;
        loop {
            visit(position as usize);
            let mut dimension = self.shape.len();
            loop {
                if dimension == 0 {
                    return;
                }
                dimension -= 1;
                index[dimension] += 1;
                position += self.strides[dimension];
                if index[dimension] < self.shape[dimension] {
                    break;
                }
                position -= self.strides[dimension] * self.shape[dimension];
                index[dimension] = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn payload(shape: &[i64], strides: &[i64], offset: i64) -> Payload {
        Payload {
            entry: "e".to_owned(),
            dtype: DType::Uint8,
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            offset,
            requires_grad: false,
        }
    }

    #[test]
    fn strided_views_are_gathered_and_scattered() {
        let transposed = payload(&[3, 2], &[1, 3], 1);
        let mut storage = [9, 0, 1, 2, 3, 4, 5];
        let bytes = transposed.gather(&storage);
        assert_eq!(bytes, [0, 3, 1, 4, 2, 5]);
        transposed.scatter(&[10, 13, 11, 14, 12, 15], &mut storage);
        assert_eq!(storage, [9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(payload(&[], &[], 2).gather(&storage), [11]);
        assert_eq!(payload(&[0, 2], &[2, 1], 0).gather(&[]), [0_u8; 0]);
    }

    #[test]
    fn views_outside_their_storage_are_refused() {
        assert!(payload(&[3, 2], &[2, 1], 0).check(6).is_ok());
        assert!(matches!(payload(&[3, 2], &[2, 1], 1).check(6), Err(Error::Size { needed: 7, .. })));
        assert!(matches!(payload(&[i64::MAX, 2], &[2, 1], 0).check(6), Err(Error::Overflow { .. })));
        assert!(matches!(payload(&[-1], &[1], 0).check(6), Err(Error::Overflow { .. })));
        assert!(matches!(payload(&[1 << 40], &[0], 0).check(6), Err(Error::Size { .. })));
    }
}
