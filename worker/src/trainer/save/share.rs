//! The word that a rank leaves of its part of a checkpoint.

use crate::trainer::snapshot::Stamp;
use thaw_core::manifest::GroupState;

pub(super) fn to_json(written: &[(Stamp, GroupState)]) -> Vec<u8> {
    serde_json::to_vec(written).expect("names and numbers are plain data")
}

pub(super) fn from_json(part: &[u8]) -> serde_json::Result<Vec<(Stamp, GroupState)>> {
    serde_json::from_slice(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_comes_back() {
        let state = GroupState { name: "head".to_owned(), weights: None, optimizer: None, optimizer_steps: 3 };
        let written = vec![(Stamp::INITIAL.next(), state)];
        assert_eq!(from_json(&to_json(&written)).unwrap(), written);
        assert!(from_json(b"[[1]]").is_err());
    }
}
