//! One suite over world sizes and placements: same bits everywhere, and every way to fail ends soon with its own error.

mod forming;

use super::*;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_core::culprit;
use thaw_core::sampler::ranks_shards;
use thaw_core::sampler::tree::{maximal_subtrees, reduce as fold};
use thaw_proto::ids::{Generation, StageIndex, Step};
use thaw_proto::status::ErrorClass;
use thaw_proto::worker::{CollectiveKind, OperationEnd};

const WORLD_SIZES: [u32; 5] = [1, 2, 3, 4, 8];
/// Ranks of most world sizes have several nodes of the tree over so many.
const SHARDS: u32 = 7;
/// Far above what any of this takes; a test that needs it has failed.
const SOON: Duration = Duration::from_secs(30);

/// Where the ranks of a gang are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// None shares memory: over TCP alone.
    Apart,
    /// One letter a rank, over and over: the hosts. They are all this one, under different names.
    Hosts(&'static str),
}

/// TCP alone, shared memory alone, and both: by turns, in rows, unevenly, and a rank that shares nothing.
const PLACEMENTS: [Placement; 6] = [
    Placement::Apart,
    Placement::Hosts("a"),
    Placement::Hosts("ab"),
    Placement::Hosts("aabb"),
    Placement::Hosts("aabcc"),
    Placement::Hosts("aa-a"),
];

impl Placement {
    fn host(self, rank: u32) -> Option<HostId> {
        let Self::Hosts(names) = self else { return None };
        let place = rank as usize % names.len();
        let name = &names[place..=place];
        (name != "-").then(|| HostId::named(name))
    }
}

fn over_all(test: fn(Placement)) {
    PLACEMENTS.into_iter().for_each(test);
}

fn options(operation_deadline: Duration) -> Options {
    Options { shards: SHARDS, connect_deadline: SOON, operation_deadline, host: None }
}

fn listeners(world_size: u32) -> (Vec<Listener>, Vec<String>) {
    (0..world_size).map(|_| Listener::bind("127.0.0.1").unwrap()).unzip()
}

fn membership(rank: usize, addresses: &[String]) -> Membership {
    Membership {
        run: "demo-0badcafe".to_owned(),
        generation: Generation(3),
        rank: Rank(u32::try_from(rank).unwrap()),
        addresses: addresses.to_vec(),
        key: b"0123456789abcdef".to_vec(),
    }
}

fn connect(listener: &Listener, membership: &Membership, options: Options) -> Result<Tree, Error> {
    listener.connect(membership, options, &Abort::default())
}

fn gang(world_size: u32, operation_deadline: Duration, placement: Placement) -> Vec<Tree> {
    gang_over(world_size, SHARDS, operation_deadline, placement)
}

fn gang_over(world_size: u32, shards: u32, operation_deadline: Duration, placement: Placement) -> Vec<Tree> {
    let (listeners, addresses) = listeners(world_size);
    std::thread::scope(|scope| {
        let joining: Vec<_> = (0..world_size)
            .zip(&listeners)
            .map(|(rank, listener)| {
                let membership = membership(rank as usize, &addresses);
                let options = Options { shards, host: placement.host(rank), ..options(operation_deadline) };
                scope.spawn(move || connect(listener, &membership, options).unwrap())
            })
            .collect();
        joining.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Runs `work` on every rank at once and returns the results in rank order.
fn on_all<R: Send>(gang: &[Tree], work: impl Fn(&Tree) -> R + Sync) -> Vec<R> {
    std::thread::scope(|scope| {
        let running: Vec<_> = gang.iter().map(|tree| scope.spawn(|| work(tree))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Values whose sum depends on the order: wide exponents, both signs.
fn shard_values(shard: u32, elements: usize) -> Vec<f32> {
    let mut state = (u64::from(shard) + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..elements)
        .map(|_| {
            let bits = next();
            let magnitude = (bits >> 40) as f32 * 2_f32.powi(i32::try_from(bits % 24).unwrap() - 12);
            if bits & (1 << 32) == 0 { magnitude } else { -magnitude }
        })
        .collect()
}

/// A rank's parts, added as a trainer adds them.
fn parts(tree: &Tree, elements: usize) -> Vec<Vec<f32>> {
    let mut leaf = |shard| shard_values(shard, elements);
    let mut add = |left: Vec<f32>, right: Vec<f32>| left.iter().zip(right).map(|(left, right)| left + right).collect();
    let shards = tree.shards();
    let subtrees = maximal_subtrees(ranks_shards(tree.rank().0, tree.world_size(), shards), shards);
    subtrees.into_iter().map(|node| fold(node, &mut leaf, &mut add).unwrap()).collect()
}

fn reduce(tree: &Tree, elements: usize) -> Result<Vec<u32>, Error> {
    let parts = parts(tree, elements);
    let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![f32::NAN; elements];
    tree.reduce_shards_f32(&parts, &mut out)?;
    Ok(out.into_iter().map(f32::to_bits).collect())
}

/// As a trainer with one part does it: in place, in leased memory where there is some.
fn reduce_in_place(tree: &Tree, elements: usize, leased: bool) -> Result<Vec<u32>, Error> {
    let mut parts = parts(tree, elements);
    let mut part = if parts.len() == 1 { parts.remove(0) } else { return reduce(tree, elements) };
    let mut lease = tree.lease(4 * elements).filter(|_| leased);
    let values = match &mut lease {
        Some(lease) => {
            let shared = &mut lease.numbers_mut()[..elements];
            shared.copy_from_slice(&part);
            shared
        }
        None => part.as_mut_slice(),
    };
    tree.reduce_in_place_f32(values)?;
    Ok(values.iter().map(|value| value.to_bits()).collect())
}

#[test]
fn sums_are_the_same_bits_for_every_world_size() {
    over_all(|placement| {
        // The last is enough for halves to be exchanged, and to be added where it lies. With eight shards a rank has one part.
        let lengths = [0, 1, 3, 7, 1001, 150_001];
        for shards in [SHARDS, 8] {
            let alone = Tree::alone(shards);
            let expected: Vec<_> = lengths.iter().map(|length| reduce(&alone, *length).unwrap()).collect();
            for world_size in WORLD_SIZES {
                let gang = gang_over(world_size, shards, SOON, placement);
                let all = |tree: &Tree| {
                    let apart = lengths.map(|length| reduce(tree, length).unwrap());
                    let private = lengths.map(|length| reduce_in_place(tree, length, false).unwrap());
                    let leased = lengths.map(|length| reduce_in_place(tree, length, true).unwrap());
                    // Each rank as it likes.
                    let mixed = lengths.map(|length| match tree.rank().0 % 3 {
                        0 => reduce(tree, length).unwrap(),
                        rank => reduce_in_place(tree, length, rank == 1).unwrap(),
                    });
                    [apart, private, leased, mixed]
                };
                for sums in on_all(&gang, all) {
                    for (way, sums) in sums.iter().enumerate() {
                        assert!(sums.iter().eq(&expected), "{placement:?}, {world_size} ranks, {shards} shards, {way}");
                    }
                }
            }
        }
    });
}

#[test]
fn what_sockets_do_not_hold_is_read_while_it_is_written() {
    for shards in [SHARDS, 8] {
        let expected = reduce(&Tree::alone(shards), 3_000_017).unwrap();
        for placement in [Placement::Apart, Placement::Hosts("a"), Placement::Hosts("ab")] {
            let gang = gang_over(2, shards, SOON, placement);
            let same = |tree: &Tree| reduce(tree, 3_000_017).unwrap() == expected;
            assert!(on_all(&gang, same).into_iter().all(|same| same), "{placement:?}, {shards} shards");
        }
    }
}

#[test]
fn ranks_with_more_ranks_than_shards_sum_too() {
    over_all(|placement| {
        let expected = reduce(&Tree::alone(3), 70_001).unwrap();
        let gang = gang_over(8, 3, SOON, placement);
        assert!(on_all(&gang, |tree| reduce(tree, 70_001).unwrap() == expected).into_iter().all(|same| same));
    });
}

#[test]
fn the_order_of_the_sum_shows_in_its_bits() {
    let one_by_one = (1..SHARDS).fold(shard_values(0, 1001), |sum, shard| {
        sum.iter().zip(shard_values(shard, 1001)).map(|(left, right)| left + right).collect()
    });
    let one_by_one: Vec<u32> = one_by_one.into_iter().map(f32::to_bits).collect();
    assert_ne!(reduce(&Tree::alone(SHARDS), 1001).unwrap(), one_by_one, "else the tests above prove nothing");
}

#[test]
fn doubles_are_summed_and_bytes_gathered() {
    over_all(doubles_are_summed_and_bytes_gathered_over);
}

fn doubles_are_summed_and_bytes_gathered_over(placement: Placement) {
    for world_size in WORLD_SIZES {
        let gang = gang(world_size, SOON, placement);
        let results = on_all(&gang, |tree| {
            let subtrees = maximal_subtrees(ranks_shards(tree.rank().0, world_size, SHARDS), SHARDS);
            let values: Vec<[f64; 2]> = subtrees.iter().map(|node| [node.len() as f64, 0.5]).collect();
            let parts: Vec<&[f64]> = values.iter().map(<[f64; 2]>::as_slice).collect();
            let mut out = [0.0; 2];
            tree.reduce_shards_f64(&parts, &mut out).unwrap();
            (out[0], tree.all_gather(&vec![7; tree.rank().0 as usize * 50_000]).unwrap())
        });
        for (sum, gathered) in results {
            assert_eq!(sum, f64::from(SHARDS));
            let lengths: Vec<usize> = gathered.iter().map(Vec::len).collect();
            assert_eq!(lengths, (0..world_size as usize).map(|rank| rank * 50_000).collect::<Vec<_>>());
        }
    }
}

/// Those that need a rank's bytes get them, the others get nothing, and all go on together.
#[test]
fn bytes_are_copied_to_those_that_need_them() {
    over_all(|placement| {
        let gang = gang(4, SOON, placement);
        let bytes: Vec<u8> = (0..300_000_u32).map(|at| at as u8).collect();
        let copied = on_all(&gang, |tree| {
            let given = if tree.rank() == Rank(1) { &bytes[..] } else { &[] };
            let copied = tree.copy(Rank(1), &[Rank(0), Rank(3)], given).unwrap();
            assert_eq!(tree.all_gather(&[tree.rank().0 as u8]).unwrap(), [[0], [1], [2], [3]]);
            copied
        });
        assert_eq!(copied, [bytes.clone(), Vec::new(), Vec::new(), bytes.clone()]);
    });
}

#[test]
fn abort_wakes_a_blocked_operation_and_stays() {
    over_all(abort_wakes_a_blocked_operation_and_stays_over);
}

fn abort_wakes_a_blocked_operation_and_stays_over(placement: Placement) {
    let gang = gang(3, SOON, placement);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let blocked = scope.spawn(|| reduce(&gang[0], 2_000_000));
        gang[0].abort();
        assert!(matches!(blocked.join().unwrap(), Err(Error::Aborted)));
    });
    assert!(matches!(gang[0].all_gather(&[]), Err(Error::Aborted)));
    assert!(matches!(gang[1].all_gather(&[]), Err(Error::PeerLost { rank: 0, .. })), "the peers hear of it");
    assert!(begun.elapsed() < SOON);
    assert!(matches!(
        {
            let alone = Tree::alone(1);
            alone.abort();
            alone.all_gather(&[])
        },
        Err(Error::Aborted)
    ));
}

#[test]
fn a_dead_peer_is_named_at_once() {
    over_all(a_dead_peer_is_named_at_once_over);
}

fn a_dead_peer_is_named_at_once_over(placement: Placement) {
    for world_size in [2, 4, 8] {
        let mut gang = gang(world_size, SOON, placement);
        let begun = Instant::now();
        drop(gang.pop());
        for error in on_all(&gang, |tree| reduce(tree, 500_000).unwrap_err()) {
            assert!(matches!(error, Error::PeerLost { .. }), "{error}");
            assert_eq!(error.class(), ErrorClass::Retry);
        }
        assert!(begun.elapsed() < SOON);
        let mut gang = gang_over(world_size, 8, SOON, placement);
        drop(gang.pop());
        let errors = on_all(&gang, |tree| reduce_in_place(tree, 500_000, true).unwrap_err());
        assert!(errors.iter().all(|error| matches!(error, Error::PeerLost { .. })), "{errors:?}");
        assert!(begun.elapsed() < SOON);
    }
}

#[test]
fn a_peer_that_leaves_after_the_last_operation_disturbs_nobody() {
    over_all(a_peer_that_leaves_after_the_last_operation_disturbs_nobody_over);
}

fn a_peer_that_leaves_after_the_last_operation_disturbs_nobody_over(placement: Placement) {
    let mut gang = gang(3, SOON, placement);
    std::thread::scope(|scope| {
        for tree in gang.drain(..) {
            scope.spawn(move || {
                let sum = reduce(&tree, 100_003).unwrap();
                drop(tree);
                sum
            });
        }
    });
}

#[test]
fn a_silent_peer_runs_into_the_deadline() {
    over_all(a_silent_peer_runs_into_the_deadline_over);
}

fn a_silent_peer_runs_into_the_deadline_over(placement: Placement) {
    let gang = gang(2, Duration::from_millis(50), placement);
    let error = reduce(&gang[0], 10).unwrap_err();
    assert!(matches!(&error, Error::Deadline { missing, .. } if missing == &[1]), "{error}");
    // Writing into a peer that does not read ends too: its reader stops at a bounded number of frames.
    let again = reduce(&gang[0], 10).unwrap_err();
    assert!(matches!(again, Error::Deadline { .. }), "later operations repeat the first error");
    for elements in [10, 150_001] {
        let gang = gang_over(8, 8, Duration::from_millis(100), placement);
        let begun = Instant::now();
        let errors = on_all(&gang[..7], |tree| reduce_in_place(tree, elements, true).unwrap_err());
        assert!(errors.iter().any(|error| matches!(error, Error::Deadline { .. })), "{errors:?}");
        let expected = |error: &Error| matches!(error, Error::Deadline { .. } | Error::PeerLost { .. });
        assert!(errors.iter().all(expected), "{errors:?}");
        assert!(begun.elapsed() < SOON);
    }
}

/// What the ranks have recorded names the one that the others waited for, whatever memory they share.
#[test]
fn the_records_of_a_gang_name_the_rank_that_did_not_come() {
    for placement in [Placement::Apart, Placement::Hosts("a"), Placement::Hosts("aab")] {
        let (listeners, addresses) = listeners(3);
        let rings: Vec<Arc<Ring>> = (0..3).map(|_| Arc::new(Ring::create().unwrap())).collect();
        let recording = listeners.into_iter().zip(&rings).map(|(one, ring)| one.recording(Some(Arc::clone(ring))));
        let listeners: Vec<Listener> = recording.collect();
        let gang: Vec<Tree> = std::thread::scope(|scope| {
            let joining: Vec<_> = (0..3_u32)
                .zip(&listeners)
                .map(|(rank, listener)| {
                    let membership = membership(rank as usize, &addresses);
                    let options = Options { host: placement.host(rank), ..options(Duration::from_secs(2)) };
                    scope.spawn(move || connect(listener, &membership, options).unwrap())
                })
                .collect();
            joining.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        gang.iter().for_each(|tree| tree.record().at(StageIndex(1), Step(40)));
        let sums = on_all(&gang, |tree| reduce(tree, 10).is_ok());
        assert_eq!(sums, [true; 3]);
        on_all(&gang[..2], |tree| reduce(tree, 20).unwrap_err());
        let read: Vec<_> = rings.iter().map(|ring| ring.read(Generation(3))).collect();
        let records = (0..).map(Rank).zip(read.iter().map(Vec::as_slice)).collect();
        let culprit::Finding::NeverCame { operation, ranks, waiting } = culprit::find(&records, 3) else {
            panic!("{placement:?}: {records:?}")
        };
        assert_eq!((ranks, waiting), (vec![Rank(2)], 2), "{placement:?}");
        assert_eq!((operation.kind, operation.bytes), (CollectiveKind::ReduceF32, 80));
        assert_eq!((operation.stage, operation.step), (StageIndex(1), Step(40)));
        assert!(matches!(operation.end, OperationEnd::Failed { .. }), "{operation:?}");
    }
}

#[test]
fn different_operations_are_a_mismatch_on_both_sides() {
    over_all(different_operations_are_a_mismatch_on_both_sides_over);
}

fn different_operations_are_a_mismatch_on_both_sides_over(placement: Placement) {
    let gang = gang(2, SOON, placement);
    let errors = on_all(&gang, |tree| reduce(tree, 10 + tree.rank().0 as usize).unwrap_err());
    assert!(errors.iter().any(|error| matches!(error, Error::Mismatch { .. })));
    assert!(errors.iter().all(|error| matches!(error, Error::Mismatch { .. } | Error::PeerLost { .. })), "{errors:?}");
    for elements in [10, 150_001] {
        let gang = gang_over(2, 2, SOON, placement);
        let begun = Instant::now();
        let errors = on_all(&gang, |tree| match tree.rank().0 {
            0 => reduce_in_place(tree, elements, true).map(drop).unwrap_err(),
            _ => tree.all_gather(&[]).map(drop).unwrap_err(),
        });
        assert!(errors.iter().any(|error| matches!(error, Error::Mismatch { .. })), "{errors:?}");
        assert!(begun.elapsed() < SOON);
    }
    let error = Tree::alone(SHARDS).reduce_shards_f32(&[], &mut [0.0]).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Fatal);
}

#[test]
fn a_queue_keeps_order_and_returns_payloads() {
    over_all(a_queue_keeps_order_and_returns_payloads_over);
}

fn a_queue_keeps_order_and_returns_payloads_over(placement: Placement) {
    let gang = gang(2, SOON, placement);
    std::thread::scope(|scope| {
        for tree in gang {
            scope.spawn(move || {
                let expected = [5, 700, 3].map(|length| reduce(&Tree::alone(SHARDS), length).unwrap());
                let inputs = [5, 700, 3].map(|length| parts(&tree, length));
                let mut queue = ReduceQueue::new(Arc::new(tree));
                let tickets = inputs.map(|parts| {
                    queue.submit((parts, Vec::new()), |collective, (parts, out)| {
                        let views: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
                        out.resize(views[0].len(), 0.0);
                        collective.reduce_shards_f32(&views, out)
                    })
                });
                for (ticket, expected) in tickets.into_iter().zip(expected) {
                    let (_, out) = queue.wait(ticket).unwrap();
                    assert!(out.into_iter().map(f32::to_bits).eq(expected));
                }
            });
        }
    });
}

#[test]
fn an_error_poisons_the_queue_and_dropping_it_ends_its_operation() {
    over_all(an_error_poisons_the_queue_and_dropping_it_ends_its_operation_over);
}

fn an_error_poisons_the_queue_and_dropping_it_ends_its_operation_over(placement: Placement) {
    let mut queue = ReduceQueue::new(Arc::new(Tree::alone(1)));
    let good = queue.submit(1, |_, _| Ok(()));
    assert_eq!(queue.wait(good).unwrap(), 1);
    let bad = queue.submit(2, |collective, _| collective.reduce_shards_f32(&[], &mut []));
    let after = queue.submit(3, |_, _| Ok(()));
    assert!(matches!(queue.wait(after), Err(Error::Mismatch { .. })));
    assert!(matches!(queue.wait(bad), Err(Error::Mismatch { .. })));

    let mut gang = gang(2, SOON, placement);
    let begun = Instant::now();
    let mut queue = ReduceQueue::new(Arc::new(gang.remove(0)));
    let _never = queue.submit((), |collective, ()| collective.all_gather(&[]).map(drop));
    drop(queue);
    assert!(begun.elapsed() < SOON);
}

#[test]
fn many_small_sums_follow_each_other() {
    over_all(|placement| {
        let lengths = |turn: usize| [1, 2, 0, 300, 70_001][turn % 5] + turn % 7;
        let sum = |tree: &Tree, turn: usize| match turn % 3 {
            0 => reduce(tree, lengths(turn)).unwrap(),
            way => reduce_in_place(tree, lengths(turn), way == 1).unwrap(),
        };
        for (world_size, shards) in [(2, 8), (3, SHARDS), (4, 8)] {
            let gang = gang_over(world_size, shards, SOON, placement);
            let alone = Tree::alone(shards);
            let expected: Vec<_> = (0..60).map(|turn| reduce(&alone, lengths(turn)).unwrap()).collect();
            let all = |tree: &Tree| (0..60).map(|turn| sum(tree, turn)).collect::<Vec<_>>();
            assert!(on_all(&gang, all).into_iter().all(|found| found == expected), "{placement:?}, {world_size} ranks");
        }
    });
}
