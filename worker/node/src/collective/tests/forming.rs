//! How a gang forms: who is let in, who is waited for and how long, and that it can be ended.

use super::*;
use std::net::TcpListener;
use std::sync::mpsc;

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
        let first = scope.spawn(|| connect(&listeners[0], &membership(0, &addresses), options(SOON)).unwrap());
        // Neither garbage nor silence holds anybody up.
        let mut garbage = std::net::TcpStream::connect(&addresses[0]).unwrap();
        std::io::Write::write_all(&mut garbage, &[b'x'; 200]).unwrap();
        let _silent = std::net::TcpStream::connect(&addresses[0]).unwrap();
        for (spoil, expected, class) in wrong {
            let mut membership = membership(1, &addresses);
            spoil(&mut membership);
            let error = connect(&listeners[1], &membership, options(SOON)).unwrap_err();
            assert_eq!(error.class(), class);
            assert!(matches!(error, Error::Handshake { rank: 0, reason, .. } if reason == expected), "{error}");
        }
        let second = connect(&listeners[1], &membership(1, &addresses), options(SOON)).unwrap();
        let first = first.join().unwrap();
        on_all(&[first, second], |tree| reduce(tree, 100).unwrap());
    });
}

#[test]
fn a_rank_that_does_not_come_is_named() {
    let (listeners, addresses) = listeners(2);
    let short = Options { connect_deadline: Duration::from_millis(50), ..options(SOON) };
    for (rank, missing) in [(0, 1), (1, 0)] {
        let error = connect(&listeners[rank], &membership(rank, &addresses), short).unwrap_err();
        assert!(
            matches!(error, Error::Handshake { rank, reason: Refusal::Deadline, .. } if rank == missing),
            "{error}"
        );
    }
}

/// Three ranks, their addresses, those that rank 2 is told, and who listens in rank 1's place there: ranks 1 and 2 join rank 0 but not
/// each other, so neither says anything more.
fn two_that_never_meet() -> (Vec<Listener>, Vec<String>, Vec<String>, TcpListener) {
    let (ours, addresses) = listeners(3);
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut elsewhere = addresses.clone();
    elsewhere[1] = silent.local_addr().unwrap().to_string();
    (ours, addresses, elsewhere, silent)
}

/// What ranks tell each other while a gang forms is none of its operations, however short those may be.
#[test]
fn forming_takes_the_time_that_it_has() {
    over_all(|placement| drop(gang(4, Duration::ZERO, placement)));
    let (ours, addresses, elsewhere, _silent) = two_that_never_meet();
    let short = Options { connect_deadline: Duration::from_millis(300), ..options(2 * SOON) };
    let begun = Instant::now();
    let errors = std::thread::scope(|scope| {
        let joining: Vec<_> = [&addresses, &addresses, &elsewhere]
            .into_iter()
            .zip(&ours)
            .enumerate()
            .map(|(rank, (addresses, listener))| {
                scope.spawn(move || connect(listener, &membership(rank, addresses), short).unwrap_err())
            })
            .collect();
        joining.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    for error in &errors {
        assert!(
            matches!(error, Error::Handshake { reason: Refusal::Deadline, .. } | Error::PeerLost { .. }),
            "{error}"
        );
    }
    assert!(errors.iter().any(|error| matches!(error, Error::Handshake { .. })), "{errors:?}");
    assert!(begun.elapsed() < SOON);
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
            connect(&listeners[0], &old, short).unwrap_err();
            connect(&listeners[0], &membership(0, addresses), options(SOON)).unwrap();
        });
        begun.recv().unwrap();
        connect(&listeners[1], &membership(1, addresses), options(SOON)).unwrap();
    });
}

#[test]
fn ranks_find_those_of_their_host() {
    let here = |placement, world_size| -> Vec<usize> {
        gang(world_size, SOON, placement).iter().map(Tree::ranks_here).collect()
    };
    assert_eq!(here(Placement::Apart, 3), [1, 1, 1]);
    assert_eq!(here(Placement::Hosts("a"), 3), [3, 3, 3]);
    assert_eq!(here(Placement::Hosts("aab"), 4), [3, 3, 1, 3]);
    assert_eq!(here(Placement::Hosts("aa-a"), 4), [3, 3, 1, 3]);
    let gang = gang(2, SOON, Placement::Hosts("a"));
    assert!(gang[0].lease(64).is_some());
    assert!(HostId::of_this_machine().is_some());
}

/// Runs `connect` until it is aborted from another thread; it must end soon, and say so.
fn aborted(connect: impl FnOnce(&Abort) -> Result<Tree, Error> + Send, when: impl FnOnce()) {
    let (abort, begun) = (Abort::default(), Instant::now());
    std::thread::scope(|scope| {
        let connecting = scope.spawn(|| connect(&abort));
        when();
        abort.abort();
        let result = connecting.join().unwrap();
        assert!(matches!(result, Err(Error::Aborted)), "{result:?}");
    });
    assert!(begun.elapsed() < SOON);
}

#[test]
fn connecting_can_be_aborted_wherever_it_waits() {
    let long = Options { connect_deadline: 2 * SOON, ..options(2 * SOON) };
    let (ours, addresses) = listeners(2);
    // For somebody who does not come, before it has begun and while it waits.
    aborted(|abort| ours[0].connect(&membership(0, &addresses), long, abort), || {});
    // For an answer from somebody who listens and is silent.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut elsewhere = addresses.clone();
    elsewhere[0] = silent.local_addr().unwrap().to_string();
    aborted(|abort| ours[1].connect(&membership(1, &elsewhere), long, abort), || drop(silent.accept().unwrap()));
    // For a port that nobody listens on, again and again.
    elsewhere[0] = "127.0.0.1:1".to_owned();
    aborted(|abort| ours[1].connect(&membership(1, &elsewhere), long, abort), || {});
}

#[test]
fn telling_each_other_about_memory_can_be_aborted() {
    let long = Options { connect_deadline: 2 * SOON, ..options(2 * SOON) };
    let (ours, addresses, elsewhere, silent) = two_that_never_meet();
    let stop = Abort::default();
    std::thread::scope(|scope| {
        let (ours, addresses, elsewhere, stop) = (&ours, &addresses, &elsewhere, &stop);
        let first = scope.spawn(move || ours[1].connect(&membership(1, addresses), long, stop));
        let second = scope.spawn(move || ours[2].connect(&membership(2, elsewhere), long, stop));
        // Rank 2 dials rank 1 only when it has joined rank 0.
        aborted(|abort| ours[0].connect(&membership(0, addresses), long, abort), || drop(silent.accept().unwrap()));
        stop.abort();
        for other in [first, second] {
            assert!(matches!(other.join().unwrap(), Err(Error::Aborted)));
        }
    });
}
