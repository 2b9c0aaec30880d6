//! The trainer: gradients of some micro-batches, then one update of the optimiser.

use super::{NO_DECAY, Optimizer, OptimizerState, Schedule, clip_scale, global_norm, pattern};
use crate::checkpoint::NamedArray;
use crate::error::{Result, Shape};
use crate::kernels::gemm::Precision;
use crate::models::{Batch, Transformer};
use crate::ops::CrossEntropy;
use crate::profile::{self, Work};
use crate::rng::Key;
use crate::simd::Float;
use crate::tape::{Grads, ParamId, Params, Pool, StatId, Tape};
use crate::threads::{section, uninterrupted};
use crate::{bail, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The argument by which a trainer is told what not to train.
const FREEZE: &str = "Trainer: argument `freeze`";

/// What can be trained: something with a loss.
pub trait Loss {
    /// What one forward pass takes.
    type Batch;

    /// The summed loss of a batch.
    fn loss<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        batch: &Self::Batch,
        label_smoothing: f64,
    ) -> Result<CrossEntropy>;
}

impl Loss for Transformer {
    type Batch = Batch;

    fn loss<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        batch: &Batch,
        label_smoothing: f64,
    ) -> Result<CrossEntropy> {
        Transformer::loss(self, tape, params, batch, label_smoothing)
    }
}

/// The number type of the large products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// f32 throughout.
    #[default]
    F32,
    /// Operands rounded to bf16, sums in f32.
    Bf16,
    /// What is faster on this machine.
    Auto,
}

/// How to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainerConfig {
    /// The update rule.
    pub optimizer: Optimizer,
    /// How the learning rate moves.
    pub schedule: Schedule,
    /// The share of the target distribution that is spread over all tokens (Szegedy et al. 2016).
    pub label_smoothing: f64,
    /// The largest norm of the gradient of the loss per token.
    pub clip_norm: Option<f64>,
    /// Patterns of names that are not trained.
    pub freeze: Vec<String>,
    /// Patterns of names without weight decay.
    pub no_decay: Vec<String>,
    /// Decides dropout.
    pub seed: u64,
    /// The number type of the large products.
    pub compute: Compute,
}

impl Default for TrainerConfig {
    fn default() -> Self {
        TrainerConfig {
            optimizer: Optimizer::default(),
            schedule: Schedule::default(),
            label_smoothing: 0.0,
            clip_norm: None,
            freeze: Vec::new(),
            no_decay: NO_DECAY.map(String::from).to_vec(),
            seed: 0,
            compute: Compute::F32,
        }
    }
}

impl TrainerConfig {
    /// Refuses settings outside their domain.
    pub fn validate(&self) -> Result<()> {
        self.optimizer.validate()?;
        self.schedule.validate()?;
        ensure!(
            (0.0..1.0).contains(&self.label_smoothing),
            Config,
            "Trainer: argument `label_smoothing`: expected at least 0 and below 1, got {}",
            self.label_smoothing
        );
        if let Some(clip) = self.clip_norm {
            ensure!(
                clip > 0.0 && clip.is_finite(),
                Config,
                "Trainer: argument `clip_norm`: expected a finite number above 0, or none, got {clip}"
            );
        }
        Ok(())
    }
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepResult {
    /// The loss that is minimised, per target token.
    pub loss: f64,
    /// The negative log-likelihood per target token, without smoothing.
    pub nll: f64,
    /// Target tokens.
    pub n_tokens: usize,
    /// The norm of the gradient of the loss per token, before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// The number of the step, from 1.
    pub step: u64,
}

/// Losses in evaluation mode.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// The loss that training minimises, per target token.
    pub loss: f64,
    /// The negative log-likelihood per target token, without smoothing.
    pub nll: f64,
    /// Target tokens.
    pub n_tokens: usize,
}

/// The gradient of the loss over a step's batches, before clipping, and what belongs to it.
#[derive(Debug)]
pub struct Gradients {
    /// The sum over all tokens, so that an all-reduce is a plain sum, of this and of `n_tokens`.
    grads: Grads<f32>,
    /// Whether they were given from outside: then they are of the mean loss, and are not divided again.
    given: bool,
    /// Of the gradient per token, if it is known.
    norm: Option<f64>,
    /// Σ smoothed loss
    pub loss_sum: f64,
    /// Σ negative log-likelihood
    pub nll_sum: f64,
    /// Target tokens.
    pub n_tokens: usize,
    statistics: Statistics,
}

/// New running statistics: the mean of what the batches of a step noted.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// For this step alone.
    step: u64,
    values: Vec<(StatId, Vec<f32>)>,
}

impl Gradients {
    /// The gradient of the loss per token by a parameter, if that is trainable.
    pub fn of(&self, id: ParamId) -> Option<Vec<f32>> {
        let mean = self.mean() as f32;
        self.grads.get(id).map(|sums| sums.iter().map(|sum| mean * sum).collect())
    }

    /// What the sums are multiplied with. Rounded to f32, so is the product, wherever it is made.
    fn mean(&self) -> f64 {
        if self.given { 1.0 } else { 1.0 / self.n_tokens as f64 }
    }

    /// To be changed.
    pub(super) fn grads_mut(&mut self) -> &mut Grads<f32> {
        self.norm = None;
        &mut self.grads
    }
}

/// Takes gradients by name: those of all trained parameters, in their shapes, and no others.
pub fn set_gradients(
    params: &Params<f32>,
    grads: &mut Grads<f32>,
    pool: &mut Pool<f32>,
    arrays: &[NamedArray<'_>],
) -> Result<()> {
    let layout = params.layout();
    let mut problems = Vec::new();
    for (name, shape, values) in arrays {
        match layout.find(name).filter(|&id| grads.wants(id)) {
            None => problems.push(format!("`{name}` is not trained")),
            Some(id) if layout.entry(id).shape != *shape => {
                let expected = Shape(&layout.entry(id).shape);
                problems.push(format!("`{name}`: expected shape {expected}, got {}", Shape(shape)));
            }
            Some(id) => grads.set(id, values, pool)?,
        }
    }
    problems.extend(grads.missing().map(|id| format!("`{}` is missing", layout.entry(id).name)));
    ensure!(
        problems.is_empty(),
        Shape,
        "argument `grads`: {}; pass one for each trained parameter",
        problems.join(", ")
    );
    Ok(())
}

/// Refuses, for `what`, a gradient whose norm is not finite, and names the first such parameter.
pub fn check_norm(what: &str, params: &Params<f32>, grads: &Grads<f32>, norm: f64) -> Result<()> {
    if !norm.is_finite() {
        let name = first_non_finite(params, |id| grads.get(id));
        let name = name.map(|name| format!(", first in parameter `{name}`")).unwrap_or_default();
        bail!(
            NonFinite,
            "{what}: the gradient's norm is {norm}{name}; nothing was changed; lower the learning rate or clip"
        );
    }
    Ok(())
}

/// Trains the parameters of a model by gradient descent. It holds what a run needs besides them and borrows nothing.
#[derive(Debug)]
pub struct Trainer {
    pub(super) config: TrainerConfig,
    pub(super) step: u64,
    /// The number of steps that schedules without a total of their own go by.
    pub total_steps: Option<u64>,
    pub(super) state: OptimizerState,
    /// For gradients, while nobody holds it.
    grads: Option<Grads<f32>>,
    pool: Pool<f32>,
    /// Whether every gradient was seen to arrive.
    covered: bool,
}

impl Trainer {
    /// A trainer at step 0. Which parameters train is from here on `config.freeze`'s business.
    pub fn new(config: TrainerConfig, params: &mut Params<f32>) -> Result<Self> {
        config.validate()?;
        freeze(FREEZE, &config.freeze, params)?;
        let grads = Grads::new(params)?;
        let state = OptimizerState::new(&config.optimizer, &config.no_decay, params, &grads)?;
        Ok(Trainer {
            config,
            step: 0,
            total_steps: None,
            state,
            grads: Some(grads),
            pool: Pool::default(),
            covered: false,
        })
    }

    /// How it trains.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// Steps done.
    pub fn step_count(&self) -> u64 {
        self.step
    }

    /// The number type in use: never `Auto`.
    pub fn compute(&self) -> Compute {
        match self.config.compute {
            Compute::Auto if Precision::bf16_is_fast() => Compute::Bf16,
            Compute::Auto => Compute::F32,
            chosen => chosen,
        }
    }

    /// Bytes that wait for the next step.
    pub fn pool_bytes(&self) -> usize {
        self.pool.bytes()
    }

    /// One step: the gradient of all micro-batches together, then an update.
    pub fn step<L: Loss>(
        &mut self,
        model: &L,
        params: &mut Params<f32>,
        micro_batches: &[L::Batch],
    ) -> Result<StepResult> {
        section(None, || {
            self.claim(params)?;
            let gradients = self.accumulate(model, params, micro_batches)?;
            self.apply(params, gradients)
        })
    }

    /// The first half of [`Trainer::step`]: nothing changes but what `apply` will need. Both halves give the bits of a step.
    pub fn gradients<L: Loss>(
        &mut self,
        model: &L,
        params: &Params<f32>,
        micro_batches: &[L::Batch],
    ) -> Result<(StepResult, Gradients)> {
        section(None, || {
            let gradients = self.accumulate(model, params, micro_batches)?;
            match self.result(params, &gradients) {
                Ok(result) => Ok((result, gradients)),
                Err(error) => {
                    self.discard(gradients);
                    Err(error)
                }
            }
        })
    }

    /// No gradients yet: they come from elsewhere, see [`Trainer::set`]. The running statistics are those that
    /// [`Trainer::gradients`] noted last, if for this step.
    pub fn blank(&mut self, params: &Params<f32>, noted: Option<&Statistics>) -> Result<Gradients> {
        let mut gradients = self.empty(params)?;
        gradients.given = true;
        if let Some(noted) = noted.filter(|noted| noted.step == gradients.statistics.step) {
            gradients.statistics = noted.clone();
        }
        Ok(gradients)
    }

    /// Takes gradients by name, see [`set_gradients`].
    pub fn set(&mut self, gradients: &mut Gradients, params: &Params<f32>, arrays: &[NamedArray<'_>]) -> Result<()> {
        set_gradients(params, gradients.grads_mut(), &mut self.pool, arrays)
    }

    /// Takes back gradients that nobody needs any more: the next pass uses their memory. What came with them is handed on.
    pub fn discard(&mut self, gradients: Gradients) -> Statistics {
        let Gradients { mut grads, statistics, .. } = gradients;
        grads.release(&mut self.pool);
        self.grads = Some(grads);
        statistics
    }

    /// Whether the model's frozen parameters are those of this trainer.
    pub fn has_claimed(&self, params: &Params<f32>) -> bool {
        let layout = params.layout();
        layout.ids().all(|id| params.is_trainable(id) != pattern::any(&self.config.freeze, &layout.entry(id).name))
    }

    /// Makes this trainer's frozen parameters those of the model: another trainer may have others.
    pub fn claim(&self, params: &mut Params<f32>) -> Result<()> {
        freeze(FREEZE, &self.config.freeze, params)
    }

    /// The second half of [`Trainer::step`]: clipping, one pass of the optimiser, running statistics. It is done whole or
    /// not at all, and no interrupt stops it.
    pub fn apply(&mut self, params: &mut Params<f32>, gradients: Gradients) -> Result<StepResult> {
        section(None, || {
            uninterrupted(|| {
                let result = self.commit(params, &gradients);
                self.discard(gradients);
                result
            })
        })
    }

    /// Losses in evaluation mode, over all batches.
    pub fn evaluate<L: Loss>(&mut self, model: &L, params: &Params<f32>, batches: &[L::Batch]) -> Result<Evaluation> {
        let (mut loss_sum, mut nll_sum, mut n_tokens) = (0.0, 0.0, 0);
        section(None, || {
            for batch in batches {
                let mut tape = Tape::evaluation(std::mem::take(&mut self.pool));
                let losses = model.loss(&mut tape, params, batch, self.config.label_smoothing);
                self.pool = tape.into_pool();
                let losses = losses?;
                loss_sum += losses.loss_sum;
                nll_sum += losses.nll_sum;
                n_tokens += losses.tokens;
            }
            Ok(())
        })?;
        ensure!(n_tokens > 0, Shape, "evaluate: expected at least one target token, got none");
        let count = n_tokens as f64;
        Ok(Evaluation { loss: loss_sum / count, nll: nll_sum / count, n_tokens })
    }

    /// Forward and backward of every micro-batch, into the same gradients.
    fn accumulate<L: Loss>(
        &mut self,
        model: &L,
        params: &Params<f32>,
        micro_batches: &[L::Batch],
    ) -> Result<Gradients> {
        let _timed = profile::span("training step", [0, 0], Work::default);
        let mut gradients = self.empty(params)?;
        match self.run(model, params, micro_batches, &mut gradients) {
            Ok(()) => Ok(gradients),
            Err(error) => {
                self.discard(gradients);
                Err(error)
            }
        }
    }

    fn empty(&mut self, params: &Params<f32>) -> Result<Gradients> {
        let grads = match self.grads.take().filter(|grads| self.state.fits(grads)) {
            Some(grads) => grads,
            None => Grads::new(params)?,
        };
        let statistics = Statistics { step: self.step + 1, values: Vec::new() };
        Ok(Gradients { grads, given: false, norm: None, loss_sum: 0.0, nll_sum: 0.0, n_tokens: 0, statistics })
    }

    fn run<L: Loss>(
        &mut self,
        model: &L,
        params: &Params<f32>,
        micro_batches: &[L::Batch],
        sum: &mut Gradients,
    ) -> Result<()> {
        ensure!(
            sum.grads.fit(params) && self.state.fits(&sum.grads),
            Config,
            "Trainer: the model's frozen parameters are not those of this trainer; another trainer changed them, \
             make a step or a new trainer"
        );
        let key = Key::new(self.config.seed).fold(sum.statistics.step);
        let mut noted: BTreeMap<StatId, (usize, Vec<f64>)> = BTreeMap::new();
        for (micro, batch) in micro_batches.iter().enumerate() {
            let key = key.fold(micro as u64).fold(0); // 0: this process, should several train together
            let mut tape = Tape::training(std::mem::take(&mut self.pool), key);
            tape.precision = if self.compute() == Compute::Bf16 { Precision::Bf16 } else { Precision::Full };
            let done = self.one_batch(model, params, batch, &mut tape, sum);
            let statistics = tape.take_statistics();
            self.pool = tape.into_pool();
            done?;
            for (id, values) in statistics {
                let (count, sums) = noted.entry(id).or_insert_with(|| (0, vec![0.0; values.len()]));
                *count += 1;
                sums.iter_mut().zip(&values).for_each(|(sum, value)| *sum += f64::from(*value));
            }
        }
        ensure!(sum.n_tokens > 0, Shape, "Trainer: expected at least one target token in the batch, got none");
        if !self.covered {
            let names: Vec<_> = sum.grads.missing().map(|id| format!("`{}`", params.layout().entry(id).name)).collect();
            ensure!(
                names.is_empty(),
                Config,
                "Trainer: no gradient reached {}: the loss does not depend on them; freeze them or remove them from the model",
                names.join(", ")
            );
            self.covered = true;
        }
        sum.grads.complete(&mut self.pool)?;
        // Up to here everything was a plain sum over batches (and, one day, processes).
        sum.norm = Some(global_norm(&sum.grads, sum.mean())?);
        let mean = |(id, (count, sums)): (StatId, (usize, Vec<f64>))| {
            (id, sums.into_iter().map(|sum| (sum / count as f64) as f32).collect())
        };
        sum.statistics.values = noted.into_iter().map(mean).collect();
        Ok(())
    }

    fn one_batch<L: Loss>(
        &self,
        model: &L,
        params: &Params<f32>,
        batch: &L::Batch,
        tape: &mut Tape<f32>,
        sum: &mut Gradients,
    ) -> Result<()> {
        let losses = model.loss(tape, params, batch, self.config.label_smoothing)?;
        if !losses.loss_sum.is_finite() {
            let parameter = first_non_finite(params, |id| Some(params.get(id)));
            bail!(
                NonFinite,
                "step {}: the loss is {}{}; nothing was changed",
                sum.statistics.step,
                losses.loss_sum,
                parameter.map(|name| format!(", and parameter `{name}` holds NaN or infinity")).unwrap_or_default()
            );
        }
        sum.loss_sum += losses.loss_sum;
        sum.nll_sum += losses.nll_sum;
        sum.n_tokens += losses.tokens;
        let mut one = tape.pool.tensor(1, 1)?;
        one.fill(1.0);
        tape.backward(params, &mut sum.grads, [(losses.loss, one)])?;
        Ok(())
    }

    /// What a step with these gradients does; an error where it cannot be done.
    fn result(&self, params: &Params<f32>, gradients: &Gradients) -> Result<StepResult> {
        let Gradients { grads, norm, loss_sum, nll_sum, n_tokens, statistics: Statistics { step, .. }, .. } = gradients;
        let count = *n_tokens as f64;
        let grad_norm = norm.map_or_else(|| global_norm(grads, gradients.mean()), Ok)?;
        check_norm(&format!("step {step}"), params, grads, grad_norm)?;
        let lr = self.config.optimizer.lr() * self.config.schedule.factor(*step, self.total_steps)?;
        Ok(StepResult { loss: loss_sum / count, nll: nll_sum / count, n_tokens: *n_tokens, grad_norm, lr, step: *step })
    }

    fn commit(&mut self, params: &mut Params<f32>, gradients: &Gradients) -> Result<StepResult> {
        ensure!(
            gradients.statistics.step == self.step + 1,
            Config,
            "these gradients were made for step {}, the next one is {}; make them anew",
            gradients.statistics.step,
            self.step + 1
        );
        let result = self.result(params, gradients)?;
        let scales = [gradients.mean(), clip_scale(result.grad_norm, self.config.clip_norm)];
        self.state.update(&self.config.optimizer, params, &gradients.grads, result.lr, scales)?;
        for (id, values) in &gradients.statistics.values {
            params.set_stat(*id, values)?;
        }
        self.step += 1;
        Ok(result)
    }
}

/// Freezes the parameters whose names match one of the `patterns`, the caller's `argument`, and sets all others free.
pub fn freeze<T: Float>(argument: &str, patterns: &[String], params: &mut Params<T>) -> Result<()> {
    let layout = params.layout().clone();
    for pattern in patterns {
        ensure!(
            layout.ids().any(|id| pattern::matches(pattern, &layout.entry(id).name)),
            Config,
            "{argument}: no parameter is named like {pattern:?}; see the names in state_dict()"
        );
    }
    let frozen = |id| pattern::any(patterns, &layout.entry(id).name);
    ensure!(!layout.ids().all(frozen), Config, "{argument}: every parameter is frozen; leave some to train");
    layout.ids().for_each(|id| params.set_trainable(id, !frozen(id)));
    Ok(())
}

fn first_non_finite<'a>(params: &'a Params<f32>, values: impl Fn(ParamId) -> Option<&'a [f32]>) -> Option<&'a str> {
    let mut ids = params.layout().ids();
    let id = ids.find(|&id| values(id).is_some_and(|values| values.iter().any(|x| !x.is_finite())))?;
    Some(&params.layout().entry(id).name)
}
