//! One suite over world sizes: same bits everywhere, and every way to fail ends soon with its own error.

use super::*;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};
use thaw_core::sampler::ranks_shards;
use thaw_core::sampler::tree::{maximal_subtrees, reduce as fold};
use thaw_proto::ids::Generation;
use thaw_proto::status::ErrorClass;

const WORLD_SIZES: [u32; 5] = [1, 2, 3, 4, 8];
const SHARDS: u32 = 7;
/// Far above what any of this takes; a test that needs it has failed.
const SOON: Duration = Duration::from_secs(30);

fn options(operation_deadline: Duration) -> Options {
    Options { shards: SHARDS, connect_deadline: SOON, operation_deadline, shared_memory: false }
}

/// Over TCP alone, and through shared memory.
const TRANSPORTS: [bool; 2] = [false, true];

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

pub(super) fn gang(world_size: u32, operation_deadline: Duration, shared_memory: bool) -> Vec<Tree> {
    let options = Options { shared_memory, ..options(operation_deadline) };
    let (listeners, addresses) = listeners(world_size);
    std::thread::scope(|scope| {
        let joining: Vec<_> = listeners
            .iter()
            .enumerate()
            .map(|(rank, listener)| {
                let membership = membership(rank, &addresses);
                scope.spawn(move || listener.connect(&membership, options).unwrap())
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
    let subtrees = maximal_subtrees(ranks_shards(tree.rank().0, tree.world_size(), SHARDS), SHARDS);
    subtrees.into_iter().map(|node| fold(node, &mut leaf, &mut add).unwrap()).collect()
}

fn reduce(tree: &Tree, elements: usize) -> Result<Vec<u32>, Error> {
    let parts = parts(tree, elements);
    let parts: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
    let mut out = vec![f32::NAN; elements];
    tree.reduce_shards_f32(&parts, &mut out)?;
    Ok(out.into_iter().map(f32::to_bits).collect())
}

#[test]
fn sums_are_the_same_bits_for_every_world_size() {
    TRANSPORTS.into_iter().for_each(sums_are_the_same_bits_for_every_world_size_over);
}

fn sums_are_the_same_bits_for_every_world_size_over(shared_memory: bool) {
    // The last is more than sockets hold, so both sides must read while they write.
    let lengths = [0, 1, 3, 7, 1001, 3_000_017];
    let alone = Tree::alone(SHARDS);
    let expected: Vec<_> = lengths.iter().map(|length| reduce(&alone, *length).unwrap()).collect();
    for world_size in WORLD_SIZES {
        let gang = gang(world_size, SOON, shared_memory);
        for sums in on_all(&gang, |tree| lengths.map(|length| reduce(tree, length).unwrap())) {
            assert!(sums.iter().eq(&expected), "world size {world_size}");
        }
    }
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
    TRANSPORTS.into_iter().for_each(doubles_are_summed_and_bytes_gathered_over);
}

fn doubles_are_summed_and_bytes_gathered_over(shared_memory: bool) {
    for world_size in WORLD_SIZES {
        let gang = gang(world_size, SOON, shared_memory);
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

#[test]
fn abort_wakes_a_blocked_operation_and_stays() {
    TRANSPORTS.into_iter().for_each(abort_wakes_a_blocked_operation_and_stays_over);
}

fn abort_wakes_a_blocked_operation_and_stays_over(shared_memory: bool) {
    let gang = gang(3, SOON, shared_memory);
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
    TRANSPORTS.into_iter().for_each(a_dead_peer_is_named_at_once_over);
}

fn a_dead_peer_is_named_at_once_over(shared_memory: bool) {
    for world_size in [2, 4, 8] {
        let mut gang = gang(world_size, SOON, shared_memory);
        let begun = Instant::now();
        drop(gang.pop());
        for error in on_all(&gang, |tree| reduce(tree, 500_000).unwrap_err()) {
            assert!(matches!(error, Error::PeerLost { .. }), "{error}");
            assert_eq!(error.class(), ErrorClass::Retry);
        }
        assert!(begun.elapsed() < SOON);
    }
}

#[test]
fn a_peer_that_leaves_after_the_last_operation_disturbs_nobody() {
    TRANSPORTS.into_iter().for_each(a_peer_that_leaves_after_the_last_operation_disturbs_nobody_over);
}

fn a_peer_that_leaves_after_the_last_operation_disturbs_nobody_over(shared_memory: bool) {
    let mut gang = gang(3, SOON, shared_memory);
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
    TRANSPORTS.into_iter().for_each(a_silent_peer_runs_into_the_deadline_over);
}

fn a_silent_peer_runs_into_the_deadline_over(shared_memory: bool) {
    let gang = gang(2, Duration::from_millis(50), shared_memory);
    let error = reduce(&gang[0], 10).unwrap_err();
    assert!(matches!(&error, Error::Deadline { missing, .. } if missing == &[1]), "{error}");
    // Writing into a peer that does not read ends too: its reader stops at a bounded number of frames.
    let again = reduce(&gang[0], 10).unwrap_err();
    assert!(matches!(again, Error::Deadline { .. }), "later operations repeat the first error");
}

#[test]
fn different_operations_are_a_mismatch_on_both_sides() {
    TRANSPORTS.into_iter().for_each(different_operations_are_a_mismatch_on_both_sides_over);
}

fn different_operations_are_a_mismatch_on_both_sides_over(shared_memory: bool) {
    let gang = gang(2, SOON, shared_memory);
    let errors = on_all(&gang, |tree| reduce(tree, 10 + tree.rank().0 as usize).unwrap_err());
    assert!(errors.iter().any(|error| matches!(error, Error::Mismatch { .. })));
    assert!(errors.iter().all(|error| matches!(error, Error::Mismatch { .. } | Error::PeerLost { .. })), "{errors:?}");
    let error = Tree::alone(SHARDS).reduce_shards_f32(&[], &mut [0.0]).unwrap_err();
    assert_eq!(error.class(), ErrorClass::Fatal);
}

#[test]
fn wrong_hellos_are_refused_and_the_right_one_still_gets_in() {
    let (listeners, addresses) = listeners(2);
    type Spoil = fn(&mut Membership);
    let wrong: [(Spoil, Refusal, ErrorClass); 4] = [
        (|m| m.key = b"guessed".to_vec(), Refusal::Key, ErrorClass::Retry),
        (|m| m.run = "other-1".to_owned(), Refusal::Run, ErrorClass::Retry),
        (|m| m.generation = Generation(2), Refusal::Generation(3), ErrorClass::Fenced),
        (|m| m.addresses.push("127.0.0.1:1".to_owned()), Refusal::Shape, ErrorClass::Retry),
    ];
    std::thread::scope(|scope| {
        let first = scope.spawn(|| listeners[0].connect(&membership(0, &addresses), options(SOON)).unwrap());
        // Neither garbage nor silence holds anybody up.
        let mut garbage = std::net::TcpStream::connect(&addresses[0]).unwrap();
        std::io::Write::write_all(&mut garbage, &[b'x'; 200]).unwrap();
        let _silent = std::net::TcpStream::connect(&addresses[0]).unwrap();
        for (spoil, expected, class) in wrong {
            let mut membership = membership(1, &addresses);
            spoil(&mut membership);
            let error = listeners[1].connect(&membership, options(SOON)).unwrap_err();
            assert_eq!(error.class(), class);
            assert!(matches!(error, Error::Handshake { rank: 0, reason, .. } if reason == expected), "{error}");
        }
        let second = listeners[1].connect(&membership(1, &addresses), options(SOON)).unwrap();
        let first = first.join().unwrap();
        on_all(&[first, second], |tree| reduce(tree, 100).unwrap());
    });
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let (listeners, addresses) = listeners(2);
    let short = Options { connect_deadline: Duration::from_millis(50), ..options(SOON) };
    for (rank, missing) in [(0, 1), (1, 0)] {
        let error = listeners[rank].connect(&membership(rank, &addresses), short).unwrap_err();
        assert!(
            matches!(error, Error::Handshake { rank, reason: Refusal::Deadline, .. } if rank == missing),
            "{error}"
        );
    }
}

#[test]
fn a_newer_generation_waits_for_a_peer_that_is_behind() {
    let (listeners, addresses) = listeners(2);
    let (behind, begun) = mpsc::channel();
    std::thread::scope(|scope| {
        let (listeners, addresses) = (&listeners, &addresses);
        scope.spawn(move || {
            let mut old = membership(0, addresses);
            old.generation = Generation(2);
            behind.send(()).unwrap();
            let short = Options { connect_deadline: Duration::from_millis(50), ..options(SOON) };
            listeners[0].connect(&old, short).unwrap_err();
            listeners[0].connect(&membership(0, addresses), options(SOON)).unwrap();
        });
        begun.recv().unwrap();
        listeners[1].connect(&membership(1, addresses), options(SOON)).unwrap();
    });
}

#[test]
fn a_queue_keeps_order_and_returns_payloads() {
    TRANSPORTS.into_iter().for_each(a_queue_keeps_order_and_returns_payloads_over);
}

fn a_queue_keeps_order_and_returns_payloads_over(shared_memory: bool) {
    let gang = gang(2, SOON, shared_memory);
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
    TRANSPORTS.into_iter().for_each(an_error_poisons_the_queue_and_dropping_it_ends_its_operation_over);
}

fn an_error_poisons_the_queue_and_dropping_it_ends_its_operation_over(shared_memory: bool) {
    let mut queue = ReduceQueue::new(Arc::new(Tree::alone(1)));
    let good = queue.submit(1, |_, _| Ok(()));
    assert_eq!(queue.wait(good).unwrap(), 1);
    let bad = queue.submit(2, |collective, _| collective.reduce_shards_f32(&[], &mut []));
    let after = queue.submit(3, |_, _| Ok(()));
    assert!(matches!(queue.wait(after), Err(Error::Mismatch { .. })));
    assert!(matches!(queue.wait(bad), Err(Error::Mismatch { .. })));

    let mut gang = gang(2, SOON, shared_memory);
    let begun = Instant::now();
    let mut queue = ReduceQueue::new(Arc::new(gang.remove(0)));
    let _never = queue.submit((), |collective, ()| collective.all_gather(&[]).map(drop));
    drop(queue);
    assert!(begun.elapsed() < SOON);
}

#[test]
fn ranks_of_one_host_share_memory_and_many_small_sums_follow_each_other() {
    let lengths = |turn: usize| [1, 2, 0, 300, 70_001][turn % 5] + turn % 7;
    for world_size in [2, 3, 4] {
        let gang = gang(world_size, SOON, true);
        assert!(gang.iter().all(Tree::shares_memory));
        let alone = Tree::alone(SHARDS);
        let expected: Vec<_> = (0..60).map(|turn| reduce(&alone, lengths(turn)).unwrap()).collect();
        for found in on_all(&gang, |tree| (0..60).map(|turn| reduce(tree, lengths(turn)).unwrap()).collect::<Vec<_>>())
        {
            assert!(found == expected, "world size {world_size}");
        }
    }
    assert!(!gang(2, SOON, false).iter().any(Tree::shares_memory));
}
