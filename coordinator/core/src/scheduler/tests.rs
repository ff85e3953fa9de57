use super::*;
use proptest::prelude::*;
use thaw_proto::ids::{Slot, WorkerName};

fn slots(count: u32) -> Vec<FreeSlot> {
    (0..count).map(|slot| FreeSlot { worker: WorkerName(format!("w{}", slot / 4)), slot: Slot(slot % 4) }).collect()
}

fn run(name: &str, tenant: &str, since_ms: u64, min: u32) -> Waiting {
    Waiting {
        run: name.into(),
        tenant: tenant.to_owned(),
        priority: Priority::Normal,
        since_ms,
        min,
        max: min,
        claim: Claim::Start,
        avoid: BTreeSet::new(),
    }
}

/// Runs in the order in which they are served, with what each gets: `Ok` slots, or `Err` what it waits for.
fn served(now_ms: u64, shares: &[(&str, Share)], held: &[(&str, u32)], waiting: &[Waiting], free: u32) -> Vec<String> {
    let shares = shares.iter().map(|(tenant, share)| ((*tenant).to_owned(), *share)).collect();
    let held = held.iter().map(|(tenant, slots)| ((*tenant).to_owned(), *slots)).collect();
    let verdicts = schedule(&Policy::default(), now_ms, &shares, &held, waiting, &slots(free));
    let mut lines: Vec<(u32, String)> = verdicts
        .iter()
        .map(|(run, verdict)| match verdict {
            Verdict::Granted(places) => (0, format!("{run} gets {}", places.len())),
            Verdict::Waits { reason, place } => (*place, format!("{run} waits {place}: {reason:?}")),
        })
        .collect();
    lines.sort();
    lines.into_iter().map(|(_, line)| line).collect()
}

#[test]
fn priority_goes_before_age_and_age_before_name() {
    let high = Waiting { priority: Priority::High, ..run("b-00000000", "t", 9, 1) };
    let low = Waiting { priority: Priority::Low, ..run("a-00000000", "t", 1, 1) };
    let waiting = [low, run("d-00000000", "t", 5, 1), run("c-00000000", "t", 5, 1), high];
    assert_eq!(
        served(10, &[], &[], &waiting, 2),
        [
            "b-00000000 gets 1",
            "c-00000000 gets 1",
            "d-00000000 waits 1: TooFewSlots { free: 0, needed: 1 }",
            "a-00000000 waits 2: TooFewSlots { free: 0, needed: 1 }"
        ]
    );
}

#[test]
fn tenants_take_turns_by_what_they_have_for_their_weight() {
    let waiting: Vec<Waiting> = (0..3)
        .flat_map(|index| {
            [run(&format!("a{index}-00000000"), "a", index, 1), run(&format!("b{index}-00000000"), "b", 100 + index, 1)]
        })
        .collect();
    // b is late, and still gets two of the four.
    let equal = served(200, &[], &[], &waiting, 4);
    assert_eq!(equal[..4], ["a0-00000000 gets 1", "a1-00000000 gets 1", "b0-00000000 gets 1", "b1-00000000 gets 1"]);
    let heavy = [("a", Share { quota: None, weight: 3 })];
    let weighted = served(200, &heavy, &[], &waiting, 4);
    assert_eq!(weighted[..4], ["a0-00000000 gets 1", "a1-00000000 gets 1", "a2-00000000 gets 1", "b0-00000000 gets 1"]);
    let behind = served(200, &[], &[("a", 5)], &waiting, 3);
    assert_eq!(behind[..3], ["b0-00000000 gets 1", "b1-00000000 gets 1", "b2-00000000 gets 1"]);
}

#[test]
fn a_quota_bounds_and_what_can_never_start_says_so() {
    let quota = [("a", Share { quota: Some(3), weight: 1 })];
    let large = Waiting { max: 8, ..run("a0-00000000", "a", 0, 2) };
    let waiting = [large, run("a1-00000000", "a", 1, 4), run("a2-00000000", "a", 2, 1), run("b0-00000000", "b", 3, 1)];
    assert_eq!(
        served(4, &quota, &[("a", 1)], &waiting, 8),
        [
            "a0-00000000 gets 2",
            "b0-00000000 gets 1",
            "a1-00000000 waits 1: QuotaExhausted { quota: 3, held: 3, needed: 4 }",
            "a2-00000000 waits 2: QuotaExhausted { quota: 3, held: 3, needed: 1 }"
        ]
    );
}

#[test]
fn small_gangs_pass_a_large_one_only_for_a_while() {
    let waiting = [run("large-00000000", "a", 0, 4), run("small-00000000", "b", 1, 1)];
    assert_eq!(
        served(59_999, &[], &[], &waiting, 3),
        ["small-00000000 gets 1", "large-00000000 waits 1: TooFewSlots { free: 3, needed: 4 }"]
    );
    assert_eq!(
        served(60_000, &[], &[], &waiting, 3),
        [
            "large-00000000 waits 1: TooFewSlots { free: 3, needed: 4 }",
            r#"small-00000000 waits 2: Reserved { run: RunId("large-00000000") }"#
        ]
    );
    assert_eq!(served(60_000, &[], &[], &waiting, 4)[0], "large-00000000 gets 4");
}

#[test]
fn damage_goes_first_and_long_waits_next() {
    let damaged = Waiting { claim: Claim::Repair, priority: Priority::Low, ..run("damaged-00000000", "a", 9, 1) };
    let low = Waiting { priority: Priority::Low, ..run("low-00000000", "a", 0, 1) };
    let high = Waiting { priority: Priority::High, ..run("high-00000000", "b", 1_000_000, 1) };
    let waiting = [high, low, damaged];
    let names = |now: u64| -> Vec<String> {
        let lines = served(now, &[], &[], &waiting, 0);
        lines.iter().map(|line| line.split('-').next().unwrap().to_owned()).collect()
    };
    assert_eq!(names(1_000_000), ["damaged", "high", "low"]);
    assert_eq!(names(6 * 3_600_000), ["damaged", "low", "high"]);
}

/// SCHED-5: a gang grows by what is left over, and by nothing that a run before it could add up to its minimum.
#[test]
fn sched_5_growth_comes_last_and_takes_nothing_that_is_waited_for() {
    let grows = Waiting { claim: Claim::Growth, priority: Priority::High, max: 3, ..run("a-00000000", "t", 0, 1) };
    let starts = run("b-00000000", "t", 9, 2);
    assert_eq!(served(10, &[], &[], &[grows.clone(), starts.clone()], 3), ["a-00000000 gets 1", "b-00000000 gets 2"]);
    assert_eq!(
        served(10, &[], &[], &[grows.clone(), starts], 1),
        [
            r#"a-00000000 waits 0: Reserved { run: RunId("b-00000000") }"#,
            "b-00000000 waits 1: TooFewSlots { free: 1, needed: 2 }"
        ]
    );
    let repair = Waiting { claim: Claim::Repair, priority: Priority::Low, ..run("c-00000000", "t", 9, 1) };
    assert_eq!(
        served(10, &[], &[], &[grows, repair], 1),
        ["a-00000000 waits 0: TooFewSlots { free: 0, needed: 1 }", "c-00000000 gets 1"]
    );
}

#[test]
fn places_that_failed_are_used_last() {
    let avoid: BTreeSet<FreeSlot> = slots(2).into_iter().collect();
    let waiting = [Waiting { avoid, ..run("a-00000000", "t", 0, 2) }];
    let granted = |free: &[FreeSlot]| {
        let verdicts = schedule(&Policy::default(), 0, &BTreeMap::new(), &BTreeMap::new(), &waiting, free);
        verdicts.into_values().next().unwrap()
    };
    assert_eq!(granted(&slots(4)), Verdict::Granted(slots(4)[2..].to_vec()));
    assert_eq!(granted(&slots(3)), Verdict::Granted([&slots(3)[..2]].concat()));
}

/// A run as a property draws it: tenant, priority, age, minimum, more than that, claim.
type Drawn = (usize, usize, u64, u32, u32, usize);

proptest! {
    #[test]
    fn laws_hold(
        drawn in prop::collection::vec((0_usize..4, 0_usize..3, 0_u64..200_000, 1_u32..6, 0_u32..4, 0_usize..3), 0..24),
        held in prop::collection::vec(0_u32..6, 4),
        quotas in prop::collection::vec((prop::option::of(0_u32..10), 1_u32..4), 4),
        free in 0_u32..24,
        turn in any::<prop::sample::Index>(),
    ) {
        let tenant = |index: usize| format!("t{index}");
        let waiting: Vec<Waiting> = drawn.iter().enumerate().map(|(index, drawn): (usize, &Drawn)| {
            let &(owner, class, since, min, more, claim) = drawn;
            let priority = [Priority::Low, Priority::Normal, Priority::High][class];
            let base = run(&format!("r{index}-00000000"), &tenant(owner), since, min);
            let claim = [Claim::Repair, Claim::Start, Claim::Growth][claim];
            Waiting { priority, max: min + more, claim, ..base }
        }).collect();
        let held: BTreeMap<String, u32> = held.into_iter().enumerate().map(|(index, slots)| (tenant(index), slots)).collect();
        let shares: BTreeMap<String, Share> =
            quotas.into_iter().enumerate().map(|(index, (quota, weight))| (tenant(index), Share { quota, weight })).collect();
        let free = slots(free);
        let verdicts = schedule(&Policy::default(), 200_000, &shares, &held, &waiting, &free);
        prop_assert_eq!(verdicts.len(), waiting.len());

        // The same whatever order they come in.
        let mut turned = waiting.clone();
        if !turned.is_empty() {
            turned.rotate_left(turn.index(waiting.len()));
        }
        let mut reversed = free.clone();
        reversed.reverse();
        prop_assert_eq!(&verdicts, &schedule(&Policy::default(), 200_000, &shares, &held, &turned, &reversed));

        let mut given = BTreeSet::new();
        let mut after = held.clone();
        let mut places = BTreeSet::new();
        for run in &waiting {
            match &verdicts[&run.run] {
                Verdict::Granted(slots) => {
                    // SCHED-1
                    prop_assert!((run.min as usize..=run.max as usize).contains(&slots.len()));
                    for slot in slots {
                        prop_assert!(free.contains(slot) && given.insert(slot.clone()), "a slot is given once");
                    }
                    *after.get_mut(&run.tenant).unwrap() += u32::try_from(slots.len()).unwrap();
                }
                Verdict::Waits { place, .. } if run.claim == Claim::Growth => prop_assert_eq!(*place, 0),
                Verdict::Waits { place, .. } => prop_assert!(places.insert(*place)),
            }
        }
        prop_assert_eq!(places.len(), places.last().map_or(0, |last| *last as usize));
        for (tenant, share) in &shares {
            // SCHED-2: what it held before may be above a quota that was lowered; nothing is added then.
            let most = share.quota.unwrap_or(u32::MAX).max(held[tenant]);
            prop_assert!(after[tenant] <= most);
        }
        // SCHED-5
        let short = |run: &&Waiting| matches!(verdicts[&run.run], Verdict::Waits { reason: Reason::TooFewSlots { .. }, .. });
        if waiting.iter().any(|run| run.claim != Claim::Growth && short(&run)) {
            let grows = |run: &&Waiting| run.claim == Claim::Growth && matches!(verdicts[&run.run], Verdict::Granted(_));
            prop_assert_eq!(waiting.iter().filter(grows).count(), 0);
        }
        // Nobody waits for slots that are there, unless they are kept for one who waits longer.
        let left = free.len() - given.len();
        for run in &waiting {
            if let Verdict::Waits { reason: Reason::TooFewSlots { .. }, .. } = &verdicts[&run.run] {
                prop_assert!(left < run.min as usize);
            }
        }
    }
}

fn holder(name: &str, priority: Priority, size: u32, min: u32, placed_ms: u64) -> Holder {
    Holder { run: name.into(), priority, size, min, shrinks: true, queued_ms: placed_ms, placed_ms }
}

/// Who gives what for a run of this priority that has waited since 0 and needs `min`, with `free` slots.
fn given(now_ms: u64, priority: Priority, min: u32, free: u32, coming: u32, holders: &[Holder]) -> Option<Vec<String>> {
    let waiting = [Waiting { priority, ..run("wants-00000000", "t", 0, min) }, run("small-00000000", "t", 1, 1)];
    let running = Running { holders: holders.to_vec(), coming };
    let none = BTreeMap::new();
    let decided = decide(&Policy::default(), now_ms, &none, &BTreeMap::new(), &waiting, &slots(free), &running);
    let reclaim = decided.reclaim?;
    assert_eq!(reclaim.by.as_str(), "wants-00000000");
    let reason = Reason::Preempts { free, needed: min };
    assert_eq!(decided.verdicts[&reclaim.by], Verdict::Waits { reason, place: 1 });
    let kept = Reason::Reserved { run: reclaim.by };
    let small = &decided.verdicts[&"small-00000000".into()];
    assert_eq!(*small, Verdict::Waits { reason: kept, place: 2 }, "what is given up is for nobody else");
    let said = |(run, give): (RunId, Give)| match give {
        Give::Shrink { to } => format!("{} to {to}", run.as_str().split('-').next().unwrap()),
        Give::Yield => format!("{} yields", run.as_str().split('-').next().unwrap()),
    };
    Some(reclaim.from.into_iter().map(said).collect())
}

/// SCHED-6
#[test]
fn sched_6_lower_priorities_shrink_first_and_yield_where_that_is_not_enough() {
    let (low, normal, high) = (Priority::Low, Priority::Normal, Priority::High);
    let after = Policy::default().preempt_after_ms;
    let holders = [
        holder("old-00000000", low, 4, 2, 10),
        holder("new-00000000", low, 4, 2, 20),
        holder("mid-00000000", normal, 4, 1, 5),
        holder("top-00000000", high, 4, 1, 5),
    ];
    let given = |min, free, coming| given(after, high, min, free, coming, &holders);
    // The lowest and youngest first, and no more than is needed.
    assert_eq!(given(4, 3, 0).unwrap(), ["new to 3"]);
    assert_eq!(given(6, 0, 0).unwrap(), ["new to 2", "old to 2", "mid to 2"]);
    assert_eq!(given(8, 0, 0).unwrap(), ["new yields", "old to 2", "mid to 2"]);
    assert_eq!(given(12, 0, 0).unwrap(), ["new yields", "old yields", "mid yields"]);
    // What is on its way is not asked for twice.
    assert_eq!(given(6, 0, 4).unwrap(), ["new to 2"]);
    assert_eq!(given(6, 0, 6).unwrap(), Vec::<String>::new());
    // Nobody gives where it would be for nothing.
    assert_eq!(given(13, 0, 0), None);
}

/// SCHED-6
#[test]
fn sched_6_equals_and_those_that_just_came_take_nothing() {
    let after = Policy::default().preempt_after_ms;
    let holders = [holder("same-00000000", Priority::Normal, 4, 1, 0)];
    assert_eq!(given(after, Priority::Normal, 2, 1, 0, &holders), None);
    assert_eq!(given(after - 1, Priority::High, 2, 1, 0, &holders), None);
    assert_eq!(given(after, Priority::High, 2, 1, 0, &holders).unwrap(), ["same to 3"]);
    // One that cannot shrink yields.
    let stiff = [Holder { shrinks: false, ..holders[0].clone() }];
    assert_eq!(given(after, Priority::High, 2, 1, 0, &stiff).unwrap(), ["same yields"]);
}

/// SCHED-7: a run of the lowest priority is served in the end, and trains for a while before it has to give way again.
#[test]
fn sched_7_a_long_wait_counts_above_every_priority() {
    let (overdue, shield) = (Policy::default().overdue_after_ms, Policy::default().shield_ms);
    let holders = [holder("top-00000000", Priority::High, 2, 1, 0)];
    assert_eq!(given(overdue - 1, Priority::Low, 2, 0, 0, &holders), None);
    assert_eq!(given(overdue, Priority::Low, 2, 0, 0, &holders).unwrap(), ["top yields"]);
    let placed_ms = overdue;
    let served = [Holder { queued_ms: 0, placed_ms, ..holder("low-00000000", Priority::Low, 2, 2, 0) }];
    let waits = |now_ms: u64| {
        let waiting = [Waiting { priority: Priority::High, ..run("wants-00000000", "t", now_ms - 10_000, 2) }];
        let running = Running { holders: served.to_vec(), coming: 0 };
        let none = BTreeMap::new();
        decide(&Policy::default(), now_ms, &none, &BTreeMap::new(), &waiting, &[], &running).reclaim
    };
    assert_eq!(waits(placed_ms + shield - 1), None);
    assert!(waits(placed_ms + shield).is_some());
}

proptest! {
    /// SCHED-6 over any holders.
    #[test]
    fn sched_6_holds(
        drawn in prop::collection::vec((0_usize..3, 1_u32..6, 0_u32..5, any::<bool>(), 0_u64..100), 0..10),
        min in 1_u32..20, free in 0_u32..6, coming in 0_u32..6,
    ) {
        let priorities = [Priority::Low, Priority::Normal, Priority::High];
        let holders: Vec<Holder> = drawn.iter().enumerate().map(|(index, &(class, least, more, shrinks, placed))| {
            let base = holder(&format!("h{index}-00000000"), priorities[class], least + more, least, placed);
            Holder { shrinks, ..base }
        }).collect();
        let waiting = [Waiting { priority: Priority::Normal, ..run("wants-00000000", "t", 0, min) }];
        let running = Running { holders: holders.clone(), coming };
        let none = BTreeMap::new();
        let decided = decide(&Policy::default(), 1_000_000, &none, &BTreeMap::new(), &waiting, &slots(free), &running);
        let short = min.saturating_sub(free);
        let below: Vec<&Holder> = holders.iter().filter(|holder| holder.priority < Priority::Normal).collect();
        let all: u32 = below.iter().map(|holder| holder.size).sum();
        let Some(reclaim) = decided.reclaim else {
            prop_assert!(short == 0 || all + coming < short);
            return Ok(());
        };
        let find = |run: &RunId| below.iter().find(|holder| holder.run == *run);
        let (mut given, mut yields) = (0, 0);
        for (run, give) in &reclaim.from {
            let holder = find(run).expect("only lower priorities give");
            match give {
                Give::Shrink { to } => {
                    prop_assert!(holder.shrinks && holder.min <= *to && *to < holder.size);
                    given += holder.size - to;
                }
                Give::Yield => (given, yields) = (given + holder.size, yields + 1),
            }
        }
        prop_assert!(given + coming >= short);
        let spare: u32 = below.iter().filter(|holder| holder.shrinks).map(|holder| holder.size - holder.min).sum();
        prop_assert!(yields == 0 || spare + coming < short, "nobody yields where shrinking is enough");
        prop_assert!(yields > 0 || given + coming == short || given == 0, "no more than is needed");
    }
}
