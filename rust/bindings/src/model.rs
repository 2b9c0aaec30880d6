//! The weights and layers behind a Python object: calls read them together, training writes them alone.

use crate::arrays::{token_ids, with_slice};
use crate::batching::Batches;
use crate::errors::ShapeError;
use crate::pools::Home;
use crate::shared::{Shared, Turn, Turns};
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use std::path::Path;
use std::sync::Arc;
use transformer_core::checkpoint::Checkpoint;
use transformer_core::error::{Error, Result};
use transformer_core::models::{self, TransformerConfig};
use transformer_core::rows::Rows;
use transformer_core::tape::{Params, Pool, Stored, Tape};

/// What `model_type` says in `config.json`.
const MODEL_TYPE: &str = "transformer";

/// A model, shared by its Python object and its trainers.
pub struct Model {
    pub layers: models::Transformer,
    params: Shared<Params<f32>>,
    /// Held by a training step from its forward pass to its update, so that the steps of two trainers do not mix.
    training: Turns<()>,
    home: Home<f32>,
    /// Calls that decode in the same way meet here.
    pub batches: Batches,
}

impl Model {
    /// A model of these weights.
    pub fn new(layers: models::Transformer, params: Params<f32>) -> Arc<Self> {
        let (params, training) = (Shared::new(params), Turns::new(()));
        Arc::new(Model { layers, params, training, home: Home::of_layer(), batches: Batches::default() })
    }

    /// Weights of zero, for values that come from elsewhere.
    pub fn blank(config: TransformerConfig, stored: Stored) -> Result<Arc<Self>> {
        let layers = models::Transformer::new(config)?;
        let params = Params::zeros(layers.layout_in(stored))?;
        Ok(Model::new(layers, params))
    }

    /// Reads the weights, beside any number of others.
    pub fn read<R>(&self, work: impl FnOnce(&Params<f32>) -> Result<R>) -> Result<R> {
        self.params.read(work)
    }

    /// Writes the weights, alone.
    pub fn write<R>(&self, work: impl FnOnce(&mut Params<f32>) -> Result<R>) -> Result<R> {
        self.params.write(work)
    }

    /// Keeps others from writing while the guard lives.
    pub fn alone(&self) -> Result<Turn<'_, ()>> {
        self.training.take("the model's training")
    }

    /// Reads the weights, with a pool of buffers.
    pub fn with_pool<R>(&self, work: impl FnOnce(&Params<f32>, &mut Pool<f32>) -> Result<R>) -> Result<R> {
        self.read(|params| {
            let mut pool = self.home.take();
            let result = work(params, &mut pool);
            self.home.give(pool);
            result
        })
    }

    /// An evaluation that records nothing.
    pub fn evaluate<R>(&self, work: impl FnOnce(&mut Tape<f32>, &Params<f32>) -> Result<R>) -> Result<R> {
        self.with_pool(|params, pool| {
            let mut tape = Tape::evaluation(std::mem::take(pool));
            let result = work(&mut tape, params);
            *pool = tape.into_pool();
            result
        })
    }

    /// The config as JSON, and the name of the kind, as they stand in a checkpoint.
    pub fn about(&self) -> (String, &'static str) {
        (self.layers.config().to_json(), MODEL_TYPE)
    }

    /// Reads the model of a folder.
    pub fn open(folder: &Path) -> Result<(Arc<Self>, Checkpoint)> {
        let mut checkpoint = Checkpoint::open(folder)?;
        let place = folder.display();
        if checkpoint.model_type() != MODEL_TYPE {
            let found = checkpoint.model_type();
            return Err(Error::Checkpoint(format!("{place}: expected a model_type of {MODEL_TYPE:?}, got {found:?}")));
        }
        let config = TransformerConfig::from_json(checkpoint.config_json())
            .map_err(|error| Error::Checkpoint(format!("{place}: {error}")))?;
        let model = Model::blank(config, checkpoint.stored())?;
        model.write(|params| checkpoint.load_into(params, model.layers.aliases()))?;
        Ok((model, checkpoint))
    }
}

/// Sequences of ids from Python: packed, and where they lie.
pub struct Sequences {
    pub ids: Vec<u32>,
    pub lengths: Vec<usize>,
}

impl Sequences {
    /// Reads ids (R,) and lengths (B,).
    pub fn read(ids: &Bound<'_, PyArray1<i64>>, lengths: &Bound<'_, PyArray1<i64>>) -> PyResult<Self> {
        let ids = token_ids(ids)?;
        let lengths = with_slice(lengths.to_dyn(), |lengths| {
            Ok(lengths.iter().map(|&n| usize::try_from(n).unwrap_or(usize::MAX)).collect::<Vec<_>>())
        })?;
        if lengths.iter().try_fold(0usize, |sum, &n| sum.checked_add(n)) != Some(ids.len()) {
            return Err(ShapeError::new_err(format!("lengths: their sum is not the number of ids, {}", ids.len())));
        }
        Ok(Sequences { ids, lengths })
    }

    /// Where the sequences lie.
    pub fn rows(&self) -> Rows {
        Rows::from_lengths(&self.lengths)
    }

    /// The ids of each sequence.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        let mut rest = self.ids.as_slice();
        self.lengths.iter().map(move |&n| {
            let (sequence, after) = rest.split_at(n);
            rest = after;
            sequence
        })
    }
}
