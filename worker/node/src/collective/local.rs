//! [`Local`]: a reduction through shared memory, among the ranks of one host.
//!
//! Each rank adds its share of the elements. Values that lie in shared memory are read and replaced where they are, each rank's share in
//! every rank's memory at once. Others pass, block by block, through small windows that stay in the caches: main memory sees the parts read
//! once and the sums written once.
//!
//! ```text
//! where they are   meet ─▶ add own share, from all ─▶ [other hosts] ─▶ write it to all ─▶ post ─▶ all posted?
//! through windows  publish(t + 1) ─▶ all published t? ─▶ add own block, post the sum ─▶ copy the others' sums ─▶ consumed t
//!                  where there are other hosts: publish and add all blocks first, then post and copy all sums
//! ```
//!
//! LOCAL-1: two windows alternate by round: one is written again only when every rank has consumed the round that used it last.
//! LOCAL-2: counters only rise, by one a round, over all operations; what a rank wrote before it posted a counter is seen by who has read it.
//! LOCAL-3: a rank waits on a counter a moment by looking, then asleep; the connection to each peer says when one is gone.
//! LOCAL-4: between meeting and the last post, rank `r` alone touches share `r` of anybody's values; nobody leaves before all have posted.

use super::error::Error;
use super::hosts::{Hosts, Nodes};
use super::peers::{Operation, Peers};
use super::tree::{self, Values};
use super::{Element, wire};
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use thaw_shm::{Arena, Lease, Segment};

/// A control word has a cache line of its own.
const LINE: usize = 64;
const PUBLISHED: usize = 0;
const SUMMED: usize = LINE;
const CONSUMED: usize = 2 * LINE;
/// Sequence, kind, elements, place: what the published parts belong to, and where they lie if not in the windows.
const HEADER: usize = 3 * LINE;
pub(super) const CONTROL_BYTES: usize = 4096;
/// Of all that a host publishes in a round, about. Larger blocks mean fewer waits for each other; where there are more ranks than cores,
/// smaller ones keep less of the others' work waiting. Found by trying 2, 4 and 8 ranks.
const WINDOW_BYTES: usize = 8 << 20;
/// Bytes of a block, at least and at most.
const BLOCK_BYTES: (usize, usize) = (16 << 10, 2 << 20);
/// Of all ranks' values, what is added at a time where they lie: it is still in the core's cache when the sum is written to all.
const STEP_BYTES: usize = 512 << 10;
/// Values below this are copied sooner than met over.
const DIRECT_BYTES: usize = 64 << 10;
/// The place of values that do not lie in shared memory.
const NOWHERE: u64 = u64::MAX;
/// Looks at a counter before sleeping: some ten microseconds.
const LOOKS: u32 = 200;
/// Longest sleep between two looks at whether a peer is gone or the operation aborted.
const SLEEP: Duration = Duration::from_millis(10);

/// How the segments of a host are laid out; the same on every rank.
#[derive(Debug, Clone)]
struct Layout {
    ranks: usize,
    block_bytes: usize,
    /// Most parts that a rank gives.
    parts: usize,
}

impl Layout {
    fn new(nodes: &[Nodes]) -> Self {
        let parts = nodes.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let ranks = nodes.len();
        let block_bytes = (WINDOW_BYTES / (parts * ranks * ranks)).clamp(BLOCK_BYTES.0, BLOCK_BYTES.1);
        // Whole elements of any type, and whole cache lines.
        Self { ranks, block_bytes: block_bytes / LINE * LINE, parts }
    }

    fn bytes(&self) -> usize {
        self.sums_at(2)
    }

    /// Where `part` for the block of the rank at place `of` lies in a rank's window.
    fn part_at(&self, window: u32, of: usize, part: usize) -> usize {
        let block = (window as usize * self.ranks + of) * self.parts + part;
        CONTROL_BYTES + block * self.block_bytes
    }

    fn sums_at(&self, window: u32) -> usize {
        self.part_at(2, 0, 0) + window as usize * self.block_bytes
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Local {
    /// The host's ranks, ascending; a place is an index into them.
    ranks: Vec<u32>,
    /// This rank's place.
    place: usize,
    layout: Layout,
    /// What each gives, by place.
    nodes: Vec<Nodes>,
    /// What they come to together.
    together: Nodes,
    own: Arc<Arena>,
    /// By place; `None` is this one.
    segments: Vec<Option<Segment>>,
    /// Rounds done in all operations so far.
    round: Mutex<u32>,
}

/// What adds a share of the elements over the other hosts, once this host's parts of it are added.
pub(super) type Beyond<'a, E> = &'a mut dyn FnMut(&mut Values<'_, E>) -> Result<(), Error>;

/// One reduction in flight.
struct Reduction<'a> {
    local: &'a Local,
    peers: &'a Peers,
    operation: &'a Operation,
    /// Of each place.
    shares: Vec<Range<usize>>,
    /// Rounds before this operation.
    before: u32,
}

impl Local {
    /// `segments` are those of the host's other ranks, in rank order.
    pub(super) fn new(hosts: &Hosts, rank: u32, own: Segment, segments: Vec<Segment>) -> Self {
        let ranks = hosts.host_of(rank).to_vec();
        let place = ranks.iter().position(|other| *other == rank).expect("a rank is on its host");
        let nodes: Vec<Nodes> = ranks.iter().map(|rank| hosts.nodes_of(*rank)).collect();
        let layout = Layout::new(&nodes);
        own.touch(0, layout.bytes());
        let mut segments: Vec<Option<Segment>> = segments.into_iter().map(Some).collect();
        segments.insert(place, None);
        let own = Arc::new(Arena::new(own, layout.bytes()));
        let together = hosts.nodes_of_host(&ranks);
        Self { ranks, place, layout, nodes, together, own, segments, round: Mutex::new(0) }
    }

    /// Memory that the host's other ranks can read.
    pub(super) fn lease(&self, bytes: usize) -> Option<Lease> {
        self.own.lease(bytes)
    }

    pub(super) fn prepare_leases(&self, bytes: usize) {
        self.own.prepare(bytes);
    }

    /// Adds over all shards, in tree order. Where there are other hosts, `beyond` gets the elements that this rank adds.
    pub(super) fn reduce<E: Element>(
        &self,
        peers: &Peers,
        operation: &Operation,
        shares: Vec<Range<usize>>,
        values: &mut Values<'_, E>,
        beyond: Option<Beyond<'_, E>>,
    ) -> Result<(), Error> {
        let mut round = self.round.lock().expect("no code that holds the lock panics");
        let reduction = Reduction { local: self, peers, operation, shares, before: *round };
        let rounds = reduction.run(values, beyond)?;
        *round = round.wrapping_add(rounds);
        Ok(())
    }

    /// The other ranks of the host by place. Staggered, so that not all read from the first one first.
    fn others(&self) -> impl Iterator<Item = (usize, &Segment)> {
        let ranks = self.ranks.len();
        (1..ranks)
            .map(move |offset| (self.place + offset) % ranks)
            .filter_map(|place| self.segments[place].as_ref().map(|segment| (place, segment)))
    }

    /// Whether every rank of the host gives one part, and the host as a whole too.
    fn gives_one_part(&self) -> bool {
        self.together.len() == 1 && self.nodes.iter().all(|nodes| nodes.len() == 1)
    }
}

impl Reduction<'_> {
    /// Returns the rounds that it took.
    fn run<E: Element>(&self, values: &mut Values<'_, E>, beyond: Option<Beyond<'_, E>>) -> Result<u32, Error> {
        // The same on every rank that is in this operation (COLL-3).
        if self.local.gives_one_part() && values.len() * size_of::<E>() >= DIRECT_BYTES {
            let places = self.meet(values)?;
            if let (Some(places), Values::InPlace(values)) = (places, &mut *values) {
                self.add_in_place(values, &places, beyond)?;
                return Ok(1);
            }
            // The meeting was a round of its own.
            let later = Reduction { before: self.after(0), shares: self.shares.clone(), ..*self };
            return Ok(1 + later.through_windows(values, beyond)?);
        }
        self.through_windows(values, beyond)
    }

    fn through_windows<E: Element>(
        &self,
        values: &mut Values<'_, E>,
        beyond: Option<Beyond<'_, E>>,
    ) -> Result<u32, Error> {
        let rounds = self.rounds::<E>();
        let mut room = Vec::new();
        self.publish(0, values)?;
        let Some(beyond) = beyond else {
            for turn in 0..rounds {
                if turn + 1 < rounds {
                    self.publish(turn + 1, values)?;
                }
                self.add(turn, values, None, &mut room)?;
                self.post_sum(turn, values)?;
                self.collect(turn, values)?;
            }
            return Ok(rounds);
        };
        let own = self.shares[self.local.place].clone();
        let mut together = match self.local.together.len() {
            1 => Vec::new(),
            nodes => vec![vec![E::default(); own.len()]; nodes],
        };
        for turn in 0..rounds {
            if turn + 1 < rounds {
                self.publish(turn + 1, values)?;
            }
            self.add(turn, values, Some(&mut together), &mut room)?;
            thaw_shm::post(self.word(CONSUMED), self.after(turn));
        }
        if self.local.together.len() == 1 {
            beyond(&mut Values::InPlace(values.sum(own)))?;
        } else {
            let parts: Vec<&[E]> = together.iter().map(Vec::as_slice).collect();
            beyond(&mut Values::Apart { parts: &parts, sum: values.sum(own) })?;
        }
        let later = Reduction { before: self.before.wrapping_add(rounds), shares: self.shares.clone(), ..*self };
        for turn in 0..rounds {
            later.consumed(turn)?;
            later.post_sum(turn, values)?;
            later.collect(turn, values)?;
        }
        Ok(2 * rounds)
    }

    fn word(&self, word: usize) -> &std::sync::atomic::AtomicU32 {
        self.local.own.segment().word(word)
    }

    fn block<E>(&self) -> usize {
        self.local.layout.block_bytes / size_of::<E>()
    }

    /// At least one, in which lengths are compared.
    fn rounds<E>(&self) -> u32 {
        let longest = self.shares.iter().map(Range::len).max().unwrap_or(0);
        u32::try_from(longest.div_ceil(self.block::<E>()).max(1))
            .expect("a vector has fewer than 2^32 rounds of blocks")
    }

    /// The elements that the rank at a place adds in a round.
    fn range<E>(&self, turn: u32, place: usize) -> Range<usize> {
        let share = &self.shares[place];
        let first = share.start + turn as usize * self.block::<E>();
        first.min(share.end)..(first + self.block::<E>()).min(share.end)
    }

    /// A counter's value once the round is done.
    fn after(&self, turn: u32) -> u32 {
        self.before.wrapping_add(turn).wrapping_add(1)
    }

    fn header<E: Element>(&self, values: &Values<'_, E>) -> [u64; 4] {
        let place = match values {
            Values::InPlace(values) => self.local.own.place_of(values).map_or(NOWHERE, |place| place as u64),
            Values::Apart { .. } => NOWHERE,
        };
        [self.operation.sequence(), E::KIND as u64, values.len() as u64, place]
    }

    /// Tells the others where this rank's values lie. Where everyone's lie in shared memory, returns their places there.
    fn meet<E: Element>(&self, values: &Values<'_, E>) -> Result<Option<Vec<usize>>, Error> {
        let Local { own, ranks, .. } = self.local;
        let header = self.header(values);
        own.segment().write(HEADER, &header);
        thaw_shm::post(self.word(PUBLISHED), self.after(0));
        let mut places = vec![header[3]; ranks.len()];
        for (other, segment) in self.local.others() {
            self.wait(segment, PUBLISHED, other, self.after(0))?;
            self.check(other, segment, header)?;
            places[other] = segment.numbers::<u64>(HEADER, 4)[3];
        }
        thaw_shm::post(self.word(CONSUMED), self.after(0));
        let known = |place: u64| usize::try_from(place).ok().filter(|_| place != NOWHERE);
        Ok(places.into_iter().map(known).collect())
    }

    /// Adds this rank's share where everyone's values lie (LOCAL-4).
    fn add_in_place<E: Element>(
        &self,
        values: &mut [E],
        places: &[usize],
        beyond: Option<Beyond<'_, E>>,
    ) -> Result<(), Error> {
        let own = self.shares[self.local.place].clone();
        let step = STEP_BYTES / self.local.ranks.len() / size_of::<E>();
        let steps: Vec<Range<usize>> =
            own.clone().step_by(step.max(1)).map(|first| first..(first + step).min(own.end)).collect();
        let at = |other: usize, range: &Range<usize>| places[other] + range.start * size_of::<E>();
        let spread = |range: &Range<usize>, sum: &[E]| {
            for (other, segment) in self.local.others() {
                segment.write(at(other, range), sum);
            }
        };
        let mut room = Vec::new();
        for range in &steps {
            let theirs: Vec<(usize, &[E])> = self
                .local
                .others()
                .map(|(other, segment)| (other, segment.numbers(at(other, range), range.len())))
                .collect();
            self.add_step(&mut values[range.clone()], &theirs, &mut room);
            if beyond.is_none() {
                spread(range, &values[range.clone()]);
            }
        }
        if let Some(beyond) = beyond {
            beyond(&mut Values::InPlace(&mut values[own]))?;
            for range in &steps {
                spread(range, &values[range.clone()]);
            }
        }
        thaw_shm::post(self.word(SUMMED), self.after(0));
        for (other, segment) in self.local.others() {
            self.wait(segment, SUMMED, other, self.after(0))?;
        }
        Ok(())
    }

    /// Adds the others' elements, by place, to this rank's.
    fn add_step<E: Element>(&self, own: &mut [E], theirs: &[(usize, &[E])], room: &mut Vec<E>) {
        let Local { place, nodes, together, .. } = self.local;
        if let [(other, theirs)] = theirs {
            // One pass over memory instead of two.
            if place < other {
                tree::add(own, theirs)
            } else {
                tree::add_onto(theirs, own)
            }
            return;
        }
        room.clear();
        room.extend_from_slice(own);
        let mut all: Vec<(usize, &[E])> = theirs.to_vec();
        all.push((*place, room));
        all.sort_by_key(|(place, _)| *place);
        let parts: Vec<tree::Part<'_, E>> =
            all.into_iter().map(|(place, values)| (nodes[place][0].clone(), values)).collect();
        tree::sum(&together[0], &parts, own);
    }

    /// Until a window may be written again (LOCAL-1).
    fn consumed(&self, turn: u32) -> Result<(), Error> {
        for (other, segment) in self.local.others() {
            self.wait(segment, CONSUMED, other, self.after(turn).wrapping_sub(2))?;
        }
        Ok(())
    }

    /// Gives the others this rank's parts of their blocks.
    fn publish<E: Element>(&self, turn: u32, values: &Values<'_, E>) -> Result<(), Error> {
        let Local { own, layout, .. } = self.local;
        self.consumed(turn)?;
        if turn == 0 {
            own.segment().write(HEADER, &self.header(values));
        }
        for (other, _) in self.local.others() {
            for (part, numbers) in values.parts(&self.range::<E>(turn, other)).into_iter().enumerate() {
                own.segment().write(layout.part_at(turn % 2, other, part), numbers);
            }
        }
        thaw_shm::post(self.word(PUBLISHED), self.after(turn));
        Ok(())
    }

    /// Adds this rank's block: to the sum, or where the host has several nodes, to each of their own.
    fn add<E: Element>(
        &self,
        turn: u32,
        values: &mut Values<'_, E>,
        together: Option<&mut Vec<Vec<E>>>,
        room: &mut Vec<E>,
    ) -> Result<(), Error> {
        let Local { place, layout, nodes, together: targets, .. } = self.local;
        let header = self.header(values);
        for (other, segment) in self.local.others() {
            self.wait(segment, PUBLISHED, other, self.after(turn))?;
            if turn == 0 {
                self.check(other, segment, header)?;
            }
        }
        let range = self.range::<E>(turn, *place);
        if range.is_empty() {
            return Ok(());
        }
        let (own, sum) = values.parts_and_sum(&range, room);
        let mut parts: Vec<tree::Part<'_, E>> = Vec::with_capacity(layout.parts * layout.ranks);
        for (other, nodes) in nodes.iter().enumerate() {
            for (part, node) in nodes.iter().enumerate() {
                let numbers = match &self.local.segments[other] {
                    Some(segment) => segment.numbers(layout.part_at(turn % 2, *place, part), range.len()),
                    None => own[part],
                };
                parts.push((node.clone(), numbers));
            }
        }
        let inside = |node: &Range<u32>| {
            let of_node = |part: &tree::Part<'_, E>| node.start <= part.0.start && part.0.end <= node.end;
            parts.iter().filter(|part| of_node(part)).cloned().collect::<Vec<_>>()
        };
        match together {
            Some(together) if !together.is_empty() => {
                let first = range.start - self.shares[*place].start;
                for (node, sums) in targets.iter().zip(together) {
                    tree::sum(node, &inside(node), &mut sums[first..first + range.len()]);
                }
            }
            Some(_) | None => targets.iter().for_each(|node| tree::sum(node, &inside(node), sum)),
        }
        Ok(())
    }

    /// Gives the others the sum of this rank's block.
    fn post_sum<E: Element>(&self, turn: u32, values: &mut Values<'_, E>) -> Result<(), Error> {
        let Local { own, layout, place, .. } = self.local;
        own.segment().write(layout.sums_at(turn % 2), values.sum(self.range::<E>(turn, *place)));
        thaw_shm::post(self.word(SUMMED), self.after(turn));
        Ok(())
    }

    /// Copies the others' sums.
    fn collect<E: Element>(&self, turn: u32, values: &mut Values<'_, E>) -> Result<(), Error> {
        for (other, segment) in self.local.others() {
            self.wait(segment, SUMMED, other, self.after(turn))?;
            let room = values.sum(self.range::<E>(turn, other));
            room.copy_from_slice(segment.numbers(self.local.layout.sums_at(turn % 2), room.len()));
        }
        thaw_shm::post(self.word(CONSUMED), self.after(turn));
        Ok(())
    }

    fn check(&self, other: usize, segment: &Segment, own: [u64; 4]) -> Result<(), Error> {
        let found = segment.numbers::<u64>(HEADER, 3);
        if found == &own[..3] {
            return Ok(());
        }
        let kind = |number: u64| {
            let kind = u8::try_from(number).ok().and_then(wire::Kind::from_byte);
            kind.map_or("another operation", wire::Kind::name)
        };
        Err(self.operation.mismatch(format!(
            "rank {} is in {} {} with {} elements, this one in {} {} with {}",
            self.local.ranks[other],
            kind(found[1]),
            found[0],
            found[2],
            kind(own[1]),
            own[0],
            own[2]
        )))
    }

    /// Until a peer's counter is at `target` or beyond (LOCAL-3).
    fn wait(&self, segment: &Segment, word: usize, other: usize, target: u32) -> Result<(), Error> {
        let word = segment.word(word);
        let reached = |value: u32| value.wrapping_sub(target).cast_signed() >= 0;
        for _ in 0..LOOKS {
            if reached(word.load(Ordering::Acquire)) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        loop {
            let value = word.load(Ordering::Acquire);
            if reached(value) {
                return Ok(());
            }
            if let Some(error) = self.peers.ended(self.operation, self.local.ranks[other]) {
                // What it posted before it went still counts.
                return if reached(word.load(Ordering::Acquire)) { Ok(()) } else { Err(error) };
            }
            thaw_shm::wait(word, value, SLEEP);
        }
    }
}
