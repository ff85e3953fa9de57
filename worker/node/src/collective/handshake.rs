//! From a list of addresses to one checked connection per pair of ranks.
//!
//! ```text
//! higher rank --- hello ---------------> lower rank      dials everyone below, then accepts everyone above
//!             <-- verdict, hello -------
//! ```
//!
//! Law: a connection counts only after both sides showed the same run, generation, world, shards and key (`COLL-4`). The key
//! itself never travels. A wrong connection is refused, logged and forgotten, and the right one still gets in.

use super::abort::Abort;
use super::error::{Error, Refusal};
use super::gang::Tree;
use super::ring::{Record, Ring};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_proto::ids::{Generation, Rank};
use thaw_runtime::backoff::Backoff;

const MAGIC: [u8; 8] = *b"thawcol1";
const SIGNED_BYTES: usize = 64;
const HELLO_BYTES: usize = 96;

/// How long an accepted connection may take over its hello.
const HELLO_LIMIT: Duration = Duration::from_secs(5);
/// Connections that may be in the middle of their hello; above that the oldest goes.
const MAX_PENDING: usize = 256;
/// Between two looks at a socket while a gang forms.
const PAUSE: Duration = Duration::from_millis(2);

/// Who forms which generation.
#[derive(Debug, Clone)]
pub struct Membership {
    /// The run's name.
    pub run: String,
    /// The generation.
    pub generation: Generation,
    /// This trainer's position.
    pub rank: Rank,
    /// Address of each rank, in rank order; the length is the world size.
    pub addresses: Vec<String>,
    /// Random bytes that only members of this generation know.
    pub key: Vec<u8>,
}

/// What a collective is built for.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Logical shards the reductions add over, from 1.
    pub shards: u32,
    /// How long the gang may take to form.
    pub connect_deadline: Duration,
    /// How long each operation may take, once the gang has formed.
    pub operation_deadline: Duration,
    /// Ranks with the same one reduce through shared memory, where they can map each other's; without, this rank shares nothing.
    pub host: Option<HostId>,
}

/// What tells hosts apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct HostId(pub(super) [u8; 16]);

impl HostId {
    /// This machine's, until it starts again. `None` where it does not say.
    #[must_use]
    pub fn of_this_machine() -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(Self::named(boot.trim()))
    }

    /// One that goes by this name.
    #[must_use]
    pub fn named(name: &str) -> Self {
        let hash = blake3::derive_key("thaw 2026 collective host", name.as_bytes());
        Self(hash[..16].try_into().expect("a hash has 32 bytes"))
    }
}

/// A socket that peers will connect to, open before anybody knows its rank.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    /// Where what its gangs do is recorded.
    ring: Option<Arc<Ring>>,
}

impl Listener {
    /// Opens a socket on a free port of `host`, and returns it with its `host:port` for the other ranks.
    ///
    /// # Errors
    /// [`Error::Listen`]: the host is not one of this machine's.
    pub fn bind(host: &str) -> Result<(Self, String), Error> {
        let failed = |source| Error::Listen { address: host.to_owned(), source: Arc::new(source) };
        let socket = TcpListener::bind((host, 0)).map_err(failed)?;
        socket.set_nonblocking(true).map_err(failed)?;
        let port = socket.local_addr().map_err(failed)?.port();
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        Ok((Self { socket, ring: None }, address))
    }

    /// Has every gang that it connects record its operations there.
    #[must_use]
    pub fn recording(self, ring: Option<Arc<Ring>>) -> Self {
        Self { ring, ..self }
    }

    /// Connects to every other rank of the generation. With one rank no socket is opened.
    ///
    /// # Errors
    /// [`Error::Handshake`] naming the rank that is missing at the deadline, or that refused for good; [`Error::Aborted`].
    pub fn connect(&self, membership: &Membership, options: Options, abort: &Abort) -> Result<Tree, Error> {
        let forming = Forming::new(membership, options, abort)?;
        let world_size = forming.world_size;
        let mut streams: Vec<Option<TcpStream>> = (0..world_size).map(|_| None).collect();
        // Rank 0 only accepts and the highest only dials, so no two ranks wait for each other.
        for (rank, address) in (0..forming.rank).zip(&membership.addresses) {
            streams[rank as usize] = Some(forming.dial(rank, address)?);
        }
        forming.accept(&self.socket, &mut streams)?;
        let record = Record::of(self.ring.clone(), membership.generation);
        let tree = Tree::start(forming.rank, options.shards, options.operation_deadline, streams, record);
        let mut tree = tree.map_err(|source| Error::Listen {
            address: membership.addresses[forming.rank as usize].clone(),
            source: Arc::new(source),
        })?;
        abort.hold(tree.shared());
        let shared = tree.share_memory(options.host, forming.token(), forming.deadline);
        abort.release();
        match shared {
            Ok(()) => Ok(tree),
            Err(Error::Deadline { missing, .. }) if !missing.is_empty() => {
                Err(forming.out_of_time(missing[0], Refusal::Deadline, None))
            }
            Err(error) => Err(error),
        }
    }
}

/// One gang's hello, and the time it has.
struct Forming {
    generation: u64,
    rank: u32,
    world_size: u32,
    shards: u32,
    run: blake3::Hash,
    key: [u8; 32],
    deadline: Instant,
    limit: Duration,
    abort: Abort,
}

/// An accepted connection that has not finished its hello.
struct Pending {
    stream: TcpStream,
    bytes: [u8; HELLO_BYTES],
    filled: usize,
    since: Instant,
}

impl Forming {
    fn new(membership: &Membership, options: Options, abort: &Abort) -> Result<Self, Error> {
        let rank = membership.rank.0;
        let world_size = u32::try_from(membership.addresses.len()).unwrap_or(u32::MAX);
        let forming = Self {
            generation: membership.generation.0,
            rank,
            world_size,
            shards: options.shards,
            run: blake3::hash(membership.run.as_bytes()),
            key: blake3::derive_key("thaw 2026 collective handshake", &membership.key),
            deadline: Instant::now() + options.connect_deadline,
            limit: options.connect_deadline,
            abort: abort.clone(),
        };
        if rank >= world_size || options.shards == 0 {
            return Err(forming.failed(rank, Refusal::Shape, None));
        }
        Ok(forming)
    }

    /// What this rank's segment is known by: nobody without the key can guess it.
    fn token(&self) -> [u8; 32] {
        let mut what = b"segment".to_vec();
        what.extend(self.generation.to_le_bytes());
        what.extend(self.rank.to_le_bytes());
        what.extend(std::process::id().to_le_bytes());
        *blake3::keyed_hash(&self.key, &what).as_bytes()
    }

    fn failed(&self, rank: u32, reason: Refusal, source: Option<io::Error>) -> Error {
        Error::Handshake { generation: self.generation, rank, reason, source: source.map(Arc::new) }
    }

    /// Time until the deadline; `None` once there is none, or nobody wants the gang any more.
    fn left(&self) -> Option<Duration> {
        let left = self.deadline.checked_duration_since(Instant::now());
        left.filter(|left| !left.is_zero() && !self.abort.is_asked())
    }

    /// What to say where no time is left.
    fn out_of_time(&self, rank: u32, reason: Refusal, source: Option<io::Error>) -> Error {
        if self.abort.is_asked() { Error::Aborted } else { self.failed(rank, reason, source) }
    }

    fn hello(&self, to: u32) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.generation.to_le_bytes());
        for (slot, value) in [self.rank, to, self.world_size, self.shards].into_iter().enumerate() {
            bytes[16 + slot * 4..20 + slot * 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes[32..SIGNED_BYTES].copy_from_slice(self.run.as_bytes());
        let proof = blake3::keyed_hash(&self.key, &bytes[..SIGNED_BYTES]);
        bytes[SIGNED_BYTES..].copy_from_slice(proof.as_bytes());
        bytes
    }

    /// The sender's rank, where everything fits.
    fn check(&self, bytes: &[u8; HELLO_BYTES]) -> Result<u32, Refusal> {
        let word = |slot: usize| {
            u32::from_le_bytes(bytes[16 + slot * 4..20 + slot * 4].try_into().expect("four bytes were taken"))
        };
        let generation = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes were taken"));
        let (from, to) = (word(0), word(1));
        if bytes[0..8] != MAGIC {
            return Err(Refusal::Protocol);
        }
        if bytes[32..SIGNED_BYTES] != *self.run.as_bytes() {
            return Err(Refusal::Run);
        }
        if generation != self.generation {
            return Err(Refusal::Generation(generation));
        }
        if word(2) != self.world_size
            || word(3) != self.shards
            || to != self.rank
            || from >= self.world_size
            || from == to
        {
            return Err(Refusal::Shape);
        }
        let proof: [u8; 32] = bytes[SIGNED_BYTES..].try_into().expect("a hello ends with its proof");
        // `blake3::Hash` compares in constant time.
        if blake3::keyed_hash(&self.key, &bytes[..SIGNED_BYTES]) != blake3::Hash::from_bytes(proof) {
            return Err(Refusal::Key);
        }
        Ok(from)
    }

    /// Connects to a lower rank; tries again until the deadline while that rank may still come.
    fn dial(&self, rank: u32, address: &str) -> Result<TcpStream, Error> {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(500)).with_deadline(self.limit);
        loop {
            let (reason, source) = match self.dial_once(rank, address) {
                Ok(stream) => return Ok(stream),
                Err(failure) => failure,
            };
            let may_come = match reason {
                Refusal::Deadline | Refusal::Address => true,
                // It has not heard of this generation yet.
                Refusal::Generation(theirs) => theirs < self.generation,
                Refusal::Protocol | Refusal::Run | Refusal::Shape | Refusal::Key => false,
            };
            match backoff.next_wait().filter(|_| may_come && self.left().is_some()) {
                Some(wait) => self.abort.wait(wait),
                None => return Err(self.out_of_time(rank, reason, source)),
            }
        }
    }

    fn dial_once(&self, rank: u32, address: &str) -> Result<TcpStream, (Refusal, Option<io::Error>)> {
        let no_answer = |error| (Refusal::Deadline, Some(error));
        let mut connected = Err((Refusal::Address, None));
        for candidate in self.resolve(address)? {
            connected = self.reach(candidate).map_err(no_answer);
            if connected.is_ok() {
                break;
            }
        }
        let mut stream = connected?;
        stream.set_nodelay(true).map_err(no_answer)?;
        // A fresh socket's buffer takes a hundred bytes whole.
        stream.write_all(&self.hello(rank)).map_err(no_answer)?;
        let mut answer = [0; 1 + HELLO_BYTES];
        self.read(&mut stream, &mut answer).map_err(no_answer)?;
        let hello: [u8; HELLO_BYTES] = answer[1..].try_into().expect("the verdict is one byte");
        match verdict(answer[0], &hello) {
            Some(refusal) => Err((refusal, None)),
            None => match self.check(&hello) {
                Ok(from) if from == rank => Ok(stream),
                Ok(_) => Err((Refusal::Shape, None)),
                Err(refusal) => Err((refusal, None)),
            },
        }
    }

    /// What an address stands for. Names are looked up on a thread of their own, since nothing can end that.
    fn resolve(&self, address: &str) -> Result<Vec<SocketAddr>, (Refusal, Option<io::Error>)> {
        if let Ok(known) = address.parse() {
            return Ok(vec![known]);
        }
        let (found, finding) = std::sync::mpsc::channel();
        let name = address.to_owned();
        let looking = std::thread::Builder::new().name("resolve".to_owned());
        let looking = looking.spawn(move || {
            let _gave_up = found.send(name.to_socket_addrs().map(Iterator::collect));
        });
        looking.map_err(|error| (Refusal::Address, Some(error)))?;
        while self.left().is_some() {
            match finding.recv_timeout(PAUSE) {
                Ok(result) => return result.map_err(|error| (Refusal::Address, Some(error))),
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
            }
        }
        Err((Refusal::Address, None))
    }

    /// A connection to an address. It does not block, so that nothing has to end it.
    fn reach(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        if let Err(error) = socket.connect(&SockAddr::from(address))
            && error.raw_os_error() != Some(nix::libc::EINPROGRESS)
        {
            return Err(error);
        }
        while self.left().is_some() {
            if let Some(error) = socket.take_error()? {
                return Err(error);
            }
            if socket.peer_addr().is_ok() {
                return Ok(socket.into());
            }
            self.abort.wait(PAUSE);
        }
        Err(io::ErrorKind::TimedOut.into())
    }

    /// Fills the buffer from a connection that does not block.
    fn read(&self, stream: &mut TcpStream, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            match stream.read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => buffer = &mut buffer[read..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && self.left().is_some() => {
                    self.abort.wait(PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Waits for every higher rank.
    fn accept(&self, socket: &TcpListener, streams: &mut [Option<TcpStream>]) -> Result<(), Error> {
        let mut pending: Vec<Pending> = Vec::new();
        loop {
            let higher = self.rank as usize + 1;
            let Some(missing) = streams.iter().skip(higher).position(Option::is_none) else {
                return Ok(());
            };
            let missing = self.rank + 1 + u32::try_from(missing).expect("ranks are u32");
            if self.left().is_none() {
                return Err(self.out_of_time(missing, Refusal::Deadline, None));
            }
            let mut idle = true;
            match socket.accept() {
                Ok((stream, _)) => {
                    idle = false;
                    if pending.len() == MAX_PENDING {
                        pending.remove(0);
                    }
                    if stream.set_nonblocking(true).is_ok() {
                        pending.push(Pending { stream, bytes: [0; HELLO_BYTES], filled: 0, since: Instant::now() });
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // A connection that died in the queue, or no free descriptors: both may pass.
                Err(error) => tracing::debug!(%error, "cannot accept a peer"),
            }
            let mut open = Vec::with_capacity(pending.len());
            for connection in pending.drain(..) {
                match self.advance(connection) {
                    Progress::Open(connection) => open.push(connection),
                    Progress::Joined(rank, stream) => {
                        idle = false;
                        // A rank that dials again has given up its earlier connection.
                        streams[rank as usize] = Some(stream);
                    }
                    Progress::Gone => idle = false,
                }
            }
            pending = open;
            if idle {
                self.abort.wait(PAUSE);
            }
        }
    }

    fn advance(&self, mut connection: Pending) -> Progress {
        while connection.filled < HELLO_BYTES {
            match connection.stream.read(&mut connection.bytes[connection.filled..]) {
                Ok(0) => return Progress::Gone,
                Ok(read) => connection.filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && connection.since.elapsed() < HELLO_LIMIT => {
                    return Progress::Open(connection);
                }
                Err(_) => return Progress::Gone,
            }
        }
        let verdict = self.check(&connection.bytes).and_then(|rank| {
            // Lower ranks are dialled, so they never dial.
            if rank > self.rank { Ok(rank) } else { Err(Refusal::Shape) }
        });
        let mut answer = vec![code(verdict.err())];
        answer.extend(self.hello(verdict.unwrap_or(u32::MAX)));
        // A fresh socket's buffer takes a hundred bytes whole.
        let answered = connection.stream.write_all(&answer).and_then(|()| connection.stream.set_nodelay(true));
        match verdict {
            Ok(rank) if answered.is_ok() => Progress::Joined(rank, connection.stream),
            Ok(_) => Progress::Gone,
            Err(reason) => {
                let peer = connection.stream.peer_addr().map(|peer| peer.to_string()).unwrap_or_default();
                tracing::warn!(peer, %reason, generation = self.generation, "refused a connection to the collective");
                Progress::Gone
            }
        }
    }
}

enum Progress {
    Open(Pending),
    Joined(u32, TcpStream),
    Gone,
}

fn code(refusal: Option<Refusal>) -> u8 {
    match refusal {
        None => 0,
        Some(Refusal::Run) => 1,
        Some(Refusal::Generation(_)) => 2,
        Some(Refusal::Shape) => 3,
        Some(Refusal::Key) => 4,
        Some(Refusal::Protocol | Refusal::Deadline | Refusal::Address) => 5,
    }
}

/// What the other side's verdict means here; its own generation is in its hello.
fn verdict(code: u8, hello: &[u8; HELLO_BYTES]) -> Option<Refusal> {
    match code {
        0 => None,
        1 => Some(Refusal::Run),
        2 => {
            let theirs = u64::from_le_bytes(hello[8..16].try_into().expect("eight bytes were taken"));
            Some(Refusal::Generation(theirs))
        }
        3 => Some(Refusal::Shape),
        4 => Some(Refusal::Key),
        _ => Some(Refusal::Protocol),
    }
}
