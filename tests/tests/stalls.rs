//! Trainers whose process runs and whose training does not: found, killed, held against their slot; and those that are only slow, or that nobody
//! listened to, left alone.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use thaw_tests::cluster::Cluster;
use thaw_tests::process::{self, Process};
use thaw_tests::sandbox::{DEADLINE, Sandbox, events, text_spec};

/// The shortest that a spec may ask for, in seconds.
const LIMIT: u32 = 5;

/// What was said of trainers that hang; not whom their gangs waited for.
fn hung(run: &Path) -> Vec<String> {
    let hung = events(run).into_iter().filter(|event| event["reason"] == "TRAINER_HUNG");
    let said = hung.map(|event| event["message"].as_str().unwrap().to_owned());
    said.filter(|message| message.starts_with("rank 0 ")).collect()
}

fn submit(cluster: &Cluster, file: &str, workers: &str, more: &str) -> String {
    cluster.submit(file, &text_spec(more).replace("{min: 1, max: 4}", workers))
}

/// AGENT-8, RUN-14: rank 0 opens its trace for writing, which is a pipe that nobody reads: the training thread sits in that call, its process
/// answers. It happens to two trainers in the only free slot, which is then given to nobody. The third, elsewhere, finds a file.
#[test]
fn a_trainer_whose_training_thread_is_stuck_is_killed_and_its_slot_rests() {
    let cluster = Cluster::start(2);
    let long = "until: {max_steps: 1000000}\neval_steps: 1000000";
    let hold = |file| {
        let id = submit(&cluster, file, "{min: 1, max: 1}", long);
        process::eventually("a run that holds a slot", DEADLINE, || {
            (cluster.verb(&["get", &id])["state"] == "RUN_STATE_RUNNING").then_some(())
        });
        id
    };
    // One slot until the pipe lies there, the other until its turn.
    let (first, last) = (hold("first.yaml"), hold("last.yaml"));
    let workers = format!("{{min: 1, max: 1, stall_timeout_seconds: {LIMIT}}}");
    let short = "until: {max_steps: 20}\nstrategy: full_fine_tuning\nverification: {trace: true}";
    let id = submit(&cluster, "spec.yaml", &workers, short);
    let run = cluster.sandbox.data_dir().join(&id);
    let trace = run.join("trace/steps.jsonl");
    fs::create_dir_all(trace.parent().unwrap()).unwrap();
    nix::unistd::mkfifo(&trace, nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR).unwrap();
    let _ = cluster.verb(&["cancel", &first]);

    process::eventually("a run that waits since the slot rests", DEADLINE, || {
        let waits = cluster.verb(&["get", &id])["message"].as_str()?.contains("1 slot(s) are quarantined");
        waits.then_some(())
    });
    let said = hung(&run);
    let sentence = format!(
        "training has not moved for {LIMIT} s, and waits for nobody, at step 0 of stage 0; its process answers"
    );
    assert!(said.len() == 2 && said.iter().all(|message| message.contains(&sentence)), "{said:?}");
    let workers = cluster.verb(&["workers"]);
    let resting: Vec<&Value> = workers["workers"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|worker| worker["quarantined"].as_array())
        .flatten()
        .collect();
    assert!(resting.len() == 1 && resting[0]["faults"] == 2, "{workers:#}");
    fs::remove_file(&trace).unwrap();
    let _ = cluster.verb(&["cancel", &last]);
    let ended = cluster.verb(&["watch", &id]);
    assert_eq!(ended["state"], "RUN_STATE_SUCCEEDED", "{ended}");
    let lines = fs::read_to_string(&trace).unwrap().lines().count();
    assert_eq!(lines, 20, "the last trainer has written the whole trace");
    cluster.stop();
}

/// AGENT-8: also while all processors are busy with something else for longer than the limit.
#[test]
fn trainers_that_are_only_slow_are_left_alone() {
    let sandbox = Sandbox::new();
    let text = text_spec("strategy: full_fine_tuning\nuntil: {max_steps: 1000000}\neval_steps: 50");
    let workers = format!("{{min: 2, max: 2, stall_timeout_seconds: {LIMIT}}}");
    let spec = sandbox.spec(&text.replace("{min: 1, max: 4}", &workers));
    let training = Process::start(&mut sandbox.train_command(&spec, 2, &[]));
    let run = process::eventually("a gang that trains", DEADLINE, || {
        let run = fs::read_dir(sandbox.data_dir().join("runs")).ok()?.next()?.ok()?.path();
        events(&run).iter().any(|event| event["reason"] == "TRAINING").then_some(run)
    });
    let trainers: BTreeSet<u32> = process::trainers_below(training.id()).into_iter().collect();
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let processors = std::thread::available_parallelism().unwrap().get();
        for _ in 0..2 * processors {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        process::let_pass(Duration::from_secs(u64::from(2 * LIMIT)));
        busy.store(false, Ordering::Relaxed);
    });
    let now: BTreeSet<u32> = process::trainers_below(training.id()).into_iter().collect();
    let all = events(&run);
    assert!(all.iter().all(|event| event["reason"] != "TRAINER_HUNG"), "{all:?}");
    assert!(now.len() == 2 && now == trainers, "{trainers:?} became {now:?}");
    drop(training);
}

/// WORKER-4: the coordinator is stopped for longer than any silence that it puts up with, and goes on.
#[test]
fn a_coordinator_that_stood_still_takes_nobody_for_lost() {
    let cluster = Cluster::start(4);
    let id = submit(&cluster, "spec.yaml", "{min: 4, max: 4}", "until: {max_steps: 1000000}\neval_steps: 1000000");
    process::eventually("a gang that trains", DEADLINE, || {
        (cluster.verb(&["get", &id])["state"] == "RUN_STATE_RUNNING").then_some(())
    });
    let run = cluster.sandbox.data_dir().join(&id);
    let told = || fs::read_to_string(run.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
    for _ in 0..3 {
        process::stop_by_id(cluster.up.id());
        process::let_pass(Duration::from_secs(4));
        process::continue_by_id(cluster.up.id());
        let before = told();
        process::eventually("further steps", DEADLINE, || (told() > before + 10).then_some(()));
    }
    let all = events(&run);
    assert!(all.iter().all(|event| event["generation"].as_u64() <= Some(1)), "{all:?}");
    let said = cluster.up.stderr();
    assert!(said.contains("this coordinator did not run"), "{said}");
}
