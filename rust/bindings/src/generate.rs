//! Decoding: options from Python, hypotheses to Python, and decodings that Python advances step by step.

use crate::arrays::{to_array, with_slice};
use crate::batching::{Kind, Turn};
use crate::door;
use crate::errors::{DTypeError, ShapeError, raise};
use crate::model::{Model, Sequences};
use numpy::{PyArray1, PyArrayDyn, PyArrayMethods};
use pyo3::prelude::*;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use transformer_core::error::{Error, Result};
use transformer_core::generate::{
    self, Decoding, GenerateOptions, Hypothesis, Length, Loaded, Processor, Sampling, Seeds,
};
use transformer_core::tape::{Params, Pool};

type Ids<'py> = Bound<'py, PyArray1<i64>>;
type Floats<'py> = Bound<'py, PyArrayDyn<f32>>;
/// `(ids, score, token_logprobs, finished, alternatives)`
pub type Found<'py> = (Ids<'py>, f64, Floats<'py>, bool, Option<(Bound<'py, PyArrayDyn<i64>>, Floats<'py>)>);

/// The newest token, and the sources that are done.
type Step<'py> = (Option<u32>, Vec<(usize, Vec<Found<'py>>)>);

/// A length: a number, or (factor, more).
#[derive(FromPyObject)]
enum Span {
    Fixed(usize),
    Relative(f64, i64),
}

impl Span {
    fn length(self) -> Length {
        match self {
            Span::Fixed(n) => Length::Fixed(n),
            Span::Relative(a, b) => Length::Relative(a, b),
        }
    }
}

#[derive(FromPyObject)]
enum SeedArgument {
    Shared(u64),
    Each(Vec<u64>),
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct SamplingArguments {
    seed: SeedArgument,
    temperature: f64,
    top_k: Option<usize>,
    top_p: Option<f64>,
    min_p: Option<f64>,
}

/// The settings of a decoding, as the shim checks and completes them.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub struct Settings {
    max_len: Option<Span>,
    min_len: Span,
    beam: usize,
    n_best: usize,
    length_penalty: f64,
    patience: f64,
    sampling: Option<SamplingArguments>,
    repetition_penalty: f64,
    no_repeat_ngram: Option<usize>,
    suppress: Vec<u32>,
    forced: std::collections::BTreeMap<usize, u32>,
    prefixes: Vec<Vec<u32>>,
    alternatives: usize,
    scores: bool,
    logits_processor: Option<Py<PyAny>>,
}

impl Settings {
    fn split(self) -> (GenerateOptions, Option<Py<PyAny>>) {
        let sampling = self.sampling.map(|s| {
            let seeds = match s.seed {
                SeedArgument::Shared(seed) => Seeds::Shared(seed),
                SeedArgument::Each(seeds) => Seeds::Each(seeds),
            };
            Sampling { seeds, temperature: s.temperature, top_k: s.top_k, top_p: s.top_p, min_p: s.min_p }
        });
        let options = GenerateOptions {
            max_len: self.max_len.map(Span::length),
            min_len: self.min_len.length(),
            beam: self.beam,
            n_best: self.n_best,
            length_penalty: self.length_penalty,
            patience: self.patience,
            sampling,
            repetition_penalty: self.repetition_penalty,
            no_repeat_ngram: self.no_repeat_ngram,
            suppress: self.suppress,
            forced: self.forced,
            prefixes: self.prefixes,
            alternatives: self.alternatives,
            scores: self.scores,
        };
        (options, self.logits_processor)
    }
}

/// Reads the weights of a model and of its draft, with a pool of buffers.
fn read<R>(
    model: &Model,
    draft: Option<&Model>,
    work: impl FnOnce(Loaded<'_>, Option<Loaded<'_>>, &mut Pool<f32>) -> Result<R>,
) -> Result<R> {
    fn loaded<'a>(model: &'a Model, params: &'a Params<f32>) -> Loaded<'a> {
        Loaded { layers: &model.layers, params }
    }
    let Some(draft) = draft else { return model.with_pool(|params, pool| work(loaded(model, params), None, pool)) };
    if std::ptr::eq(model, draft) {
        // Read once: a writer between two readings would wait for the first, and the second for it.
        return model.with_pool(|params, pool| work(loaded(model, params), Some(loaded(draft, params)), pool));
    }
    // Always in the same order: else two calls, each the other's draft, and two writers could wait for each other.
    if std::ptr::from_ref(model) < std::ptr::from_ref(draft) {
        model.with_pool(|params, pool| {
            draft.read(|of_draft| work(loaded(model, params), Some(loaded(draft, of_draft)), pool))
        })
    } else {
        draft.read(|of_draft| {
            model.with_pool(|params, pool| work(loaded(model, params), Some(loaded(draft, of_draft)), pool))
        })
    }
}

/// A Python function that replaces logits. What it raises waits here until the engine has come back.
struct Hook<'a> {
    function: &'a Py<PyAny>,
    raised: Mutex<Option<PyErr>>,
}

impl Hook<'_> {
    fn ask(&self, ids: &[u32], logits: &[f32]) -> Result<Vec<f32>> {
        let ask = |py: Python<'_>| {
            let ids = PyArray1::from_iter(py, ids.iter().map(|&id| i64::from(id)));
            let answer = self.function.call1(py, (ids, PyArray1::from_slice(py, logits)))?;
            match answer.bind(py).cast::<PyArrayDyn<f32>>() {
                Ok(array) => with_slice(array, |values| Ok(values.to_vec())),
                Err(_) => Err(DTypeError::new_err("logits_processor: expected an f32 array")),
            }
        };
        door::call_back(ask).map_err(|raised| {
            *self.raised.lock().unwrap_or_else(PoisonError::into_inner) = Some(raised);
            Error::Interrupted
        })
    }
}

/// Runs `work` behind the door with the processor, if there is one. What a processor raises comes out as it is.
fn run<R: Send>(
    py: Python<'_>,
    function: Option<&Py<PyAny>>,
    stop: Option<&AtomicBool>,
    work: impl FnOnce(Option<&mut Processor<'_>>) -> Result<R> + Send,
) -> PyResult<R> {
    let Some(function) = function else { return door::run_until(py, stop, || work(None)) };
    let hook = Hook { function, raised: Mutex::new(None) };
    let result = door::run_until(py, stop, || work(Some(&mut |ids: &[u32], logits: &[f32]| hook.ask(ids, logits))));
    let raised = hook.raised.into_inner().unwrap_or_else(PoisonError::into_inner);
    result.map_err(|error| raised.unwrap_or(error))
}

fn found<'py>(py: Python<'py>, hypotheses: Vec<Hypothesis>, k: usize) -> PyResult<Vec<Found<'py>>> {
    let give = |h: Hypothesis| {
        let ids = PyArray1::from_iter(py, h.ids.iter().map(|&id| i64::from(id)));
        let n = h.token_logprobs.len();
        let alternatives = if k > 0 {
            let (ids, logprobs) = h.alternatives.iter().map(|entry| (i64::from(entry.id), entry.value)).unzip();
            let ids: Vec<i64> = ids;
            Some((PyArray1::from_vec(py, ids).reshape(vec![n, k])?, to_array(py, logprobs, &[n, k])?))
        } else {
            None
        };
        Ok((ids, h.score, to_array(py, h.token_logprobs, &[n])?, h.finished, alternatives))
    };
    hypotheses.into_iter().map(give).collect()
}

/// The best hypotheses of every source, decoded together with what others ask for; `None` says to decode alone, as does a call
/// from within another, which may lead all others.
fn together(
    py: Python<'_>,
    model: &Model,
    draft: Option<&Model>,
    src: &Sequences,
    options: &GenerateOptions,
) -> PyResult<Option<Vec<Vec<Hypothesis>>>> {
    if door::is_nested() {
        return Ok(None);
    }
    let plans = options.plans(model.layers.config(), &src.rows(), 0..).map_err(raise)?;
    let address = draft.map(|draft| std::ptr::from_ref(draft).addr());
    let kind = Kind::new(options, address, door::context_limit(py)?);
    let Some(caller) = model.batches.join(kind, plans, &src.ids) else { return Ok(None) };
    loop {
        match door::wait(py, |patience| caller.turn(patience))? {
            Turn::Done(answers) => return Ok(Some(answers)),
            Turn::Alone => return Ok(None),
            Turn::Lead(leader) => {
                let lead = |model: Loaded<'_>, draft: Option<Loaded<'_>>, pool: &mut Pool<f32>| {
                    leader.lead(model, draft, pool)
                };
                match door::run(py, || Ok(read(model, draft, lead)))? {
                    Ok(()) => {}
                    Err(error) if caller.is_the_only_one() => return Err(raise(error)),
                    Err(_) => return Ok(None),
                }
            }
        }
    }
}

/// The best hypotheses of every source.
pub fn hypotheses<'py>(
    py: Python<'py>,
    model: &Model,
    draft: Option<&Model>,
    src: &Sequences,
    settings: Settings,
) -> PyResult<Vec<Vec<Found<'py>>>> {
    let (options, function) = settings.split();
    let shared = match function {
        None => together(py, model, draft, src, &options)?,
        Some(_) => None, // it is called on the calling thread alone
    };
    let best = match shared {
        Some(best) => best,
        None => run(py, function.as_ref(), None, |processor| {
            read(model, draft, |model, draft, pool| {
                generate::hypotheses(model, draft, pool, &src.ids, &src.rows(), &options, processor)
            })
        })?,
    };
    best.into_iter().map(|best| found(py, best, options.alternatives)).collect()
}

/// A decoding that goes on when it is asked to. Dropping it ends the work.
#[pyclass(frozen, module = "transformer_rs._core")]
pub struct Decoder {
    model: Arc<Model>,
    draft: Option<Arc<Model>>,
    options: GenerateOptions,
    processor: Option<Py<PyAny>>,
    decoding: Mutex<Decoding>,
    stopped: AtomicBool,
}

impl Decoder {
    /// A decoding by this model, of no source yet.
    pub fn new(model: Arc<Model>, draft: Option<Arc<Model>>, settings: Settings) -> PyResult<Self> {
        let (options, processor) = settings.split();
        options.check(model.layers.config(), None).map_err(raise)?;
        let guesses = draft.as_ref().map(|draft| &draft.layers);
        let decoding = Decoding::new(&model.layers, guesses, &options, processor.is_some()).map_err(raise)?;
        let (decoding, stopped) = (Mutex::new(decoding), AtomicBool::new(false));
        Ok(Decoder { model, draft, options, processor, decoding, stopped })
    }

    /// Two calls at once would have to share the tokens between them, and a processor may not ask for its own.
    fn alone<R>(&self, work: impl FnOnce(&mut Decoding) -> Result<R>) -> Result<R> {
        match self.decoding.try_lock() {
            Ok(mut decoding) => work(&mut decoding),
            Err(std::sync::TryLockError::Poisoned(poisoned)) => work(&mut poisoned.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => {
                Err(Error::Config("decoding: another call is at work on it; give each thread its own".into()))
            }
        }
    }
}

#[pymethods]
impl Decoder {
    /// Takes in sources with these numbers.
    fn push<'py>(&self, py: Python<'py>, src: &Ids<'py>, src_lengths: &Ids<'py>, numbers: Vec<usize>) -> PyResult<()> {
        let src = Sequences::read(src, src_lengths)?;
        if numbers.len() != src.lengths.len() {
            return Err(ShapeError::new_err("decoding: expected a number for each source"));
        }
        door::run(py, || {
            let plans = self.options.plans(self.model.layers.config(), &src.rows(), numbers)?;
            self.alone(|decoding| decoding.push(plans, &src.ids))
        })
    }

    /// Adds a token to every hypothesis, again and again if `until_done`, until a source is done. Returns the newest token of
    /// the first hypothesis, if it goes on, and the sources that are done.
    fn step<'py>(&self, py: Python<'py>, until_done: bool) -> PyResult<Step<'py>> {
        let (newest, done) = run(py, self.processor.as_ref(), Some(&self.stopped), |mut processor| {
            self.alone(|decoding| {
                read(&self.model, self.draft.as_deref(), |model, draft, pool| {
                    loop {
                        let done = decoding.step(model, draft, pool, processor.as_deref_mut())?;
                        if !until_done || !done.is_empty() || decoding.sources() == 0 {
                            return Ok((decoding.newest(), done));
                        }
                    }
                })
            })
        })?;
        let give = |(source, best)| Ok((source, found(py, best, self.options.alternatives)?));
        Ok((newest, done.into_iter().map(give).collect::<PyResult<_>>()?))
    }

    /// Ends a step that is under way in another thread, as Ctrl-C does, and every later one.
    fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Sources that are not done.
    fn sources(&self) -> PyResult<usize> {
        self.alone(|decoding| Ok(decoding.sources())).map_err(raise)
    }
}
