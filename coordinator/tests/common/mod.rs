//! What the coordinator's tests share.

#![allow(dead_code, reason = "each test program uses a part of it")]

pub(crate) mod agent;
pub(crate) mod cluster;
pub(crate) mod one_stage;
pub(crate) mod proxy;

use nix::sys::statvfs::statvfs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// An etcd of this test's own; ends with the value.
pub(crate) struct EtcdProcess {
    child: Child,
    pub(crate) address: String,
    _folder: tempfile::TempDir,
}

impl EtcdProcess {
    /// `None` where etcd is not installed, after saying so. In CI that is a failure.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with("http://127.0.0.1:0", &[])
    }

    /// With other options, for clients at `any_client`.
    pub(crate) fn start_with(any_client: &str, options: &[&str]) -> Option<Self> {
        Self::start_in(memory_folder(), any_client, options)
    }

    /// As deployed, for measurements.
    pub(crate) fn start_on_disk() -> Option<Self> {
        Self::start_in(tempfile::tempdir().unwrap(), "http://127.0.0.1:0", &[])
    }

    fn start_in(folder: tempfile::TempDir, any_client: &str, options: &[&str]) -> Option<Self> {
        let any = "http://127.0.0.1:0";
        let spawned = Command::new("etcd")
            .arg("--data-dir")
            .arg(folder.path())
            .args(options)
            .args(["--listen-client-urls", any_client, "--advertise-client-urls", any_client])
            .args(["--listen-peer-urls", any])
            .args(["--initial-advertise-peer-urls", any, "--initial-cluster"])
            .arg(format!("default={any}"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                assert!(std::env::var_os("CI").is_none(), "etcd is not installed, and in CI that is a failure");
                eprintln!("skipped: no etcd on the path (apt install etcd-server)");
                return None;
            }
            Err(error) => panic!("start etcd: {error}"),
        };
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let started = Instant::now();
        let address = loop {
            assert!(started.elapsed() < Duration::from_secs(30), "etcd did not say its port");
            let line = lines.next().expect("etcd ended before it served").unwrap();
            // "serving insecure client requests on 127.0.0.1:34863, this is strongly discouraged!"
            if let Some((_, rest)) = line.split_once("client requests on ") {
                break rest.split(',').next().unwrap().trim_matches('"').to_owned();
            }
        };
        // Its log is read to the end, or it would block on a full pipe.
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        Some(Self { child, address, _folder: folder })
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// On a memory file system that has room for several logs of 64 MiB. A disk busy for longer than a leader's lease would
/// change who leads, which no test here is about.
fn memory_folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let free = statvfs(memory).map_or(0, |found| found.blocks_available().saturating_mul(found.fragment_size()));
    let in_memory = (free >= 2 << 30).then(|| tempfile::tempdir_in(memory).ok()).flatten();
    in_memory.unwrap_or_else(|| tempfile::tempdir().unwrap())
}

/// Forgets the history of an etcd up to now.
pub(crate) async fn compact(address: String) {
    let mut client = etcd_client::Client::connect([address], None).await.unwrap();
    let revision = client.get("none", None).await.unwrap().header().unwrap().revision();
    // An error says that this was compacted already.
    let _ = client.compact(revision, None).await;
}

/// Names of the services that reflection v1 shows, after v1alpha has shown the same.
pub(crate) async fn reflected_services(channel: tonic::transport::Channel) -> Vec<String> {
    use tonic_reflection::pb::{v1, v1alpha};
    let request = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(String::new())),
    };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let v1::server_reflection_response::MessageResponse::ListServicesResponse(listed) = answer else {
        panic!("{answer:?}")
    };
    let mut names: Vec<String> = listed.service.into_iter().map(|service| service.name).collect();
    names.sort();

    let request = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
            "thaw.v1.RunService".to_owned(),
        )),
    };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    assert!(
        matches!(answer, v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse(_)),
        "{answer:?}"
    );
    names
}
