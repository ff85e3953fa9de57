//! Times the sum of a vector over processes of this host, as a training step would ask for it.
//!
//! `cargo run --example all_reduce -- RANKS MEGABYTES ROUNDS [tcp]` prints one JSON line: seconds of each round, as rank 0 saw them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use thaw_proto::ids::{Generation, Rank};
use thaw_worker::collective::{Collective as _, Listener, Membership, Options};

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("rank") => rank(&arguments[1..]),
        Some(_) => gang(&arguments),
        None => anyhow::bail!("usage: all_reduce RANKS MEGABYTES ROUNDS [tcp]"),
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
    let (listener, address) = Listener::bind("127.0.0.1")?;
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
    let shared_memory = arguments.get(4).is_none_or(|transport| transport != "tcp");
    let options = Options { shards: ranks, connect_deadline: LIMIT, operation_deadline: LIMIT, shared_memory };
    let tree = listener.connect(&membership, options)?;
    let elements = megabytes * 1_000_000 / size_of::<f32>();
    let part = vec![1.0_f32; elements];
    let mut sum = vec![0.0_f32; elements];
    let mut seconds = Vec::new();
    for _ in 0..=rounds {
        // All begin together.
        tree.all_gather(&[])?;
        let began = Instant::now();
        tree.reduce_shards_f32(&[&part], &mut sum)?;
        seconds.push(began.elapsed().as_secs_f64());
    }
    #[expect(clippy::cast_precision_loss, reason = "a gang has few ranks")]
    let expected = ranks as f32;
    anyhow::ensure!(sum.iter().all(|value| value.to_bits() == expected.to_bits()), "the sum is wrong");
    // The first round touches the memory.
    seconds.remove(0);
    let report = serde_json::json!({"seconds": seconds, "shared_memory": tree.shares_memory()});
    writeln!(std::io::stdout(), "{report}")?;
    Ok(())
}
