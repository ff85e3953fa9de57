//! One rank of a sum over GPUs, as trainers make it; `tests/gpu` starts them.
//!
//! `gpu_sums FOLDER rank=R world=W [gpu=N] [mib=100] [rounds=20] [act=sum|stall]`: ranks find each other through files in FOLDER. Sums are
//! checked; the last line is `sums ok rank=R bytes=B seconds=S` (median of the rounds). With `act=stall` this rank joins, writes FOLDER/stalled and
//! waits to be killed; the others end with 3 and the error that they got.

#![expect(clippy::print_stdout, reason = "a program for tests reports on stdout")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use thaw_node::collective::{Abort, Collective, HostId, Listener, Membership, Options};
use thaw_proto::ids::{Generation, Rank};
use thaw_torch::cuda;
use thaw_torch::tch::{Device, Kind, Tensor};
use thaw_worker::gpus::{Gpus, Limits};

const CONNECT: Duration = Duration::from_secs(60);
/// Far beyond what a sum takes; a stalled peer that is killed must be noticed sooner.
const OPERATION: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let folder =
        PathBuf::from(arguments.next().ok_or_else(|| anyhow::anyhow!("usage: gpu_sums FOLDER NAME=VALUE ..."))?);
    let given: BTreeMap<String, String> = arguments
        .filter_map(|argument| Some(argument.split_once('=')?).map(|(name, value)| (name.to_owned(), value.to_owned())))
        .collect();
    let number = |name: &str, default: u32| given.get(name).map_or(Ok(default), |value| value.parse::<u32>());
    let (rank, world, gpu) = (number("rank", 0)?, number("world", 1)?, number("gpu", 0)?);
    let (mib, rounds) = (number("mib", 100)?, number("rounds", 20)?);
    let device = cuda::select(gpu as usize)?;
    let host = gang(&folder, rank, world)?;
    let limits = Limits { join: CONNECT, operation: OPERATION, abort: Duration::from_secs(5) };
    let joined = Instant::now();
    let mut gpus = Gpus::join(&host, device, limits)?.ok_or_else(|| anyhow::anyhow!("the gang has no GPUs"))?;
    println!("rank {rank} of {world} joined in {:.2} s", joined.elapsed().as_secs_f64());
    if given.get("act").is_some_and(|act| act == "stall") {
        fs::write(folder.join("stalled"), "")?;
        std::thread::sleep(2 * OPERATION);
        return Ok(ExitCode::FAILURE);
    }
    match sums(&mut gpus, device, (rank, world), i64::from(mib) << 18, rounds) {
        Ok(seconds) => {
            println!("sums ok rank={rank} bytes={} seconds={seconds:.6}", u64::from(mib) << 20);
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            println!("sums failed rank={rank}: {error:#}");
            Ok(ExitCode::from(3))
        }
    }
}

/// Median seconds of a sum of so many elements, after several at once of different sizes.
fn sums(gpus: &mut Gpus, device: Device, (rank, world): (u32, u32), elements: i64, rounds: u32) -> anyhow::Result<f64> {
    let ramp = |elements: i64| Tensor::f_arange(elements, (Kind::Float, device));
    let own =
        |elements: i64| Ok::<_, anyhow::Error>(ramp(elements)?.f_remainder(1024.0)?.f_mul_scalar(f64::from(rank + 1))?);
    let sizes = [1, 1000, 1 << 20, elements];
    let mut tickets = Vec::new();
    for size in sizes {
        tickets.push(gpus.submit(own(size)?)?);
    }
    // Whole numbers, so any order of adding gives the same.
    let factor = f64::from(world * (world + 1) / 2);
    for (size, ticket) in sizes.into_iter().zip(tickets) {
        let expected = ramp(size)?.f_remainder(1024.0)?.f_mul_scalar(factor)?;
        anyhow::ensure!(gpus.wait(ticket)?.equal(&expected), "the sum of {size} elements is wrong");
    }
    let mut seconds = Vec::new();
    let mut buffer = own(elements)?;
    for _ in 0..rounds.max(1) {
        let started = Instant::now();
        let ticket = gpus.submit(buffer)?;
        buffer = gpus.wait(ticket)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

/// Connects the ranks' processes through files with their addresses.
fn gang(folder: &Path, rank: u32, world: u32) -> anyhow::Result<Arc<dyn Collective>> {
    let (listener, address) = Listener::bind("127.0.0.1")?;
    // Whole or not there.
    fs::write(folder.join(format!("partial-{rank}")), &address)?;
    fs::rename(folder.join(format!("partial-{rank}")), folder.join(format!("address-{rank}")))?;
    let begun = Instant::now();
    let mut addresses = Vec::new();
    for other in 0..world {
        addresses.push(loop {
            match fs::read_to_string(folder.join(format!("address-{other}"))) {
                Ok(address) => break address,
                Err(error) if begun.elapsed() > CONNECT => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        });
    }
    let membership = Membership {
        run: "gpu-sums".to_owned(),
        generation: Generation(1),
        rank: Rank(rank),
        addresses,
        key: folder.to_string_lossy().into_owned().into_bytes(),
    };
    let options = Options {
        shards: world,
        connect_deadline: CONNECT,
        operation_deadline: OPERATION,
        host: HostId::of_this_machine(),
    };
    Ok(Arc::new(listener.connect(&membership, options, &Abort::default())?))
}
