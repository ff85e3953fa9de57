//! Calls to the coordinators of a cluster, each with a deadline. Whoever does not lead says who does, and the call goes there.

use super::{Failure, print};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::run_service_client::RunServiceClient;
use thaw_proto::status::{self, ErrorClass};
use thaw_runtime::backoff::Backoff;
use thaw_runtime::tls::{self, Tls, TlsOptions};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

pub(super) type Runs = RunServiceClient<Channel>;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a call looks for a coordinator that answers it: several times what another needs to lead.
const SEARCH_DEADLINE: Duration = Duration::from_secs(20);
const RETRY_BASE: Duration = Duration::from_millis(100);
const RETRY_CAP: Duration = Duration::from_secs(1);
/// Redirections followed without a pause between.
const REDIRECTIONS: u32 = 2;

/// Whether a call whose answer was lost may be made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    /// Twice is as good as once.
    Yes,
    No,
}

/// The coordinators of one cluster.
pub(super) struct Coordinators {
    /// As given, at least one.
    addresses: Vec<String>,
    /// Whom to ask first: who answered last, or who was said to lead.
    next: String,
    channel: Option<Channel>,
    tls: Option<Tls>,
    /// Calls made again after a pause.
    retries: u32,
}

/// Reads the files of TLS.
pub(super) fn load(options: &TlsOptions) -> Result<Option<Tls>, Failure> {
    options.load().map_err(|error| Failure::invalid(thaw_runtime::chain(&error)))
}

impl Coordinators {
    /// Those at `servers`, with commas between.
    pub(super) fn at(servers: &str, tls: Option<Tls>) -> Result<Self, Failure> {
        let addresses: Vec<String> = servers.split(',').map(str::trim).map(str::to_owned).collect();
        for address in &addresses {
            endpoint(address, tls.as_ref())?;
        }
        let next = addresses.first().cloned().unwrap_or_default();
        Ok(Self { addresses, next, channel: None, tls, retries: 0 })
    }

    /// Makes a call, wherever it is answered.
    pub(super) async fn call<T>(
        &mut self,
        again: Again,
        mut call: impl AsyncFnMut(Runs) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        self.call_any(again, async |channel| call(Runs::new(channel).max_decoding_message_size(64 << 20)).await).await
    }

    async fn call_any<T>(
        &mut self,
        again: Again,
        mut call: impl AsyncFnMut(Channel) -> Result<Response<T>, Status>,
    ) -> Result<T, Failure> {
        let end = Instant::now() + SEARCH_DEADLINE;
        let mut backoff = Backoff::new(RETRY_BASE, RETRY_CAP);
        let mut redirections = 0;
        loop {
            let failure = match self.connect().await {
                Err(failure) if self.addresses.len() == 1 => return Err(failure),
                Err(failure) => failure,
                Ok(channel) => match call(channel).await {
                    Ok(response) => return Ok(response.into_inner()),
                    Err(status) => match self.after(&status, again) {
                        After::Over => return Err(status.into()),
                        After::Redirected if redirections < REDIRECTIONS => {
                            redirections += 1;
                            continue;
                        }
                        After::Redirected | After::Search => Failure::from(status),
                    },
                },
            };
            if Instant::now() > end {
                return Err(failure);
            }
            redirections = 0;
            self.retries += 1;
            tokio::time::sleep(backoff.next_wait().unwrap_or(RETRY_CAP)).await;
        }
    }

    /// How often calls were made again so far, but for those sent on to the leader at once.
    pub(super) fn retries(&self) -> u32 {
        self.retries
    }

    /// What a refusal means, and whom to ask next.
    fn after(&mut self, refused: &Status, again: Again) -> After {
        match (status::reason(refused).as_deref(), status::metadata(refused, "leader")) {
            (Some("NOT_LEADING"), Some(leader)) => {
                let scheme = tls::scheme(self.tls.as_ref());
                self.turn_to(format!("{scheme}://{leader}"));
                After::Redirected
            }
            (Some("NOT_LEADING" | "NO_LEADER" | "BEHIND"), _) => {
                self.turn();
                After::Search
            }
            (Some(_), _) => After::Over,
            // The connection broke: nobody knows how far the call came.
            (None, _) if again == Again::Yes && is_broken(refused) => {
                self.turn();
                After::Search
            }
            (None, _) => After::Over,
        }
    }

    fn turn_to(&mut self, address: String) {
        if self.next != address {
            self.next = address;
            self.channel = None;
        }
    }

    /// The next one in turn.
    fn turn(&mut self) {
        let at = self.addresses.iter().position(|address| *address == self.next);
        let next = at.map_or(0, |at| (at + 1) % self.addresses.len());
        self.next = self.addresses[next].clone();
        self.channel = None;
    }

    async fn connect(&mut self) -> Result<Channel, Failure> {
        if let Some(channel) = &self.channel {
            return Ok(channel.clone());
        }
        match endpoint(&self.next, self.tls.as_ref())?.connect_timeout(CONNECT_DEADLINE).connect().await {
            Ok(channel) => Ok(self.channel.insert(channel).clone()),
            Err(error) => {
                let tried = self.addresses.join(", ");
                // With TLS the reason may be a certificate; without, it says no more than the sentence.
                let why = self.tls.as_ref().map(|_| format!(" ({})", thaw_runtime::chain(&error))).unwrap_or_default();
                self.turn();
                Err(Failure::failed(format!(
                    "no coordinator answers at {tried}{why}; start one with `thaw up`, or name another with --server"
                )))
            }
        }
    }
}

enum After {
    Redirected,
    Search,
    Over,
}

fn is_broken(refused: &Status) -> bool {
    ErrorClass::of(refused) == ErrorClass::Retry || refused.code() == Code::Unknown
}

fn endpoint(server: &str, tls: Option<&Tls>) -> Result<Endpoint, Failure> {
    let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|error| {
        Failure::invalid(format!("--server `{server}` is not an address such as http://127.0.0.1:7070: {error}"))
    })?;
    tls::endpoint(endpoint, tls).map_err(|error| Failure::invalid(thaw_runtime::chain(&error)))
}

/// Whether the coordinator serves `service`; with `live`, whether it answers. One try.
pub(super) async fn health(coordinators: &mut Coordinators, service: String, live: bool) -> Result<ExitCode, Failure> {
    let mut request = tonic::Request::new(HealthCheckRequest { service });
    request.set_timeout(CONNECT_DEADLINE);
    let status = HealthClient::new(coordinators.connect().await?).check(request).await?.into_inner().status();
    print(status.as_str_name());
    Ok(if live || status == ServingStatus::Serving { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

pub(super) async fn workers(coordinators: &mut Coordinators) -> Result<pb::ListWorkersResponse, Failure> {
    let ask = async |channel| ClusterServiceClient::new(channel).list_workers(pb::ListWorkersRequest {}).await;
    coordinators.call_any(Again::Yes, ask).await
}

/// One try.
pub(super) async fn workers_now(coordinators: &mut Coordinators) -> Result<pb::ListWorkersResponse, Failure> {
    let mut client = ClusterServiceClient::new(coordinators.connect().await?);
    Ok(client.list_workers(pb::ListWorkersRequest {}).await?.into_inner())
}

pub(super) async fn submit(coordinators: &mut Coordinators, spec: pb::RunSpec) -> Result<pb::Run, Failure> {
    let request_id = uuid::Uuid::new_v4().to_string();
    let request = pb::CreateRunRequest { spec: Some(spec), request_id, validate_only: false };
    // However often it is sent, the request's id makes it one run.
    coordinators.call(Again::Yes, async |mut runs| runs.create_run(request.clone()).await).await
}

pub(super) async fn list(coordinators: &mut Coordinators) -> Result<pb::ListRunsResponse, Failure> {
    let mut all = pb::ListRunsResponse::default();
    let mut page_token = String::new();
    loop {
        let request = pb::ListRunsRequest { page_size: 100, page_token };
        let page = coordinators.call(Again::Yes, async |mut runs| runs.list_runs(request.clone()).await).await?;
        all.runs.extend(page.runs);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

pub(super) async fn logs(coordinators: &mut Coordinators, name: String, follow: bool) -> Result<ExitCode, Failure> {
    let request = pb::TailLogsRequest { name, follow };
    let mut printed = 0_usize;
    loop {
        let mut lines = coordinators.call(Again::Yes, async |mut runs| runs.tail_logs(request.clone()).await).await?;
        let mut read = 0_usize;
        loop {
            match lines.message().await {
                // The file is the same for every leader: what was printed comes first.
                Ok(Some(line)) => {
                    read += 1;
                    if read > printed {
                        print(&format!("[{}] {}", line.source, line.text));
                        printed = read;
                    }
                }
                Ok(None) => return Ok(ExitCode::SUCCESS),
                Err(broken) => {
                    coordinators.after_stream(&broken)?;
                    break;
                }
            }
        }
    }
}

impl Coordinators {
    /// After the end of a stream that should go on elsewhere.
    pub(super) fn after_stream(&mut self, ended: &Status) -> Result<(), Failure> {
        match self.after(ended, Again::Yes) {
            After::Redirected | After::Search => Ok(()),
            After::Over => Err(ended.clone().into()),
        }
    }
}
