//! The trainers' own collective, which waits by blocking, over the simulated network, which is awaited.
//!
//! ```text
//! toy ── operation ─▶ collective, on a thread of its own ── frames, and whose it waits for ─▶ mesh
//!     ◀── result ────            ◀──────────────── frames, or who is gone ────────────────────
//! ```
//!
//! Either that thread runs or the simulation does, never both, so order is the seed's alone (SIM-1).

use super::mesh::Mesh;
use crate::world::World;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use thaw_node::collective::{Error, Links, Tree};
use thaw_proto::ids::Rank;
use tokio::time::sleep;

type Frames = Result<Vec<Vec<u8>>, (Rank, io::Error)>;
type Operation = Box<dyn FnOnce(&Tree) + Send>;

/// What the collective's thread says as it stops running.
#[derive(Debug)]
struct Stop {
    sends: Vec<(Rank, Vec<u8>)>,
    /// Whose frames it waits for; `None` where the operation is over.
    awaits: Option<Vec<Rank>>,
}

/// The thread's side.
#[derive(Debug)]
struct Inside {
    unsent: Mutex<Vec<(Rank, Vec<u8>)>>,
    stops: Mutex<Sender<Stop>>,
    frames: Mutex<Receiver<Frames>>,
}

/// One rank's part in its generation.
pub(super) struct Gang {
    mesh: Mesh,
    stops: Receiver<Stop>,
    /// Absent once it is being dropped.
    outside: Option<Outside>,
    /// How long it stands still before it looks for what a sum ends with.
    lull: Option<Duration>,
    world: World,
    thread: Option<JoinHandle<()>>,
}

struct Outside {
    operations: Sender<Operation>,
    frames: Sender<Frames>,
}

impl Gang {
    pub(super) fn start(mesh: Mesh, shards: u32, world: World) -> io::Result<Self> {
        let (stopped, stops) = channel();
        let (frames, received) = channel();
        let (operations, work) = channel::<Operation>();
        let inside = Inside { unsent: Mutex::default(), stops: Mutex::new(stopped), frames: Mutex::new(received) };
        let inside = Arc::new(inside);
        let (rank, world_size) = (Rank(mesh.rank), mesh.world);
        let plant = planted_here();
        let thread = std::thread::Builder::new().name(format!("collective-{rank}"));
        let thread = thread.spawn(move || {
            plant();
            let tree = Tree::over(rank, world_size, shards, Arc::clone(&inside) as Arc<dyn Links>);
            for operation in work {
                operation(&tree);
                inside.stop(None);
            }
        })?;
        let outside = Some(Outside { operations, frames });
        Ok(Self { mesh, stops, outside, lull: None, world, thread: Some(thread) })
    }

    /// Stands still for so long in the next sum, once it has sent all that the others need.
    pub(super) fn lull(&mut self, length: Duration) {
        self.lull = Some(length);
    }

    pub(super) fn rank(&self) -> u32 {
        self.mesh.rank
    }

    pub(super) fn world(&self) -> u32 {
        self.mesh.world
    }

    /// Runs an operation that all ranks take part in. After an error the gang is of no use any more (COLL-2).
    pub(super) async fn operate<R: Send + 'static>(
        &mut self,
        operation: impl FnOnce(&Tree) -> Result<R, Error> + Send + 'static,
    ) -> io::Result<R> {
        let world = self.world.clone();
        let gone = || {
            world.violated("COLL-2", "a collective has panicked");
            io::Error::other("the collective's thread is gone")
        };
        let Some(outside) = &self.outside else { return Err(gone()) };
        let (done, result) = channel();
        let run = move |tree: &Tree| {
            // Nobody waits for it where its toy was killed meanwhile.
            let _ = done.send(operation(tree));
        };
        outside.operations.send(Box::new(run)).map_err(|_| gone())?;
        let mut waits = 0;
        loop {
            // It runs now, and nothing else does.
            let stop = self.stops.recv().map_err(|_| gone())?;
            let mut lost = None;
            for (to, frame) in stop.sends {
                if let Err(error) = self.mesh.send(to.0, &frame).await {
                    lost.get_or_insert((to, error));
                }
            }
            let Some(from) = stop.awaits else {
                return result.recv().map_err(|_| gone())?.map_err(io::Error::other);
            };
            waits += 1;
            if waits == 2
                && let Some(lull) = self.lull.take()
            {
                sleep(lull).await;
            }
            let frames = match lost {
                Some(lost) => Err(lost),
                None => self.mesh.frames(&from).await,
            };
            outside.frames.send(frames).map_err(|_| gone())?;
        }
    }
}

impl Drop for Gang {
    fn drop(&mut self) {
        self.outside = None;
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

impl Inside {
    fn unsent(&self) -> MutexGuard<'_, Vec<(Rank, Vec<u8>)>> {
        self.unsent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self, awaits: Option<Vec<Rank>>) {
        let sends = std::mem::take(&mut *self.unsent());
        // Without its gang it is about to end.
        let _ = self.stops.lock().unwrap_or_else(PoisonError::into_inner).send(Stop { sends, awaits });
    }
}

impl Links for Inside {
    fn send(&self, to: Rank, frame: Vec<u8>) -> io::Result<()> {
        self.unsent().push((to, frame));
        Ok(())
    }

    fn receive(&self, from: &[Rank]) -> Frames {
        self.stop(Some(from.to_vec()));
        let frames = self.frames.lock().unwrap_or_else(PoisonError::into_inner).recv();
        frames.unwrap_or_else(|_| {
            let first = from.first().copied().unwrap_or_default();
            Err((first, io::ErrorKind::BrokenPipe.into()))
        })
    }
}

/// Plants on another thread what is planted on this one.
#[cfg(feature = "mutants")]
fn planted_here() -> impl FnOnce() + Send {
    let present = thaw_mutants::present();
    move || thaw_mutants::plant(present)
}

#[cfg(not(feature = "mutants"))]
fn planted_here() -> impl FnOnce() + Send {
    || ()
}
