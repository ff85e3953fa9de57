//! Times the sum of a vector over processes of this host, as a training step would ask for it: a gradient where trainers keep theirs, summed
//! in place.
//!
//! `cargo run --example all_reduce -- RANKS MEGABYTES ROUNDS [tcp] [recorded]` prints one JSON line: seconds of each round, as rank 0 saw them;
//! where operations are recorded, as an agent has its trainers do it, also the seconds that recording one takes.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use thaw_node::collective::{Abort, Collective as _, HostId, Listener, Membership, Options, Record, Ring};
use thaw_proto::ids::{Generation, Rank};
use thaw_proto::worker::CollectiveKind;
use thaw_torch::runtime::{tensor_in, with_slice_f32_mut};
use thaw_torch::tch::{Device, Kind, Tensor};

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("rank") => rank(&arguments[1..]),
        Some(_) => gang(&arguments),
        None => anyhow::bail!("usage: all_reduce RANKS MEGABYTES ROUNDS [tcp] [recorded]"),
    }
}

/// Starts the ranks, tells them each other's addresses, and passes on what rank 0 says.
fn gang(arguments: &[String]) -> anyhow::Result<()> {
    let ranks: usize = arguments[0].parse()?;
    let mut children = Vec::new();
    let mut addresses = Vec::new();
    for rank in 0..ranks {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("rank").arg(rank.to_string()).args(arguments);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().ok_or_else(|| anyhow::anyhow!("no pipe"))?);
        let mut line = String::new();
        lines.read_line(&mut line)?;
        addresses.push(line.trim().to_owned());
        children.push((child, lines));
    }
    for (child, _) in &mut children {
        writeln!(child.stdin.as_mut().ok_or_else(|| anyhow::anyhow!("no pipe"))?, "{}", addresses.join(" "))?;
    }
    for (rank, (mut child, mut lines)) in children.into_iter().enumerate() {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut lines, &mut text)?;
        anyhow::ensure!(child.wait()?.success(), "rank {rank} failed");
        if rank == 0 {
            std::io::stdout().write_all(text.as_bytes())?;
        }
    }
    Ok(())
}

fn rank(arguments: &[String]) -> anyhow::Result<()> {
    let number = |at: usize| arguments[at].parse::<u32>();
    let (rank, ranks, megabytes, rounds) = (number(0)?, number(1)?, number(2)? as usize, number(3)?);
    let asks = |word: &str| arguments[4..].iter().any(|argument| argument == word);
    let ring = if asks("recorded") { Some(Arc::new(Ring::create()?)) } else { None };
    let (listener, address) = Listener::bind("127.0.0.1")?;
    let listener = listener.recording(ring.clone());
    writeln!(std::io::stdout(), "{address}")?;
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    let membership = Membership {
        run: "bench".to_owned(),
        generation: Generation(1),
        rank: Rank(rank),
        addresses: line.split_whitespace().map(str::to_owned).collect(),
        key: b"bench".to_vec(),
    };
    let host = if asks("tcp") { None } else { HostId::of_this_machine() };
    let options = Options { shards: ranks, connect_deadline: LIMIT, operation_deadline: LIMIT, host };
    let tree = listener.connect(&membership, options, &Abort::default())?;
    let elements = megabytes * 1_000_000 / size_of::<f32>();
    let mut gradient = match tree.lease(elements * size_of::<f32>()) {
        Some(lease) => tensor_in(lease, Kind::Float, elements)?,
        None => Tensor::zeros([i64::try_from(elements)?], (Kind::Float, Device::Cpu)),
    };
    #[expect(clippy::cast_precision_loss, reason = "a gang has few ranks")]
    let expected = ranks as f32;
    let mut seconds = Vec::new();
    for _ in 0..=rounds {
        let _ones = gradient.fill_(1.0);
        // All begin together.
        tree.all_gather(&[])?;
        let began = Instant::now();
        with_slice_f32_mut(&mut gradient, |values| tree.reduce_in_place_f32(values))??;
        seconds.push(began.elapsed().as_secs_f64());
        let is_sum = |values: &[f32]| values.iter().all(|value| value.to_bits() == expected.to_bits());
        anyhow::ensure!(with_slice_f32_mut(&mut gradient, |values| is_sum(values))?, "the sum is wrong");
    }
    // The first round touches the memory.
    seconds.remove(0);
    let recording = ring.map(|ring| recording(&Record::of(Some(ring), Generation(1))));
    let report =
        serde_json::json!({"seconds": seconds, "shared_memory": tree.ranks_here() > 1, "recording": recording});
    writeln!(std::io::stdout(), "{report}")?;
    Ok(())
}

/// Seconds that it takes to record one operation, its begin and its end.
fn recording(record: &Record) -> f64 {
    const OPERATIONS: u32 = 1_000_000;
    let began = Instant::now();
    for sequence in 0..OPERATIONS {
        let entry = record.begin(CollectiveKind::ReduceF32, sequence.into(), 1 << 20);
        record.end(entry, true);
    }
    began.elapsed().as_secs_f64() / f64::from(OPERATIONS)
}
