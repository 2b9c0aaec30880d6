//! From logits to what may follow a hypothesis.

use super::Loaded;
use super::beam::{Beam, Candidate, Follow};
use super::constraints::{Constraints, Next};
use super::options::{GenerateOptions, Plan};
use crate::error::Result;
use crate::kernels::softmax::LogSumExp;
use crate::kernels::top_k::{Entry, Finite, Survey, top_k};
use crate::models::TransformerConfig;
use crate::profile::{self, Work};
use crate::rng::Key;
use crate::tape::{Tape, Var};
use crate::threads::for_each;
use crate::{bail, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Replaces the logits of one hypothesis: (its ids so far, the model's logits (V,)) -> logits (V,), −∞ for what must not
/// follow. It is called on the calling thread, hypothesis by hypothesis. Nothing that it returns allows what is forbidden
/// otherwise.
pub type Processor<'a> = dyn FnMut(&[u32], &[f32]) -> Result<Vec<f32>> + 'a;

/// So many likeliest tokens are sought without the logits of all.
const MOST: usize = 64;
/// After so many rows that must have helped half of them.
const TRIES: usize = 64;

/// What decides.
#[derive(Debug)]
pub(super) struct Choice {
    options: Arc<GenerateOptions>,
    constraints: Constraints,
    /// Whether there is a processor.
    processed: bool,
    vocabulary: usize,
    /// Rows of the model so far, and those of them that needed all logits.
    sought: AtomicUsize,
    missed: AtomicUsize,
}

/// A hypothesis whose next token is to be found.
#[derive(Debug)]
pub(super) struct Row<'a> {
    plan: &'a Plan,
    /// How many ids it has, and they, where somebody reads them.
    len: usize,
    ids: Vec<u32>,
    /// Decides what is drawn.
    key: Key,
    /// What a processor made of the logits.
    processed: Option<Vec<f32>>,
}

impl Choice {
    pub fn new(options: Arc<GenerateOptions>, config: &TransformerConfig, processed: bool) -> Self {
        let constraints = Constraints::new(&options, config);
        let (sought, missed) = Default::default();
        Choice { options, constraints, processed, vocabulary: config.tgt_vocab, sought, missed }
    }

    /// Whether values never rise above 0.
    pub fn falls(&self) -> bool {
        !(self.processed || self.constraints.raises())
    }

    /// A live hypothesis, with some tokens more.
    pub fn row<'a>(&self, beam: &'a Beam, live: usize, more: &[u32]) -> Row<'a> {
        let mut ids = Vec::new();
        if self.processed || self.constraints.reads_ids() {
            ids = beam.ids(live);
            ids.extend(more);
        }
        Row { plan: &beam.plan, len: beam.len + more.len(), ids, key: beam.key(live), processed: None }
    }

    /// What may follow each, given the hidden states (R, D) of all of them; `None` where the logits are not finite. Of a `guess`
    /// nothing but the token is of interest.
    pub fn choose(
        &self,
        model: Loaded<'_>,
        tape: &mut Tape<f32>,
        hidden: Var,
        rows: Vec<Row<'_>>,
        guess: bool,
        processor: Option<&mut Processor<'_>>,
    ) -> Result<Vec<Option<Follow>>> {
        let scored = !(guess || self.options.ids_alone());
        let mut follows = match self.deciding(guess).filter(|_| !scored) {
            Some(k) => self.by_likeliest(model, tape, hidden, &rows, k)?,
            None => vec![None; rows.len()],
        };
        let open: Vec<usize> = (0..rows.len()).filter(|&row| follows[row].is_none()).collect();
        if !guess {
            self.sought.fetch_add(rows.len(), Ordering::Relaxed);
            self.missed.fetch_add(open.len(), Ordering::Relaxed);
        }
        if !open.is_empty() {
            let logits = model.logits(tape, hidden, open.iter().copied())?;
            let rows = rows.into_iter().enumerate().filter(|(row, _)| follows[*row].is_none()).map(|(_, row)| row);
            let found = self.by_logits(rows.collect(), &logits, scored, processor);
            tape.pool.recycle(logits);
            open.into_iter().zip(found?).for_each(|(row, found)| follows[row] = found);
        }
        Ok(follows)
    }

    /// How many of the largest logits decide, where they decide alone.
    fn deciding(&self, guess: bool) -> Option<usize> {
        let options = &self.options;
        let (sought, missed) = (self.sought.load(Ordering::Relaxed), self.missed.load(Ordering::Relaxed));
        let hopeless = !guess && sought >= TRIES && missed > sought / 2;
        if hopeless || self.processed || self.constraints.changes() {
            return None;
        }
        match &options.sampling {
            Some(sampling) => sampling.top_k.filter(|&k| k <= MOST),
            None => Some(1),
        }
    }

    /// What follows each, as far as the `k` likeliest tokens say.
    fn by_likeliest(
        &self,
        model: Loaded<'_>,
        tape: &mut Tape<f32>,
        hidden: Var,
        rows: &[Row<'_>],
        k: usize,
    ) -> Result<Vec<Option<Follow>>> {
        let next: Vec<Next<'_>> =
            rows.iter().map(|row| self.constraints.next(row.plan, row.len, &row.ids, &[])).collect();
        let forbidden: Vec<&[(u32, f32)]> = next.iter().map(Next::edits).collect();
        let found = model.layers.likeliest(tape, model.params, hidden, k, &forbidden)?;
        let choose = |((row, next), best): ((&Row<'_>, &Next<'_>), Vec<Entry>)| match (next, &self.options.sampling) {
            (Next::Only(id), _) => Some(*id),
            (_, Some(sampling)) => sampling.draw_from(&best, row.key.uniform(row.len as u64)),
            (_, None) => best.first().map(|entry| entry.id),
        };
        Ok(rows.iter().zip(&next).zip(found).map(|(of, best)| Some(Follow::unscored(choose((of, best?))))).collect())
    }

    /// What may follow each, given the model's logits (R, V); how likely that is, if it is to be `scored`.
    fn by_logits(
        &self,
        mut rows: Vec<Row<'_>>,
        logits: &[f32],
        scored: bool,
        mut processor: Option<&mut Processor<'_>>,
    ) -> Result<Vec<Option<Follow>>> {
        let v = self.vocabulary;
        let _timed = profile::part("choice", [v, 0], || Work::passes::<f32>(1, rows.len(), v));
        for (row, logits) in rows.iter_mut().zip(logits.chunks(v)) {
            if let Some(processor) = processor.as_mut().filter(|_| self.constraints.forced(row.plan, row.len).is_none())
            {
                row.processed = Some(process(*processor, row, logits)?);
            }
        }
        let mut follows = vec![None; rows.len()];
        for_each(rows.iter().zip(logits.chunks(v)).zip(&mut follows), |((row, logits), follow)| {
            *follow = self.candidates(row, logits, scored);
        })?;
        Ok(follows)
    }

    /// What may follow one; `None` where its logits are not finite.
    fn candidates(&self, row: &Row<'_>, logits: &[f32], scored: bool) -> Option<Follow> {
        if scored {
            let (chosen, lse) = self.best(row, logits);
            return self.follow(logits, lse, &chosen);
        }
        let (chosen, finite) = self.best::<Finite<f32>>(row, logits);
        finite.holds().then(|| Follow::unscored(chosen.first().map(|entry| entry.id)))
    }

    /// What is to follow it, best first, and what was learnt of all logits.
    fn best<R: Survey<f32>>(&self, row: &Row<'_>, logits: &[f32]) -> (Vec<Entry>, R) {
        let read = row.processed.as_deref().unwrap_or(logits);
        let of = |id: u32| Entry { id, value: logits[id as usize] };
        let mut survey = None;
        let chosen = match self.constraints.next(row.plan, row.len, &row.ids, read) {
            Next::Only(id) => vec![of(id)],
            Next::All(edits) => match &self.options.sampling {
                Some(sampling) => {
                    sampling.draw(read, &edits, row.key.uniform(row.len as u64)).map(of).into_iter().collect()
                }
                None => {
                    let mut best = vec![Entry::NONE; self.options.beam.saturating_add(1).min(logits.len())];
                    let of_read = top_k(&mut best, read, &edits);
                    survey = row.processed.is_none().then_some(of_read);
                    best.retain(|entry| entry.value > f32::NEG_INFINITY);
                    best
                }
            },
        };
        (chosen, survey.unwrap_or_else(|| top_k(&mut [], logits, &[])))
    }

    /// What was chosen, with what the model says of it; `None` if its logits are not finite.
    pub fn follow(&self, logits: &[f32], lse: LogSumExp<f32>, chosen: &[Entry]) -> Option<Follow> {
        if !(lse.max.is_finite() && lse.log.is_finite()) {
            return None;
        }
        let logprob = |value| lse.log_probability(value);
        let candidates = chosen.iter().map(|&Entry { id, value }| Candidate {
            id,
            logprob: logprob(logits[id as usize]),
            value: logprob(value),
        });
        let mut alternatives = vec![Entry::NONE; self.options.alternatives];
        if !alternatives.is_empty() {
            top_k::<f32, Finite<f32>>(&mut alternatives, logits, &[]);
        }
        alternatives.iter_mut().for_each(|entry| entry.value = logprob(entry.value));
        Some(Follow { candidates: candidates.collect(), alternatives: alternatives.into() })
    }
}

/// Asks a processor, and checks what it says.
fn process(processor: &mut Processor<'_>, row: &Row<'_>, logits: &[f32]) -> Result<Vec<f32>> {
    let processed = processor(&row.ids, logits)?;
    let (token, source) = (row.len, row.plan.source);
    ensure!(
        processed.len() == logits.len(),
        Shape,
        "logits_processor: token {token} of source {source}: expected {} logits, got {}",
        logits.len(),
        processed.len()
    );
    if let Some(id) = processed.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        bail!(
            NonFinite,
            "logits_processor: token {token} of source {source}: expected numbers, or -inf for what must not follow, got {} for id {id}",
            processed[id]
        );
    }
    Ok(processed)
}
