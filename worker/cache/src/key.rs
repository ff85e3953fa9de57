//! What makes two prefix outputs the same: the hash of everything that they depend on.

use std::fmt;
use std::str::FromStr;

/// Rises whenever records of old keys must not be read any more.
const FORMAT: &[u8] = b"thaw prefix cache 1";

/// Names one set of records: all samples and views of one prefix, boundary, preprocessing, chunk size and element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key([u8; 32]);

/// A text that is no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a prefix cache key: 64 lower-case hexadecimal digits")]
pub struct KeyTextError {
    /// As given.
    pub text: String,
}

impl Key {
    /// The key of named parts, in this order. Names and bytes are hashed with their lengths, so no two lists share a key.
    #[must_use]
    pub fn of(parts: &[(&str, &[u8])]) -> Key {
        let mut hasher = blake3::Hasher::new();
        for piece in std::iter::once(FORMAT).chain(parts.iter().flat_map(|(name, bytes)| [name.as_bytes(), *bytes])) {
            hasher.update(&(piece.len() as u64).to_le_bytes());
            hasher.update(piece);
        }
        Key(*hasher.finalize().as_bytes())
    }

    /// Seeds every checksum, so that a record of another key never passes.
    pub(crate) fn seed(&self) -> u64 {
        let mut seed = [0; 8];
        seed.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(seed)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Key {
    type Err = KeyTextError;

    fn from_str(text: &str) -> Result<Key, KeyTextError> {
        let refused = || KeyTextError { text: text.to_owned() };
        if text.len() != 64 || !text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
            return Err(refused());
        }
        let mut key = [0; 32];
        for (byte, digits) in key.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| refused())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| refused())?;
        }
        Ok(Key(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_told_apart_by_name_order_and_length() {
        let lists: [&[(&str, &[u8])]; 6] = [
            &[("prefix", b"ab"), ("boundary", b"c")],
            &[("prefix", b"a"), ("boundary", b"bc")],
            &[("boundary", b"c"), ("prefix", b"ab")],
            &[("prefixa", b"b"), ("boundary", b"c")],
            &[("prefix", b"ab")],
            &[],
        ];
        let keys: std::collections::BTreeSet<_> = lists.iter().map(|parts| Key::of(parts)).collect();
        assert_eq!(keys.len(), lists.len());
        assert_eq!(Key::of(lists[0]), Key::of(lists[0]));
    }

    #[test]
    fn text_and_back() {
        let key = Key::of(&[("prefix", b"x")]);
        assert_eq!(key.to_string().parse(), Ok(key));
        for text in ["", "12", &key.to_string().to_uppercase(), &format!("{key}0"), &"+1".repeat(32)] {
            assert!(text.parse::<Key>().is_err(), "{text}");
        }
    }
}
