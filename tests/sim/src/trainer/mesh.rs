//! The connections of one generation's ranks over the simulated network, each with each, and frames on them.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;
use thaw_proto::ids::Rank;
use thaw_proto::pb;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;
use turmoil::net::{TcpListener, TcpStream};

/// For who has connected to say who it is.
const GREETING_LIMIT: Duration = Duration::from_secs(1);
/// Nothing that toys send is longer.
const MOST_BYTES: u32 = 1 << 16;

/// Of one rank: a stream to every other.
pub(super) struct Mesh {
    pub(super) rank: u32,
    pub(super) world: u32,
    streams: BTreeMap<u32, TcpStream>,
}

impl Mesh {
    /// Connects to the lower ranks and is connected to by the higher ones; each shows the generation's key.
    pub(super) async fn join(propose: &pb::Propose, listener: &TcpListener) -> io::Result<Self> {
        let peers = propose.peers.clone().unwrap_or_default();
        let world = u32::try_from(peers.len()).unwrap_or(1);
        let mut streams = BTreeMap::new();
        for (lower, address) in (0..propose.rank).zip(peers.iter()) {
            let mut stream = connect(address).await?;
            stream.write_all(&propose.key).await?;
            stream.write_u32(propose.rank).await?;
            stream.read_u8().await?;
            streams.insert(lower, stream);
        }
        while streams.len() + 1 < world as usize {
            let (mut stream, _) = listener.accept().await?;
            // Whoever shows another key belongs to another generation, and may be gone.
            let Ok(Ok(rank)) = timeout(GREETING_LIMIT, greet(&mut stream, &propose.key)).await else { continue };
            if (propose.rank + 1..world).contains(&rank) {
                streams.insert(rank, stream);
            }
        }
        Ok(Self { rank: propose.rank, world, streams })
    }

    pub(super) async fn send(&mut self, to: u32, bytes: &[u8]) -> io::Result<()> {
        let stream = self.stream(to)?;
        let mut frame = u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes().to_vec();
        frame.extend(bytes);
        stream.write_all(&frame).await
    }

    async fn receive(&mut self, from: u32) -> io::Result<Vec<u8>> {
        let stream = self.stream(from)?;
        let length = stream.read_u32().await?;
        if length > MOST_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length as usize];
        stream.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    /// The next frame of each of these ranks; who of them is gone otherwise.
    pub(super) async fn frames(&mut self, from: &[Rank]) -> Result<Vec<Vec<u8>>, (Rank, io::Error)> {
        let mut frames = Vec::new();
        for rank in from {
            frames.push(self.receive(rank.0).await.map_err(|error| (*rank, error))?);
        }
        Ok(frames)
    }

    fn stream(&mut self, rank: u32) -> io::Result<&mut TcpStream> {
        self.streams.get_mut(&rank).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

/// The rank of who has connected, once it has shown the key.
async fn greet(stream: &mut TcpStream, key: &[u8]) -> io::Result<u32> {
    let mut shown = vec![0; key.len()];
    stream.read_exact(&mut shown).await?;
    if shown != key {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let rank = stream.read_u32().await?;
    stream.write_u8(1).await?;
    Ok(rank)
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let (host, port) = address.rsplit_once(':').unwrap_or((address, "0"));
    TcpStream::connect((host.to_owned(), port.parse().unwrap_or(0))).await
}
