//! Adding the parts of a reduction along the tree over logical shards ([`thaw_core::sampler::tree`]).
//!
//! Law: `SUM-1`: two values are added only where they are the two halves of one node of the tree, lower half first; whoever
//! computed a part computed it the same way.

use super::Element;
use std::ops::Range;
use thaw_core::sampler::tree::split;

/// A part: the node of the tree it is the sum of, and its values.
pub(super) type Part<'a, E> = (Range<u32>, &'a [E]);

/// The sum over all shards, written to `out`. `parts` cover `0..shards` with nodes of the tree, ascending.
pub(super) fn sum<E: Element>(shards: u32, parts: &[Part<'_, E>], out: &mut [E]) {
    let mut parts = parts.iter().peekable();
    visit(&(0..shards), &mut parts, out, &mut Vec::new());
}

/// `spare` is room for upper halves, used again from node to node.
fn visit<E: Element>(
    node: &Range<u32>,
    parts: &mut std::iter::Peekable<std::slice::Iter<'_, Part<'_, E>>>,
    out: &mut [E],
    spare: &mut Vec<Vec<E>>,
) {
    if let Some((_, values)) = parts.next_if(|(range, _)| range == node) {
        out.copy_from_slice(values);
        return;
    }
    assert!(node.len() > 1, "a single shard {node:?} is a part, or inside one");
    let middle = split(node.start, node.end);
    if let Some((left, right)) = halves(parts, node.start..middle, middle..node.end) {
        // One pass over memory instead of two.
        for (sum, (left, right)) in out.iter_mut().zip(left.iter().zip(right)) {
            *sum = *left + *right;
        }
        return;
    }
    visit(&(node.start..middle), parts, out, spare);
    let upper = middle..node.end;
    if let Some((_, values)) = parts.next_if(|(range, _)| *range == upper) {
        add(out, values);
        return;
    }
    let mut room = spare.pop().unwrap_or_default();
    room.resize(out.len(), E::default());
    visit(&upper, parts, &mut room, spare);
    add(out, &room);
    spare.push(room);
}

/// The next two parts, where they are these two nodes.
fn halves<'a, E>(
    parts: &mut std::iter::Peekable<std::slice::Iter<'_, Part<'a, E>>>,
    lower: Range<u32>,
    upper: Range<u32>,
) -> Option<(&'a [E], &'a [E])> {
    let mut ahead = parts.clone();
    let (left, right) = (ahead.next()?, ahead.next()?);
    if left.0 != lower || right.0 != upper {
        return None;
    }
    *parts = ahead;
    Some((left.1, right.1))
}

fn add<E: Element>(left: &mut [E], right: &[E]) {
    for (left, right) in left.iter_mut().zip(right) {
        *left = *left + *right;
    }
}
