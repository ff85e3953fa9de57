//! A coordinator and its workers in one command, and the verbs that speak to it.

use crate::process::{self, Process};
use crate::sandbox::{DEADLINE, Sandbox};
use serde_json::Value;
use std::time::Duration;

/// `thaw up` in a sandbox of its own.
pub struct Cluster {
    pub sandbox: Sandbox,
    pub up: Process,
    pub server: String,
}

impl Cluster {
    /// With so many workers, all of which are there.
    #[must_use]
    pub fn start(workers: usize) -> Self {
        let sandbox = Sandbox::new();
        let count = workers.to_string();
        let up = Process::start(sandbox.thaw().args(["up", "--workers", &count, "--listen", "127.0.0.1:0"]));
        let server = process::eventually("the coordinator's address", DEADLINE, || {
            let stderr = up.stderr();
            Some(stderr.split_once("coordinator at ")?.1.split_whitespace().next()?.to_owned())
        });
        let cluster = Self { sandbox, up, server };
        process::eventually("all workers", DEADLINE, || {
            (cluster.verb(&["workers"])["workers"].as_array()?.len() == workers).then_some(())
        });
        cluster
    }

    /// `thaw VERB ... -o json`.
    #[must_use]
    pub fn verb(&self, arguments: &[&str]) -> Value {
        let mut command = self.sandbox.thaw();
        let command = command.args(["--server", &self.server]).args(arguments).arg("-ojson");
        let ended = Process::start(command).wait(DEADLINE);
        assert!(ended.status.success(), "thaw {arguments:?}: {}", ended.stderr);
        serde_json::from_str(&ended.stdout).unwrap()
    }

    /// A spec's text, written to `file`; the run's name.
    #[must_use]
    pub fn submit(&self, file: &str, text: &str) -> String {
        let spec = self.sandbox.file(file, text).display().to_string();
        self.verb(&["submit", &spec])["name"].as_str().unwrap().to_owned()
    }

    /// SIGTERM, on which it ends well.
    pub fn stop(self) {
        self.up.terminate();
        let ended = self.up.wait(Duration::from_secs(30));
        assert!(ended.status.success(), "{}", ended.stderr);
    }
}
