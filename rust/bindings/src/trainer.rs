//! The trainer: steps on a shared model.

use crate::arrays::{named_arrays, read_named, with_slice};
use crate::door;
use crate::errors::{ShapeError, raise};
use crate::model::{Model, Sequences};
use crate::shared::{Turn, Turns};
use crate::transformer::Transformer;
use numpy::{PyArray1, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use transformer_core::checkpoint::NamedArray;
use transformer_core::error::{Error, Result};
use transformer_core::models::Batch;
use transformer_core::train::{self, Compute, Gradients, Statistics, StepResult, TrainerConfig};

/// `(epoch, steps within it)`: where the data stand.
type Place = (u64, u64);
/// `(loss, nll, n_tokens, grad_norm, lr, step)`
type Step = (f64, f64, usize, f64, f64, u64);
/// `(src, src_lengths, tgt, tgt_lengths)`
type Packed<'py> =
    (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>);

struct State {
    trainer: train::Trainer,
    place: Place,
    /// What `gradients` noted last, for `apply`.
    noted: Option<Statistics>,
}

/// Trains a Transformer.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct Trainer {
    model: Arc<Model>,
    state: Turns<State>,
}

/// Weights, optimiser and place of a trainer at one moment.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct Snapshot {
    snapshot: train::Snapshot,
    place: Place,
}

#[pymethods]
impl Trainer {
    #[new]
    fn new(py: Python<'_>, model: &Transformer, config: &str) -> PyResult<Self> {
        let config: TrainerConfig =
            serde_json::from_str(config).map_err(|error| raise(Error::Config(format!("Trainer: {error}"))))?;
        let model = model.model.clone();
        let trainer = door::run(py, || {
            let _alone = model.alone()?;
            model.write(|params| train::Trainer::new(config, params))
        })?;
        Ok(Self::of(model, trainer, (0, 0)))
    }

    /// The trainer, its model, and the text that was saved with it.
    #[staticmethod]
    fn load(py: Python<'_>, folder: PathBuf) -> PyResult<(Self, Transformer, String)> {
        let (model, trainer, place, text) = door::run(py, || {
            let (model, checkpoint) = Model::open(&folder)?;
            let (trainer, cursor) = model.write(|params| train::Trainer::load(&checkpoint, params))?;
            let (place, text) = read_cursor(&cursor)
                .ok_or_else(|| Error::Checkpoint(format!("{}: the trainer's place in the data", folder.display())))?;
            Ok((model, trainer, place, text))
        })?;
        Ok((Self::of(model.clone(), trainer, place), Transformer { model }, text))
    }

    /// Writes model and trainer, with a text that `load` gives back.
    fn save(&self, py: Python<'_>, folder: PathBuf, text: &str) -> PyResult<()> {
        let (config, kind) = self.model.about();
        self.run(py, |state| {
            let (epoch, done) = state.place;
            let cursor = json!({ "epoch": epoch, "done": done, "text": text });
            self.model.read(|params| state.trainer.save(&folder, &config, kind, params, cursor))
        })
    }

    fn config(&self, py: Python<'_>) -> PyResult<String> {
        self.run(py, |state| {
            serde_json::to_string(state.trainer.config()).map_err(|error| Error::Internal(error.to_string()))
        })
    }

    fn compute(&self, py: Python<'_>) -> PyResult<&'static str> {
        self.run(py, |state| {
            Ok(match state.trainer.compute() {
                Compute::Bf16 => "bf16",
                Compute::F32 | Compute::Auto => "f32",
            })
        })
    }

    fn step_count(&self, py: Python<'_>) -> PyResult<u64> {
        self.run(py, |state| Ok(state.trainer.step_count()))
    }

    fn place(&self, py: Python<'_>) -> PyResult<Place> {
        self.run(py, |state| Ok(state.place))
    }

    /// The number of steps that schedules without a total of their own go by.
    fn set_total(&self, py: Python<'_>, steps: u64) -> PyResult<()> {
        self.run(py, |state| {
            state.trainer.total_steps = Some(steps);
            Ok(())
        })
    }

    /// One step on some batches together. With it the data are at `place`.
    fn step(&self, py: Python<'_>, batches: Vec<Packed<'_>>, place: Option<Place>) -> PyResult<Step> {
        let batches = self.batches(&batches)?;
        self.run(py, |state| {
            let (_alone, gradients, _) = self.forward_backward(state, &batches)?;
            let result = self.model.write(|params| state.trainer.apply(params, gradients))?;
            state.place = place.unwrap_or(state.place);
            Ok(step(&result))
        })
    }

    /// The first half of a step, and the gradients by name.
    fn gradients<'py>(&self, py: Python<'py>, batches: Vec<Packed<'_>>) -> PyResult<(Step, Bound<'py, PyDict>)> {
        let batches = self.batches(&batches)?;
        let (result, arrays) = self.run(py, |state| {
            let (_alone, gradients, result) = self.forward_backward(state, &batches)?;
            let layout = self.model.layers.layout();
            let copy = |id| {
                let entry = layout.entry(id);
                gradients.of(id).map(|values| (entry.name.clone(), entry.shape.clone(), values))
            };
            let arrays: Vec<_> = layout.ids().filter_map(copy).collect();
            state.noted = Some(state.trainer.discard(gradients));
            Ok((step(&result), arrays))
        })?;
        Ok((result, named_arrays(py, arrays)?))
    }

    /// The second half of a step.
    fn apply(&self, py: Python<'_>, arrays: &Bound<'_, PyDict>) -> PyResult<()> {
        let given = read_named::<f32>(arrays)?;
        self.run(py, |state| {
            let _alone = self.model.alone()?;
            self.model.write(|params| {
                state.trainer.claim(params)?;
                let mut gradients = state.trainer.blank(params, state.noted.as_ref())?;
                let arrays: Vec<NamedArray<'_>> =
                    given.iter().map(|(name, shape, values)| (name.as_str(), &shape[..], &values[..])).collect();
                match state.trainer.set(&mut gradients, params, &arrays) {
                    Ok(()) => state.trainer.apply(params, gradients).map(|_| ()),
                    Err(error) => {
                        state.trainer.discard(gradients);
                        Err(error)
                    }
                }
            })
        })
    }

    /// `(loss, nll, n_tokens)` in evaluation mode.
    fn evaluate(&self, py: Python<'_>, batches: Vec<Packed<'_>>) -> PyResult<(f64, f64, usize)> {
        let batches = self.batches(&batches)?;
        self.run(py, |state| {
            let found = self.model.read(|params| state.trainer.evaluate(&self.model.layers, params, &batches))?;
            Ok((found.loss, found.nll, found.n_tokens))
        })
    }

    fn snapshot(&self, py: Python<'_>) -> PyResult<Snapshot> {
        self.run(py, |state| {
            let snapshot = self.model.read(|params| Ok(state.trainer.snapshot(params)))?;
            Ok(Snapshot { snapshot, place: state.place })
        })
    }

    fn restore(&self, py: Python<'_>, snapshot: &Snapshot) -> PyResult<()> {
        self.run(py, |state| {
            let _alone = self.model.alone()?;
            self.model.write(|params| state.trainer.restore(&snapshot.snapshot, params))?;
            (state.place, state.noted) = (snapshot.place, None);
            Ok(())
        })
    }
}

impl Trainer {
    fn of(model: Arc<Model>, trainer: train::Trainer, place: Place) -> Self {
        Trainer { model, state: Turns::new(State { trainer, place, noted: None }) }
    }

    /// Works on the state, alone and without the interpreter.
    fn run<R: Send>(&self, py: Python<'_>, work: impl FnOnce(&mut State) -> Result<R> + Send) -> PyResult<R> {
        door::run(py, || work(&mut *self.state.take("the trainer")?))
    }

    /// Gradients, whether they can be applied, and the right to do so before anybody else writes.
    fn forward_backward<'a>(
        &'a self,
        state: &mut State,
        batches: &[Batch],
    ) -> Result<(Turn<'a, ()>, Gradients, StepResult)> {
        let alone = self.model.alone()?;
        // Another trainer of this model may have other parameters frozen.
        if !self.model.read(|params| Ok(state.trainer.has_claimed(params)))? {
            self.model.write(|params| state.trainer.claim(params))?;
        }
        let (result, gradients) =
            self.model.read(|params| state.trainer.gradients(&self.model.layers, params, batches))?;
        Ok((alone, gradients, result))
    }

    fn batches(&self, batches: &[Packed<'_>]) -> PyResult<Vec<Batch>> {
        let config = self.model.layers.config();
        let batch = |(src, src_lengths, tgt, tgt_lengths): &Packed<'_>| {
            let (src, tgt) = (Sequences::read(src, src_lengths)?, Sequences::read(tgt, tgt_lengths)?);
            let (src, tgt): (Vec<_>, Vec<_>) = (src.iter().collect(), tgt.iter().collect());
            Batch::new(&src, &tgt, config.bos_id, config.eos_id).map_err(raise)
        };
        batches.iter().map(batch).collect()
    }
}

fn step(r: &StepResult) -> Step {
    (r.loss, r.nll, r.n_tokens, r.grad_norm, r.lr, r.step)
}

fn read_cursor(cursor: &Value) -> Option<(Place, String)> {
    let number = |name: &str| cursor.get(name)?.as_u64();
    Some(((number("epoch")?, number("done")?), cursor.get("text")?.as_str()?.to_owned()))
}

/// Pairs cut into batches: arrays of their numbers.
#[pyfunction]
pub fn batches<'py>(
    py: Python<'py>,
    src_lengths: &Bound<'py, PyArray1<i64>>,
    tgt_lengths: &Bound<'py, PyArray1<i64>>,
    max_tokens: usize,
    seed: u64,
    epoch: u64,
) -> PyResult<Vec<Bound<'py, PyArray1<i64>>>> {
    let read = |lengths: &Bound<'py, PyArray1<i64>>| {
        with_slice(lengths.to_dyn(), |lengths| {
            let lengths = lengths.iter().map(|&n| usize::try_from(n)).collect::<Result<Vec<_>, _>>();
            lengths.map_err(|_| ShapeError::new_err("batches: a length is negative"))
        })
    };
    let (src, tgt) = (read(src_lengths)?, read(tgt_lengths)?);
    let cut = door::run(py, || train::batches(&src, &tgt, max_tokens, seed, epoch))?;
    Ok(cut.into_iter().map(|batch| PyArray1::from_iter(py, batch.into_iter().map(|i| i as i64))).collect())
}
