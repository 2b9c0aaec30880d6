//! Calls of several threads that decode with one model in the same way are one batch: weights are read once for all of them.
//!
//! The first caller leads: it advances the decoding, admits between two steps what others ask for, and delivers to them what is
//! done. When its own answers are there, one of those who wait leads on. What comes back for a source depends on that source
//! alone, so nobody can tell. Where the decoding breaks off, by an interrupt or by weights that changed between two leaders, each
//! of the others decodes alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use transformer_core::error::Result;
use transformer_core::generate::{Decoding, GenerateOptions, Hypothesis, Loaded, Plan};
use transformer_core::tape::Pool;
use transformer_core::threads::briefly;

/// Hypotheses of a batch at most: with more, callers wait longer for each other than they gain.
const MOST: usize = 64;

/// What the callers of a batch have in common.
#[derive(PartialEq)]
pub struct Kind {
    options: GenerateOptions,
    /// Where the draft lies; callers keep it alive.
    draft: Option<usize>,
    threads: Option<usize>,
    /// A child has its parent's batches, but not the threads that lead them.
    process: u32,
}

/// The batches of a model.
#[derive(Default)]
pub struct Batches(Mutex<Vec<Arc<Batch>>>);

struct Batch {
    kind: Kind,
    state: Mutex<State>,
    news: Condvar,
}

#[derive(Default)]
struct State {
    /// Those who have joined and not left, and all who ever joined.
    callers: usize,
    joined: usize,
    /// Hypotheses of sources that are not done.
    rows: usize,
    /// Sources are counted through: the number of the next one.
    next: usize,
    /// What the next step is to admit.
    requests: Vec<Request>,
    /// By the number of a caller's first source; gone for a caller who is to decode alone.
    answers: BTreeMap<usize, Vec<Option<Vec<Hypothesis>>>>,
    /// Whether somebody leads, and what the next one goes on with.
    led: bool,
    decoding: Option<Box<Decoding>>,
}

/// The sources of a caller.
struct Request {
    first: usize,
    plans: Vec<Plan>,
    ids: Vec<u32>,
}

/// A call that has joined a batch.
pub struct Caller<'a> {
    batches: &'a Batches,
    batch: Arc<Batch>,
    /// The number of its first source.
    first: usize,
}

/// What a caller does next.
pub enum Turn<'a> {
    Done(Vec<Vec<Hypothesis>>),
    Lead(Leader<'a>),
    Alone,
}

/// A caller while it leads. Where that ends before the decoding is there for the next one, the batch breaks up.
pub struct Leader<'a> {
    caller: &'a Caller<'a>,
    decoding: Option<Box<Decoding>>,
    done: bool,
}

impl Kind {
    pub fn new(options: &GenerateOptions, draft: Option<usize>, threads: Option<usize>) -> Self {
        Kind { options: options.shared(), draft, threads, process: std::process::id() }
    }
}

impl Batches {
    /// Joins a batch of this kind that has room, or begins one; `None` for more sources than a batch has room for.
    pub fn join(&self, kind: Kind, mut plans: Vec<Plan>, ids: &[u32]) -> Option<Caller<'_>> {
        let rows = plans.len().checked_mul(kind.options.width()).filter(|rows| (1..=MOST).contains(rows))?;
        let mut batches = self.look()?;
        let has_room = |batch: &&Arc<Batch>| batch.kind == kind && batch.state().rows + rows <= MOST;
        let batch = match batches.iter().find(has_room) {
            Some(batch) => Arc::clone(batch),
            None => {
                batches.push(Arc::new(Batch { kind, state: Mutex::default(), news: Condvar::new() }));
                Arc::clone(batches.last()?)
            }
        };
        let mut state = batch.state();
        let first = state.next;
        state.next += plans.len();
        state.callers += 1;
        state.joined += 1;
        state.rows += rows;
        state.answers.insert(first, vec![None; plans.len()]);
        plans.iter_mut().zip(first..).for_each(|(plan, number)| plan.source = number);
        state.requests.push(Request { first, plans, ids: ids.to_vec() });
        drop(state);
        Some(Caller { batches: self, batch, first })
    }

    fn look(&self) -> Option<MutexGuard<'_, Vec<Arc<Batch>>>> {
        briefly(|| self.0.try_lock())
    }
}

impl Batch {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the decoding what was asked for. A caller whose request it refuses will hear so when it decodes alone.
    fn admit(&self, decoding: &mut Decoding) {
        let requests = std::mem::take(&mut self.state().requests);
        for Request { first, plans, ids } in requests {
            let rows = plans.len() * self.kind.options.width();
            if decoding.push(plans, &ids).is_err() {
                let mut state = self.state();
                state.rows -= rows;
                state.answers.remove(&first);
                self.news.notify_all();
            }
        }
    }

    /// Leaves what is done for those who asked for it.
    fn deliver(&self, done: Vec<(usize, Vec<Hypothesis>)>) {
        if done.is_empty() {
            return;
        }
        let mut state = self.state();
        for (source, best) in done {
            state.rows -= self.kind.options.width();
            // An interrupted caller has left.
            let caller = state.answers.range_mut(..=source).next_back();
            if let Some(answer) = caller.and_then(|(first, answers)| answers.get_mut(source - first)) {
                *answer = Some(best);
            }
        }
        self.news.notify_all();
    }
}

impl State {
    /// Whether answers of this caller are still to come.
    fn expects(&self, first: usize) -> bool {
        self.answers.get(&first).is_some_and(|answers| answers.contains(&None))
    }
}

impl Caller<'_> {
    /// What to do, if there is something before patience ends.
    pub fn turn(&self, patience: Duration) -> Option<Turn<'_>> {
        let end = Instant::now() + patience;
        let mut state = self.batch.state();
        loop {
            if !state.expects(self.first) {
                let answers = state.answers.remove(&self.first);
                return Some(
                    answers.map_or(Turn::Alone, |answers| Turn::Done(answers.into_iter().flatten().collect())),
                );
            }
            if !state.led {
                state.led = true;
                return Some(Turn::Lead(Leader { caller: self, decoding: state.decoding.take(), done: false }));
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            state = self.batch.news.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether nobody else ever joined its batch.
    pub fn is_the_only_one(&self) -> bool {
        self.batch.state().joined == 1
    }
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        let batches = self.batches.look();
        let mut state = self.batch.state();
        state.answers.remove(&self.first);
        state.callers -= 1;
        // What it asked for and nobody has begun is not begun.
        let State { requests, rows, .. } = &mut *state;
        for request in requests.extract_if(.., |request| request.first == self.first) {
            *rows -= request.plans.len() * self.batch.kind.options.width();
        }
        if let Some(mut batches) = batches.filter(|_| state.callers == 0) {
            batches.retain(|batch| !Arc::ptr_eq(batch, &self.batch));
        }
    }
}

impl Leader<'_> {
    /// Advances the decoding until the leader's own answers are there, or will not come.
    pub fn lead(mut self, model: Loaded<'_>, draft: Option<Loaded<'_>>, pool: &mut Pool<f32>) -> Result<()> {
        let Caller { batch, first, .. } = self.caller;
        let mut decoding = match self.decoding.take() {
            Some(decoding) => decoding,
            None => Box::new(Decoding::new(model.layers, draft.map(|draft| draft.layers), &batch.kind.options, false)?),
        };
        loop {
            batch.admit(&mut decoding);
            if !batch.state().expects(*first) {
                break;
            }
            let done = decoding.step(model, draft, pool, None)?;
            batch.deliver(done);
        }
        self.done = true;
        let mut state = batch.state();
        (state.led, state.decoding) = (false, Some(decoding));
        batch.news.notify_all();
        Ok(())
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        if !self.done {
            let mut state = self.caller.batch.state();
            state.answers.clear();
            state.requests.clear();
            state.rows = MOST; // nobody joins it any more
            self.caller.batch.news.notify_all();
        }
    }
}
