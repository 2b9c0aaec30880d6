//! A call with a gradient: arrays become leaves of a tape and parameters, an operation or a layer runs, and the tape
//! waits in a [`Pullback`] for the gradient of the result. One mechanism for every function and every layer.

use crate::arrays::{Floats, Owned, Real, copy, named_arrays, to_array};
use crate::door;
use crate::errors::{PullbackError, ShapeError, raise};
use crate::form::Form;
use crate::pools::Home;
use crate::shared::Shared;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use transformer_core::error::{Result, Shape};
use transformer_core::rng::Key;
use transformer_core::simd::zeros;
use transformer_core::tape::{Builder, Grads, Init, Layout, ParamId, Params, Pool, StatId, Tape, Tensor, Var};
use transformer_core::train;

/// The numbers of a layer. A call reads them, an optimiser writes them.
pub struct Weights<T> {
    /// Parameters and statistics.
    pub params: Params<T>,
    /// How much of the version is due to running statistics, which no recorded training pass reads again.
    committed: u64,
    /// How often parameters were frozen or set free: a recorded pass knows only those that were free.
    freezes: u64,
}

impl<T: Real> Weights<T> {
    /// Weights that calls, pullbacks and optimisers share.
    pub fn shared(params: Params<T>) -> Arc<Shared<Self>> {
        Arc::new(Shared::new(Weights { params, committed: 0, freezes: 0 }))
    }

    fn version(&self, training: bool) -> u64 {
        self.params.version() + self.freezes - if training { self.committed } else { 0 }
    }

    /// Keeps the parameters that these patterns name as they are, and sets all others free.
    pub fn freeze(&mut self, patterns: &[String]) -> Result<()> {
        self.freezes += 1;
        train::freeze("argument `patterns`", patterns, &mut self.params)
    }

    fn commit(&mut self, statistics: Vec<(StatId, Vec<T>)>) -> Result<()> {
        let before = self.params.version();
        statistics.into_iter().try_for_each(|(id, values)| self.params.set_stat(id, &values))?;
        self.committed += self.params.version() - before;
        Ok(())
    }
}

/// Random numbers and gradients of a call.
#[derive(Clone, Copy, Default)]
pub struct Mode {
    /// How many arguments, counted from the first, get a gradient. Without any nothing is recorded.
    pub gradients: usize,
    /// The seed of a training pass; None in evaluation.
    pub seed: Option<u64>,
}

impl Mode {
    fn tape<T: Real>(self, pool: Pool<T>) -> Tape<T> {
        match self.seed {
            Some(seed) if self.gradients == 0 => Tape::training(pool, Key::new(seed)).without_recording(),
            Some(seed) => Tape::training(pool, Key::new(seed)),
            None if self.gradients == 0 => Tape::evaluation(pool),
            None => Tape::recording(pool),
        }
    }
}

/// An argument of a call, for its gradient.
enum Input {
    /// Not differentiable, or absent.
    Nothing,
    Leaf(Var, Form),
    Weight(ParamId, Vec<usize>),
}

/// A call that is being prepared. Arguments are declared in their order.
pub struct Call<'py, T: Real> {
    py: Python<'py>,
    mode: Mode,
    /// What the result is multiplied with.
    pub scale: T,
    tape: Tape<T>,
    home: Home<T>,
    /// Of a layer: gradients of its weights are wanted by name.
    named: bool,
    builder: Builder,
    values: Vec<(ParamId, Floats<'py>)>,
    statistics: Vec<(StatId, Floats<'py>)>,
    inputs: Vec<Input>,
}

/// What a call gives Python: the result, and the pullback where it was recorded.
pub type Answer<'py> = (Bound<'py, PyAny>, Option<Pullback>);

impl<'py, T: Real> Call<'py, T> {
    /// The call of a function, without arguments so far.
    pub fn new(py: Python<'py>, mode: Mode) -> Self {
        Self::with_home(py, mode, T::home(), false)
    }

    /// The call of a layer, which has buffers of its own.
    pub fn of_layer(py: Python<'py>, mode: Mode, home: &Home<T>) -> Self {
        Self::with_home(py, mode, home.clone(), true)
    }

    fn with_home(py: Python<'py>, mode: Mode, home: Home<T>, named: bool) -> Self {
        let (builder, tape, scale) = (Builder::new(), mode.tape(home.take()), T::ONE);
        let (values, statistics, inputs) = Default::default();
        Call { py, mode, scale, tape, home, named, builder, values, statistics, inputs }
    }

    /// The next argument has no gradient.
    pub fn nothing(&mut self) {
        self.inputs.push(Input::Nothing);
    }

    /// The next argument is data; its rows are made by `form`.
    pub fn leaf(&mut self, x: &Floats<'py>, form: Form) -> PyResult<Var> {
        let (py, pool) = (self.py, &mut self.tape.pool);
        let tensor = x.read(|values| door::copying(py, values.len(), || form.pack(values, pool).map_err(raise)))?;
        let wanted = self.inputs.len() < self.mode.gradients;
        let var = if wanted { self.tape.leaf(tensor) } else { self.tape.constant(tensor) };
        self.inputs.push(if wanted { Input::Leaf(var, form) } else { Input::Nothing });
        Ok(var)
    }

    /// The next two arguments stand side by side in one matrix.
    pub fn leaf_pair(&mut self, left: &Floats<'py>, right: &Floats<'py>) -> PyResult<Var> {
        let form = Form::rows(left.shape())?;
        let (rows, cols) = form.size();
        let pool = &mut self.tape.pool;
        let tensor = left.read(|left| {
            right.read(|right| {
                let mut both = pool.tensor(rows, 2 * cols).map_err(raise)?;
                let columns = cols.max(1);
                for ((to, left), right) in
                    both.chunks_mut(2 * columns).zip(left.chunks(columns)).zip(right.chunks(columns))
                {
                    let (gate, up) = to.split_at_mut(cols);
                    gate.copy_from_slice(left);
                    up.copy_from_slice(right);
                }
                Ok(both)
            })
        })?;
        let wanted = [self.inputs.len() < self.mode.gradients, self.inputs.len() + 1 < self.mode.gradients];
        let var = if wanted.contains(&true) { self.tape.leaf(tensor) } else { self.tape.constant(tensor) };
        for (i, wanted) in wanted.into_iter().enumerate() {
            let form = Form::Columns { shape: left.shape().to_vec(), start: i * cols };
            self.inputs.push(if wanted { Input::Leaf(var, form) } else { Input::Nothing });
        }
        Ok(var)
    }

    /// The next argument is a weight.
    pub fn weight(&mut self, name: &str, w: Floats<'py>) -> ParamId {
        let shape = w.shape().to_vec();
        let id = self.builder.param(name, &shape, Init::Constant(0.0));
        self.inputs.push(Input::Weight(id, shape));
        self.values.push((id, w));
        id
    }

    /// The next argument is a weight or absent.
    pub fn maybe_weight(&mut self, name: &str, w: Option<Floats<'py>>) -> Option<ParamId> {
        match w {
            Some(w) => Some(self.weight(name, w)),
            None => {
                self.nothing();
                None
            }
        }
    }

    /// A constant of one value per column.
    pub fn statistic(&mut self, name: &str, s: Floats<'py>) -> StatId {
        let id = self.builder.stat(name, s.shape().iter().product(), 0.0);
        self.statistics.push((id, s));
        id
    }

    /// Also asks for the weights of attentions.
    pub fn collect_attention(&mut self) {
        self.tape.collect_attention();
    }

    /// Runs an operation on the arguments. `form` lays the result out.
    pub fn run(
        self,
        form: Form,
        operation: impl FnOnce(&mut Tape<T>, &Params<T>) -> Result<Var> + Send,
    ) -> PyResult<Answer<'py>> {
        Ok(self.run_with(form, |tape, params| Ok((operation(tape, params)?, ())))?.0)
    }

    /// Likewise; also gives what the operation says beside its result.
    pub fn run_with<E: Send>(
        mut self,
        form: Form,
        operation: impl FnOnce(&mut Tape<T>, &Params<T>) -> Result<(Var, E)> + Send,
    ) -> PyResult<(Answer<'py>, E)> {
        let weights = self.take_weights()?;
        self.run_on(weights, form, operation)
    }

    /// The weights that were declared.
    fn take_weights(&mut self) -> PyResult<Arc<Shared<Weights<T>>>> {
        let layout = Arc::new(std::mem::take(&mut self.builder).finish());
        let mut params = Params::init(layout, 0).map_err(raise)?;
        for (id, values) in self.values.drain(..) {
            values.read(|values| params.set(id, values).map_err(raise))?;
        }
        for (id, values) in self.statistics.drain(..) {
            values.read(|values| params.set_stat(id, values).map_err(raise))?;
        }
        for (i, input) in self.inputs.iter().enumerate() {
            if let Input::Weight(id, _) = input {
                params.set_trainable(*id, i < self.mode.gradients);
            }
        }
        Ok(Weights::shared(params))
    }

    /// Runs on the weights of a layer.
    pub fn run_on<E: Send>(
        self,
        weights: Arc<Shared<Weights<T>>>,
        form: Form,
        work: impl FnOnce(&mut Tape<T>, &Params<T>) -> Result<(Var, E)> + Send,
    ) -> PyResult<(Answer<'py>, E)> {
        let Call { py, mode, scale, mut tape, home, named, inputs, .. } = self;
        let training = mode.seed.is_some();
        let (values, recorded, extra) = door::run(py, move || {
            let (version, (output, extra)) =
                weights.read(|weights| Ok((weights.version(training), work(&mut tape, &weights.params)?)))?;
            let mut values = form.unpack(tape.value(output)?)?;
            if scale != T::ONE {
                values.iter_mut().for_each(|y| *y *= scale);
            }
            let recorded = Recorded { tape, weights, version, training, inputs, output, form, scale, home, named };
            Ok((values, recorded, extra))
        })?;
        let y = to_array(py, values, &recorded.form.shape())?.into_any();
        let pullback = (mode.gradients > 0).then(|| Pullback { recorded: Mutex::new(Some(Box::new(recorded))) });
        Ok(((y, pullback), extra))
    }
}

/// A finished forward pass that can be walked back once. Its buffers go home with it, walked or not.
struct Recorded<T: Real> {
    tape: Tape<T>,
    weights: Arc<Shared<Weights<T>>>,
    version: u64,
    training: bool,
    inputs: Vec<Input>,
    output: Var,
    form: Form,
    scale: T,
    home: Home<T>,
    named: bool,
}

impl<T: Real> Drop for Recorded<T> {
    fn drop(&mut self) {
        let tape = std::mem::replace(&mut self.tape, Tape::evaluation(Pool::default()));
        self.home.give(tape.into_pool());
    }
}

/// Values of a gradient and its shape.
type Gradient<T> = (Vec<T>, Vec<usize>);

/// Gradients of the arguments, in their order, and of a layer's weights.
type Walked<'py> = (Bound<'py, PyList>, Option<Gradients>);

/// A [`Recorded`] of either precision.
trait Walk: Send {
    fn shape(&self) -> Vec<usize>;
    fn walk<'py>(self: Box<Self>, py: Python<'py>, dy: Floats<'py>) -> PyResult<Walked<'py>>;
}

impl<T: Real> Walk for Recorded<T> {
    fn shape(&self) -> Vec<usize> {
        self.form.shape()
    }

    fn walk<'py>(mut self: Box<Self>, py: Python<'py>, dy: Floats<'py>) -> PyResult<Walked<'py>> {
        let (form, pool) = (&self.form, &mut self.tape.pool);
        let mut dy = dy.read(|dy| door::copying(py, dy.len(), || form.pack(dy, pool).map_err(raise)))?;
        let walked = door::run(py, move || {
            if self.scale != T::ONE {
                dy.iter_mut().for_each(|y| *y *= self.scale);
            }
            let walked = self.weights.read(|weights| {
                if weights.version(self.training) != self.version {
                    return Ok(None);
                }
                let mut grads = self.home.take_grads(&weights.params)?;
                let dvars = self.tape.backward(&weights.params, &mut grads, [(self.output, dy)])?;
                Ok(Some((grads, dvars, Arc::clone(weights.params.layout()))))
            })?;
            let Some((mut grads, mut dvars, layout)) = walked else { return Ok(None) };
            grads.complete(&mut self.tape.pool)?;
            let dw = |id: ParamId| grads.get(id).map(copy).transpose();

            let mut taken: Vec<(Var, Option<Tensor<T>>)> = Vec::new();
            let mut arguments: Vec<Option<Gradient<T>>> = Vec::new();
            for input in &self.inputs {
                arguments.push(match input {
                    Input::Nothing => None,
                    Input::Weight(id, shape) => dw(*id)?.map(|dw| (dw, shape.clone())),
                    Input::Leaf(var, form) => {
                        if taken.iter().all(|(other, _)| other != var) {
                            taken.push((*var, dvars.take(*var)));
                        }
                        match taken.iter().find(|(other, _)| other == var) {
                            Some((_, Some(dx))) => Some((form.unpack(dx)?, form.shape())),
                            _ => Some((zeros(form.shape().iter().product())?, form.shape())),
                        }
                    }
                });
            }
            // The weights of a function are arguments of it, those of a layer f32.
            let named = if self.named {
                let of: Box<dyn Any> = Box::new(LayerGrads { layout, grads: Some(grads), home: self.home.clone() });
                of.downcast().ok().map(|of| Gradients { of: *of })
            } else {
                grads.release(&mut self.tape.pool);
                None
            };
            taken.into_iter().filter_map(|(_, dx)| dx).for_each(|dx| self.tape.pool.recycle(dx));
            let statistics = self.tape.take_statistics();
            if !statistics.is_empty() {
                self.weights.write(|weights| weights.commit(statistics))?;
            }
            Ok(Some((arguments, named)))
        })?;
        let Some((arguments, named)) = walked else {
            let text = "pullback: the weights have changed since this call; call tr.vjp again";
            return Err(PullbackError::new_err(text));
        };
        let list = PyList::empty(py);
        for gradient in arguments {
            list.append(gradient.map(|(values, shape)| to_array(py, values, &shape)).transpose()?)?;
        }
        Ok((list, named))
    }
}

/// Gradients of a layer's weights in the engine's memory, which goes back to the layer.
pub struct LayerGrads<T: Real> {
    layout: Arc<Layout>,
    /// There until the end.
    grads: Option<Grads<T>>,
    home: Home<T>,
}

impl<T: Real> LayerGrads<T> {
    /// The gradients, if they are of parameters of this very layout.
    pub fn of(&self, params: &Params<T>) -> Option<&Grads<T>> {
        self.grads.as_ref().filter(|_| Arc::ptr_eq(&self.layout, params.layout()))
    }

    /// Each by its name, with its shape.
    pub fn named(&self) -> impl Iterator<Item = (&str, &[usize], &[T])> {
        self.layout.ids().filter_map(|id| {
            let (entry, values) = (self.layout.entry(id), self.grads.as_ref()?.get(id)?);
            Some((entry.name.as_str(), &entry.shape[..], values))
        })
    }
}

impl<T: Real> Drop for LayerGrads<T> {
    fn drop(&mut self) {
        self.grads.take().into_iter().for_each(|grads| self.home.give_grads(grads));
    }
}

/// Gradients of a layer's weights, not yet arrays.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct Gradients {
    /// What an optimiser takes as it is.
    pub of: LayerGrads<f32>,
}

#[pymethods]
impl Gradients {
    /// Copies, by name.
    fn arrays<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let owned = |(name, shape, values): (&str, &[usize], &[f32])| Ok((name.into(), shape.to_vec(), copy(values)?));
        let arrays: Vec<Owned<f32>> = door::run(py, || self.of.named().map(owned).collect())?;
        named_arrays(py, arrays)
    }
}

/// The way back of one call. Used once.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct Pullback {
    recorded: Mutex<Option<Box<dyn Walk>>>,
}

#[pymethods]
impl Pullback {
    /// Gradients of the arguments, in their order, and of a layer's weights.
    fn __call__<'py>(&self, py: Python<'py>, dy: Floats<'py>) -> PyResult<Walked<'py>> {
        let recorded = {
            let mut recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
            match recorded.as_ref().map(|recorded| recorded.shape()) {
                None => {
                    let text = "pullback: it was used already; each call of tr.vjp gives one for one use";
                    return Err(PullbackError::new_err(text));
                }
                Some(shape) if shape != dy.shape() => {
                    let (expected, got) = (Shape(&shape), Shape(dy.shape()));
                    let text = format!("pullback: argument `dy`: expected the shape of y, {expected}, got {got}");
                    return Err(ShapeError::new_err(text));
                }
                Some(_) => recorded.take(),
            }
        };
        match recorded {
            Some(recorded) => recorded.walk(py, dy),
            None => Err(PullbackError::new_err("pullback: it was used already")),
        }
    }
}
