//! How many samples a frozen prefix is computed for at a time: a function of a sample's size and the spec, so that trainers and plans agree.

/// Tokens of a chunk, about: enough for a matrix product to run at full speed, few enough that a rare length wastes little.
const CHUNK_TOKENS: u64 = 1024;
/// Elements of a chunk of images, about (eight of 3 x 224 x 224).
const CHUNK_ELEMENTS: u64 = 8 * 3 * 224 * 224;
/// Samples of a chunk, at least and at most.
const CHUNK_SAMPLES: (u64, u64) = (8, 64);

/// What a model reads of a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleSize {
    /// A text, padded to so many tokens.
    Tokens(u64),
    /// An image of so many elements, all channels together.
    Elements(u64),
}

/// Samples of a chunk; `given` by the spec, or by the size of a sample.
#[must_use]
pub fn chunk_samples(given: Option<u32>, size: SampleSize) -> u64 {
    let derived = match size {
        SampleSize::Tokens(tokens) => CHUNK_TOKENS / tokens.max(1),
        SampleSize::Elements(elements) => CHUNK_ELEMENTS / elements.max(1),
    };
    given.map_or(derived.clamp(CHUNK_SAMPLES.0, CHUNK_SAMPLES.1), u64::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_samples_come_in_larger_chunks_within_bounds() {
        let of = |size| chunk_samples(None, size);
        assert_eq!([32, 1, 512].map(|tokens| of(SampleSize::Tokens(tokens))), [32, 64, 8]);
        assert_eq!([3 * 224 * 224, 3 * 112 * 112, 0].map(|elements| of(SampleSize::Elements(elements))), [8, 32, 64]);
        assert_eq!(chunk_samples(Some(5), SampleSize::Tokens(32)), 5);
    }
}
