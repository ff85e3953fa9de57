//! The table of every state and input, and the check that cited invariants are stated.

use super::script::{Script, checkpoint};
use super::*;
use thaw_proto::ids::Slot;

/// RUN-4, and every other pair of a state and an input: the state that follows, `=` where nothing changes, `-` where it is refused.
#[test]
fn run_4_the_table_of_transitions() {
    let preempting = || {
        let mut script = Script::running();
        script.record.state = RunState::Preempting;
        script
    };
    let finish = |mut script: Script| {
        let written = script.checkpoint(10);
        script.effects(written);
        let finished = script.finished(10);
        script.after(finished)
    };
    let resizing = || {
        let script = Script::running();
        let lost = script.failed(FailureClass::Retry);
        script.after(lost)
    };
    let states: Vec<(&str, Script)> = vec![
        ("PENDING", Script::new()),
        ("ADMITTED", Script::admitted()),
        ("FORMING", Script::forming()),
        ("RUNNING", Script::running()),
        ("KEEPING", Script::keeping()),
        ("KEPT", {
            let mut script = Script::keeping();
            script.record.spec.workers.min = 2;
            let lost = script.exited(1);
            script.after(lost)
        }),
        ("RESIZING", resizing()),
        ("SUSPENDING", Script::running().after(Input::Suspend)),
        ("SUSPENDED", Script::new().after(Input::Suspend)),
        ("PREEMPTING", preempting()),
        ("SUCCEEDED", finish(Script::running())),
        ("FAILED", {
            let script = Script::running();
            let failed = script.failed(FailureClass::Fatal);
            script.after(failed)
        }),
        ("CANCELLED", Script::running().after(Input::Cancel)),
    ];
    let mut table = String::from("\n");
    for (name, script) in states {
        let shown = |input: Input| match step(
            &Policy::default(),
            &script.record,
            &script.observed,
            Now::at(script.now_ms),
            &input,
        ) {
            Err(_) => "-".to_owned(),
            Ok(outcome) if outcome.record.state == script.record.state => "=".to_owned(),
            Ok(outcome) => format!("{:?}", outcome.record.state),
        };
        let members = script.record.members.clone();
        // In states without members, one that was a member once.
        let rank_0 = members.first().map_or_else(
            || Trainer { worker: "a".into(), slot: Slot(0), incarnation: "old".into() },
            |member| member.trainer.clone(),
        );
        let generation = script.record.generation;
        let checkpoint = checkpoint(generation, 20);
        let failed = |class| Input::TrainerFailed {
            trainer: rank_0.clone(),
            generation,
            class,
            reason: RunReason::TrainerError,
            message: String::new(),
        };
        let cells = [
            shown(Input::Tick {
                resting: None,
                slots: script.granted(&["a", "b"]),
                fresh: vec!["x".into(), "y".into()],
            }),
            shown(Input::TrainersSeen { worker: "a".into(), trainers: Vec::new() }),
            shown(Input::TrainerReady { trainer: rank_0.clone(), address: "h:1".into(), keeps: true }),
            shown(Input::GangBuilt { trainer: rank_0.clone(), generation }),
            shown(Input::TrainerExited { trainer: rank_0.clone(), ending: Ending::Code(0) }),
            shown(Input::WorkersLost { workers: vec!["a".into()] }),
            shown(failed(FailureClass::Retry)),
            shown(failed(FailureClass::Fatal)),
            shown(Input::CheckpointWritten { trainer: rank_0.clone(), generation, checkpoint }),
            shown(Input::Suspended { trainer: rank_0.clone(), generation }),
            shown(Input::Suspend),
            shown(Input::Resume),
            shown(Input::Cancel),
            shown(Input::CoordinatorStarted),
            shown(Input::TrainerInterrupted { trainer: rank_0.clone(), generation, message: String::new() }),
            shown(Input::Progressed { generation, step: Step(7) }),
            shown(Input::Scale { workers: script.record.spec.workers.min }),
            shown(Input::Cede { workers: script.record.spec.workers.min, to: "other-00000002".into() }),
            shown(Input::Yield { to: "other-00000002".into() }),
        ];
        table.push_str(&format!("{name}: {}\n", cells.join(" ")));
    }
    // Tick TrainersSeen TrainerReady GangBuilt TrainerExited WorkersLost Failed(Retry) Failed(Fatal) CheckpointWritten Suspended Suspend Resume Cancel CoordinatorStarted TrainerInterrupted Progressed Scale Cede Yield
    let expected = "
PENDING: Admitted = - - - = - - - - Suspended - Cancelled = - = = - -
ADMITTED: = = = - = = = Failed - - Suspended - Cancelled Resizing = = = - -
FORMING: = Resizing = = Resizing Resizing Resizing Failed - - Suspended - Cancelled Resizing = = = - -
RUNNING: = Resizing = = Resizing Resizing Resizing Failed = - Suspending - Cancelled = = = = = Preempting
KEEPING: = Forming = = Forming Forming Forming Failed = - Suspending - Cancelled = = = Forming Forming Preempting
KEPT: Admitted = = - = = = Failed - - Suspended - Cancelled = = = = - -
RESIZING: = = - - = = = Failed = - Suspended - Cancelled = = = = - -
SUSPENDING: = Suspended = = Suspended Suspended Suspended Failed = Suspended = - Cancelled = Suspended = = - -
SUSPENDED: = = - - - = - - - - = Pending Cancelled = - = = - -
PREEMPTING: = Pending = = Pending Pending Pending Failed = Pending Suspending - Cancelled = Pending = = - -
SUCCEEDED: = = - - - = - - - - - - - = - = - - -
FAILED: = = - - - = - - - - - - - = - = - - -
CANCELLED: = = - - - = - - - - - - = = - = - - -
";
    assert_eq!(table, expected);
}

/// Every invariant that the machine's code or tests cite is stated where the module opens.
#[test]
fn cited_invariants_exist() {
    let law = include_str!("mod.rs");
    let sources = [
        include_str!("gangs.rs"),
        include_str!("keeping.rs"),
        include_str!("now.rs"),
        include_str!("record.rs"),
        include_str!("rejection.rs"),
        include_str!("reports.rs"),
        include_str!("requests.rs"),
        include_str!("sizes.rs"),
        include_str!("slots.rs"),
        include_str!("sizes_tests.rs"),
        include_str!("yielding.rs"),
        include_str!("turn.rs"),
        include_str!("verdicts.rs"),
        include_str!("verdicts_tests.rs"),
        include_str!("tests.rs"),
        include_str!("table.rs"),
        include_str!("simulation/mod.rs"),
        include_str!("simulation/laws.rs"),
        include_str!("simulation/lives.rs"),
    ];
    for source in sources {
        for (at, _) in source.match_indices("RUN-") {
            let number: String = source[at + 4..].chars().take_while(char::is_ascii_digit).collect();
            assert!(number.is_empty() || law.contains(&format!("//! - RUN-{number}:")), "RUN-{number} is not stated");
        }
    }
}
