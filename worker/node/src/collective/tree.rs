//! Adding the parts of a reduction along the tree over logical shards ([`thaw_core::sampler::tree`]).
//!
//! Law: `SUM-1`: two values are added only where they are the two halves of one node of the tree, lower half first; whoever
//! computed a part computed it the same way.

use super::Element;
use std::ops::Range;
use thaw_core::sampler::tree::split;

/// A part: the node of the tree it is the sum of, and its values.
pub(super) type Part<'a, E> = (Range<u32>, &'a [E]);

/// What a rank gives a reduction, and where it wants the sum.
pub(super) enum Values<'a, E> {
    /// Parts of equal length, and room for the sum.
    Apart { parts: &'a [&'a [E]], sum: &'a mut [E] },
    /// The only part, which the sum replaces.
    InPlace(&'a mut [E]),
}

impl<E: Element> Values<'_, E> {
    /// Elements of the sum.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Apart { sum, .. } => sum.len(),
            Self::InPlace(values) => values.len(),
        }
    }

    /// Of each part.
    pub(super) fn lengths(&self) -> Vec<usize> {
        match self {
            Self::Apart { parts, .. } => parts.iter().map(|part| part.len()).collect(),
            Self::InPlace(values) => vec![values.len()],
        }
    }

    /// A range of each part.
    pub(super) fn parts(&self, range: &Range<usize>) -> Vec<&[E]> {
        match self {
            Self::Apart { parts, .. } => parts.iter().map(|part| &part[range.clone()]).collect(),
            Self::InPlace(values) => vec![&values[range.clone()]],
        }
    }

    /// A range of the sum. Where it is made in place, the part is gone once this has been written.
    pub(super) fn sum(&mut self, range: Range<usize>) -> &mut [E] {
        match self {
            Self::Apart { sum, .. } => &mut sum[range],
            Self::InPlace(values) => &mut values[range],
        }
    }

    /// A range of each part, beside that range of the sum. `room` holds what the sum is about to replace.
    pub(super) fn parts_and_sum<'b>(
        &'b mut self,
        range: &Range<usize>,
        room: &'b mut Vec<E>,
    ) -> (Vec<&'b [E]>, &'b mut [E]) {
        match self {
            Self::Apart { parts, sum } => {
                (parts.iter().map(|part| &part[range.clone()]).collect(), &mut sum[range.clone()])
            }
            Self::InPlace(values) => {
                let values = &mut values[range.clone()];
                room.clear();
                room.extend_from_slice(values);
                (vec![room.as_slice()], values)
            }
        }
    }
}

/// The sum over the shards of `node`, written to `out`. `parts` cover it with nodes of the tree, ascending.
pub(super) fn sum<E: Element>(node: &Range<u32>, parts: &[Part<'_, E>], out: &mut [E]) {
    let mut parts = parts.iter().peekable();
    visit(node, &mut parts, out, &mut Vec::new());
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

/// `left + right`, into `left`.
pub(super) fn add<E: Element>(left: &mut [E], right: &[E]) {
    for (left, right) in left.iter_mut().zip(right) {
        *left = *left + *right;
    }
}

/// `left + right`, into `right`.
pub(super) fn add_onto<E: Element>(left: &[E], right: &mut [E]) {
    for (left, right) in left.iter().zip(right) {
        *right = *left + *right;
    }
}
