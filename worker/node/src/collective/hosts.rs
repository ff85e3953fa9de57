//! [`Hosts`]: which ranks share memory, and who speaks to whom beyond it.
//!
//! ```text
//!             host a          host b
//! column 0    rank 0 <------> rank 1        each rank of a host adds the host's parts of its share of the elements, over shared memory;
//! column 1    rank 2 <------> rank 3        the ranks of one column add the hosts' sums of one share, over TCP
//! ```
//!
//! Law: `HOST-1`: every rank works this out from the same words of all, so all have the same picture.

use std::ops::Range;
use thaw_core::sampler::ranks_shards;
use thaw_core::sampler::tree::{maximal_subtrees, split};

/// Where a share of the elements begins is a multiple of this many, so that ranks do not write into one cache line.
const GRAIN: usize = 16;

/// The ranks of a gang by host, each host's ascending; hosts ordered by their lowest rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hosts {
    hosts: Vec<Vec<u32>>,
    world_size: u32,
    shards: u32,
}

/// What one rank, or one host, gives a sum of: a part for each of these nodes of the tree, ascending.
pub(super) type Nodes = Vec<Range<u32>>;

/// Who adds one share of the elements beyond shared memory: of each host one rank, with the host's parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) members: Vec<(u32, Nodes)>,
}

impl Hosts {
    /// Every rank for itself.
    pub(super) fn apart(world_size: u32, shards: u32) -> Self {
        Self { hosts: (0..world_size).map(|rank| vec![rank]).collect(), world_size, shards }
    }

    /// Ranks belong together where each has reached every other's memory; `reached[a][b]`: rank `a` has reached that of rank `b`.
    pub(super) fn of(reached: &[Vec<bool>], shards: u32) -> Self {
        let mutual = |a: u32, b: u32| {
            let one_way = |a: u32, b: u32| reached[a as usize].get(b as usize).copied().unwrap_or(false);
            one_way(a, b) && one_way(b, a)
        };
        let world_size = u32::try_from(reached.len()).expect("ranks are u32");
        let mut hosts: Vec<Vec<u32>> = Vec::new();
        for rank in 0..world_size {
            match hosts.iter_mut().find(|host| host.iter().all(|other| mutual(rank, *other))) {
                Some(host) => host.push(rank),
                None => hosts.push(vec![rank]),
            }
        }
        Self { hosts, world_size, shards }
    }

    pub(super) fn len(&self) -> usize {
        self.hosts.len()
    }

    pub(super) fn shards(&self) -> u32 {
        self.shards
    }

    /// The ranks of the host that `rank` is on.
    pub(super) fn host_of(&self, rank: u32) -> &[u32] {
        self.hosts.iter().find(|host| host.contains(&rank)).expect("every rank is on a host")
    }

    /// What a rank gives a sum of.
    pub(super) fn nodes_of(&self, rank: u32) -> Nodes {
        maximal_subtrees(ranks_shards(rank, self.world_size, self.shards), self.shards)
    }

    /// What a host's ranks come to together: the largest nodes of which they have all shards.
    pub(super) fn nodes_of_host(&self, host: &[u32]) -> Nodes {
        let mut held = vec![false; self.shards as usize];
        for rank in host {
            for shard in ranks_shards(*rank, self.world_size, self.shards) {
                held[shard as usize] = true;
            }
        }
        let mut nodes = Vec::new();
        largest(0..self.shards, &held, &mut nodes);
        nodes
    }

    /// As many as the largest host has ranks.
    fn columns(&self) -> usize {
        self.hosts.iter().map(Vec::len).max().unwrap_or(1)
    }

    /// The columns of the rank at `place` of a host of so many.
    fn columns_at(&self, place: usize, ranks: usize) -> Range<usize> {
        place * self.columns() / ranks..(place + 1) * self.columns() / ranks
    }

    /// The columns that a rank speaks in, ascending; each with its number.
    pub(super) fn columns_of(&self, rank: u32) -> Vec<(usize, Column)> {
        let host = self.host_of(rank);
        let place = host.iter().position(|other| *other == rank).expect("a rank is on its host");
        self.columns_at(place, host.len()).map(|number| (number, self.column(number))).collect()
    }

    fn column(&self, number: usize) -> Column {
        let speaker = |host: &Vec<u32>| {
            let place = (0..host.len()).find(|place| self.columns_at(*place, host.len()).contains(&number));
            (host[place.expect("the columns are shared out")], self.nodes_of_host(host))
        };
        Column { members: self.hosts.iter().map(speaker).collect() }
    }

    /// The elements of a column.
    pub(super) fn elements_of(&self, column: usize, elements: usize) -> Range<usize> {
        let bound = |column| cut(elements, self.columns(), column);
        bound(column)..bound(column + 1)
    }

    /// The elements that each rank of a host of so many adds: those of its columns.
    pub(super) fn shares(&self, ranks: usize, elements: usize) -> Vec<Range<usize>> {
        let bound = |place| cut(elements, self.columns(), self.columns_at(place, ranks).start);
        (0..ranks).map(|place| bound(place)..if place + 1 == ranks { elements } else { bound(place + 1) }).collect()
    }
}

/// Where piece `index` begins, where so many elements are cut into about equal pieces.
pub(super) fn cut(elements: usize, pieces: usize, index: usize) -> usize {
    if index >= pieces {
        return elements;
    }
    let bound = elements as u128 * index as u128 / pieces as u128;
    usize::try_from(bound).expect("a bound is at most the number of elements") / GRAIN * GRAIN
}

fn largest(node: Range<u32>, held: &[bool], nodes: &mut Nodes) {
    if node.is_empty() {
        return;
    }
    if held[node.start as usize..node.end as usize].iter().all(|held| *held) {
        nodes.push(node);
    } else if node.len() > 1 {
        let middle = split(node.start, node.end);
        largest(node.start..middle, held, nodes);
        largest(middle..node.end, held, nodes);
    }
}

impl Column {
    /// The members in the order of the tree, where they are a power of two and give one part each, so that neighbours of each level are the
    /// two halves of one node: then halves can be exchanged level by level.
    pub(super) fn halving_order(&self, shards: u32) -> Option<Vec<usize>> {
        fn is_halved(nodes: &[Range<u32>], whole: Range<u32>) -> bool {
            if let [node] = nodes {
                return *node == whole;
            }
            let (lower, upper) = nodes.split_at(nodes.len() / 2);
            let middle = split(whole.start, whole.end);
            whole.len() > 1 && is_halved(lower, whole.start..middle) && is_halved(upper, middle..whole.end)
        }

        let single = |(_, nodes): &(u32, Nodes)| match nodes.as_slice() {
            [node] => Some(node.clone()),
            _ => None,
        };
        let nodes: Vec<Range<u32>> = self.members.iter().map(single).collect::<Option<_>>()?;
        if !nodes.len().is_power_of_two() {
            return None;
        }
        let mut order: Vec<usize> = (0..nodes.len()).collect();
        order.sort_by_key(|place| nodes[*place].start);
        let sorted: Vec<Range<u32>> = order.iter().map(|place| nodes[*place].clone()).collect();
        is_halved(&sorted, 0..shards).then_some(order)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ranks with the same letter reach each other.
    fn hosts(names: &str, shards: u32) -> Hosts {
        let names: Vec<char> = names.chars().collect();
        Hosts::of(&names.iter().map(|a| names.iter().map(|b| a == b).collect()).collect::<Vec<_>>(), shards)
    }

    #[test]
    fn ranks_that_reach_each_other_are_one_host() {
        assert_eq!(hosts("abab", 4).hosts, [[0, 2], [1, 3]]);
        assert_eq!(hosts("aaa", 4).hosts, [[0, 1, 2]]);
        assert_eq!(hosts("abc", 4), Hosts::apart(3, 4));
        // Rank 2 reaches both others, but rank 0 not it.
        let reached = [vec![true, true, false], vec![true, true, true], vec![true, true, true]];
        assert_eq!(Hosts::of(&reached, 4).hosts, [vec![0, 1], vec![2]]);
    }

    #[test]
    fn a_host_gives_the_largest_nodes_it_has_whole() {
        let gang = hosts("aabb", 8);
        assert_eq!(gang.nodes_of_host(&[0, 1]), std::slice::from_ref(&(0..4)));
        assert_eq!(hosts("abab", 8).nodes_of_host(&[0, 2]), [0..2, 4..6]);
        assert_eq!(gang.nodes_of_host(&[0, 1, 2]), [0..4, 4..6]);
        assert_eq!(hosts("aaaa", 2).nodes_of_host(&[0, 2]), Nodes::new(), "more ranks than shards");
    }

    #[test]
    fn every_element_and_column_has_one_rank_of_each_host() {
        for names in ["a", "ab", "aab", "abb", "abab", "aaabb", "aabcccc", "aaaabbbb"] {
            let gang = hosts(names, 8);
            for elements in [0, 1, 15, 16, 100, 1001] {
                for host in &gang.hosts {
                    let shares = gang.shares(host.len(), elements);
                    assert_eq!((shares[0].start, shares[host.len() - 1].end), (0, elements));
                    assert!(shares.windows(2).all(|pair| pair[0].end == pair[1].start));
                    for (rank, share) in host.iter().zip(shares) {
                        let own = gang.columns_of(*rank);
                        let covered: Vec<_> =
                            own.iter().flat_map(|(column, _)| gang.elements_of(*column, elements)).collect();
                        assert_eq!(covered, share.collect::<Vec<_>>(), "{names}, rank {rank}");
                        assert!(own.iter().all(|(_, column)| column.members.iter().any(|(member, _)| member == rank)));
                        assert!(own.iter().all(|(_, column)| column.members.len() == gang.len()));
                    }
                }
            }
        }
    }

    #[test]
    fn halving_follows_the_tree_or_is_not_done() {
        let order = |names: &str, shards| hosts(names, shards).column(0).halving_order(shards);
        assert_eq!(order("ab", 2), Some(vec![0, 1]));
        assert_eq!(order("abcd", 8), Some(vec![0, 1, 2, 3]));
        assert_eq!(order("aabb", 4), Some(vec![0, 1]));
        assert_eq!(order("abab", 4), None, "each host has two nodes");
        assert_eq!(order("abc", 3), None, "not a power of two");
        assert_eq!(order("abcd", 7), None, "the second rank has shard 1 and half of a node");
        assert_eq!(order("abcd", 2), None, "a rank without a shard");
    }
}
