//! torchft's lighthouse under the same load: a heartbeat a second of each replica, in a connection of its own, and quorums of all of them.
//!
//! Its protocol is unary calls; a quorum is answered once everybody has asked for one.

use crate::cluster::{DEADLINE, peak_memory, processor_seconds};
use crate::rows::Row;
use anyhow::{Context, Result};
use futures::future::try_join_all;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};
use tonic::Request;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Where it listens, as host:port.
    #[arg(long)]
    address: String,
    /// Its process.
    #[arg(long)]
    pid: u32,
    /// Replicas; it was started with --min_replicas of this.
    #[arg(long, default_value_t = 4096)]
    pub(crate) workers: u32,
    /// Quorums.
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Seconds over which its processor time is counted; 0: not at all.
    #[arg(long, default_value_t = 60)]
    steady: u32,
    /// Milliseconds between heartbeats.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    beat: u64,
}

/// `torchft.LighthouseHeartbeatRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct Heartbeat {
    #[prost(string, tag = "1")]
    replica_id: String,
}

/// `torchft.LighthouseQuorumRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct QuorumRequest {
    #[prost(message, optional, tag = "1")]
    requester: Option<Member>,
}

/// `torchft.QuorumMember`.
#[derive(Clone, PartialEq, prost::Message)]
struct Member {
    #[prost(string, tag = "1")]
    replica_id: String,
    #[prost(string, tag = "2")]
    address: String,
    #[prost(string, tag = "3")]
    store_address: String,
    #[prost(int64, tag = "4")]
    step: i64,
    #[prost(uint64, tag = "5")]
    world_size: u64,
}

/// An answer of which nothing is read: its members are left where they are, as Thaw's lists of peers are.
#[derive(Clone, PartialEq, prost::Message)]
struct Anything {}

/// One replica's connection.
#[derive(Clone)]
struct Replica {
    id: String,
    client: tonic::client::Grpc<Channel>,
}

pub(crate) async fn measure(options: Options) -> Result<()> {
    let endpoint = Endpoint::from_shared(format!("http://{}", options.address))?.tcp_nodelay(true);
    let mut replicas = Vec::new();
    for index in 0..options.workers {
        let client = tonic::client::Grpc::new(endpoint.connect().await.context("connect to the lighthouse")?);
        replicas.push(Replica { id: format!("worker-{index:05}"), client });
    }
    tokio::select! {
        measured = rounds(&options, &replicas) => measured,
        ended = beat(&options, replicas.clone()) => ended,
    }
}

/// Every replica's heartbeats, without end.
async fn beat(options: &Options, replicas: Vec<Replica>) -> Result<()> {
    let (every, count) = (Duration::from_millis(options.beat), options.workers);
    let began = Instant::now();
    let beats = (0..).zip(replicas).map(|(index, mut replica)| {
        tokio::spawn(async move {
            let mut ticks = interval_at(began + every * index / count, every);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                ticks.tick().await;
                replica.heartbeat().await?;
            }
        })
    });
    let ended = futures::future::select_all(beats).await;
    ended.0?
}

async fn rounds(options: &Options, replicas: &[Replica]) -> Result<()> {
    // So that all are known.
    sleep(2 * Duration::from_millis(options.beat)).await;
    let mut formed = Vec::new();
    for round in 0..options.rounds {
        let began = Instant::now();
        let asked = replicas.iter().cloned().map(|mut replica| {
            tokio::spawn(async move {
                replica.quorum(round.into()).await?;
                anyhow::Ok(Instant::now())
            })
        });
        let answered = timeout(DEADLINE, try_join_all(asked)).await.context("no quorum")??;
        let answered = answered.into_iter().collect::<Result<Vec<_>>>()?;
        let last = answered.into_iter().max().context("no replicas")?;
        formed.push(last.duration_since(began).as_secs_f64());
        // A tick of the lighthouse.
        sleep(Duration::from_millis(200)).await;
    }
    Row::new(format!("control_plane.torchft.quorum_{}", options.workers), formed, None).with("unit", "s").print();
    if options.steady > 0 {
        steady(options).await?;
    }
    Ok(())
}

async fn steady(options: &Options) -> Result<()> {
    let (mut shares, mut then, mut used) = (Vec::new(), Instant::now(), processor_seconds(options.pid)?);
    for _ in 0..options.steady {
        sleep(Duration::from_secs(1)).await;
        let (now, total) = (Instant::now(), processor_seconds(options.pid)?);
        shares.push((total - used) / now.duration_since(then).as_secs_f64());
        (then, used) = (now, total);
    }
    let row = Row::new("control_plane.torchft.cpu", shares, None).with("workers", options.workers);
    row.with("heartbeat_ms", options.beat).with("peak_mib", peak_memory(options.pid)?).with("unit", "cores").print();
    Ok(())
}

impl Replica {
    async fn heartbeat(&mut self) -> Result<()> {
        let request = Heartbeat { replica_id: self.id.clone() };
        self.call(request, PathAndQuery::from_static("/torchft.LighthouseService/Heartbeat")).await
    }

    async fn quorum(&mut self, step: i64) -> Result<()> {
        let requester = Member {
            replica_id: self.id.clone(),
            address: "http://10.0.0.1:41000".to_owned(),
            store_address: "10.0.0.1:42000".to_owned(),
            step,
            world_size: 1,
        };
        let request = QuorumRequest { requester: Some(requester) };
        self.call(request, PathAndQuery::from_static("/torchft.LighthouseService/Quorum")).await
    }

    async fn call<Asked: prost::Message + Send + Sync + 'static>(
        &mut self,
        request: Asked,
        path: PathAndQuery,
    ) -> Result<()> {
        self.client.ready().await?;
        let codec = tonic_prost::ProstCodec::<Asked, Anything>::default();
        let mut request = Request::new(request);
        request.set_timeout(DEADLINE);
        self.client.unary(request, path, codec).await?;
        Ok(())
    }
}
