//! What a process knows of a key's records.

use std::collections::hash_map::Entry as Slot;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::TierName;
use crate::entry::{Entry, Tensor};
use crate::segment::{Payloads, Reading};

/// A record that is there: what it holds, and where. Cheap to clone; stays readable as long as it is held.
#[derive(Debug, Clone)]
pub struct Record(pub(crate) Arc<Stored>);

#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) sample: u32,
    pub(crate) view: u16,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) sum: u64,
    pub(crate) tensors: Arc<[Tensor]>,
    pub(crate) payloads: Arc<Payloads>,
    /// This process has read it whole, and its sum was right.
    pub(crate) verified: AtomicBool,
}

impl Record {
    /// The tensors of its payload, in order.
    #[must_use]
    pub fn tensors(&self) -> &[Tensor] {
        &self.0.tensors
    }

    /// Bytes of all its tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// Where it is kept.
    #[must_use]
    pub fn tier(&self) -> TierName {
        self.0.payloads.tier
    }
}

/// All records that are known of one key.
#[derive(Debug, Default)]
pub(crate) struct Index {
    pub(crate) records: HashMap<(u32, u16), Record>,
    /// Further copies of a record, which processes wrote that did not know of each other's.
    spares: HashMap<(u32, u16), Vec<Record>>,
    /// Shapes repeat: each list is kept once.
    shapes: HashSet<Arc<[Tensor]>>,
    pub(crate) segments: Vec<Reading>,
    /// Index files that are followed.
    pub(crate) known: HashSet<PathBuf>,
}

impl Index {
    /// Adds a record, or a further copy of one.
    pub(crate) fn insert(&mut self, payloads: &Arc<Payloads>, entry: Entry) {
        let tensors = match self.shapes.get(entry.tensors.as_slice()) {
            Some(tensors) => Arc::clone(tensors),
            None => {
                let tensors: Arc<[Tensor]> = entry.tensors.into();
                self.shapes.insert(Arc::clone(&tensors));
                tensors
            }
        };
        let (sample, view) = (entry.sample, entry.view);
        let (payloads, verified) = (Arc::clone(payloads), AtomicBool::new(false));
        let stored = Stored {
            sample,
            view,
            offset: entry.offset,
            bytes: entry.bytes,
            sum: entry.sum,
            tensors,
            payloads,
            verified,
        };
        match self.records.entry((sample, view)) {
            Slot::Vacant(slot) => {
                slot.insert(Record(Arc::new(stored)));
            }
            Slot::Occupied(_) => self.spares.entry((sample, view)).or_default().push(Record(Arc::new(stored))),
        }
    }

    /// Forgets a damaged record; a spare copy takes its place.
    pub(crate) fn forget(&mut self, damaged: &Record) {
        let at = (damaged.0.sample, damaged.0.view);
        if self.records.get(&at).is_some_and(|record| Arc::ptr_eq(&record.0, &damaged.0)) {
            match self.spares.get_mut(&at).and_then(Vec::pop) {
                Some(spare) => self.records.insert(at, spare),
                None => self.records.remove(&at),
            };
        }
    }
}
