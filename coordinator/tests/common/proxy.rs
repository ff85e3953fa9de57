//! A TCP proxy whose faults a test turns on and off: what is sent arrives and no answer comes back, or nothing passes.

use std::net::SocketAddr;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    /// Requests arrive; their answers are thrown away.
    DropAnswers,
    /// Nothing passes, and nothing is closed.
    BlackHole,
    /// Connections are closed, and new ones too.
    Cut,
}

pub(crate) struct Proxy {
    pub(crate) address: String,
    fault: watch::Sender<Fault>,
    task: tokio::task::JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn start(upstream: &str) -> Self {
        let upstream: SocketAddr = upstream.parse().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (fault, faults) = watch::channel(Fault::None);
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(carry(client, upstream, faults.clone()));
            }
        });
        Self { address, fault, task }
    }

    pub(crate) fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn carry(client: TcpStream, upstream: SocketAddr, faults: watch::Receiver<Fault>) {
    let Ok(server) = TcpStream::connect(upstream).await else { return };
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut until_cut = faults.clone();
    tokio::select! {
        _ = until_cut.wait_for(|fault| *fault == Fault::Cut) => {}
        () = pump(from_client, to_server, faults.clone(), &[Fault::BlackHole]) => {}
        () = pump(from_server, to_client, faults, &[Fault::BlackHole, Fault::DropAnswers]) => {}
    }
}

/// Copies until an end closes. What arrives during one of `lost` is lost for good, so the connection is broken after it,
/// as one is whose packets do not come back.
async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut faults: watch::Receiver<Fault>,
    lost: &[Fault],
) {
    let mut chunk = vec![0; 64 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut chunk).await else { return };
        // Looked at here as well as in `carry`: once `set` has returned, nothing that comes later passes.
        let fault = *faults.borrow();
        if fault == Fault::Cut {
            return;
        }
        if lost.contains(&fault) {
            // An error is the end of the proxy.
            let _ = faults.wait_for(|fault| !lost.contains(fault)).await;
            return;
        }
        if to.write_all(&chunk[..read]).await.is_err() {
            return;
        }
    }
}
