//! From sources to what the model says: greedy and beam search or sampling over the model's own `forward`, with key/value
//! caches.
//!
//! Greedy is a beam of 1. All live hypotheses of all sources are one batch of rows, a token each; sources that are done
//! leave it, and others take their places. What comes back for a source depends on that source alone, by the rules of
//! [`crate::ops`]: not on the batch, its order, the number of threads, or on the caches, which hold what
//! [`Transformer::decode`] would compute again.
//!
//! A token is chosen in this order: a [`Processor`] may replace the model's logits; repeated tokens are penalised; what
//! is forbidden falls to −∞ ([`GenerateOptions`]); the search, or the draw ([`Sampling`]), takes from what is left. A token
//! that is forced skips all of it.
//!
//! BOS and PAD are never generated: a BOS would end nothing, and a PAD would be dropped as padding when the ids are fed
//! back. Their probability stays in `token_logprobs`, which are the raw model's and equal [`Transformer::score`] bit for bit.
//! A source may be empty: attention to no keys gives zeros.

mod beam;
mod choice;
mod constraints;
mod decoding;
mod draft;
mod hypothesis;
mod memory;
mod options;
mod sampling;

pub use crate::kernels::top_k::Entry;
pub use choice::Processor;
pub use decoding::Decoding;
pub use hypothesis::Hypothesis;
pub use options::{GenerateOptions, Length, Plan};
pub use sampling::{Sampling, Seeds};

use crate::ensure;
use crate::error::Result;
use crate::models::{DecoderState, Transformer};
use crate::rows::Rows;
use crate::tape::{Params, Pool, Tape, Tensor, Var};
use crate::threads;

/// A model that is ready to speak.
#[derive(Clone, Copy, Debug)]
pub struct Loaded<'a> {
    /// What it is made of.
    pub layers: &'a Transformer,
    /// Its weights.
    pub params: &'a Params<f32>,
}

impl Loaded<'_> {
    /// The state before the first token of sources.
    fn start(self, tape: &mut Tape<f32>, src: &[u32], rows: &Rows) -> Result<DecoderState<f32>> {
        let memory = self.layers.encode(tape, self.params, src, rows)?;
        self.layers.start(tape, self.params, memory, rows)
    }

    /// The logits of these rows of the hidden states (R, D).
    fn logits(self, tape: &mut Tape<f32>, hidden: Var, asked: impl Iterator<Item = usize>) -> Result<Tensor<f32>> {
        let hidden = some_rows(tape, hidden, &asked.collect::<Vec<_>>())?;
        let logits = self.layers.logits(tape, self.params, hidden)?;
        tape.take(logits)
    }
}

/// Puts sequences behind those that are there.
fn join(all: &mut Option<DecoderState<f32>>, more: DecoderState<f32>) {
    match all {
        Some(all) => all.join(more),
        None => *all = Some(more),
    }
}

/// The best hypotheses of every source, best first. `src` holds the ids of the sources one after the other, as `rows` says. A draft
/// makes few hypotheses faster, and no difference to them.
///
/// Not finite logits are [`crate::error::Error::NonFinite`] with the step and the source; a source whose caches could
/// outgrow the machine's memory is refused before anything starts.
pub fn hypotheses(
    model: Loaded<'_>,
    draft: Option<Loaded<'_>>,
    pool: &mut Pool<f32>,
    src: &[u32],
    rows: &Rows,
    options: &GenerateOptions,
    mut processor: Option<&mut Processor<'_>>,
) -> Result<Vec<Vec<Hypothesis>>> {
    ensure!(src.len() == rows.total(), Shape, "hypotheses: {} ids for rows of {}", src.len(), rows.total());
    let plans = options.plans(model.layers.config(), rows, 0..)?;
    let mut found = vec![Vec::new(); plans.len()];
    let mut decoding = Decoding::new(model.layers, draft.map(|draft| draft.layers), options, processor.is_some())?;
    decoding.push(plans, src)?;
    threads::section(None, || {
        while decoding.sources() > 0 {
            for (source, best) in decoding.step(model, draft, pool, processor.as_deref_mut())? {
                found[source] = best;
            }
        }
        Ok(found)
    })
}

/// Runs an evaluation that records nothing on buffers of the pool, and gives them back, also after an error.
fn on_tape<R>(pool: &mut Pool<f32>, body: impl FnOnce(&mut Tape<f32>) -> Result<R>) -> Result<R> {
    let mut tape = Tape::evaluation(std::mem::take(pool));
    let result = body(&mut tape);
    *pool = tape.into_pool();
    result
}

/// These rows of x (R, D), in their order.
fn some_rows(tape: &mut Tape<f32>, x: Var, rows: &[usize]) -> Result<Var> {
    let (all, d) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    if rows.iter().copied().eq(0..all) {
        return Ok(x);
    }
    let mut some = tape.pool.tensor(rows.len(), d)?;
    for (to, &row) in some.chunks_mut(d).zip(rows) {
        to.copy_from_slice(tape.value(x)?.row(row));
    }
    Ok(tape.constant(some))
}

#[cfg(test)]
mod tests;
