//! The simulated network as coordinators, agents and users see it.

use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use thaw_runtime::dial::{Dial, Link};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;
use turmoil::net::{TcpListener, TcpStream};

/// Port of every coordinator.
pub(crate) const PORT: u16 = 7070;

/// A connection that a server has taken.
#[derive(Debug)]
pub(crate) struct Taken(TcpStream);

impl Connected for Taken {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Taken {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Taken {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Every connection to this host.
pub(crate) async fn listen() -> io::Result<BoxStream<'static, io::Result<Taken>>> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    Ok(futures::stream::unfold(listener, |listener| async move {
        let taken = listener.accept().await.map(|(stream, _)| Taken(stream));
        Some((taken, listener))
    })
    .boxed())
}

/// Connections over the simulated network.
pub(crate) fn dial() -> Dial {
    Dial::by(|uri| {
        async move {
            let host = uri.host().unwrap_or_default().to_owned();
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(PORT))).await?;
            Ok(Box::new(stream) as Box<dyn Link>)
        }
        .boxed()
    })
}
