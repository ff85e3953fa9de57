//! A span leaves the process, under its service's name and below its remote parent.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use std::time::Duration;
use thaw_runtime::telemetry::{self, Format, Options};
use tokio::sync::mpsc;

struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        self.0.send(request.into_inner()).unwrap();
        Ok(tonic::Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_span_reaches_the_collector_below_its_parent() {
    let (sender, mut received) = mpsc::unbounded_channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let server = tonic::transport::Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
    let server = tokio::spawn(server.serve_with_incoming(incoming));

    let options = Options { endpoint: Some(endpoint), filter: "warn".to_owned(), format: Format::Json };
    let guard = telemetry::init("thaw-test", &options).unwrap();
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let span = tracing::info_span!("forming");
    telemetry::set_parent(&span, parent);
    let carried = span.in_scope(|| {
        let mut request = telemetry::trace_interceptor(tonic::Request::new(())).unwrap();
        request.metadata_mut().remove("traceparent").unwrap().to_str().unwrap().to_owned()
    });
    assert_eq!(carried[..36], parent[..36], "the trace goes on");
    drop(span);
    // A flush waits for its thread, so it must not hold this runtime's.
    tokio::task::spawn_blocking(move || drop(guard)).await.unwrap();

    let request = tokio::time::timeout(Duration::from_secs(10), received.recv()).await.unwrap().unwrap();
    let of_service = &request.resource_spans[0];
    let attributes = &of_service.resource.as_ref().unwrap().attributes;
    assert!(attributes.iter().any(|pair| pair.key == "service.name" && format!("{pair:?}").contains("thaw-test")));
    let span = &of_service.scope_spans[0].spans[0];
    assert_eq!(span.name, "forming");
    assert_eq!(span.parent_span_id, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
    server.abort();
}
