//! From sources to what the model says: greedy and beam search over the model's own `forward`, with key/value caches.
//!
//! Greedy is a beam of 1. All live hypotheses of all sources are one batch of rows, a token each; sources that are done
//! leave it. What comes back for a source depends on that source alone, by the rules of [`crate::ops`]: not on the batch,
//! its order, the number of threads, or on the caches, which hold what [`Transformer::decode`] would compute again.
//!
//! BOS and PAD are never generated: a BOS would end nothing, and a PAD would be dropped as padding when the ids are fed
//! back. Their probability stays in `token_logprobs`, which are the raw model's and equal [`Transformer::score`] bit for bit.
//! A source may be empty: attention to no keys gives zeros.

mod beam;
mod options;
mod top_k;

pub use options::{CrossAttention, GenerateOptions, Hypothesis};

use crate::error::Result;
use crate::models::{DecoderState, Transformer};
use crate::rows::Rows;
use crate::tape::{Params, Pool, Tape, Tensor};
use crate::{bail, ensure, threads};
use beam::Beam;
use top_k::Token;

/// The best hypotheses of every source, best first. `src` holds the ids of the sources one after the other, as `rows` says.
///
/// Not finite logits are [`crate::error::Error::NonFinite`] with the step and the source.
pub fn hypotheses(
    model: &Transformer,
    pool: &mut Pool<f32>,
    params: &Params<f32>,
    src: &[u32],
    rows: &Rows,
    options: &GenerateOptions,
) -> Result<Vec<Vec<Hypothesis>>> {
    ensure!(src.len() == rows.total(), Shape, "hypotheses: {} ids for rows of {}", src.len(), rows.total());
    let max_len = options.check(model.config(), rows)?;
    if rows.sequences() == 0 {
        return Ok(Vec::new());
    }
    threads::section(None, || {
        let (memory, state) = on_tape(pool, |tape| {
            let memory = model.encode(tape, params, src, rows)?;
            let state = model.start(tape, params, memory, rows)?;
            Ok((options.attention.then(|| tape.take(memory)).transpose()?, state))
        })?;
        let beams = max_len.iter().map(|&max_len| Beam::new(options, max_len)).collect();
        let mut search = Search { model, params, options, state, beams, best: Vec::new(), len: 0 };
        while search.step(pool)? {}
        let mut found: Vec<Vec<Hypothesis>> = search.beams.into_iter().map(Beam::into_best).collect();
        if let Some(memory) = memory {
            attend(model, pool, params, memory, rows, &mut found)?;
        }
        Ok(found)
    })
}

/// A decoding under way.
struct Search<'a> {
    model: &'a Transformer,
    params: &'a Params<f32>,
    options: &'a GenerateOptions,
    /// One sequence for every live hypothesis: those of the first source, of the second, ...
    state: DecoderState<f32>,
    beams: Vec<Beam>,
    best: Vec<Token>,
    /// Ids of every live hypothesis.
    len: usize,
}

impl Search<'_> {
    /// Adds a token to every live hypothesis; false when there is none.
    fn step(&mut self, pool: &mut Pool<f32>) -> Result<bool> {
        let Search { model, params, options, state, beams, best, len } = self;
        let config = model.config();
        let tokens: Vec<u32> = beams.iter().flat_map(|beam| beam.last_tokens(config.bos_id)).collect();
        if tokens.is_empty() {
            return Ok(false);
        }
        let mut logits = on_tape(pool, |tape| {
            let hidden = model.advance(tape, params, &tokens, &Rows::from_lengths(&vec![1; tokens.len()]), state)?;
            let logits = model.logits(tape, params, hidden)?;
            tape.take(logits)
        })?;

        let k = options.beam.saturating_add(1).min(config.tgt_vocab);
        best.resize(tokens.len() * k, Token { id: 0, logprob: 0.0 });
        let too_early = (*len < options.min_len).then_some(config.eos_id);
        let forbidden: Vec<u32> = [Some(config.bos_id), config.pad_id, too_early].into_iter().flatten().collect();
        if let Some(row) = top_k::likeliest(best, k, &mut logits, config.tgt_vocab, &forbidden)? {
            let source = beams.iter().enumerate().flat_map(|(i, beam)| vec![i; beam.alive()]).nth(row).unwrap_or(0);
            bail!(
                NonFinite,
                "decoding: token {len} of source {source}: the logits are not finite; is there NaN in the weights?"
            );
        }
        pool.recycle(logits);

        let mut parents = Vec::with_capacity(tokens.len());
        let mut row = 0;
        for beam in beams {
            let alive = beam.alive();
            beam.step(&best[row * k..(row + alive) * k], k, config.eos_id, |parent| parents.push(row + parent));
            row += alive;
        }
        *len += 1;
        state.reorder(&parents)?;
        Ok(true)
    }
}

/// Runs an evaluation that records nothing on buffers of the pool, and gives them back, also after an error.
fn on_tape<R>(pool: &mut Pool<f32>, body: impl FnOnce(&mut Tape<f32>) -> Result<R>) -> Result<R> {
    let mut tape = Tape::evaluation(std::mem::take(pool));
    let result = body(&mut tape);
    *pool = tape.into_pool();
    result
}

/// Gives every hypothesis its attention: by one pass over whole targets for every rank, which has the bits of the steps.
fn attend(
    model: &Transformer,
    pool: &mut Pool<f32>,
    params: &Params<f32>,
    memory: Tensor<f32>,
    rows: &Rows,
    found: &mut [Vec<Hypothesis>],
) -> Result<()> {
    let ranks = found.iter().map(Vec::len).max().unwrap_or(0);
    on_tape(pool, |tape| {
        let memory = tape.constant(memory);
        tape.collect_attention();
        for rank in 0..ranks {
            let tokens = |of: &Vec<Hypothesis>| of.get(rank).map_or(0, |h| h.token_logprobs.len());
            let read = |of: &Vec<Hypothesis>| {
                let ids = of.get(rank).into_iter().flat_map(|h| h.ids.iter().copied());
                [model.config().bos_id].into_iter().chain(ids).take(tokens(of)).collect::<Vec<_>>()
            };
            let tgt_in: Vec<u32> = found.iter().flat_map(read).collect();
            let tgt_rows = Rows::from_lengths(&found.iter().map(tokens).collect::<Vec<_>>());
            let hidden = model.decode(tape, params, &tgt_in, &tgt_rows, memory, rows)?;
            let hidden = tape.take(hidden)?;
            tape.pool.recycle(hidden);
            // Every layer of the decoder attends to the target first, then to the source.
            let calls = tape.take_attention();
            let layers: Vec<_> = calls.iter().skip(1).step_by(2).collect();
            let mut starts = vec![0; layers.len()];
            for (i, found) in found.iter_mut().enumerate() {
                let mut values = Vec::new();
                let mut shape = [layers.len(), 0, 0, 0];
                for (layer, start) in layers.iter().zip(&mut starts) {
                    let (heads, queries, keys) = layer.shapes[i];
                    let end = *start + heads * queries * keys;
                    values.extend_from_slice(&layer.values[*start..end]);
                    (shape, *start) = ([layers.len(), heads, queries, keys], end);
                }
                if let Some(hypothesis) = found.get_mut(rank) {
                    hypothesis.attention = Some(CrossAttention { values, shape });
                }
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests;
