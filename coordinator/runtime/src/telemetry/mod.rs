//! Logs to stderr, spans to an OTLP collector, and the trace context between processes.
//!
//! Law: stdout is never written; without an endpoint nothing is exported and a [`traceparent`] is absent. Trace context
//! travels as W3C `traceparent` text: in gRPC metadata, and in a field of `StartTrainer`.

mod context;

pub use context::{inject, set_parent, set_parent_from, trace_interceptor, traceparent};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::time::Duration;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

/// How long the last spans may take to leave when the process ends.
const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// For people; coloured on a terminal.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What to log and where spans go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// OTLP gRPC endpoint, e.g. `http://collector:4317`. `None`: spans are not exported.
    pub endpoint: Option<String>,
    /// Filter in the syntax of `tracing_subscriber::EnvFilter`.
    pub filter: String,
    /// How lines look.
    pub format: Format,
}

impl Default for Options {
    fn default() -> Self {
        Self { endpoint: None, filter: "info".to_owned(), format: Format::Text }
    }
}

/// Why telemetry did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The filter does not parse.
    #[error("log filter {filter:?} is not valid; write e.g. info,thaw=debug in THAW_LOG")]
    Filter {
        /// As given.
        filter: String,
        /// Where it is wrong.
        source: tracing_subscriber::filter::ParseError,
    },
    /// An unknown format.
    #[error("log format {format:?} is not known; THAW_LOG_FORMAT is text or json")]
    Format {
        /// As given.
        format: String,
    },
    /// The exporter cannot be built.
    #[error("cannot export spans to {endpoint}; OTEL_EXPORTER_OTLP_ENDPOINT is a URL such as http://collector:4317")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// Why.
        source: opentelemetry_otlp::ExporterBuildError,
    },
    /// The exporter's thread cannot start.
    #[error("cannot start the span exporter")]
    Runtime(#[source] std::io::Error),
    /// Telemetry was started before.
    #[error("telemetry was started twice in one process")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

impl Options {
    /// Reads `OTEL_EXPORTER_OTLP_ENDPOINT`, `THAW_LOG` (default: `filter`) and `THAW_LOG_FORMAT` (`text`, `json`).
    ///
    /// # Errors
    /// An unknown format.
    pub fn from_env(filter: &str) -> Result<Self, Error> {
        let read = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
        let format = match read("THAW_LOG_FORMAT").as_deref() {
            None | Some("text") => Format::Text,
            Some("json") => Format::Json,
            Some(format) => {
                return Err(Error::Format { format: format.to_owned() });
            }
        };
        let filter = read("THAW_LOG").unwrap_or_else(|| filter.to_owned());
        Ok(Self { endpoint: read("OTEL_EXPORTER_OTLP_ENDPOINT"), filter, format })
    }
}

/// Sends the last spans when dropped. Keep it until the process ends.
#[must_use = "dropping it stops the export of spans"]
#[derive(Debug)]
pub struct Guard {
    exporter: Option<Exporter>,
}

#[derive(Debug)]
struct Exporter {
    provider: SdkTracerProvider,
    runtime: tokio::runtime::Runtime,
}

/// Starts logging and tracing for this process, under the service's name. Works with and without a runtime around it.
///
/// # Errors
/// The filter or the endpoint is not valid, or telemetry runs already.
pub fn init(service: &'static str, options: &Options) -> Result<Guard, Error> {
    let filter = EnvFilter::try_new(&options.filter)
        .map_err(|source| Error::Filter { filter: options.filter.clone(), source })?;
    let exporter = options.endpoint.as_deref().map(|endpoint| start_exporter(service, endpoint)).transpose()?;
    let spans = exporter.as_ref().map(|exporter| {
        // The exporter's own client must not trace itself.
        let own = EnvFilter::new("info,h2=off,hyper=off,tonic=off,tower=off,opentelemetry=off");
        tracing_opentelemetry::layer().with_tracer(exporter.provider.tracer(service)).with_filter(own)
    });
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match options.format {
        Format::Text => {
            let colour = std::io::IsTerminal::is_terminal(&std::io::stderr());
            lines.with_ansi(colour).with_filter(filter).boxed()
        }
        Format::Json => lines.json().with_filter(filter).boxed(),
    };
    tracing_subscriber::registry().with(lines).with(spans).try_init().map_err(Error::Twice)?;
    Ok(Guard { exporter })
}

/// The exporter has a runtime of its own: a trainer has none, and a server's may be gone when the last spans leave.
fn start_exporter(service: &'static str, endpoint: &str) -> Result<Exporter, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("otlp")
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let entered = runtime.enter();
    let sender = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(FLUSH_LIMIT)
        .build()
        .map_err(|source| Error::Endpoint { endpoint: endpoint.to_owned(), source })?;
    drop(entered);
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(sender)
        .with_resource(Resource::builder().with_service_name(service).build())
        .build();
    Ok(Exporter { provider, runtime })
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(Exporter { provider, runtime }) = self.exporter.take() else {
            return;
        };
        if let Err(error) = provider.shutdown_with_timeout(FLUSH_LIMIT) {
            tracing::warn!(%error, "the last spans were not exported");
        }
        // Waiting for it here would panic inside another runtime.
        runtime.shutdown_background();
    }
}
