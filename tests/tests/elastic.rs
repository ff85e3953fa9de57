//! Gangs that grow and shrink while they train: who stays keeps its process, and the end is the same.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::{Value, json};
use std::collections::BTreeSet;
use thaw_tests::cluster::Cluster;
use thaw_tests::process;
use thaw_tests::sandbox::{DEADLINE, Sandbox, text_spec};

/// Waits until the run's gangs have had these sizes and the last one trains: the ids of all trainers then.
fn until_sizes(cluster: &Cluster, run: &str, sizes: &Value) -> BTreeSet<u32> {
    process::eventually(&format!("{run} with gangs of {sizes}"), DEADLINE, || {
        let found = cluster.verb(&["get", run]);
        let had = found["world_sizes"].as_array()?;
        assert!(sizes.as_array().unwrap().starts_with(had), "{found}");
        (had.len() == sizes.as_array().unwrap().len() && found["state"] == "RUN_STATE_RUNNING").then_some(())
    });
    trainers(cluster)
}

fn trainers(cluster: &Cluster) -> BTreeSet<u32> {
    process::trainers_below(cluster.up.id()).into_iter().collect()
}

/// Waits until so many trainers live: their ids.
fn until_trainers(cluster: &Cluster, count: usize) -> BTreeSet<u32> {
    process::eventually(&format!("{count} trainers"), DEADLINE, || {
        Some(trainers(cluster)).filter(|trainers| trainers.len() == count)
    })
}

/// Waits for the run's end, and shows it.
fn ended(cluster: Cluster, run: &str) -> Value {
    let ended = cluster.verb(&["watch", run]);
    assert_eq!(ended["state"], "RUN_STATE_SUCCEEDED", "{ended}");
    until_trainers(&cluster, 0);
    cluster.stop();
    ended
}

fn undisturbed(spec: &str) -> Value {
    let alone = Sandbox::new();
    alone.train_summary(&alone.spec(&text_spec(spec)), 1, &[])["weights_blake3"].clone()
}

/// Two stages, a mean of the weights, and evaluations in between; every tenth step all ranks compare all they hold.
const SCALED: &str = "strategy: custom
stages:
  - {name: head, thaw: [head], until: {max_steps: 200}}
  - {name: all, thaw: [head, '/[012]$/'], until: {max_steps: 2800}}
stop_when_no_gain: false
eval_steps: 500
ema: {decay: 0.9}
verification: {digest_steps: 10}
";

/// RUN-11
#[test]
fn a_run_that_is_scaled_keeps_its_processes_and_its_weights() {
    let expected = undisturbed(SCALED);
    let cluster = Cluster::start(4);
    // Holds two of the four slots.
    let other =
        text_spec("until: {max_steps: 1000000}\neval_steps: 1000000").replace("min: 1, max: 4", "min: 2, max: 2");
    let other = cluster.submit("other.yaml", &other);
    let others = until_sizes(&cluster, &other, &json!([2]));
    let run = cluster.submit("spec.yaml", &text_spec(SCALED));
    let first: BTreeSet<u32> = until_sizes(&cluster, &run, &json!([2])).difference(&others).copied().collect();
    assert_eq!(first.len(), 2);
    // Its wish is four: it grows as soon as there are slots.
    let _ = cluster.verb(&["cancel", &other]);
    let grown = until_sizes(&cluster, &run, &json!([2, 4]));
    assert!(grown.len() == 4 && grown.is_superset(&first), "{first:?} became {grown:?}");
    let scaled = cluster.verb(&["scale", &run, "1"]);
    assert_eq!(scaled["wanted_world_size"], 1);
    let _ = until_sizes(&cluster, &run, &json!([2, 4, 1]));
    let last = until_trainers(&cluster, 1);
    assert!(last.is_subset(&grown), "{grown:?} became {last:?}");
    let ended = ended(cluster, &run);
    assert_eq!((&ended["attempt"], &ended["generation"]), (&json!(1), &json!("3")));
    assert_eq!(ended["result"]["weights_blake3"], expected);
}

/// Of one, of four and of two trainers.
const STAGES: &str = "strategy: custom
stages:
  - {name: head, thaw: [head], workers: 1, until: {max_steps: 300}}
  - {name: top, thaw: [head, '/2$/'], until: {max_steps: 2000}}
  - {name: all, thaw: [head, '/[012]$/'], workers: 2, until: {max_steps: 700}}
stop_when_no_gain: false
eval_steps: 500
verification: {digest_steps: 10}
";

/// RUN-11: each stage has its own size, and a change of it restarts nobody who stays.
#[test]
fn stages_have_sizes_of_their_own() {
    let expected = undisturbed(STAGES);
    let cluster = Cluster::start(4);
    let run = cluster.submit("spec.yaml", &text_spec(STAGES));
    let first = until_sizes(&cluster, &run, &json!([1]));
    assert_eq!(first.len(), 1);
    let grown = until_sizes(&cluster, &run, &json!([1, 4]));
    assert!(grown.len() == 4 && grown.is_superset(&first), "{first:?} became {grown:?}");
    let _ = until_sizes(&cluster, &run, &json!([1, 4, 2]));
    let last = until_trainers(&cluster, 2);
    assert!(last.is_subset(&grown) && last.is_superset(&first), "{grown:?} became {last:?}");
    let ended = ended(cluster, &run);
    assert_eq!((&ended["attempt"], &ended["world_sizes"]), (&json!(1), &json!([1, 4, 2])));
    assert_eq!(ended["result"]["weights_blake3"], expected);
}
