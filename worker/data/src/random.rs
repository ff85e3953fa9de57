//! A shuffle that gives the same order on every machine and in every version: Fisher-Yates over BLAKE3's output stream.
//!
//! Keyed by (seed, purpose, name), so that one class's order does not depend on how many classes come before it.

const CONTEXT: &str = "thaw-data shuffle v1";

/// A stream of uniform numbers for one purpose.
pub(crate) struct Stream {
    reader: blake3::OutputReader,
    buffer: [u8; 1024],
    used: usize,
}

impl Stream {
    pub(crate) fn new(seed: u64, purpose: &str, name: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&seed.to_le_bytes());
        // Lengths keep ("ab", "c") and ("a", "bc") apart.
        for part in [purpose, name] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        Self { reader: hasher.finalize_xof(), buffer: [0; 1024], used: 1024 }
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        if self.used == self.buffer.len() {
            self.reader.fill(&mut self.buffer);
            self.used = 0;
        }
        let bytes = self.buffer[self.used..self.used + 8].try_into().expect("eight bytes by construction");
        self.used += 8;
        u64::from_le_bytes(bytes)
    }

    /// Uniform in `0..bound` without bias (Lemire, "Fast random integer generation in an interval", 2019).
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        let reject_below = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= reject_below {
                return (product >> 64) as u64;
            }
        }
    }

    /// Uniform in `[0, 1)`: a multiple of 2^-53.
    pub(crate) fn unit(&mut self) -> f64 {
        const STEP: f64 = 1.0 / (1_u64 << 53) as f64;
        (self.next_u64() >> 11) as f64 * STEP
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(seed: u64, purpose: &str, name: &str) -> Vec<u32> {
        let mut items: Vec<u32> = (0..200).collect();
        Stream::new(seed, purpose, name).shuffle(&mut items);
        items
    }

    #[test]
    fn keeps_every_item_and_follows_its_key() {
        let shuffled = order(7, "split", "math");
        let mut sorted = shuffled.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..200).collect::<Vec<_>>());
        assert_eq!(shuffled, order(7, "split", "math"));
        assert_ne!(shuffled, order(8, "split", "math"));
        assert_ne!(shuffled, order(7, "split", "mail"));
    }

    #[test]
    fn the_order_is_frozen() {
        // Changing this order changes every run's split: a new CONTEXT and index version would be due.
        let mut items: Vec<u32> = (0..10).collect();
        Stream::new(1, "split", "a").shuffle(&mut items);
        assert_eq!(items, FROZEN);
    }

    const FROZEN: [u32; 10] = [0, 5, 3, 4, 9, 6, 1, 2, 7, 8];
}
