//! Layers with weights of their own.

use crate::arrays::{Floats, State, named_arrays, stored_in, token_ids};
use crate::call::{Answer, Call, Mode, Weights};
use crate::door;
use crate::errors::{ConfigError, ShapeError, raise};
use crate::form::Form;
use crate::functional::dense_mask;
use crate::pools::Home;
use crate::shared::Shared;
use numpy::{PyArray1, PyArrayDyn};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::sync::Arc;
use transformer_core::checkpoint::{self, Checkpoint};
use transformer_core::error::{Error, Result};
use transformer_core::models::{Encoder, EncoderConfig, Pooled};
use transformer_core::nn::{
    AttentionConfig, Cross, Embedding, FeedForward, LayerConfig, Linear, MultiHeadAttention, Norm, Source, Stack,
    TransformerLayer,
};
use transformer_core::ops::{self, Masks};
use transformer_core::rows::Rows;
use transformer_core::tape::{Builder, Params, Tape, Var};

/// What `model_type` says in the `config.json` of an encoder.
const ENCODER: &str = "encoder";

/// Keeps the length of a zero vector from dividing by zero.
const UNIT_EPS: f64 = 1e-24;

enum Module {
    /// With the size of its result.
    Linear(Linear, usize),
    /// With the size of its vectors.
    Embedding(Embedding, usize),
    Norm(Norm),
    FeedForward(FeedForward),
    Attention(MultiHeadAttention),
    Block(Box<TransformerLayer>),
    Stack(Stack),
    Encoder(Box<Encoder>),
}

/// A layer of `transformer_rs.nn`: what it is, its weights, and its buffers.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct Layer {
    module: Module,
    /// Calls read them, optimisers write them; locked inside the door.
    pub weights: Arc<Shared<Weights<f32>>>,
    home: Home<f32>,
}

/// The settings of a stack and its layers.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct BlockOptions {
    d_model: usize,
    n_heads: usize,
    d_ff: usize,
    activation: String,
    norm: String,
    norm_first: bool,
    norm_eps: f64,
    bias: bool,
    dropout: f64,
    decoder: bool,
    /// None: one layer without a stack around it.
    n_layers: Option<usize>,
    final_norm: bool,
}

/// A choice by its name.
fn named<T: DeserializeOwned>(what: &str, name: &str) -> PyResult<T> {
    serde_json::from_value(name.into()).map_err(|error| ConfigError::new_err(format!("{what}: {error}")))
}

impl Layer {
    /// Declares and draws the weights.
    fn build(py: Python<'_>, seed: u64, declare: impl FnOnce(&mut Builder) -> Module + Send) -> PyResult<Self> {
        let (module, params) = door::run(py, || {
            let mut builder = Builder::new();
            let module = declare(&mut builder);
            Ok((module, Params::init(Arc::new(builder.finish()), seed)?))
        })?;
        Ok(Layer { module, weights: Weights::shared(params), home: Home::of_layer() })
    }
}

#[pymethods]
impl Layer {
    #[staticmethod]
    fn linear(py: Python<'_>, d_in: usize, d_out: usize, bias: bool, seed: u64) -> PyResult<Self> {
        Self::build(py, seed, |b| Module::Linear(Linear::new(b, "", d_in, d_out, bias), d_out))
    }

    #[staticmethod]
    fn embedding(py: Python<'_>, vocab: usize, d_model: usize, scale: f64, std: f64, seed: u64) -> PyResult<Self> {
        Self::build(py, seed, |b| Module::Embedding(Embedding::new(b, "", vocab, d_model, scale, std), d_model))
    }

    #[staticmethod]
    fn norm(py: Python<'_>, kind: &str, d_model: usize, eps: f64, bias: bool, seed: u64) -> PyResult<Self> {
        let kind = named("norm", kind)?;
        Self::build(py, seed, |b| Module::Norm(Norm::new(b, "", d_model, kind, eps, bias)))
    }

    #[staticmethod]
    fn feed_forward(
        py: Python<'_>,
        d_model: usize,
        d_ff: usize,
        kind: &str,
        bias: bool,
        dropout: f64,
        seed: u64,
    ) -> PyResult<Self> {
        let kind = named("activation", kind)?;
        Self::build(py, seed, |b| Module::FeedForward(FeedForward::new(b, d_model, d_ff, kind, bias, dropout)))
    }

    #[staticmethod]
    fn attention(
        py: Python<'_>,
        d_model: usize,
        n_heads: usize,
        n_kv_heads: usize,
        head_dim: usize,
        scale: f64,
        bias: bool,
        dropout: f64,
        seed: u64,
    ) -> PyResult<Self> {
        let config = AttentionConfig { d_model, n_heads, n_kv_heads, head_dim, scale, bias, dropout };
        Self::build(py, seed, |b| Module::Attention(MultiHeadAttention::new(b, &config)))
    }

    #[staticmethod]
    fn block(py: Python<'_>, options: BlockOptions, seed: u64) -> PyResult<Self> {
        let o = options;
        let mut config = LayerConfig {
            activation: named("activation", &o.activation)?,
            norm: named("norm", &o.norm)?,
            norm_first: o.norm_first,
            norm_eps: o.norm_eps,
            ..LayerConfig::new(o.d_model, o.n_heads, o.d_ff).map_err(raise)?
        };
        (config.attention.bias, config.attention.dropout) = (o.bias, o.dropout);
        Self::build(py, seed, |b| match (o.n_layers, o.decoder) {
            (None, false) => Module::Block(Box::new(TransformerLayer::encoder(b, &config))),
            (None, true) => Module::Block(Box::new(TransformerLayer::decoder(b, &config))),
            (Some(n), false) => Module::Stack(Stack::encoder(b, &config, n, o.final_norm)),
            (Some(n), true) => Module::Stack(Stack::decoder(b, &config, n, o.final_norm)),
        })
    }

    /// Name and shape of every parameter; statistics are none.
    fn parameters(&self, py: Python<'_>) -> PyResult<Vec<(String, Vec<usize>)>> {
        self.read(py, |params| {
            let layout = params.layout();
            Ok(layout.ids().map(|id| layout.entry(id)).map(|entry| (entry.name.clone(), entry.shape.clone())).collect())
        })
    }

    /// Copies of all parameters and statistics.
    fn state_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        self.read(py, State::of)?.give(py)
    }

    /// Takes all parameters and statistics over, or none of them.
    fn load_state_dict(&self, py: Python<'_>, arrays: &Bound<'_, PyDict>) -> PyResult<()> {
        let state = State::read(arrays)?;
        door::run(py, || self.weights.write(|weights| state.load_into(&mut weights.params, &[])))
    }

    /// Keeps the parameters that these patterns name as they are, and sets all others free.
    fn freeze(&self, py: Python<'_>, patterns: Vec<String>) -> PyResult<()> {
        door::run(py, || self.weights.write(|weights| weights.freeze(&patterns)))
    }

    /// The encoder of a config, with fresh weights.
    #[staticmethod]
    fn encoder(py: Python<'_>, config: &str, seed: u64) -> PyResult<Self> {
        let encoder = Encoder::new(EncoderConfig::from_json(config).map_err(raise)?).map_err(raise)?;
        let layout = encoder.layout().clone();
        let params = door::run(py, || Params::init(layout, seed))?;
        Ok(Self::of_encoder(encoder, params))
    }

    /// An encoder whose weights are zero, kept in a precision, for values that come from elsewhere.
    #[staticmethod]
    fn blank_encoder(py: Python<'_>, config: &str, precision: &str) -> PyResult<Self> {
        let encoder = Encoder::new(EncoderConfig::from_json(config).map_err(raise)?).map_err(raise)?;
        let layout = encoder.layout_in(stored_in(precision)?);
        let params = door::run(py, || Params::zeros(layout))?;
        Ok(Self::of_encoder(encoder, params))
    }

    /// The same encoder with its matrices in another precision.
    fn convert_encoder(&self, py: Python<'_>, precision: &str) -> PyResult<Self> {
        let (encoder, stored) = (self.as_encoder()?.clone(), stored_in(precision)?);
        let params = self.read(py, |params| params.convert(encoder.layout_in(stored)))?;
        Ok(Self::of_encoder(encoder, params))
    }

    /// What matrices are kept in.
    fn precision(&self, py: Python<'_>) -> PyResult<&'static str> {
        self.read(py, |params| Ok(params.stored().name()))
    }

    /// The encoder of a folder.
    #[staticmethod]
    fn load_encoder(py: Python<'_>, folder: PathBuf) -> PyResult<Self> {
        let (encoder, params) = door::run(py, || {
            let mut checkpoint = Checkpoint::open(&folder)?;
            let (place, found) = (folder.display(), checkpoint.model_type());
            if found != ENCODER {
                return Err(Error::Checkpoint(format!("{place}: expected a model_type of {ENCODER:?}, got {found:?}")));
            }
            let config = EncoderConfig::from_json(checkpoint.config_json())
                .map_err(|error| Error::Checkpoint(format!("{place}: {error}")))?;
            let encoder = Encoder::new(config)?;
            let mut params = Params::zeros(encoder.layout_in(checkpoint.stored()))?;
            checkpoint.load_into(&mut params, &[])?;
            Ok((encoder, params))
        })?;
        Ok(Self::of_encoder(encoder, params))
    }

    /// Writes an encoder into a folder.
    fn save_encoder(&self, py: Python<'_>, folder: PathBuf) -> PyResult<()> {
        let config = self.as_encoder()?.config().to_json();
        self.read(py, |params| checkpoint::save_model(&folder, &config, ENCODER, params))
    }

    /// The config of an encoder.
    fn encoder_config(&self) -> PyResult<String> {
        Ok(self.as_encoder()?.config().to_json())
    }

    /// Runs an encoder: hidden states (R, D); with `pooling` what stands for each sequence, of length 1 with `unit`; with
    /// `logits` what the head makes of it.
    fn encode<'py>(
        &self,
        py: Python<'py>,
        gradients: usize,
        seed: Option<u64>,
        ids: Bound<'py, PyArray1<i64>>,
        token_types: Option<Bound<'py, PyArray1<i64>>>,
        lengths: Vec<usize>,
        pooling: Option<&str>,
        unit: bool,
        logits: bool,
    ) -> PyResult<Answer<'py>> {
        let encoder = self.as_encoder()?;
        let config = encoder.config();
        let ids = token_ids(&ids)?;
        let token_types = token_types.as_ref().map(token_ids).transpose()?;
        let rows = rows_of("ids", ids.len(), &lengths)?;
        let pooling = match pooling {
            _ if logits => config.pooling,
            None => Pooled::None,
            Some(name) => named("pooling", name)?,
        };
        let cols = if logits { config.head.unwrap_or(0) } else { config.d_model };
        let shape = vec![if pooling == Pooled::None { rows.total() } else { rows.sequences() }, cols];
        let mut call = Call::of_layer(py, Mode { gradients, seed }, &self.home);
        call.nothing();
        if unit {
            // x / |x| = (x / √(mean of x²)) / √D
            call.scale = (1.0 / (cols as f64).sqrt()) as f32;
        }
        self.run(call, Form::Plain { shape, cols }, |tape, params| {
            let hidden = encoder.encode(tape, params, &ids, token_types.as_deref(), &rows)?;
            if logits {
                return encoder.logits(tape, params, hidden, &rows);
            }
            let y = encoder.pool(tape, hidden, &rows, pooling)?;
            if unit { ops::rms_norm(tape, params, y, None, UNIT_EPS) } else { Ok(y) }
        })
    }

    /// Runs an embedding.
    fn embed<'py>(
        &self,
        py: Python<'py>,
        gradients: usize,
        seed: Option<u64>,
        ids: Bound<'py, PyArray1<i64>>,
    ) -> PyResult<Answer<'py>> {
        let Module::Embedding(embedding, d_model) = &self.module else {
            return Err(ConfigError::new_err("this layer takes vectors, not ids"));
        };
        let ids = token_ids(&ids)?;
        let mut call = Call::of_layer(py, Mode { gradients, seed }, &self.home);
        call.nothing();
        let form = Form::Plain { shape: vec![ids.len(), *d_model], cols: *d_model };
        self.run(call, form, |tape, params| embedding.forward(tape, params, &ids))
    }

    /// Runs a layer on packed rows (R, D); `lengths` says where sequences lie, and likewise for a memory. `keep` masks
    /// are for the queries' own sequence (without a memory, or in a decoder) and for the memory.
    #[allow(clippy::type_complexity)]
    fn forward<'py>(
        &self,
        py: Python<'py>,
        gradients: usize,
        seed: Option<u64>,
        x: Floats<'py>,
        lengths: Vec<usize>,
        memory: Option<(Floats<'py>, Vec<usize>)>,
        causal: bool,
        keep: Option<Bound<'py, PyArrayDyn<bool>>>,
        memory_keep: Option<Bound<'py, PyArrayDyn<bool>>>,
    ) -> PyResult<Answer<'py>> {
        let keep = keep.as_ref().map(dense_mask).transpose()?;
        let memory_keep = memory_keep.as_ref().map(dense_mask).transpose()?;
        let mut call = Call::of_layer(py, Mode { gradients, seed }, &self.home);
        let form = Form::rows(x.shape())?;
        let rows = rows_of("x", form.size().0, &lengths)?;
        let x = call.leaf(&x, form.clone())?;
        let memory = match memory {
            Some((memory, lengths)) => {
                let form = Form::rows(memory.shape())?;
                let rows = rows_of("memory", form.size().0, &lengths)?;
                Some((call.leaf(&memory, form)?, rows))
            }
            None => None,
        };
        let form = match &self.module {
            Module::Linear(_, d_out) => form.with_last(*d_out),
            _ => form,
        };
        self.run(call, form, |tape, params| {
            let masks = Masks { causal, keep: keep.as_ref(), ..Masks::default() };
            let memory_masks = Masks { keep: memory_keep.as_ref(), ..Masks::default() };
            let memory = memory.as_ref().map(|(memory, rows)| (*memory, rows));
            let cross = |(memory, rows)| Cross { source: Source::Memory(memory, rows), masks: memory_masks };
            match &self.module {
                Module::Linear(linear, _) => linear.forward(tape, params, x),
                Module::Embedding(..) | Module::Encoder(_) => {
                    transformer_core::bail!(Config, "this layer takes ids, not vectors")
                }
                Module::Norm(norm) => norm.forward(tape, params, x),
                Module::FeedForward(layer) => layer.forward(tape, params, x),
                Module::Attention(layer) => {
                    let source = memory.map_or(Source::Itself, |(memory, rows)| Source::Memory(memory, rows));
                    layer.forward(tape, params, x, &rows, source, &masks)
                }
                Module::Block(layer) => {
                    layer.forward(tape, params, x, &rows, Source::Itself, &masks, memory.map(cross))
                }
                Module::Stack(stack) => {
                    let memory = memory.map(|(memory, rows)| (memory, rows, &memory_masks));
                    stack.forward(tape, params, x, &rows, &masks, memory)
                }
            }
        })
    }
}

impl Layer {
    fn of_encoder(encoder: Encoder, params: Params<f32>) -> Self {
        let (module, weights) = (Module::Encoder(Box::new(encoder)), Weights::shared(params));
        Layer { module, weights, home: Home::of_layer() }
    }

    fn read<R: Send>(&self, py: Python<'_>, work: impl FnOnce(&Params<f32>) -> Result<R> + Send) -> PyResult<R> {
        door::run(py, || self.weights.read(|weights| work(&weights.params)))
    }

    fn as_encoder(&self) -> PyResult<&Encoder> {
        match &self.module {
            Module::Encoder(encoder) => Ok(encoder),
            _ => Err(ConfigError::new_err("this layer is no encoder")),
        }
    }

    fn run<'py>(
        &self,
        call: Call<'py, f32>,
        form: Form,
        forward: impl FnOnce(&mut Tape<f32>, &Params<f32>) -> Result<Var> + Send,
    ) -> PyResult<Answer<'py>> {
        let weights = Arc::clone(&self.weights);
        Ok(call.run_on(weights, form, |tape, params| Ok((forward(tape, params)?, ())))?.0)
    }
}

/// Where sequences lie among the rows of an argument.
fn rows_of(name: &str, rows: usize, lengths: &[usize]) -> PyResult<Rows> {
    let sum = lengths.iter().fold(0usize, |sum, &n| sum.saturating_add(n));
    if sum != rows {
        let text = format!("argument `{name}`: expected sequences of {rows} rows together, got lengths of {sum}");
        return Err(ShapeError::new_err(text));
    }
    Ok(Rows::from_lengths(lengths))
}

/// Checks the config of an encoder given as JSON and gives it back as the engine reads it.
#[pyfunction]
pub fn check_encoder_config(config: &str) -> PyResult<String> {
    Ok(EncoderConfig::from_json(config).map_err(raise)?.to_json())
}

/// Arrays of a safetensors file by name, as f32, without those whose names begin or end with one of `ignore`.
#[pyfunction]
pub fn read_safetensors(py: Python<'_>, path: PathBuf, ignore: Vec<String>) -> PyResult<Bound<'_, PyDict>> {
    let wanted = |name: &str| !ignore.iter().any(|text| name.starts_with(text) || name.ends_with(text));
    named_arrays(py, door::run(py, || checkpoint::read_arrays(&path, wanted))?)
}
