//! An encoder alone: BERT (Devlin and others 2019) and its family, from ids to vectors of tokens, sentences or classes.

use super::PositionKind;
use super::config::{LARGEST, check_common};
use crate::error::{Error, Result};
use crate::nn::{Embedding, FeedForwardActivation, LayerConfig, Linear, Norm, NormKind, Positions, Stack};
use crate::ops::{self, Masks, Pooling};
use crate::rows::Rows;
use crate::simd::Float;
use crate::tape::{Builder, Layout, Params, Stored, Tape, Var};
use crate::{bail, ensure};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// What stands for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pooled {
    /// The vector of its first token, BERT's `[CLS]`.
    Cls,
    /// The mean over its tokens (Reimers and Gurevych 2019).
    Mean,
    /// Nothing: every token stands for itself.
    None,
}

/// Sizes and kinds of an encoder. The defaults are those of BERT's base model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncoderConfig {
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Attention heads; divides `d_model`.
    pub n_heads: usize,
    /// Layers.
    pub n_layers: usize,
    /// Width of the feed-forward networks.
    pub d_ff: usize,
    /// Dropout of embeddings, attention weights, hidden activations and sublayer outputs, in [0, 1).
    pub dropout: f64,
    /// The norms.
    pub norm: NormKind,
    /// Norm before the sublayer instead of after the addition.
    pub norm_first: bool,
    /// A norm at the end of the stack; `None` means "with `norm_first`".
    pub final_norm: Option<bool>,
    /// A norm of the embeddings, as in BERT.
    pub embedding_norm: bool,
    /// What keeps the norms from dividing by zero.
    pub norm_eps: f64,
    /// Activation of the feed-forward networks.
    pub activation: FeedForwardActivation,
    /// Biases in linear maps and norms.
    pub bias: bool,
    /// How positions enter.
    pub positions: PositionKind,
    /// Length of a learned table.
    pub max_positions: Option<usize>,
    /// Embeddings times √`d_model`.
    pub scale_embeddings: bool,
    /// Kinds of tokens that have a vector added, such as BERT's two segments; 0 for none.
    pub token_types: usize,
    /// What stands for a sequence.
    pub pooling: Pooled,
    /// Whether what stands for a sequence is brought to length 1.
    pub normalize: bool,
    /// Outputs of a linear head over what stands for a sequence, or over each token; `None` for no head.
    pub head: Option<usize>,
    /// Padding; `None` where ids never hold padding.
    pub pad_id: Option<u32>,
}

impl EncoderConfig {
    /// BERT's base model over this vocabulary.
    pub fn new(vocab: usize) -> Self {
        EncoderConfig {
            vocab,
            d_model: 768,
            n_heads: 12,
            n_layers: 12,
            d_ff: 3072,
            dropout: 0.1,
            norm: NormKind::Layer,
            norm_first: false,
            final_norm: None,
            embedding_norm: true,
            norm_eps: 1e-12,
            activation: FeedForwardActivation::Gelu,
            bias: true,
            positions: PositionKind::Learned,
            max_positions: Some(512),
            scale_embeddings: false,
            token_types: 2,
            pooling: Pooled::Mean,
            normalize: false,
            head: None,
            pad_id: Some(0),
        }
    }

    /// Reads a config and checks it.
    pub fn from_json(json: &str) -> Result<Self> {
        let config: Self = serde_json::from_str(json).map_err(|e| Error::Config(format!("EncoderConfig: {e}")))?;
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
            ("vocab", self.vocab),
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("n_layers", self.n_layers),
            ("d_ff", self.d_ff),
            ("head", self.head.unwrap_or(1)),
        ] {
            ensure!((1..=LARGEST).contains(&n), Config, "{name} = {n}: expected 1 to {LARGEST}");
        }
        ensure!(self.token_types <= LARGEST, Config, "token_types = {}: expected 0 to {LARGEST}", self.token_types);
        check_common(self.dropout, self.norm_eps, self.positions, self.max_positions)?;
        self.layer().map(|_| ())
    }

    fn layer(&self) -> Result<LayerConfig> {
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

/// The encoder. Plain data: the numbers are in a [`Params`] of its layout.
#[derive(Clone, Debug)]
pub struct Encoder {
    config: EncoderConfig,
    layout: Arc<Layout>,
    embedding: Embedding,
    token_types: Option<Embedding>,
    positions: Positions,
    norm: Option<Norm>,
    dropout: u32,
    stack: Stack,
    head: Option<Linear>,
}

impl Encoder {
    /// Builds the layers of a config.
    pub fn new(config: EncoderConfig) -> Result<Self> {
        config.check()?;
        let layer = config.layer()?;
        let d = config.d_model;
        let root = (d as f64).sqrt();
        let scale = if config.scale_embeddings { root } else { 1.0 };
        // Embedded tokens start with unit variance, unless a norm brings them there.
        let std = if config.scale_embeddings || config.embedding_norm { 1.0 / root } else { 1.0 };
        let mut b = Builder::new();
        let b = &mut b;
        let embedding = Embedding::new(b, "embedding", config.vocab, d, scale, std);
        let token_types =
            (config.token_types > 0).then(|| Embedding::new(b, "token_types", config.token_types, d, 1.0, 1.0 / root));
        let positions = config.positions.layer(b, "positions", config.max_positions, d);
        let norm =
            config.embedding_norm.then(|| Norm::new(b, "embedding_norm", d, config.norm, config.norm_eps, config.bias));
        let dropout = b.site();
        let final_norm = config.final_norm.unwrap_or(config.norm_first);
        let stack = b.within("encoder", |b| Stack::encoder(b, &layer, config.n_layers, final_norm));
        let head = config.head.map(|outputs| Linear::new(b, "head", d, outputs, true));
        let layout = Arc::new(std::mem::take(b).finish());
        Ok(Encoder { config, layout, embedding, token_types, positions, norm, dropout, stack, head })
    }

    /// Names, shapes and ranges of the parameters.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    /// The layout with matrices in this form, for [`Params::convert`]. In int8 what is small and adds to every sequence stays in
    /// f32: the head, token types and learned positions.
    pub fn layout_in(&self, stored: Stored) -> Arc<Layout> {
        let small = (self.head.iter().map(Linear::weight)).chain(self.token_types.iter().map(|table| table.weight));
        self.layout.stored_in(stored, &small.chain(self.positions.weight()).collect::<Vec<_>>())
    }

    /// What the model is made of.
    pub fn config(&self) -> &EncoderConfig {
        &self.config
    }

    /// Ids (R,), and the kinds of these tokens where there are kinds (0 by default) -> hidden states (R, D).
    pub fn encode<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        ids: &[u32],
        types: Option<&[u32]>,
        rows: &Rows,
    ) -> Result<Var> {
        tape.scope(|tape| {
            let x = tape.scope(|tape| {
                let mut x = self.embedding.forward(tape, params, ids)?;
                match (&self.token_types, types) {
                    (Some(table), types) => {
                        let zeros = if types.is_none() { vec![0; ids.len()] } else { Vec::new() };
                        let types = types.unwrap_or(&zeros);
                        ensure!(
                            types.len() == ids.len(),
                            Shape,
                            "encoder: argument `token_types`: expected one for each of {} ids, got {}",
                            ids.len(),
                            types.len()
                        );
                        let types = table.forward(tape, params, types)?;
                        x = ops::add(tape, x, types)?;
                    }
                    (None, Some(_)) => bail!(
                        Config,
                        "encoder: argument `token_types`: this model has none (its config says token_types = 0)"
                    ),
                    (None, None) => {}
                }
                x = self.positions.forward(tape, params, x, rows)?;
                if let Some(norm) = &self.norm {
                    x = norm.forward(tape, params, x)?;
                }
                ops::dropout(tape, x, self.dropout, self.config.dropout)
            })?;
            self.stack.forward(tape, params, x, rows, &Masks::default(), None)
        })
    }

    /// Hidden states (R, D) -> what stands for each sequence (B, D), or for each token (R, D).
    pub fn pool<T: Float>(&self, tape: &mut Tape<T>, hidden: Var, rows: &Rows, pooling: Pooled) -> Result<Var> {
        match pooling {
            Pooled::Cls => ops::pool(tape, hidden, rows, Pooling::First),
            Pooled::Mean => ops::pool(tape, hidden, rows, Pooling::Mean),
            Pooled::None => Ok(hidden),
        }
    }

    /// Hidden states (R, D) -> the head's outputs for each sequence (B, C), or for each token (R, C).
    pub fn logits<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, hidden: Var, rows: &Rows) -> Result<Var> {
        let Some(head) = &self.head else {
            bail!(Config, "encoder: this model has no head; make it with head = (number of outputs) in its config")
        };
        let x = self.pool(tape, hidden, rows, self.config.pooling)?;
        head.forward(tape, params, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Key;
    use crate::tape::{Grads, Pool, Tensor, gradcheck};
    use crate::threads;

    fn tiny() -> EncoderConfig {
        EncoderConfig {
            d_model: 12,
            n_heads: 3,
            n_layers: 2,
            d_ff: 20,
            dropout: 0.0,
            max_positions: Some(5),
            norm_eps: 1e-5,
            head: Some(3),
            ..EncoderConfig::new(11)
        }
    }

    const IDS: [u32; 8] = [3, 4, 5, 10, 7, 9, 8, 3];
    const TYPES: [u32; 8] = [0, 0, 1, 1, 0, 1, 0, 1];

    fn rows() -> Rows {
        Rows::from_lengths(&[4, 1, 3])
    }

    fn params(model: &Encoder) -> Params<f32> {
        Params::init(model.layout().clone(), 42).unwrap()
    }

    #[test]
    fn gradients_of_whole_models_are_right() {
        let variants = [
            ("BERT, cls", EncoderConfig { pooling: Pooled::Cls, ..tiny() }),
            ("BERT, mean", tiny()),
            ("each token", EncoderConfig { pooling: Pooled::None, ..tiny() }),
            ("pre-norm, no types", EncoderConfig { norm_first: true, token_types: 0, ..tiny() }),
            (
                "RMSNorm, sinusoidal, scaled",
                EncoderConfig {
                    norm: NormKind::Rms,
                    positions: PositionKind::Sinusoidal,
                    scale_embeddings: true,
                    embedding_norm: false,
                    bias: false,
                    ..tiny()
                },
            ),
            ("dropout", EncoderConfig { dropout: 0.3, ..tiny() }),
        ];
        for (name, config) in variants {
            let model = Encoder::new(EncoderConfig { n_layers: 1, ..config }).unwrap();
            let params = params(&model).cast::<f64>().unwrap();
            let types = model.token_types.is_some().then_some(&TYPES[..]);
            gradcheck(&params, &[], Some(Key::new(3)), |tape, params, _| {
                let hidden = model.encode(tape, params, &IDS, types, &rows())?;
                model.logits(tape, params, hidden, &rows())
            })
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    fn hidden(model: &Encoder, params: &Params<f32>, ids: &[u32], types: &[u32], rows: &Rows) -> Vec<u32> {
        let mut tape = Tape::evaluation(Pool::default());
        let hidden = model.encode(&mut tape, params, ids, Some(types), rows).unwrap();
        tape.value(hidden).unwrap().iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn a_sequence_alone_has_the_bits_it_has_in_a_batch() {
        for config in [tiny(), EncoderConfig { norm_first: true, ..tiny() }] {
            let model = Encoder::new(config).unwrap();
            let params = params(&model);
            let together = hidden(&model, &params, &IDS, &TYPES, &rows());
            for i in 0..3 {
                let range = rows().range(i);
                let one = Rows::from_lengths(&[range.len()]);
                let alone = hidden(&model, &params, &IDS[range.clone()], &TYPES[range.clone()], &one);
                assert_eq!(alone, together[range.start * 12..range.end * 12]);
            }
        }
    }

    #[test]
    fn gradients_have_the_same_bits_on_any_number_of_threads() {
        let model =
            Encoder::new(EncoderConfig { d_model: 64, n_heads: 4, d_ff: 128, max_positions: Some(40), ..tiny() });
        let model = model.unwrap();
        let params = params(&model);
        let lengths: Vec<usize> = (0..40).map(|i| 5 + i * 7 % 30).collect();
        let rows = Rows::from_lengths(&lengths);
        let ids: Vec<u32> = (0..rows.total()).map(|i| (i * 31 % 11) as u32).collect();
        let run = |n: usize| {
            threads::with_local_limit(n, || {
                let mut tape = Tape::training(Pool::default(), Key::new(9));
                let mut grads = Grads::new(&params).unwrap();
                let hidden = model.encode(&mut tape, &params, &ids, None, &rows).unwrap();
                let logits = model.logits(&mut tape, &params, hidden, &rows).unwrap();
                let dy = Tensor::from_slice(40, 3, &crate::kernels::testing::normal(120, 5)).unwrap();
                tape.backward(&params, &mut grads, [(logits, dy)]).unwrap();
                grads.complete(&mut tape.pool).unwrap();
                grads.iter().flatten().map(|g| g.to_bits()).collect::<Vec<_>>()
            })
        };
        let one = run(1);
        for n in [2, 3, 7] {
            assert!(run(n) == one, "{n} threads differ");
        }
    }

    #[test]
    fn token_types_are_zero_by_default_and_matter() {
        let model = Encoder::new(tiny()).unwrap();
        let params = params(&model);
        let mut tape = Tape::evaluation(Pool::default());
        let default = model.encode(&mut tape, &params, &IDS, None, &rows()).unwrap();
        let default: Vec<u32> = tape.value(default).unwrap().iter().map(|x| x.to_bits()).collect();
        assert_eq!(default, hidden(&model, &params, &IDS, &[0; 8], &rows()));
        assert_ne!(default, hidden(&model, &params, &IDS, &TYPES, &rows()));
        let error = model.encode(&mut tape, &params, &IDS, Some(&TYPES[1..]), &rows()).unwrap_err();
        assert!(error.to_string().contains("one for each of 8 ids, got 7"), "{error}");
        let without = Encoder::new(EncoderConfig { token_types: 0, head: None, ..tiny() }).unwrap();
        let params = super::tests::params(&without);
        assert!(without.encode(&mut tape, &params, &IDS, Some(&TYPES), &rows()).is_err());
        let hidden = without.encode(&mut tape, &params, &IDS, None, &rows()).unwrap();
        assert!(without.logits(&mut tape, &params, hidden, &rows()).unwrap_err().to_string().contains("no head"));
    }

    #[test]
    fn a_config_survives_json_and_impossible_ones_are_refused_by_name() {
        let good = tiny();
        assert_eq!(EncoderConfig::from_json(&good.to_json()).unwrap(), good);
        for (name, config) in [
            ("n_heads", EncoderConfig { n_heads: 7, ..good.clone() }),
            ("dropout", EncoderConfig { dropout: 1.0, ..good.clone() }),
            ("max_positions", EncoderConfig { max_positions: None, ..good.clone() }),
            ("head", EncoderConfig { head: Some(0), ..good.clone() }),
            ("vocab", EncoderConfig { vocab: 0, ..good.clone() }),
            ("token_types", EncoderConfig { token_types: 1 << 40, ..good.clone() }),
        ] {
            let message = config.check().unwrap_err().to_string();
            assert!(message.contains(name), "{name}: {message}");
        }
    }
}
