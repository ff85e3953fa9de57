//! Which rank writes which part of a checkpoint, and the word it leaves of it.

use crate::trainer::snapshot::Stamp;
use thaw_core::manifest::GroupState;

/// The rank that writes each of the states with these sizes: the largest first, each to the rank that has least.
pub(super) fn assign(bytes: &[u64], world_size: u32) -> Vec<u32> {
    let mut order: Vec<usize> = (0..bytes.len()).collect();
    order.sort_by_key(|&index| (std::cmp::Reverse(bytes[index]), index));
    let mut load = vec![0_u64; world_size as usize];
    let mut ranks = vec![0; bytes.len()];
    for index in order {
        let least = (0..world_size).min_by_key(|&rank| load[rank as usize]).expect("a gang has a rank");
        load[least as usize] += bytes[index];
        ranks[index] = least;
    }
    ranks
}

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
    fn shares_are_even_and_the_same_for_everyone() {
        let bytes = [90, 28, 28, 28, 28, 2];
        assert_eq!(assign(&bytes, 2), [0, 1, 1, 1, 1, 0]);
        assert_eq!(assign(&bytes, 1), [0; 6]);
        assert_eq!(assign(&[], 3), [0_u32; 0]);
        assert_eq!(assign(&[5, 5, 5], 5), [0, 1, 2]);
    }

    #[test]
    fn what_was_written_comes_back() {
        let state = GroupState { name: "head".to_owned(), weights: None, optimizer: None, optimizer_steps: 3 };
        let written = vec![(Stamp::INITIAL.next(), state)];
        assert_eq!(from_json(&to_json(&written)).unwrap(), written);
        assert!(from_json(b"[[1]]").is_err());
    }
}
