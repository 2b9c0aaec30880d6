//! One layer for the whole family: an encoder layer, a decoder layer, a GPT block.

use super::{AttentionConfig, FeedForward, FeedForwardActivation, MultiHeadAttention, Norm, NormKind, Source};
use crate::error::Result;
use crate::ops::{self, Masks};
use crate::rows::Rows;
use crate::simd::Float;
use crate::tape::{Builder, Params, Tape, Var};

/// Sizes and kinds of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerConfig {
    /// Both attentions. Its biases and its dropout are also those of the feed-forward network, the norms and the outputs of
    /// sublayers.
    pub attention: AttentionConfig,
    /// Width of the feed-forward network.
    pub d_ff: usize,
    /// Its activation.
    pub activation: FeedForwardActivation,
    /// The norms.
    pub norm: NormKind,
    /// Norm before the sublayer instead of after the addition (Xiong et al. 2020).
    pub norm_first: bool,
    /// What keeps the norms from dividing by zero.
    pub norm_eps: f64,
}

impl LayerConfig {
    /// The paper's layer with its norms before the sublayers, and without dropout.
    pub fn new(d_model: usize, n_heads: usize, d_ff: usize) -> Result<Self> {
        Ok(LayerConfig {
            attention: AttentionConfig::new(d_model, n_heads)?,
            d_ff,
            activation: FeedForwardActivation::Relu,
            norm: NormKind::Layer,
            norm_first: true,
            norm_eps: 1e-5,
        })
    }

    /// Declares one of the norms.
    pub(super) fn norm(&self, b: &mut Builder, name: &str) -> Norm {
        Norm::new(b, name, self.attention.d_model, self.norm, self.norm_eps, self.attention.bias)
    }
}

/// What a decoder layer attends to.
pub struct Cross<'a, T> {
    /// The memory, or keys and values projected from it.
    pub source: Source<'a, T>,
    /// Which of it may be seen.
    pub masks: Masks<'a>,
}

/// A sublayer with its norm and the dropout of its output.
#[derive(Clone, Debug)]
struct Residual {
    norm: Norm,
    norm_first: bool,
    dropout: (u32, f64),
}

impl Residual {
    fn new(b: &mut Builder, name: &str, config: &LayerConfig) -> Self {
        let norm = config.norm(b, name);
        Residual { norm, norm_first: config.norm_first, dropout: (b.site(), config.attention.dropout) }
    }

    /// Norm(x + Dropout(Sublayer(x))) as in the paper, or x + Dropout(Sublayer(Norm(x))).
    fn around<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        x: Var,
        sublayer: impl FnOnce(&mut Tape<T>, Var) -> Result<Var>,
    ) -> Result<Var> {
        let (site, p) = self.dropout;
        tape.scope(|tape| {
            if self.norm_first {
                let normed = self.norm.forward(tape, params, x)?;
                let y = sublayer(tape, normed)?;
                ops::residual(tape, x, y, site, p)
            } else {
                let y = sublayer(tape, x)?;
                let sum = ops::residual(tape, x, y, site, p)?;
                self.norm.forward(tape, params, sum)
            }
        })
    }
}

/// Self-attention, cross-attention where there is a memory, feed-forward; each with "Add & Norm" (figure 1).
#[derive(Clone, Debug)]
pub struct TransformerLayer {
    self_attention: (MultiHeadAttention, Residual),
    cross_attention: Option<(MultiHeadAttention, Residual)>,
    feed_forward: (FeedForward, Residual),
}

impl TransformerLayer {
    /// Figure 1, left.
    pub fn encoder(b: &mut Builder, config: &LayerConfig) -> Self {
        Self::new(b, config, false)
    }

    /// Figure 1, right.
    pub fn decoder(b: &mut Builder, config: &LayerConfig) -> Self {
        Self::new(b, config, true)
    }

    fn new(b: &mut Builder, config: &LayerConfig, cross: bool) -> Self {
        let mut attention = |name: &str| {
            let layer = b.within(name, |b| MultiHeadAttention::new(b, &config.attention));
            (layer, Residual::new(b, &format!("{name}_norm"), config))
        };
        let self_attention = attention("self_attention");
        let cross_attention = cross.then(|| attention("cross_attention"));
        let feed_forward = b.within("feed_forward", |b| {
            let AttentionConfig { d_model, bias, dropout, .. } = config.attention;
            FeedForward::new(b, d_model, config.d_ff, config.activation, bias, dropout)
        });
        let residual = Residual::new(b, "feed_forward_norm", config);
        TransformerLayer { self_attention, cross_attention, feed_forward: (feed_forward, residual) }
    }

    /// x (R, D) -> (R, D). `source` is [`Source::Itself`] or a growing cache; `cross` is needed by a decoder layer alone.
    pub fn forward<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        x: Var,
        rows: &Rows,
        source: Source<'_, T>,
        masks: &Masks<'_>,
        cross: Option<Cross<'_, T>>,
    ) -> Result<Var> {
        tape.scope(|tape| {
            let (attention, residual) = &self.self_attention;
            let mut x =
                residual.around(tape, params, x, |tape, x| attention.forward(tape, params, x, rows, source, masks))?;
            if let (Some((attention, residual)), Some(Cross { source, masks })) = (&self.cross_attention, cross) {
                x = residual
                    .around(tape, params, x, |tape, x| attention.forward(tape, params, x, rows, source, &masks))?;
            }
            let (feed_forward, residual) = &self.feed_forward;
            residual.around(tape, params, x, |tape, x| feed_forward.forward(tape, params, x))
        })
    }

    /// The layer's self-attention.
    pub fn self_attention(&self) -> &MultiHeadAttention {
        &self.self_attention.0
    }

    /// The layer's cross-attention, if it is a decoder layer.
    pub fn cross_attention(&self) -> Option<&MultiHeadAttention> {
        self.cross_attention.as_ref().map(|(attention, _)| attention)
    }
}
