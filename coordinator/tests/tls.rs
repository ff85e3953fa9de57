//! The coordinator beyond loopback: mutual TLS, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::cluster::{OneStage, WAIT, config, embedded};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use thaw_coordinator::server::{self, Server};
use thaw_proto::pb;
use thaw_proto::pb::cluster_service_client::ClusterServiceClient;
use thaw_runtime::tls::{Tls, TlsOptions, endpoint};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

/// An authority, and the folder with its file and its certificates.
struct Authority {
    folder: tempfile::TempDir,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(folder.path().join("ca.crt"), issuer.pem()).unwrap();
        Self { folder, issuer }
    }

    /// A certificate for one name, that believes `others`.
    fn issue(&self, name: &str, others: &Self) -> Tls {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new([name.to_owned()]).unwrap().signed_by(&key, &self.issuer).unwrap();
        let path = |end: &str| self.folder.path().join(format!("{name}.{end}"));
        std::fs::write(path("crt"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        let options = TlsOptions {
            tls_ca: Some(others.folder.path().join("ca.crt")),
            tls_cert: Some(path("crt")),
            tls_key: Some(path("key")),
            tls_name: Some("coordinator".to_owned()),
        };
        options.load().unwrap().unwrap()
    }

    fn certificate(&self) -> Certificate {
        Certificate::from_pem(self.issuer.pem())
    }
}

struct Serving {
    address: SocketAddr,
    stop: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), server::Error>>,
}

impl Serving {
    async fn start(folder: &Path, tls: Tls) -> Self {
        let mut config = config(&embedded(folder), folder);
        config.listen = "0.0.0.0:0".parse().unwrap();
        config.advertise = Some("coordinator-0.thaw.svc:7070".to_owned());
        config.tls = Some(tls);
        let bound = Server::bind(config).await.unwrap().with_planner(Arc::new(OneStage));
        let address = SocketAddr::from(([127, 0, 0, 1], bound.address().port()));
        let stop = CancellationToken::new();
        Self { address, running: tokio::spawn(bound.run(stop.clone())), stop }
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(format!("https://{}", self.address)).unwrap().connect_timeout(WAIT).timeout(WAIT)
    }
}

/// The leader, or what stood in the way. The handshake's verdict on a client comes with its first call.
async fn leader(channel: Result<Channel, tonic::transport::Error>) -> Result<pb::Leader, tonic::Status> {
    let channel = channel.map_err(|error| tonic::Status::unauthenticated(error.to_string()))?;
    let mut client = ClusterServiceClient::new(channel);
    let asked = async {
        loop {
            match client.get_leader(pb::GetLeaderRequest {}).await {
                // It answers, but does not lead yet.
                Err(status) if status.code() == Code::Unavailable && !status.metadata().is_empty() => {
                    tokio::task::yield_now().await;
                }
                answer => return answer.map(tonic::Response::into_inner),
            }
        }
    };
    tokio::time::timeout(WAIT, asked).await.expect("an answer in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beyond_loopback_only_certificates_of_the_authority_are_served() {
    let folder = tempfile::tempdir().unwrap();
    let (ours, theirs) = (Authority::new(), Authority::new());
    let serving = Serving::start(folder.path(), ours.issue("coordinator", &ours)).await;

    let client = ours.issue("client", &ours);
    let found = leader(endpoint(serving.endpoint(), Some(&client)).unwrap().connect().await).await.unwrap();
    assert_eq!(found.address, "coordinator-0.thaw.svc:7070");

    let foreign = theirs.issue("client", &ours);
    let refused = leader(endpoint(serving.endpoint(), Some(&foreign)).unwrap().connect().await).await;
    assert!(refused.is_err(), "a certificate of another authority was believed: {refused:?}");

    let believing = theirs.issue("coordinator", &theirs);
    let refused = endpoint(serving.endpoint(), Some(&believing)).unwrap().connect().await;
    assert!(refused.is_err(), "the client believed a server of another authority");

    let without = ClientTlsConfig::new().ca_certificate(ours.certificate()).domain_name("coordinator");
    let refused = leader(serving.endpoint().tls_config(without).unwrap().connect().await).await;
    assert!(refused.is_err(), "a client without a certificate was served: {refused:?}");

    let plain = Endpoint::from_shared(format!("http://{}", serving.address)).unwrap().timeout(WAIT);
    let refused = leader(plain.connect().await).await;
    assert!(refused.is_err(), "a client without TLS was served: {refused:?}");

    serving.stop.cancel();
    tokio::time::timeout(WAIT, serving.running).await.expect("stops in time").unwrap().unwrap();
}

#[tokio::test]
async fn without_tls_it_keeps_to_loopback() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&embedded(folder.path()), folder.path());
    config.listen = "0.0.0.0:0".parse().unwrap();
    let error = Server::bind(config).await.map(drop).unwrap_err().to_string();
    assert!(error.contains("without TLS only loopback addresses are served"), "{error}");
    assert!(error.contains("--tls-ca"), "{error}");
}
