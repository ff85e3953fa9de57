//! How many samples a frozen prefix is computed for at a time: a function of a sample's size and the spec, so that trainers and plans agree.

/// Tokens of a chunk, about: enough for a matrix product to run at full speed, few enough that a rare length wastes little. A GPU needs more.
const CHUNK_TOKENS: u64 = 512;
const CHUNK_TOKENS_OF_A_GPU: u64 = 1024;
/// Elements of a chunk of images, about (eight of 3 x 224 x 224).
const CHUNK_ELEMENTS: u64 = 8 * 3 * 224 * 224;
/// Samples of a chunk, at least and at most.
const CHUNK_TEXTS: (u64, u64) = (4, 64);
const CHUNK_IMAGES: (u64, u64) = (8, 64);

/// What a prefix is computed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    Cpu,
    Gpu,
}

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
pub fn chunk_samples(given: Option<u32>, size: SampleSize, on: Processor) -> u64 {
    let derived = match (size, on) {
        (SampleSize::Tokens(tokens), Processor::Cpu) => of(CHUNK_TOKENS, tokens, CHUNK_TEXTS),
        (SampleSize::Tokens(tokens), Processor::Gpu) => of(CHUNK_TOKENS_OF_A_GPU, tokens, CHUNK_TEXTS),
        (SampleSize::Elements(elements), _) => of(CHUNK_ELEMENTS, elements, CHUNK_IMAGES),
    };
    given.map_or(derived, u64::from)
}

fn of(chunk: u64, sample: u64, (least, most): (u64, u64)) -> u64 {
    (chunk / sample.max(1)).clamp(least, most)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_samples_come_in_larger_chunks_within_bounds() {
        let of = |size| chunk_samples(None, size, Processor::Cpu);
        assert_eq!([32, 1, 512].map(|tokens| of(SampleSize::Tokens(tokens))), [16, 64, 4]);
        assert_eq!(chunk_samples(None, SampleSize::Tokens(32), Processor::Gpu), 32);
        assert_eq!([3 * 224 * 224, 3 * 112 * 112, 0].map(|elements| of(SampleSize::Elements(elements))), [8, 32, 64]);
        assert_eq!(chunk_samples(Some(5), SampleSize::Tokens(32), Processor::Cpu), 5);
    }
}
