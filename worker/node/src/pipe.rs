//! What an agent and its trainer say to each other over the trainer's stdin and stdout.
//!
//! A frame is its length (u32, little-endian) and one protobuf message: `CoordinatorMessage` down, `TrainerReport` up.
//!
//! Law: a frame is read whole or not at all; a stream that ends inside a frame is an error, one that ends between two is the
//! other side's end. A trainer whose stdin ends has lost its agent and must exit at once (`PIPE-1`): nobody is left who
//! would stop it. Nothing else writes to a trainer's stdout.

use prost::Message;
use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use thaw_proto::pb::{CoordinatorMessage, TrainerReport};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// No message is larger; a spec with its plan has some kilobytes.
const MAX_FRAME_BYTES: usize = 64 << 20;
/// Reports that may wait for the agent before the trainer waits too. The agent only stops reading when it is gone.
const MAX_WAITING_REPORTS: usize = 4096;

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The pipe failed, or ended inside a frame.
    #[error("the pipe between agent and trainer failed")]
    Io(#[from] io::Error),
    /// A length beyond the limit: something else wrote to the pipe.
    #[error("a frame of {0} bytes between agent and trainer; the limit is {MAX_FRAME_BYTES}")]
    TooLong(usize),
    /// Not the expected message.
    #[error("a frame between agent and trainer does not decode")]
    Decode(#[from] prost::DecodeError),
    /// The trainer's side was closed.
    #[error("the pipe to the agent is closed")]
    Closed,
}

fn encode(message: &impl Message) -> Result<Vec<u8>, Error> {
    let length = message.encoded_len();
    if length > MAX_FRAME_BYTES {
        return Err(Error::TooLong(length));
    }
    let mut frame = Vec::with_capacity(4 + length);
    frame.extend(u32::try_from(length).expect("the limit is below 4 GiB").to_le_bytes());
    message.encode(&mut frame).expect("a vector grows");
    Ok(frame)
}

fn checked_length(prefix: [u8; 4]) -> Result<usize, Error> {
    let length = u32::from_le_bytes(prefix) as usize;
    if length > MAX_FRAME_BYTES { Err(Error::TooLong(length)) } else { Ok(length) }
}

/// Writes one frame and flushes.
///
/// # Errors
/// [`Error::Io`], [`Error::TooLong`].
pub fn write_frame(stream: &mut impl Write, message: &impl Message) -> Result<(), Error> {
    stream.write_all(&encode(message)?)?;
    Ok(stream.flush()?)
}

/// Reads one frame; `None` at the stream's end.
///
/// # Errors
/// [`Error::Io`] where it ends inside a frame, [`Error::TooLong`], [`Error::Decode`].
pub fn read_frame<M: Message + Default>(stream: &mut impl Read) -> Result<Option<M>, Error> {
    let mut prefix = [0; 4];
    let mut filled = 0;
    while filled < prefix.len() {
        match stream.read(&mut prefix[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut body = vec![0; checked_length(prefix)?];
    stream.read_exact(&mut body)?;
    Ok(Some(M::decode(&*body)?))
}

/// [`write_frame`] in async code. Not cancel-safe: a cancelled call leaves the stream inside a frame.
///
/// # Errors
/// As [`write_frame`].
pub async fn write_frame_async(stream: &mut (impl AsyncWrite + Unpin), message: &impl Message) -> Result<(), Error> {
    stream.write_all(&encode(message)?).await?;
    Ok(stream.flush().await?)
}

/// [`read_frame`] in async code. Not cancel-safe.
///
/// # Errors
/// As [`read_frame`].
pub async fn read_frame_async<M: Message + Default>(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<M>, Error> {
    let mut prefix = [0; 4];
    if stream.read(&mut prefix[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut prefix[1..]).await?;
    let mut body = vec![0; checked_length(prefix)?];
    stream.read_exact(&mut body).await?;
    Ok(Some(M::decode(&*body)?))
}

/// Makes the kernel kill this process when its parent ends. A parent that ended before the call is found by the end of
/// stdin.
///
/// # Errors
/// The kernel refuses.
pub fn die_with_parent() -> io::Result<()> {
    Ok(nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?)
}

/// The trainer's side.
#[derive(Debug)]
pub struct TrainerPipe {
    sender: ReportSender,
    writer: JoinHandle<()>,
}

/// Sends reports to the agent from any thread.
#[derive(Debug, Clone)]
pub struct ReportSender {
    reports: SyncSender<TrainerReport>,
}

impl ReportSender {
    /// Queues a report; waits only where thousands are queued.
    ///
    /// # Errors
    /// [`Error::Closed`]: the agent is gone.
    pub fn send(&self, report: TrainerReport) -> Result<(), Error> {
        self.reports.send(report).map_err(|_| Error::Closed)
    }
}

impl TrainerPipe {
    /// Starts two threads, one for each direction, and returns the messages from the coordinator, in order. `on_parent_gone`
    /// runs on the reading thread when the agent's end is closed or sends nonsense: it should end the process (`PIPE-1`).
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        mut from_agent: impl Read + Send + 'static,
        mut to_agent: impl Write + Send + 'static,
        on_parent_gone: impl FnOnce() + Send + 'static,
    ) -> io::Result<(Self, Receiver<CoordinatorMessage>)> {
        let (received, messages) = channel();
        let (reports, queued) = sync_channel::<TrainerReport>(MAX_WAITING_REPORTS);
        // Never joined: it lives in a read that ends with the agent, or with the process.
        std::thread::Builder::new().name("from-agent".to_owned()).spawn(move || {
            loop {
                match read_frame(&mut from_agent) {
                    Ok(Some(message)) => {
                        // The trainer may have stopped listening; the end of the stream still matters.
                        let _not_listening = received.send(message);
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(error = thaw_runtime::chain(&error), "cannot read from the agent");
                        break;
                    }
                }
            }
            on_parent_gone();
        })?;
        let writer = std::thread::Builder::new().name("to-agent".to_owned()).spawn(move || {
            while let Ok(report) = queued.recv() {
                if let Err(error) = write_frame(&mut to_agent, &report) {
                    tracing::error!(error = thaw_runtime::chain(&error), "cannot write to the agent");
                    return;
                }
            }
        })?;
        Ok((Self { sender: ReportSender { reports }, writer }, messages))
    }

    /// A handle that sends reports.
    #[must_use]
    pub fn sender(&self) -> ReportSender {
        self.sender.clone()
    }

    /// Waits until every report is written. Call last, after every clone of the sender is dropped.
    pub fn finish(self) {
        drop(self.sender);
        let _panicked = self.writer.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn report(run: &str) -> TrainerReport {
        TrainerReport { run: run.to_owned(), ..TrainerReport::default() }
    }

    #[test]
    fn frames_come_back_and_cuts_are_errors() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, &report("first")).unwrap();
        write_frame(&mut bytes, &TrainerReport::default()).unwrap();
        let mut stream = &bytes[..];
        assert_eq!(read_frame(&mut stream).unwrap(), Some(report("first")));
        assert_eq!(read_frame(&mut stream).unwrap(), Some(TrainerReport::default()));
        assert_eq!(read_frame::<TrainerReport>(&mut stream).unwrap(), None);
        for cut in 1..11 {
            assert!(matches!(read_frame::<TrainerReport>(&mut &bytes[..cut]), Err(Error::Io(_))), "cut at {cut}");
        }
        assert!(matches!(read_frame::<TrainerReport>(&mut &[0xff; 8][..]), Err(Error::TooLong(_))));
        assert!(matches!(read_frame::<TrainerReport>(&mut &[1, 0, 0, 0, 0xff][..]), Err(Error::Decode(_))));
    }

    #[tokio::test]
    async fn async_frames_are_the_same_frames() {
        let mut bytes = Vec::new();
        write_frame_async(&mut bytes, &report("run")).await.unwrap();
        assert_eq!(read_frame(&mut &bytes[..]).unwrap(), Some(report("run")));
        let mut stream = &bytes[..];
        assert_eq!(read_frame_async(&mut stream).await.unwrap(), Some(report("run")));
        assert_eq!(read_frame_async::<TrainerReport>(&mut stream).await.unwrap(), None);
        assert!(read_frame_async::<TrainerReport>(&mut &bytes[..3]).await.is_err());
    }

    #[test]
    fn a_trainer_hears_talks_and_notices_its_orphaning() {
        let (mut agent, trainer) = UnixStream::pair().unwrap();
        let (gone, orphaned) = channel();
        let (pipe, messages) =
            TrainerPipe::start(trainer.try_clone().unwrap(), trainer, move || gone.send(()).unwrap()).unwrap();
        let message = CoordinatorMessage { leader_epoch: 4, message: None };
        write_frame(&mut agent, &message).unwrap();
        assert_eq!(messages.recv().unwrap(), message);
        pipe.sender().send(report("run")).unwrap();
        assert_eq!(read_frame(&mut agent).unwrap(), Some(report("run")));
        assert!(orphaned.try_recv().is_err());
        agent.shutdown(std::net::Shutdown::Write).unwrap();
        orphaned.recv().unwrap();
        pipe.finish();
    }
}
