//! Checkpoints of toys, through the real store; and what is said of them.

use super::pipes::hear;
use super::{Over, Toy};
use crate::one_stage::{evaluation, position};
use crate::world::{ToyManifest, Weights};
use thaw_node::checkpoint::{self, CheckpointStore};
use thaw_proto::ids::{Generation, Step};
use thaw_proto::pb;
use thaw_proto::pb::trainer_report::Event;
use thaw_proto::run::CheckpointRef;
use tokio::time::sleep;

impl Toy {
    pub(super) async fn load(&mut self, resume: &pb::CheckpointRef) -> Result<(u64, Weights), Over> {
        sleep(self.dice.millis(1..self.hazards.slowest_ms + 2)).await;
        let checkpoint = CheckpointRef::try_from(resume).map_err(|_| Over::Dies(5))?;
        let loaded = with_store(&self.start, move |store| {
            let bytes = store.get_manifest(&checkpoint)?;
            let manifest: Option<ToyManifest> = serde_json::from_slice(&bytes).ok();
            Ok(match manifest {
                Some(manifest) => Some((manifest.step, store.get_blob(&manifest.blob)?)),
                None => None,
            })
        });
        match loaded {
            Ok(Some((step, blob))) => {
                let weights = Weights::try_from(&blob[..]).map_err(|_| Over::Dies(6))?;
                Ok((step, weights))
            }
            Ok(None) => Err(Over::Dies(6)),
            Err(error) => {
                self.world.violated("CKPT-3", format!("the head of {} cannot be loaded: {error}", self.start.run));
                Err(Over::Dies(6))
            }
        }
    }

    pub(super) async fn save(&mut self, rank: u32, step: u64, weights: &Weights) -> Result<(), Over> {
        let (start, generation) = (&self.start, self.generation);
        sleep(self.dice.millis(1..self.hazards.slowest_ms + 2)).await;
        let bytes = weights.to_vec();
        let folder = std::path::PathBuf::from(start.run_url.trim_start_matches("file://"));
        let path = folder.join(thaw_core::manifest::blob_name(&blake3::hash(&bytes).to_hex()));
        // What is there already is not written again, so no writer tears it.
        let torn = self.dice.permille(self.hazards.torn) && !path.exists();
        let blob = with_store(start, move |store| {
            let blob = store.put_blob(vec![bytes.into()])?;
            if torn {
                let _torn = std::fs::write(path, b"torn");
            }
            Ok(blob)
        });
        let Ok(blob) = blob else { return Err(Over::lost("storage refuses")) };
        if torn {
            self.world.say(format!("{} dies with a torn blob", self.life));
            return Err(Over::Dies(137));
        }
        sleep(self.dice.millis(1..self.hazards.slowest_ms + 2)).await;
        let manifest = ToyManifest { run: start.run.clone(), generation, step, rank, blob };
        let json = serde_json::to_vec(&manifest).unwrap_or_default();
        let written = with_store(start, move |store| store.put_manifest(Generation(generation), Step(step), json));
        let Ok(written) = written else { return Err(Over::lost("the manifest is another's")) };
        if self.dice.permille(self.hazards.zombies) {
            let other = serde_json::to_vec(&ToyManifest { rank: rank + 100, ..manifest }).unwrap_or_default();
            let put = with_store(start, move |store| store.put_manifest(Generation(generation), Step(step), other));
            if !matches!(put, Err(checkpoint::Error::Fenced { .. })) {
                self.world.violated("CKPT-1", "a manifest is written twice with different words");
            }
        }
        let (manifest, manifest_blake3) = (written.path, written.blake3);
        let checkpoint = pb::CheckpointRef { position: Some(position(step)), generation, manifest, manifest_blake3 };
        self.world.reports(&start.run, rank, &checkpoint);
        self.report(Event::Checkpoint(pb::CheckpointWritten { checkpoint: Some(checkpoint) }));
        Ok(())
    }

    /// Waits until the last checkpoint is the head, then says that the run has finished; or that it stands still, where it is asked to.
    pub(super) async fn finish(&mut self, step: u64) -> Result<(), Over> {
        let generation = self.generation;
        let mut ears = self.ears.clone();
        let is_last = |head: &pb::CheckpointCommitted| {
            let at = head.checkpoint.as_ref().and_then(|checkpoint| checkpoint.position);
            head.generation == generation && at.map(|at| at.step) == Some(step)
        };
        let finishes = hear(&mut ears, |heard| match () {
            () if heard.head.as_ref().is_some_and(is_last) => Some(true),
            () if heard.suspend == generation => Some(false),
            () => None,
        });
        match finishes.await {
            Some(true) => self.report(finished(&self.start, step)),
            Some(false) => self.report(Event::Suspended(pb::Suspended {})),
            None => return Err(Over::Dies(1)),
        }
        Ok(())
    }

    /// Says, now and then, what no trainer may be believed: that the run has finished before its last step is committed, or,
    /// from another rank than 0, that a checkpoint asks to become the head.
    pub(super) fn lie(&mut self, rank: u32, step: u64, last_step: u64) {
        if !self.dice.permille(self.hazards.lies) {
            return;
        }
        if rank == 0 {
            return self.report(finished(&self.start, last_step));
        }
        let generation = self.generation;
        let checkpoint = pb::CheckpointRef {
            position: Some(position(step)),
            generation,
            manifest: thaw_core::manifest::file_name(Generation(generation), Step(step)),
            manifest_blake3: "00".repeat(32),
        };
        self.report(Event::Checkpoint(pb::CheckpointWritten { checkpoint: Some(checkpoint) }));
    }
}

/// Works on the run's folder. On a thread of its own, since the store drives a runtime; nobody else moves meanwhile.
fn with_store<T: Send>(
    start: &pb::StartTrainer,
    work: impl FnOnce(&CheckpointStore) -> Result<T, checkpoint::Error> + Send,
) -> Result<T, checkpoint::Error> {
    let url = start.run_url.clone();
    #[cfg(feature = "mutants")]
    let planted = thaw_mutants::present();
    std::thread::scope(|scope| {
        let working = scope.spawn(move || {
            #[cfg(feature = "mutants")]
            thaw_mutants::plant(planted);
            let url = url.parse().map_err(|_| checkpoint::Error::Panicked)?;
            work(&CheckpointStore::open(&url)?)
        });
        working.join().unwrap_or(Err(checkpoint::Error::Panicked))
    })
}

fn finished(start: &pb::StartTrainer, step: u64) -> Event {
    let result = pb::RunResult {
        test: Some(evaluation(step)),
        best: Some(evaluation(step)),
        weights_blake3: "abc".to_owned(),
        model: format!("{}model/", start.run_url),
        steps: step,
        seconds: 2.0,
    };
    Event::Finished(pb::RunFinished { result: Some(result), reason: pb::RunReason::LastStageEnded.into() })
}
