//! What a Transformer is made of.

use crate::error::{Error, Result};
use crate::nn::{FeedForwardActivation, LayerConfig, NormKind, Positions};
use crate::tape::Builder;
use crate::{bail, ensure};
use serde::{Deserialize, Serialize};

/// How positions enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PositionKind {
    /// Section 3.5 of the paper.
    Sinusoidal,
    /// A learned table of `max_positions` vectors.
    Learned,
    /// No positions.
    None,
}

impl PositionKind {
    /// Declares the layer that adds them; a learned table has `max` rows.
    pub(super) fn layer(self, b: &mut Builder, name: &str, max: Option<usize>, d_model: usize) -> Positions {
        match (self, max) {
            (PositionKind::Learned, Some(max)) => Positions::learned(b, name, max, d_model),
            (PositionKind::Sinusoidal, _) => Positions::sinusoidal(d_model),
            _ => Positions::None,
        }
    }
}

/// Which matrices are one (section 3.4 of the paper; Press and Wolf 2017).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tie {
    /// Target embedding and head.
    Target,
    /// Source embedding, target embedding and head.
    All,
}

/// The encoder–decoder Transformer of "Attention Is All You Need" (Vaswani et al. 2017) and its usual variants.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransformerConfig {
    /// Size of the source vocabulary.
    pub src_vocab: usize,
    /// Size of the target vocabulary.
    pub tgt_vocab: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Attention heads; divides `d_model`.
    pub n_heads: usize,
    /// Layers of the encoder.
    pub n_encoder_layers: usize,
    /// Layers of the decoder.
    pub n_decoder_layers: usize,
    /// Width of the feed-forward networks.
    pub d_ff: usize,
    /// Dropout of embeddings, attention weights, hidden activations and sublayer outputs, in [0, 1).
    pub dropout: f64,
    /// The norms.
    pub norm: NormKind,
    /// Norm before the sublayer.
    pub norm_first: bool,
    /// A norm at the end of both stacks; `None` means "with `norm_first`".
    pub final_norm: Option<bool>,
    /// What keeps the norms from dividing by zero.
    pub norm_eps: f64,
    /// Activation of the feed-forward networks.
    pub activation: FeedForwardActivation,
    /// Biases in linear maps and norms.
    pub bias: bool,
    /// A bias on the logits.
    pub head_bias: bool,
    /// How positions enter.
    pub positions: PositionKind,
    /// Length of a learned table.
    pub max_positions: Option<usize>,
    /// Embeddings times √`d_model`.
    pub scale_embeddings: bool,
    /// Which matrices are one.
    pub tie_embeddings: Option<Tie>,
    /// Padding; `None` where ids never hold padding.
    pub pad_id: Option<u32>,
    /// Begin of sequence.
    pub bos_id: u32,
    /// End of sequence.
    pub eos_id: u32,
}

/// Sizes beyond this are refused before anything is allocated.
pub(super) const LARGEST: usize = 1 << 24;

impl TransformerConfig {
    /// The paper's base model (table 3) over these vocabularies, pre-norm.
    pub fn new(src_vocab: usize, tgt_vocab: usize) -> Self {
        TransformerConfig {
            src_vocab,
            tgt_vocab,
            d_model: 512,
            n_heads: 8,
            n_encoder_layers: 6,
            n_decoder_layers: 6,
            d_ff: 2048,
            dropout: 0.1,
            norm: NormKind::Layer,
            norm_first: true,
            final_norm: None,
            norm_eps: 1e-5,
            activation: FeedForwardActivation::Relu,
            bias: true,
            head_bias: true,
            positions: PositionKind::Sinusoidal,
            max_positions: None,
            scale_embeddings: true,
            tie_embeddings: None,
            pad_id: Some(0),
            bos_id: 1,
            eos_id: 2,
        }
    }

    /// Reads a config and checks it.
    pub fn from_json(json: &str) -> Result<Self> {
        let config: Self = serde_json::from_str(json).map_err(|e| Error::Config(format!("TransformerConfig: {e}")))?;
        config.check()?;
        Ok(config)
    }

    /// The config as JSON, as it stands in `config.json`.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a config has string keys and finite numbers")
    }

    /// Every condition on the fields.
    pub fn check(&self) -> Result<()> {
        for (name, n) in [
            ("src_vocab", self.src_vocab),
            ("tgt_vocab", self.tgt_vocab),
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("n_encoder_layers", self.n_encoder_layers),
            ("n_decoder_layers", self.n_decoder_layers),
            ("d_ff", self.d_ff),
        ] {
            ensure!((1..=LARGEST).contains(&n), Config, "{name} = {n}: expected 1 to {LARGEST}");
        }
        check_common(self.dropout, self.norm_eps, self.positions, self.max_positions)?;
        ensure!(
            self.tie_embeddings != Some(Tie::All) || self.src_vocab == self.tgt_vocab,
            Config,
            "tie_embeddings = \"all\" needs equal vocabularies, got src_vocab = {} and tgt_vocab = {}",
            self.src_vocab,
            self.tgt_vocab
        );
        for (name, id) in [("bos_id", self.bos_id), ("eos_id", self.eos_id)] {
            ensure!(
                (id as usize) < self.tgt_vocab,
                Config,
                "{name} = {id}: expected an id below tgt_vocab = {}",
                self.tgt_vocab
            );
            ensure!(Some(id) != self.pad_id, Config, "{name} = pad_id = {id}: expected different ids");
        }
        ensure!(self.bos_id != self.eos_id, Config, "bos_id = eos_id = {}: expected different ids", self.bos_id);
        self.layer().map(|_| ())
    }

    /// The longest sequence that has positions.
    pub fn longest(&self) -> usize {
        match self.positions {
            PositionKind::Learned => self.max_positions.unwrap_or(usize::MAX),
            _ => usize::MAX,
        }
    }

    /// The layers of both stacks.
    pub fn layer(&self) -> Result<LayerConfig> {
        let mut layer = LayerConfig {
            activation: self.activation,
            norm: self.norm,
            norm_first: self.norm_first,
            norm_eps: self.norm_eps,
            ..LayerConfig::new(self.d_model, self.n_heads, self.d_ff)?
        };
        (layer.attention.bias, layer.attention.dropout) = (self.bias, self.dropout);
        Ok(layer)
    }
}

/// The conditions that the configs of all models have in common.
pub(super) fn check_common(
    dropout: f64,
    norm_eps: f64,
    positions: PositionKind,
    max_positions: Option<usize>,
) -> Result<()> {
    ensure!((0.0..1.0).contains(&dropout), Config, "dropout = {}: expected 0 <= dropout < 1", dropout);
    ensure!(
        norm_eps.is_finite() && norm_eps > 0.0,
        Config,
        "norm_eps = {}: expected a small positive number",
        norm_eps
    );
    match (positions, max_positions) {
        (PositionKind::Learned, None) => bail!(Config, "positions = \"learned\" needs max_positions"),
        (PositionKind::Learned, Some(n)) if n == 0 || n > LARGEST => {
            bail!(Config, "max_positions = {n}: expected 1 to {LARGEST}")
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_survives_json() {
        let config = TransformerConfig { tie_embeddings: Some(Tie::Target), ..TransformerConfig::new(10, 20) };
        assert_eq!(TransformerConfig::from_json(&config.to_json()).unwrap(), config);
    }

    #[test]
    fn impossible_configs_are_refused_by_name() {
        let good = TransformerConfig::new(10, 20);
        let broken: [(&str, TransformerConfig); 7] = [
            ("n_heads", TransformerConfig { n_heads: 7, ..good.clone() }),
            ("dropout", TransformerConfig { dropout: 1.0, ..good.clone() }),
            ("dropout", TransformerConfig { dropout: f64::NAN, ..good.clone() }),
            ("max_positions", TransformerConfig { positions: PositionKind::Learned, ..good.clone() }),
            ("vocabularies", TransformerConfig { tie_embeddings: Some(Tie::All), ..good.clone() }),
            ("eos_id", TransformerConfig { eos_id: 20, ..good.clone() }),
            ("d_model", TransformerConfig { d_model: 0, ..good.clone() }),
        ];
        assert!(good.check().is_ok());
        for (name, config) in broken {
            let message = config.check().unwrap_err().to_string();
            assert!(message.contains(name), "{name}: {message}");
        }
    }
}
