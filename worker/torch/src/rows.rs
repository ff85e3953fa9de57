//! The rows of a batch as bytes: taking a tensor apart by sample, and putting one together.
//!
//! ROWS-1: a row's bytes are its elements in the tensor's own memory order, rows first: for a channels-last `[batch, channels, height, width]`
//!         that is height, width, channels. A tensor put together from them has the layout of the one they came from.

use tch::{Device, Kind, TchError, Tensor};

/// How the elements of one row follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// The last dimension fastest.
    RowMajor,
    /// Of `[channels, height, width]`, the channels fastest.
    ChannelsLast,
}

/// A batch whose rows lie one after the other in memory, on the CPU.
#[derive(Debug)]
pub struct Rows {
    /// Contiguous, rows first.
    tensor: Tensor,
    layout: Layout,
}

impl Rows {
    /// From a batch `[rows, ...]` of any layout; copied only where its rows do not lie one after the other already.
    ///
    /// # Errors
    /// With libtorch's text.
    pub fn of(batch: &Tensor) -> Result<Self, TchError> {
        let batch = batch.f_detach()?.f_to_device(Device::Cpu)?;
        let permuted =
            if batch.dim() == 4 && !batch.is_contiguous() { Some(batch.f_permute([0, 2, 3, 1])?) } else { None };
        if let Some(tensor) = permuted.filter(Tensor::is_contiguous) {
            return Ok(Self { tensor, layout: Layout::ChannelsLast });
        }
        Ok(Self { tensor: batch.f_contiguous()?, layout: Layout::RowMajor })
    }

    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    #[must_use]
    pub fn kind(&self) -> Kind {
        self.tensor.kind()
    }

    /// The first `count` entries of a row's first dimension, as bytes; the whole row for `None`.
    ///
    /// # Panics
    /// If the row, or so many entries of it, are not there.
    #[must_use]
    pub fn bytes(&self, row: usize, count: Option<usize>) -> &[u8] {
        let size = self.tensor.size();
        let rows = usize::try_from(size[0]).expect("a size is not negative");
        let bytes = byte_slice(&self.tensor);
        let length = bytes.len() / rows.max(1);
        let start = row * length;
        let kept = match count {
            Some(count) => {
                let entries = usize::try_from(size[1]).expect("a size is not negative");
                assert!(count <= entries, "a row of {entries} entries has no {count}");
                length / entries.max(1) * count
            }
            None => length,
        };
        &bytes[start..start + kept]
    }
}

/// A batch `[rows, dims...]` put together row by row: `fill` gets each row's number and its bytes, which are zero at first.
///
/// # Errors
/// What `fill` returned, or libtorch's text.
pub fn assemble<E: From<TchError>>(
    kind: Kind,
    rows: usize,
    dims: &[i64],
    layout: Layout,
    mut fill: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
) -> Result<Tensor, E> {
    let mut shape = vec![i64::try_from(rows).expect("a batch has fewer than 2^63 rows")];
    match (layout, dims) {
        (Layout::ChannelsLast, [channels, height, width]) => shape.extend([height, width, channels]),
        _ => shape.extend(dims),
    }
    let tensor = Tensor::f_zeros(&shape, (kind, Device::Cpu))?;
    // SAFETY: nothing else holds the tensor yet; it is contiguous, on the CPU, and all zero, so initialised; any bytes are numbers.
    let bytes = unsafe { std::slice::from_raw_parts_mut(pointer(&tensor), byte_slice(&tensor).len()) };
    let length = bytes.len().checked_div(rows).unwrap_or(0);
    if length > 0 {
        for (row, bytes) in bytes.chunks_exact_mut(length).enumerate() {
            fill(row, bytes)?;
        }
    }
    match layout {
        Layout::ChannelsLast if dims.len() == 3 => Ok(tensor.f_permute([0, 3, 1, 2])?),
        Layout::ChannelsLast | Layout::RowMajor => Ok(tensor),
    }
}

fn byte_slice(tensor: &Tensor) -> &[u8] {
    let length = tensor.numel() * tensor.kind().elt_size_in_bytes();
    // SAFETY: the tensor is contiguous and on the CPU (both callers see to it), nothing on the CPU writes in the background, and the
    // slice borrows the handle that keeps the memory.
    unsafe { std::slice::from_raw_parts(pointer(tensor), length) }
}

/// Where a tensor's memory begins; an empty tensor may have none, and a slice must not be null.
fn pointer(tensor: &Tensor) -> *mut u8 {
    if tensor.numel() == 0 { std::ptr::NonNull::dangling().as_ptr() } else { tensor.data_ptr().cast() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rebuilt(batch: &Tensor, dims: &[i64]) -> Tensor {
        let rows = Rows::of(batch).unwrap();
        let count = usize::try_from(batch.size()[0]).unwrap();
        assemble(rows.kind(), count, dims, rows.layout(), |row, bytes| {
            bytes.copy_from_slice(rows.bytes(row, None));
            Ok::<_, TchError>(())
        })
        .unwrap()
    }

    #[test]
    fn rows_survive_being_taken_apart() {
        let batch = Tensor::randn([3, 5, 4, 6], (Kind::Float, Device::Cpu));
        let same = rebuilt(&batch, &[5, 4, 6]);
        assert!(same.equal(&batch) && same.is_contiguous());
        let permuted = batch.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2]);
        assert_eq!(Rows::of(&permuted).unwrap().layout(), Layout::ChannelsLast);
        let same = rebuilt(&permuted, &[5, 4, 6]);
        assert!(same.equal(&permuted));
        assert_eq!(same.stride(), permuted.stride());
        let low = batch.to_kind(Kind::BFloat16);
        assert!(rebuilt(&low, &[5, 4, 6]).equal(&low));
    }

    #[test]
    fn texts_keep_their_first_tokens_and_get_zeros() {
        let batch = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([2, 3, 2]);
        let rows = Rows::of(&batch).unwrap();
        let lengths = [1, 2];
        let cut = assemble(Kind::Float, 2, &[2, 2], Layout::RowMajor, |row, bytes| {
            let kept = rows.bytes(row, Some(lengths[row]));
            bytes[..kept.len()].copy_from_slice(kept);
            Ok::<_, TchError>(())
        })
        .unwrap();
        assert!(cut.equal(&Tensor::from_slice(&[0.0_f32, 1.0, 0.0, 0.0, 6.0, 7.0, 8.0, 9.0]).reshape([2, 2, 2])));
    }
}
