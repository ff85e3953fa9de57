//! How a client reaches a server: over the operating system's TCP, or as it is told.

use futures::future::BoxFuture;
use hyper_util::rt::TokioIo;
use std::fmt;
use std::io;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::{Channel, Endpoint, Error, Uri};

/// A connection of any kind.
pub trait Link: AsyncRead + AsyncWrite + Send + Unpin {}

impl<L: AsyncRead + AsyncWrite + Send + Unpin> Link for L {}

type Open = dyn Fn(Uri) -> BoxFuture<'static, io::Result<Box<dyn Link>>> + Send + Sync;

/// Opens connections. A cheap clone.
#[derive(Clone, Default)]
pub struct Dial {
    /// `None`: TCP.
    open: Option<Arc<Open>>,
}

impl fmt::Debug for Dial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.open.is_none() { "Dial::tcp" } else { "Dial::by" })
    }
}

impl Dial {
    /// The operating system's.
    #[must_use]
    pub fn tcp() -> Self {
        Self::default()
    }

    /// By a function, as a simulated network needs it.
    #[must_use]
    pub fn by(open: impl Fn(Uri) -> BoxFuture<'static, io::Result<Box<dyn Link>>> + Send + Sync + 'static) -> Self {
        Self { open: Some(Arc::new(open)) }
    }

    /// Connects.
    ///
    /// # Errors
    /// The server is not reached.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Error> {
        let Some(open) = self.open.clone() else { return endpoint.connect().await };
        let service = tower::service_fn(move |uri| {
            let opening = open(uri);
            async move { opening.await.map(TokioIo::new) }
        });
        endpoint.connect_with_connector(service).await
    }
}
