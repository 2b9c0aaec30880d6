//! N layers one above the other and the norm at the end.

use super::{Cross, KeyValueCache, LayerConfig, Norm, Source, TransformerLayer};
use crate::error::Result;
use crate::kernels::elementwise::copy;
use crate::ops::Masks;
use crate::rows::{Rows, runs};
use crate::simd::Float;
use crate::tape::{Builder, Params, Tape, Var};
use std::ops::Range;

/// Rows that go through the layers together in an evaluation: enough for fast products.
const RUN_ROWS: usize = 4096;

/// What a decoder layer remembers between the steps of a decoding.
#[derive(Debug)]
pub struct LayerState<T> {
    /// Keys and values of the tokens so far.
    pub own: KeyValueCache<T>,
    /// Keys and values of the memory, projected once.
    pub memory: Option<KeyValueCache<T>>,
}

impl<T: Float> LayerState<T> {
    /// Sequence `i` goes on from what was sequence `parents[i]`.
    pub fn reorder(&mut self, parents: &[usize]) {
        if let Some(memory) = &mut self.memory {
            memory.share(parents);
        }
        self.own.reorder(parents);
    }

    /// Sequence `i` forgets all but its first `lengths[i]` tokens.
    pub fn keep(&mut self, lengths: &[usize]) -> Result<()> {
        self.own.keep(lengths)
    }

    /// Puts the sequences of another decoding by the same layer behind these.
    pub fn join(&mut self, other: Self) {
        if let (Some(memory), Some(other)) = (&mut self.memory, other.memory) {
            memory.join(other);
        }
        self.own.join(other.own);
    }
}

/// An encoder or a decoder.
#[derive(Clone, Debug)]
pub struct Stack {
    layers: Vec<TransformerLayer>,
    norm: Option<Norm>,
}

impl Stack {
    /// Figure 1, left: declares `layers.{i}` and, with `final_norm`, `norm`.
    pub fn encoder(b: &mut Builder, config: &LayerConfig, n_layers: usize, final_norm: bool) -> Self {
        Self::new(b, config, n_layers, final_norm, TransformerLayer::encoder)
    }

    /// Figure 1, right.
    pub fn decoder(b: &mut Builder, config: &LayerConfig, n_layers: usize, final_norm: bool) -> Self {
        Self::new(b, config, n_layers, final_norm, TransformerLayer::decoder)
    }

    fn new(
        b: &mut Builder,
        config: &LayerConfig,
        n_layers: usize,
        final_norm: bool,
        layer: fn(&mut Builder, &LayerConfig) -> TransformerLayer,
    ) -> Self {
        let layers = (0..n_layers).map(|i| b.within(&format!("layers.{i}"), |b| layer(b, config))).collect();
        let norm = final_norm.then(|| config.norm(b, "norm"));
        Stack { layers, norm }
    }

    /// x (R, D) -> (R, D); a decoder also gets the memory with its rows and the masks of the cross-attention.
    ///
    /// No sequence knows of another. Where the result alone is wanted, a few of them at a time go through all layers, so
    /// that memory does not grow with the batch.
    pub fn forward<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        x: Var,
        rows: &Rows,
        masks: &Masks<'_>,
        memory: Option<(Var, &Rows, &Masks<'_>)>,
    ) -> Result<Var> {
        let plain = |masks: &Masks<'_>| masks.keep.is_none() && masks.bias.is_none();
        let apart = plain(masks)
            && memory.is_none_or(|(_, of, masks)| plain(masks) && of.sequences() == rows.sequences())
            && tape.wants_results_alone();
        let length = |i| rows.length(i) + memory.map_or(0, |(_, rows, _)| rows.length(i));
        let runs = if apart { runs((0..rows.sequences()).map(length), RUN_ROWS) } else { Vec::new() };
        if runs.len() < 2 {
            return self.layers(tape, params, x, rows, masks, memory);
        }
        let mut y = tape.pool.tensor(rows.total(), tape.value(x)?.cols())?;
        for run in runs {
            let result = tape.scope(|tape| {
                let x = part(tape, x, rows.span(&run))?;
                let memory = match memory {
                    Some((memory, rows, masks)) => {
                        Some((part(tape, memory, rows.span(&run))?, rows.part(run.clone()), masks))
                    }
                    None => None,
                };
                let memory = memory.as_ref().map(|(memory, rows, masks)| (*memory, rows, *masks));
                self.layers(tape, params, x, &rows.part(run.clone()), masks, memory)
            })?;
            let result = tape.take(result)?;
            let span = rows.span(&run);
            copy(&mut y[span.start * result.cols()..span.end * result.cols()], &result)?;
            tape.pool.recycle(result);
        }
        Ok(tape.push(y, false))
    }

    fn layers<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        mut x: Var,
        rows: &Rows,
        masks: &Masks<'_>,
        memory: Option<(Var, &Rows, &Masks<'_>)>,
    ) -> Result<Var> {
        for layer in &self.layers {
            let cross =
                memory.map(|(memory, rows, masks)| Cross { source: Source::Memory(memory, rows), masks: *masks });
            x = layer.forward(tape, params, x, rows, Source::Itself, masks, cross)?;
        }
        self.finish(tape, params, x)
    }

    /// The states of a decoding of these sequences, before the first token.
    pub fn start<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        sequences: usize,
        memory: Option<(Var, &Rows)>,
    ) -> Result<Vec<LayerState<T>>> {
        let start = |layer: &TransformerLayer| {
            let memory = match (layer.cross_attention(), memory) {
                (Some(attention), Some((memory, rows))) => Some(attention.project_memory(tape, params, memory, rows)?),
                _ => None,
            };
            Ok(LayerState { own: layer.self_attention().cache(sequences), memory })
        };
        self.layers.iter().map(start).collect()
    }

    /// The same layers over new rows alone, causal; what came before is in the states.
    pub fn advance<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        mut x: Var,
        rows: &Rows,
        states: &mut [LayerState<T>],
    ) -> Result<Var> {
        let causal = Masks { causal: true, ..Masks::default() };
        for (layer, state) in self.layers.iter().zip(states) {
            let cross = state
                .memory
                .as_ref()
                .map(|memory| Cross { source: Source::Projected(memory), masks: Masks::default() });
            x = layer.forward(tape, params, x, rows, Source::Growing(&mut state.own), &causal, cross)?;
        }
        self.finish(tape, params, x)
    }

    fn finish<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, x: Var) -> Result<Var> {
        match &self.norm {
            Some(norm) => norm.forward(tape, params, x),
            None => Ok(x),
        }
    }
}

/// Some rows of a value, as a value of their own.
fn part<T: Float>(tape: &mut Tape<T>, x: Var, rows: Range<usize>) -> Result<Var> {
    let cols = tape.value(x)?.cols();
    let mut part = tape.pool.tensor(rows.len(), cols)?;
    copy(&mut part, &tape.value(x)?[rows.start * cols..rows.end * cols])?;
    Ok(tape.constant(part))
}
