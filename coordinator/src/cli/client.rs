//! Calls to a coordinator, each with a deadline.

use super::{Failure, print};
use std::process::ExitCode;
use std::time::Duration;
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_proto::pb::run_service_client::RunServiceClient;
use tonic::transport::{Channel, Endpoint};

pub(super) type Runs = RunServiceClient<Channel>;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// Connects to the coordinator at `server`.
pub(super) async fn runs(server: &str) -> Result<Runs, Failure> {
    Ok(RunServiceClient::new(channel(server).await?).max_decoding_message_size(64 << 20))
}

pub(super) async fn workers(server: &str) -> Result<pb::ListWorkersResponse, Failure> {
    let mut client = ClusterServiceClient::new(channel(server).await?);
    Ok(client.list_workers(pb::ListWorkersRequest {}).await?.into_inner())
}

async fn channel(server: &str) -> Result<Channel, Failure> {
    let endpoint = Endpoint::from_shared(server.to_owned()).map_err(|error| {
        Failure::invalid(format!("--server `{server}` is not an address such as http://127.0.0.1:7070: {error}"))
    })?;
    endpoint.connect_timeout(CONNECT_DEADLINE).connect().await.map_err(|_| {
        Failure::failed(format!(
            "no coordinator answers at {server}; start one with `thaw up`, or name another with --server"
        ))
    })
}

pub(super) async fn submit(client: &mut Runs, spec: pb::RunSpec) -> Result<pb::Run, Failure> {
    let request_id = uuid::Uuid::new_v4().to_string();
    let request = pb::CreateRunRequest { spec: Some(spec), request_id, validate_only: false };
    Ok(client.create_run(request).await?.into_inner())
}

pub(super) async fn list(client: &mut Runs) -> Result<pb::ListRunsResponse, Failure> {
    let mut all = pb::ListRunsResponse::default();
    let mut page_token = String::new();
    loop {
        let page = client.list_runs(pb::ListRunsRequest { page_size: 100, page_token }).await?.into_inner();
        all.runs.extend(page.runs);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            return Ok(all);
        }
    }
}

pub(super) async fn logs(client: &mut Runs, name: String, follow: bool) -> Result<ExitCode, Failure> {
    let mut lines = client.tail_logs(pb::TailLogsRequest { name, follow }).await?.into_inner();
    while let Some(line) = lines.message().await? {
        print(&format!("[{}] {}", line.source, line.text));
    }
    Ok(ExitCode::SUCCESS)
}
