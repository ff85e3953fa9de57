//! Micro-batches in a given order, loaded ahead, each entering at the stage's boundary where there is one.

use super::{Error, Micro, Prefix, Row};
use std::collections::VecDeque;
use thaw_data::batch::{Batch, Dataset};
use thaw_data::prefetch::{Prefetch, Work};
use thaw_torch::SegmentedModel;

/// See the module.
pub(crate) struct Source {
    dataset: Dataset,
    /// The same order twice: what is asked for, and what loads it ahead.
    order: Box<dyn Iterator<Item = Work> + Send>,
    prefetch: Prefetch,
    queue: VecDeque<Loaded>,
    /// Micro-batches whose prefixes are computed together.
    window: usize,
    /// Micro-batches at the front of the queue whose prefixes are at hand.
    ready: usize,
}

/// One micro-batch, asked for and perhaps loaded.
struct Loaded {
    work: Work,
    /// `None` where nobody needs its inputs.
    batch: Option<Batch>,
}

impl Source {
    /// Begins to load, `ahead` micro-batches at a time. `prefix` is the one that [`Source::next`] will be given; it runs for `window`
    /// micro-batches (at least one) at a time.
    pub(crate) fn start<I>(
        dataset: &Dataset,
        order: I,
        ahead: usize,
        window: usize,
        prefix: Option<&Prefix>,
    ) -> Result<Self, Error>
    where
        I: Iterator<Item = Work> + Clone + Send + 'static,
    {
        let known = prefix.filter(|prefix| !prefix.needs_inputs()).map(Prefix::known);
        let loading = order.clone().map(move |work| match &known {
            Some(known) if work.samples.iter().all(|sample| known.contains(work.part, *sample, work.view)) => {
                Work { samples: Vec::new(), ..work }
            }
            Some(_) | None => work,
        });
        let prefetch = Prefetch::spawn(dataset.clone(), loading, ahead, 1)?;
        Ok(Self {
            dataset: dataset.clone(),
            order: Box::new(order),
            prefetch,
            queue: VecDeque::new(),
            window: window.max(1),
            ready: 0,
        })
    }

    /// The next micro-batch; `None` after the last.
    pub(crate) fn next(
        &mut self,
        prefix: Option<&mut Prefix>,
        model: &mut SegmentedModel,
    ) -> Option<Result<Micro, Error>> {
        if self.queue.is_empty()
            && let Err(error) = self.load()?
        {
            return Some(Err(error));
        }
        let Some(prefix) = prefix else {
            let Loaded { batch, .. } = self.queue.pop_front()?;
            return batch.map(|batch| Ok(Micro { batch, cut: None }));
        };
        Some(self.cut(prefix, model))
    }

    /// The front of the queue, entering at the boundary.
    fn cut(&mut self, prefix: &mut Prefix, model: &mut SegmentedModel) -> Result<Micro, Error> {
        if self.ready == 0 {
            self.prepare(prefix, model)?;
        }
        self.ready -= 1;
        loop {
            self.fill(0, prefix, model)?;
            let Loaded { work, batch } = self.queue.pop_front().expect("the caller loaded it");
            let needs_inputs = prefix.needs_inputs();
            let mut bare = match &batch {
                Some(batch) if needs_inputs => batch.clone(),
                Some(_) | None => self.bare(&work),
            };
            if needs_inputs && batch.is_none() {
                bare = self.dataset.load(work.part, &work.samples, work.view)?;
            }
            match prefix.assemble(&work, bare)? {
                Ok(micro) => return Ok(micro),
                // The cache lost it since; it is computed now.
                Err(_) => self.queue.push_front(Loaded { work, batch }),
            }
        }
    }

    /// Computes what the next window lacks.
    fn prepare(&mut self, prefix: &mut Prefix, model: &mut SegmentedModel) -> Result<(), Error> {
        while self.queue.len() < self.window {
            match self.load() {
                Some(loaded) => loaded?,
                None => break,
            }
        }
        self.ready = self.queue.len().min(self.window);
        (0..self.ready).try_for_each(|place| self.fill(place, prefix, model))
    }

    /// Computes what a place of the queue lacks, chunk by chunk, with companions from the rest of it and from further back.
    fn fill(&mut self, place: usize, prefix: &mut Prefix, model: &mut SegmentedModel) -> Result<(), Error> {
        loop {
            let front = self.queue.get_mut(place).expect("the caller loaded it");
            let (part, view) = (front.work.part, front.work.view);
            let Some(missing) = front.work.samples.iter().position(|sample| !prefix.has(part, *sample, view)) else {
                return Ok(());
            };
            let batch = match front.batch.take() {
                Some(batch) => batch,
                None => self.dataset.load(part, &front.work.samples, view)?,
            };
            let class = prefix.shapes.class(batch.lengths.get(missing).copied());
            front.batch = Some(batch);
            let (most, ahead) = (prefix.shapes.samples(class), prefix.shapes.ahead(part));
            let mut rows = self.companions(prefix, class, most);
            while rows.len() < most && self.queue.iter().map(|loaded| loaded.work.samples.len()).sum::<usize>() < ahead
            {
                match self.load() {
                    Some(loaded) => loaded?,
                    None => break,
                }
                rows = self.companions(prefix, class, most);
            }
            let row = |(place, row): (usize, usize)| {
                let Loaded { work, batch } = &self.queue[place];
                Some(Row { batch: batch.as_ref()?, row, view: work.view })
            };
            let rows: Vec<Row<'_>> = rows.into_iter().filter_map(row).collect();
            prefix.compute(model, part, &rows)?;
        }
    }

    /// Rows of the queue (place, row) that are missing and of this class, in order, at most so many.
    fn companions(&self, prefix: &Prefix, class: usize, most: usize) -> Vec<(usize, usize)> {
        let part = self.queue.front().expect("the caller loaded it").work.part;
        let mut found = Vec::with_capacity(most);
        for (place, loaded) in self.queue.iter().enumerate() {
            let Some(batch) = loaded.batch.as_ref().filter(|_| loaded.work.part == part) else { continue };
            for (row, sample) in batch.samples.iter().enumerate() {
                if found.len() == most {
                    return found;
                }
                let view = loaded.work.view;
                let is_twice = found.iter().any(|(place, row): &(usize, usize)| {
                    let Loaded { work, batch } = &self.queue[*place];
                    work.view == view && batch.as_ref().is_some_and(|batch| batch.samples[*row] == *sample)
                });
                let same_class = prefix.shapes.class(batch.lengths.get(row).copied()) == class;
                if same_class && !is_twice && !prefix.has(part, *sample, view) {
                    found.push((place, row));
                }
            }
        }
        found
    }

    /// Takes one more micro-batch into the queue; `None` after the last.
    fn load(&mut self) -> Option<Result<(), Error>> {
        let work = self.order.next()?;
        let batch = match self.prefetch.next()? {
            Ok(batch) => batch,
            Err(error) => return Some(Err(error.into())),
        };
        let skipped = batch.samples.len() < work.samples.len();
        self.queue.push_back(Loaded { work, batch: Some(batch).filter(|_| !skipped) });
        Some(Ok(()))
    }

    /// Labels and positions without inputs.
    fn bare(&self, work: &Work) -> Batch {
        let label = |sample: &u32| self.dataset.index().label(work.part, *sample).map_or(0, i64::from);
        Batch {
            inputs: Vec::new(),
            labels: work.samples.iter().map(label).collect(),
            samples: work.samples.clone(),
            lengths: Vec::new(),
        }
    }
}
