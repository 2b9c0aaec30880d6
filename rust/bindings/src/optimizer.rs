//! Optimisers for layers, and what checks the settings of training.

use crate::arrays::{copy, named_arrays, read_named};
use crate::call::{Gradients, LayerGrads, Weights};
use crate::door;
use crate::errors::raise;
use crate::layer::Layer;
use crate::shared::Turns;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::de::DeserializeOwned;
use transformer_core::checkpoint::NamedArray;
use transformer_core::error::{Error, Result};
use transformer_core::tape::{Grads, Params, Pool};
use transformer_core::threads::uninterrupted;
use transformer_core::train::{self, Optimizer, Schedule, check_norm, clip_scale, global_norm, set_gradients};

/// The moments of one layer, made when it is updated for the first time.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct OptimizerState {
    optimizer: Optimizer,
    no_decay: Vec<String>,
    state: Turns<Option<Known>>,
}

type Known = (train::OptimizerState, Grads<f32>);

const STATE: &str = "the optimiser's state";

#[pymethods]
impl OptimizerState {
    #[new]
    fn new(settings: &str, no_decay: Vec<String>) -> PyResult<Self> {
        Ok(OptimizerState { optimizer: optimizer(settings)?, no_decay, state: Turns::new(None) })
    }

    /// One step on the weights of a layer.
    fn update(&self, py: Python<'_>, layer: &Layer, grads: Given<'_>, lr: f64, clip: Option<f64>) -> PyResult<()> {
        let (kept, owned) = match &grads {
            Given::Kept(grads) => (Some(&grads.get().of), Vec::new()),
            Given::Arrays(arrays) => (None, read_named::<f32>(arrays)?),
        };
        let update = |weights: &mut Weights<f32>| {
            let params = &mut weights.params;
            let mut state = self.state.take(STATE)?;
            let (state, own) = self.known(&mut state, params)?;
            let grads = match kept.and_then(|kept| kept.of(params)) {
                Some(grads) => grads,
                None => {
                    let owned = owned.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..]));
                    let arrays: Vec<NamedArray<'_>> =
                        owned.chain(kept.into_iter().flat_map(LayerGrads::named)).collect();
                    own.reset();
                    set_gradients(params, own, &mut Pool::default(), &arrays)?;
                    own
                }
            };
            let norm = global_norm(grads, 1.0)?;
            check_norm("argument `grads`", params, grads, norm)?;
            uninterrupted(|| state.update(&self.optimizer, params, grads, lr, [1.0, clip_scale(norm, clip)]))
        };
        door::run(py, || layer.weights.write(update))
    }

    /// How many updates a layer had, and its moments by name.
    fn state_dict<'py>(&self, py: Python<'py>, layer: &Layer) -> PyResult<(u64, Bound<'py, PyDict>)> {
        let copied = |weights: &Weights<f32>| {
            let mut state = self.state.take(STATE)?;
            let (state, _) = self.known(&mut state, &weights.params)?;
            let moments = state.state_dict(&self.optimizer, &weights.params);
            let arrays = moments.map(|(name, shape, values)| Ok((name, shape.to_vec(), copy(values)?)));
            Ok((state.updates(), arrays.collect::<Result<Vec<_>>>()?))
        };
        let (updates, arrays) = door::run(py, || layer.weights.read(copied))?;
        Ok((updates, named_arrays(py, arrays)?))
    }

    /// Takes over what `state_dict` gave, or nothing.
    fn load_state_dict(&self, py: Python<'_>, layer: &Layer, updates: u64, arrays: &Bound<'_, PyDict>) -> PyResult<()> {
        let given = read_named::<f32>(arrays)?;
        let arrays: Vec<NamedArray<'_>> =
            given.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..])).collect();
        let load = |weights: &Weights<f32>| {
            let mut state = self.state.take(STATE)?;
            let (state, _) = self.known(&mut state, &weights.params)?;
            state.load_state_dict(&self.optimizer, &weights.params, updates, &arrays)
        };
        door::run(py, || layer.weights.read(load))
    }
}

impl OptimizerState {
    /// What it remembers of the parameters that are free, and room for their gradients.
    fn known<'a>(&self, state: &'a mut Option<Known>, params: &Params<f32>) -> Result<&'a mut Known> {
        match state {
            Some((_, grads)) if !grads.fit(params) => Err(Error::Config(
                "other parameters are frozen than at this optimiser's first step; go on with a new one".into(),
            )),
            Some(known) => Ok(known),
            empty => {
                let grads = Grads::new(params)?;
                let state = train::OptimizerState::new(&self.optimizer, &self.no_decay, params, &grads)?;
                Ok(empty.insert((state, grads)))
            }
        }
    }
}

/// Gradients as a pullback gives them, or as arrays by name.
#[derive(FromPyObject)]
enum Given<'py> {
    Kept(Bound<'py, Gradients>),
    Arrays(Bound<'py, PyDict>),
}

fn parse<T: DeserializeOwned>(what: &str, json: &str) -> PyResult<T> {
    serde_json::from_str(json).map_err(|error| raise(Error::Config(format!("{what}: {error}"))))
}

fn optimizer(json: &str) -> PyResult<Optimizer> {
    let optimizer: Optimizer = parse("optimizer", json)?;
    optimizer.validate().map_err(raise)?;
    Ok(optimizer)
}

fn schedule(json: &str) -> PyResult<Schedule> {
    let schedule: Schedule = parse("schedule", json)?;
    schedule.validate().map_err(raise)?;
    Ok(schedule)
}

/// Refuses settings outside their domain.
#[pyfunction]
pub fn check_optimizer(settings: &str) -> PyResult<()> {
    optimizer(settings).map(|_| ())
}

/// Refuses settings outside their domain.
#[pyfunction]
pub fn check_schedule(settings: &str) -> PyResult<()> {
    schedule(settings).map(|_| ())
}

/// The factor of a step, counted from 1.
#[pyfunction]
#[pyo3(signature = (settings, step, total))]
pub fn schedule_factor(settings: &str, step: u64, total: Option<u64>) -> PyResult<f64> {
    schedule(settings)?.factor(step, total).map_err(raise)
}

/// The peak of the paper's schedule.
#[pyfunction]
pub fn paper_lr(d_model: usize, warmup: u64) -> f64 {
    train::paper_lr(d_model, warmup)
}
