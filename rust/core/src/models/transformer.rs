//! "Attention Is All You Need", whole: embeddings to logits.

use super::{Tie, TransformerConfig};
use crate::ensure;
use crate::error::Result;
use crate::kernels::top_k::Entry;
use crate::nn::{Embedding, LayerState, Linear, Positions, Stack};
use crate::ops::{self, CrossEntropy, Masks};
use crate::rows::Rows;
use crate::simd::Float;
use crate::tape::{Builder, Layout, Params, Stored, Tape, Tensor, Var};
use std::sync::Arc;

/// Source and target sequences side by side, without padding.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Source ids, one sequence after the other.
    pub src: Vec<u32>,
    /// Where each source lies.
    pub src_rows: Rows,
    /// What the decoder reads: BOS and the target.
    pub tgt_in: Vec<u32>,
    /// What it is to say: the target and EOS.
    pub tgt_out: Vec<u32>,
    /// Where each target lies, in both.
    pub tgt_rows: Rows,
}

impl Batch {
    /// Shifts the targets: BOS in front for the input, EOS at the end for the output.
    pub fn new(src: &[&[u32]], tgt: &[&[u32]], bos: u32, eos: u32) -> Result<Self> {
        ensure!(src.len() == tgt.len(), Shape, "batch: {} sources and {} targets", src.len(), tgt.len());
        let lengths = |sequences: &[&[u32]], more: usize| sequences.iter().map(|s| s.len() + more).collect::<Vec<_>>();
        Ok(Batch {
            src: src.concat(),
            src_rows: Rows::from_lengths(&lengths(src, 0)),
            tgt_in: tgt.iter().flat_map(|t| [bos].into_iter().chain(t.iter().copied())).collect(),
            tgt_out: tgt.iter().flat_map(|t| t.iter().copied().chain([eos])).collect(),
            tgt_rows: Rows::from_lengths(&lengths(tgt, 1)),
        })
    }
}

/// An embedding with its positions and the dropout of their sum.
#[derive(Clone, Debug)]
struct Input {
    embedding: Embedding,
    positions: Positions,
    dropout: (u32, f64),
}

impl Input {
    fn forward<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, ids: &[u32], rows: &Rows) -> Result<Var> {
        tape.scope(|tape| {
            let x = self.embedding.forward(tape, params, ids)?;
            let x = self.positions.forward(tape, params, x, rows)?;
            ops::dropout(tape, x, self.dropout.0, self.dropout.1)
        })
    }
}

/// What a decoding remembers between its steps.
#[derive(Debug)]
pub struct DecoderState<T> {
    layers: Vec<LayerState<T>>,
    /// Tokens read so far by each sequence.
    positions: Vec<usize>,
}

impl<T: Float> DecoderState<T> {
    /// Sequence `i` goes on from what was sequence `parents[i]`; the others are dropped.
    pub fn reorder(&mut self, parents: &[usize]) {
        self.positions = parents.iter().map(|&p| self.positions[p]).collect();
        self.layers.iter_mut().for_each(|layer| layer.reorder(parents));
    }

    /// Tokens read so far by each sequence.
    pub fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Sequence `i` forgets all but its first `lengths[i]` tokens.
    pub fn keep(&mut self, lengths: &[usize]) -> Result<()> {
        self.positions.iter_mut().zip(lengths).for_each(|(position, &n)| *position = n.min(*position));
        self.layers.iter_mut().try_for_each(|layer| layer.keep(lengths))
    }

    /// Puts the sequences of another decoding by the same model behind these.
    pub fn join(&mut self, other: Self) {
        self.positions.extend(other.positions);
        self.layers.iter_mut().zip(other.layers).for_each(|(layer, other)| layer.join(other));
    }
}

/// The encoder–decoder Transformer. Plain data: the numbers are in a [`Params`] of its layout.
#[derive(Clone, Debug)]
pub struct Transformer {
    config: TransformerConfig,
    layout: Arc<Layout>,
    source: Input,
    target: Input,
    encoder: Stack,
    decoder: Stack,
    head: Linear,
}

impl Transformer {
    /// Builds the layers of a config.
    pub fn new(config: TransformerConfig) -> Result<Self> {
        config.check()?;
        let layer = config.layer()?;
        let d = config.d_model;
        let root = (d as f64).sqrt();
        let scale = if config.scale_embeddings { root } else { 1.0 };
        // Embedded tokens start with unit variance; a matrix that is also the head starts as a head must.
        let std = |tied: bool| if config.scale_embeddings || tied { 1.0 / root } else { 1.0 };
        let mut b = Builder::new();
        let b = &mut b;
        let src_embedding = Embedding::new(
            b,
            "src_embedding",
            config.src_vocab,
            d,
            scale,
            std(config.tie_embeddings == Some(Tie::All)),
        );
        let tgt_embedding = match config.tie_embeddings {
            Some(Tie::All) => src_embedding.clone(),
            tie => Embedding::new(b, "tgt_embedding", config.tgt_vocab, d, scale, std(tie.is_some())),
        };
        let mut input = |name: &str, embedding: Embedding| {
            let positions = config.positions.layer(b, &format!("{name}_positions"), config.max_positions, d);
            Input { embedding, positions, dropout: (b.site(), config.dropout) }
        };
        let source = input("src", src_embedding);
        let target = input("tgt", tgt_embedding);
        let norm = config.final_norm.unwrap_or(config.norm_first);
        let encoder = b.within("encoder", |b| Stack::encoder(b, &layer, config.n_encoder_layers, norm));
        let decoder = b.within("decoder", |b| Stack::decoder(b, &layer, config.n_decoder_layers, norm));
        let head = match config.tie_embeddings {
            Some(_) => Linear::tied(b, "head", target.embedding.weight, config.tgt_vocab, config.head_bias),
            None => Linear::new(b, "head", d, config.tgt_vocab, config.head_bias),
        };
        let layout = Arc::new(std::mem::take(b).finish());
        Ok(Transformer { config, layout, source, target, encoder, decoder, head })
    }

    /// Names, shapes and ranges of the parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// What the model is made of.
    pub fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Other names under which a tied matrix may stand in a checkpoint, each with its own.
    pub fn aliases(&self) -> &'static [(&'static str, &'static str)] {
        match self.config.tie_embeddings {
            None => &[],
            Some(Tie::Target) => &[("head.weight", "tgt_embedding.weight")],
            Some(Tie::All) => {
                &[("tgt_embedding.weight", "src_embedding.weight"), ("head.weight", "src_embedding.weight")]
            }
        }
    }

    /// Source ids (R,) -> memory (R, D).
    pub fn encode<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, src: &[u32], rows: &Rows) -> Result<Var> {
        tape.scope(|tape| {
            let x = self.source.forward(tape, params, src, rows)?;
            self.encode_embedded(tape, params, x, rows)
        })
    }

    fn encode_embedded<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, x: Var, rows: &Rows) -> Result<Var> {
        self.encoder.forward(tape, params, x, rows, &Masks::default(), None)
    }

    /// Decoder input ids (R,) and the memory -> hidden states (R, D).
    pub fn decode<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        tgt_in: &[u32],
        rows: &Rows,
        memory: Var,
        memory_rows: &Rows,
    ) -> Result<Var> {
        ensure!(
            rows.sequences() == memory_rows.sequences(),
            Shape,
            "transformer: {} targets for {} sources",
            rows.sequences(),
            memory_rows.sequences()
        );
        tape.scope(|tape| {
            let x = self.target.forward(tape, params, tgt_in, rows)?;
            self.decode_embedded(tape, params, x, rows, memory, memory_rows)
        })
    }

    fn decode_embedded<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        x: Var,
        rows: &Rows,
        memory: Var,
        memory_rows: &Rows,
    ) -> Result<Var> {
        let causal = Masks { causal: true, ..Masks::default() };
        let memory = (memory, memory_rows, &Masks::default());
        self.decoder.forward(tape, params, x, rows, &causal, Some(memory))
    }

    /// The hidden states (R, D) that say the targets of a batch. Source and target are embedded first: the gradients of the
    /// tables, as large as these, then come last, when the values of all layers have gone.
    fn hidden<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, batch: &Batch) -> Result<Var> {
        tape.scope(|tape| {
            let src = self.source.forward(tape, params, &batch.src, &batch.src_rows)?;
            let tgt = self.target.forward(tape, params, &batch.tgt_in, &batch.tgt_rows)?;
            let memory = tape.scope(|tape| self.encode_embedded(tape, params, src, &batch.src_rows))?;
            self.decode_embedded(tape, params, tgt, &batch.tgt_rows, memory, &batch.src_rows)
        })
    }

    /// The layout with matrices in this form, for [`Params::convert`]. In int8 learned positions, which are few, stay in f32.
    pub fn layout_in(&self, stored: Stored) -> Arc<Layout> {
        let positions: Vec<_> =
            [&self.source, &self.target].iter().filter_map(|side| side.positions.weight()).collect();
        self.layout.stored_in(stored, &positions)
    }

    /// Hidden states (R, D) -> logits (R, V).
    pub fn logits<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, hidden: Var) -> Result<Var> {
        self.head.forward(tape, params, hidden)
    }

    /// The `k` likeliest tokens of each row of the hidden states (R, D), with their logits: see [`ops::likeliest`].
    pub fn likeliest<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        hidden: Var,
        k: usize,
        forbidden: &[&[(u32, T)]],
    ) -> Result<Vec<Option<Vec<Entry<T>>>>> {
        ops::likeliest(tape, params, hidden, self.head.weight(), self.head.bias(), k, forbidden)
    }

    /// The summed loss of a batch, label-smoothed.
    pub fn loss<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        batch: &Batch,
        label_smoothing: f64,
    ) -> Result<CrossEntropy> {
        let hidden = self.hidden(tape, params, batch)?;
        let (weight, bias) = (self.head.weight(), self.head.bias());
        ops::linear_cross_entropy(tape, params, hidden, weight, bias, &batch.tgt_out, label_smoothing)
    }

    /// The log-probability of every target token, EOS last: a row of each target after the other.
    pub fn score<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, batch: &Batch) -> Result<Vec<T>> {
        let hidden = self.hidden(tape, params, batch)?;
        ops::token_logprobs(tape, params, hidden, self.head.weight(), self.head.bias(), &batch.tgt_out)
    }

    /// The log-probabilities of all tokens (R, V) in the places that [`Transformer::score`] looks at, with its bits.
    pub fn log_probabilities<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        batch: &Batch,
    ) -> Result<Tensor<T>> {
        let hidden = self.hidden(tape, params, batch)?;
        let logits = self.logits(tape, params, hidden)?;
        ops::log_probabilities(tape, logits)
    }

    /// The state of a decoding before its first token: keys and values of the memory are projected once.
    pub fn start<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        memory: Var,
        memory_rows: &Rows,
    ) -> Result<DecoderState<T>> {
        let sequences = memory_rows.sequences();
        let layers = self.decoder.start(tape, params, sequences, Some((memory, memory_rows)))?;
        Ok(DecoderState { layers, positions: vec![0; sequences] })
    }

    /// The next tokens of every sequence -> hidden states of these tokens; the same layers, and the same bits, as
    /// [`Transformer::decode`] over the whole sequences.
    pub fn advance<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        tokens: &[u32],
        rows: &Rows,
        state: &mut DecoderState<T>,
    ) -> Result<Var> {
        let rows = rows.starting_at(&state.positions)?;
        let hidden = tape.scope(|tape| {
            let x = self.target.forward(tape, params, tokens, &rows)?;
            self.decoder.advance(tape, params, x, &rows, &mut state.layers)
        })?;
        state.positions.iter_mut().zip(rows.lengths()).for_each(|(position, n)| *position += n);
        Ok(hidden)
    }
}
