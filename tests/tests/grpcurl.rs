//! The README's grpcurl lines, each run as it stands there but for the port and the run's name.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use serde_json::Value;
use std::fs;
use std::process::Command;
use thaw_tests::cluster::Cluster;
use thaw_tests::fixtures;
use thaw_tests::process::Process;
use thaw_tests::sandbox::DEADLINE;

/// The lines of README.md that begin with `grpcurl`, continued lines joined.
fn lines() -> Vec<String> {
    let readme = fs::read_to_string(fixtures::root().join("README.md")).unwrap().replace("\\\n", " ");
    readme.lines().filter(|line| line.starts_with("grpcurl ")).map(str::to_owned).collect()
}

/// A cluster of one worker, with the files that the lines speak of.
struct Shown(Cluster);

impl Shown {
    fn start() -> Self {
        let cluster = Cluster::start(1);
        let (sandbox, fixtures) = (&cluster.sandbox, fixtures::folder());
        let texts = fs::read_to_string(fixtures.join("texts.csv")).unwrap();
        let _ = sandbox.file("packages.csv", &texts.replacen("text,label", "description,section", 1));
        std::os::unix::fs::symlink(fixtures.join("text.pt2"), sandbox.path().join("minilm.pt2")).unwrap();
        Self(cluster)
    }

    fn address(&self) -> &str {
        self.0.server.trim_start_matches("http://")
    }

    /// Runs one line through a shell and gives what it printed.
    fn run(&self, line: &str, run: &str) -> String {
        let grpcurl = thaw_tests::tool("grpcurl").unwrap();
        let line = line
            .replacen("grpcurl", &grpcurl.display().to_string(), 1)
            .replace("127.0.0.1:7070", self.address())
            .replace("\"RUN\"", &format!("{run:?}"));
        let ended =
            Process::start(Command::new("bash").args(["-c", &line]).current_dir(self.0.sandbox.path())).wait(DEADLINE);
        assert!(ended.status.success(), "{line}\n{}", ended.stderr);
        ended.stdout
    }
}

fn find<'a>(lines: &'a [String], words: &[&str]) -> &'a str {
    let found = lines.iter().find(|line| words.iter().all(|word| line.contains(word)));
    found.unwrap_or_else(|| panic!("the README has no grpcurl line with {words:?}"))
}

#[test]
fn every_line_of_the_readme_works() {
    if thaw_tests::tool("grpcurl").is_none() {
        return;
    }
    let lines = lines();
    let cluster = Shown::start();
    let listed = cluster.run(find(&lines, &[" list"]), "");
    for service in ["thaw.v1.RunService", "thaw.v1.ClusterService", "thaw.v1.WorkerService", "grpc.health.v1.Health"] {
        assert!(listed.contains(service), "{service} is not listed:\n{listed}");
    }
    let described = cluster.run(find(&lines, &["describe"]), "");
    assert!(described.contains("CreateRun"), "{described}");

    let validated: Value =
        serde_json::from_str(&cluster.run(find(&lines, &["CreateRun", "validate_only"]), "")).unwrap();
    assert!(validated["plan"]["stages"].as_array().unwrap().len() > 1, "{validated}");
    let none = cluster.run(find(&lines, &["ListRuns"]), "");
    assert_eq!(serde_json::from_str::<Value>(&none).unwrap(), serde_json::json!({}), "validate_only kept a run");

    let create = lines
        .iter()
        .find(|line| line.contains("CreateRun") && !line.contains("validate_only"))
        .expect("a CreateRun line");
    let created: Value = serde_json::from_str(&cluster.run(create, "")).unwrap();
    let name = created["name"].as_str().unwrap().trim_start_matches("runs/").to_owned();
    let scaled = cluster.run(find(&lines, &["ScaleRun"]), &name);
    assert_eq!(serde_json::from_str::<Value>(&scaled).unwrap()["wantedWorldSize"], 1, "{scaled}");
    let watched = cluster.run(find(&lines, &["WatchRun"]), &name);
    let updates: Vec<Value> = serde_json::Deserializer::from_str(&watched).into_iter().map(Result::unwrap).collect();
    let last = updates.iter().rev().find_map(|update| update.get("run")).unwrap();
    assert_eq!(last["state"], "RUN_STATE_SUCCEEDED", "{last}");
    assert!(updates.iter().any(|update| update.get("progress").is_some()), "no progress was watched");

    for line in &lines {
        // Those above have run; a cancelled, resumed or scaled run must be one that has not ended.
        let not_now = ["CreateRun", "WatchRun", "CancelRun", "SuspendRun", "ResumeRun", "ScaleRun"];
        if not_now.iter().all(|method| !line.contains(method)) {
            let _ = cluster.run(line, &name);
        }
    }
    cluster.0.stop();
}

#[test]
fn a_bad_spec_names_its_fields() {
    let Some(grpcurl) = thaw_tests::tool("grpcurl") else { return };
    let cluster = Shown::start();
    let request = r#"{"spec": {"name": "Bad Name", "global_batch_size": 0}}"#;
    let ended = Process::start(Command::new(grpcurl).args([
        "-plaintext",
        "-d",
        request,
        cluster.address(),
        "thaw.v1.RunService/CreateRun",
    ]))
    .wait(DEADLINE);
    assert!(!ended.status.success());
    for word in ["InvalidArgument", "google.rpc.BadRequest", "google.rpc.ErrorInfo", "global_batch_size", "backbone"] {
        assert!(ended.stderr.contains(word), "{word} is missing:\n{}", ended.stderr);
    }
}
