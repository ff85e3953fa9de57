//! Partial sums over logical shards, added in the fixed order that makes the result independent of the world size.
//!
//! TREE-1: two partial sums are added only where they are the two children of one node of the tree over all shards; so whatever
//!         contiguous range of shards a rank holds, what is left when all are pushed are the maximal subtrees of its range.

use std::ops::Range;
use thaw_core::sampler::tree;

/// The partial sums of one rank for one value, in ascending shard order.
pub(crate) struct ShardTree<T> {
    shards: u32,
    parts: Vec<(Range<u32>, T)>,
}

impl<T> ShardTree<T> {
    /// Over `shards` logical shards in all.
    pub(crate) fn new(shards: u32) -> Self {
        Self { shards, parts: Vec::new() }
    }

    /// Takes the value of `shard`; shards come in ascending order without gaps.
    pub(crate) fn push(&mut self, shard: u32, value: T, mut add: impl FnMut(&mut T, T)) {
        self.parts.push((shard..shard + 1, value));
        while let [.., (left, _), (right, _)] = self.parts.as_slice() {
            let joined = left.start..right.end;
            if !is_node(self.shards, &joined) || tree::split(joined.start, joined.end) != left.end {
                return;
            }
            let (_, right_value) = self.parts.pop().expect("the pattern matched two parts");
            let (range, left_value) = self.parts.last_mut().expect("the pattern matched two parts");
            *range = joined;
            add(left_value, right_value);
        }
    }

    /// The maximal subtrees, ascending; leaves the tree empty for the next step.
    pub(crate) fn take(&mut self) -> Vec<T> {
        self.parts.drain(..).map(|(_, value)| value).collect()
    }
}

fn is_node(shards: u32, wanted: &Range<u32>) -> bool {
    let mut node = 0..shards;
    while node != *wanted {
        if node.len() <= 1 || wanted.start < node.start || wanted.end > node.end {
            return false;
        }
        let middle = tree::split(node.start, node.end);
        node = if wanted.end <= middle { node.start..middle } else { middle..node.end };
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(left: &mut String, right: String) {
        *left = format!("({left}+{right})");
    }

    fn parts(shards: u32, range: Range<u32>) -> Vec<String> {
        let mut tree = ShardTree::new(shards);
        for shard in range {
            tree.push(shard, shard.to_string(), add);
        }
        tree.take()
    }

    #[test]
    fn one_rank_sums_the_whole_tree() {
        assert_eq!(parts(1, 0..1), ["0"]);
        assert_eq!(parts(4, 0..4), ["((0+1)+(2+3))"]);
        assert_eq!(parts(5, 0..5), ["(((0+1)+2)+(3+4))"]);
    }

    #[test]
    fn a_range_leaves_its_maximal_subtrees() {
        assert_eq!(parts(4, 1..4), ["1", "(2+3)"]);
        assert_eq!(parts(8, 2..7), ["(2+3)", "(4+5)", "6"]);
        assert_eq!(parts(8, 3..3), Vec::<String>::new());
    }

    #[test]
    fn parts_are_the_maximal_subtrees_of_the_core() {
        for shards in 1..=16 {
            for start in 0..shards {
                for end in start + 1..=shards {
                    assert_eq!(parts(shards, start..end).len(), tree::maximal_subtrees(start..end, shards).len());
                }
            }
        }
    }
}
