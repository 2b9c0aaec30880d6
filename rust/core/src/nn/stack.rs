//! N layers one above the other and the norm at the end.

use super::{Cross, KeyValueCache, LayerConfig, Norm, Source, TransformerLayer};
use crate::error::Result;
use crate::ops::Masks;
use crate::rows::Rows;
use crate::simd::Float;
use crate::tape::{Builder, Params, Tape, Var};

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
    pub fn reorder(&mut self, parents: &[usize]) -> Result<()> {
        if let Some(memory) = &mut self.memory {
            memory.share(parents);
        }
        self.own.reorder(parents)
    }

    /// Puts the sequences of another decoding by the same layer behind these.
    pub fn join(&mut self, other: Self) -> Result<()> {
        if let (Some(memory), Some(other)) = (&mut self.memory, other.memory) {
            memory.join(other)?;
        }
        self.own.join(other.own)
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
        let norm = final_norm
            .then(|| Norm::new(b, "norm", config.attention.d_model, config.norm, config.norm_eps, config.bias));
        Stack { layers, norm }
    }

    /// x (R, D) -> (R, D); a decoder also gets the memory with its rows and the masks of the cross-attention.
    pub fn forward<T: Float>(
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
