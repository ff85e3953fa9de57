//! A small fleet of simulated workers: they come, form gangs, and come back to the next leader with nobody lost.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::Command;
use std::time::Duration;
use thaw_tests::fixtures;
use thaw_tests::process::{Process, binary};

const DEADLINE: Duration = Duration::from_secs(300);

#[test]
fn a_fleet_forms_gangs_and_follows_the_leader() {
    let Some(etcd) = thaw_tests::tool("etcd") else { return };
    let mut command = Command::new(binary("thaw-fleet"));
    command.args(["thaw", "--workers", "64", "--gangs", "64,32", "--rounds", "2", "--steady", "1", "--kills", "1"]);
    command.args(["--settle", "0", "--thaw"]).arg(binary("thaw")).arg("--etcd").arg(etcd);
    command.arg("--fixtures").arg(fixtures::folder());
    let ended = Process::start(&mut command).wait(DEADLINE);
    assert!(ended.status.success(), "{}", ended.stderr);
    for row in ["join", "gang_64", "gang_32", "cpu", "return"] {
        let line = ended.stdout.lines().find(|line| line.starts_with(&format!("chaos control_plane.{row} ")));
        let line = line.unwrap_or_else(|| panic!("no row {row}: {}", ended.stdout));
        assert!(!line.contains("false_deaths") || line.contains(" false_deaths=0 "), "{line}");
    }
}
