//! Trace context as W3C `traceparent` text.

use opentelemetry::propagation::{Extractor, Injector, TextMapPropagator as _};
use opentelemetry::trace::TraceContextExt as _;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tonic::metadata::MetadataMap;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

const TRACEPARENT: &str = "traceparent";

/// The only field that travels.
struct Field(Option<String>);

impl Injector for Field {
    fn set(&mut self, key: &str, value: String) {
        if key == TRACEPARENT {
            self.0 = Some(value);
        }
    }
}

impl Extractor for Field {
    fn get(&self, key: &str) -> Option<&str> {
        if key == TRACEPARENT { self.0.as_deref() } else { None }
    }

    fn keys(&self) -> Vec<&str> {
        vec![TRACEPARENT]
    }
}

/// The current span as a `traceparent`. `None` where spans are not exported.
#[must_use]
pub fn traceparent() -> Option<String> {
    let context = Span::current().context();
    if !context.span().span_context().is_valid() {
        return None;
    }
    let mut field = Field(None);
    TraceContextPropagator::new().inject_context(&context, &mut field);
    field.0
}

/// Makes `span` a child of the remote span that `traceparent` names. Text that is no `traceparent` changes nothing: a bad
/// header must not fail a request. Call before the span is first entered.
pub fn set_parent(span: &Span, traceparent: &str) {
    let context = TraceContextPropagator::new().extract(&Field(Some(traceparent.to_owned())));
    if context.span().span_context().is_valid()
        && let Err(error) = span.set_parent(context)
    {
        tracing::debug!(%error, "trace context not applied");
    }
}

/// Writes the current span into a request's metadata.
pub fn inject(metadata: &mut MetadataMap) {
    if let Some(value) = traceparent().and_then(|text| text.parse().ok()) {
        metadata.insert(TRACEPARENT, value);
    }
}

/// [`set_parent`] from a request's metadata, where it has a context.
pub fn set_parent_from(span: &Span, metadata: &MetadataMap) {
    if let Some(text) = metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()) {
        set_parent(span, text);
    }
}

/// [`inject`] as a client's interceptor.
///
/// # Errors
/// None.
pub fn trace_interceptor(mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
    inject(request.metadata_mut());
    Ok(request)
}
