//! Optimisers: their settings, their moments, and one pass over the flat arenas.

use super::pattern;
use crate::checkpoint::{NamedArray, Offer, match_names};
use crate::error::Result;
use crate::kernels::optimizer::{Adam, Sgd, adam, descent, momentum};
use crate::profile::{self, Work};
use crate::simd::Buffer;
use crate::tape::{Grads, ParamId, Params};
use crate::threads::{GRAIN, for_each, gather};
use crate::{bail, ensure};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Names that get no weight decay unless somebody says otherwise.
pub const NO_DECAY: [&str; 2] = ["*.bias", "*norm.weight"];

/// An update rule and its settings; the formulas are PyTorch's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum Optimizer {
    /// Adam with decay apart from the gradient (Loshchilov and Hutter 2019).
    AdamW {
        /// The peak learning rate.
        lr: f64,
        /// Decay rates of the two moments.
        betas: (f64, f64),
        /// What keeps the quotient finite.
        eps: f64,
        /// What a weight loses per step, times the learning rate.
        weight_decay: f64,
    },
    /// Adam (Kingma and Ba 2015); the decay is part of the gradient.
    Adam {
        /// The peak learning rate.
        lr: f64,
        /// Decay rates of the two moments.
        betas: (f64, f64),
        /// What keeps the quotient finite.
        eps: f64,
        /// The weight's share in the gradient.
        weight_decay: f64,
    },
    /// Gradient descent; the decay is part of the gradient.
    Sgd {
        /// The peak learning rate.
        lr: f64,
        /// The velocity that is kept.
        momentum: f64,
        /// The weight's share in the gradient.
        weight_decay: f64,
        /// Look ahead.
        nesterov: bool,
    },
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer::AdamW { lr: 1e-3, betas: (0.9, 0.999), eps: 1e-8, weight_decay: 0.01 }
    }
}

impl Optimizer {
    /// The peak learning rate.
    pub fn lr(&self) -> f64 {
        match *self {
            Optimizer::AdamW { lr, .. } | Optimizer::Adam { lr, .. } | Optimizer::Sgd { lr, .. } => lr,
        }
    }

    /// Refuses settings outside their domain.
    pub fn validate(&self) -> Result<()> {
        let name = self.name();
        let at_least_zero = |what: &str, value: f64| {
            ensure!(
                value >= 0.0 && value.is_finite(),
                Config,
                "{name}: argument `{what}`: expected a finite number of at least 0, got {value}"
            );
            Ok(())
        };
        let below_one = |what: &str, value: f64| {
            ensure!(
                (0.0..1.0).contains(&value),
                Config,
                "{name}: argument `{what}`: expected at least 0 and below 1, got {value}"
            );
            Ok(())
        };
        at_least_zero("lr", self.lr())?;
        match *self {
            Optimizer::AdamW { betas, eps, weight_decay, .. } | Optimizer::Adam { betas, eps, weight_decay, .. } => {
                below_one("betas", betas.0)?;
                below_one("betas", betas.1)?;
                at_least_zero("weight_decay", weight_decay)?;
                ensure!(
                    eps >= f64::from(f32::MIN_POSITIVE) && eps.is_finite(),
                    Config,
                    "{name}: argument `eps`: expected a number above 0 that f32 can hold, got {eps}"
                );
            }
            Optimizer::Sgd { momentum, weight_decay, nesterov, .. } => {
                below_one("momentum", momentum)?;
                at_least_zero("weight_decay", weight_decay)?;
                ensure!(
                    !nesterov || momentum > 0.0,
                    Config,
                    "{name}: argument `nesterov`: expected a momentum above 0 beside it, got 0"
                );
            }
        }
        Ok(())
    }

    fn name(&self) -> &'static str {
        match self {
            Optimizer::AdamW { .. } => "AdamW",
            Optimizer::Adam { .. } => "Adam",
            Optimizer::Sgd { .. } => "SGD",
        }
    }

    /// The names of the moments it keeps for each parameter.
    pub(super) fn moments(&self) -> &'static [&'static str] {
        match self {
            Optimizer::AdamW { .. } | Optimizer::Adam { .. } => &["exp_avg", "exp_avg_sq"],
            Optimizer::Sgd { momentum, .. } if *momentum > 0.0 => &["momentum_buffer"],
            Optimizer::Sgd { .. } => &[],
        }
    }

    /// Update number `t` (from 1) of a parameter at learning rate `lr`; gradients are multiplied with `mean`, then with `scale`.
    fn update(&self, t: u64, decays: bool, lr: f64, [mean, scale]: [f64; 2]) -> Update {
        let decay = |weight_decay: f64| if decays { weight_decay } else { 0.0 };
        let adam = |betas: (f64, f64), eps, shrink, l2| {
            let left = |beta: f64| 1.0 - libm::pow(beta, t as f64);
            let (rate, unbias) = (lr / left(betas.0), 1.0 / left(betas.1).sqrt());
            Update::Adam(Adam { mean, scale, shrink, l2, betas, eps, rate, unbias })
        };
        match *self {
            Optimizer::AdamW { betas, eps, weight_decay, .. } => adam(betas, eps, 1.0 - lr * decay(weight_decay), 0.0),
            Optimizer::Adam { betas, eps, weight_decay, .. } => adam(betas, eps, 1.0, decay(weight_decay)),
            Optimizer::Sgd { momentum, weight_decay, nesterov, .. } => {
                Update::Sgd(Sgd { mean, scale, l2: decay(weight_decay), momentum, nesterov, rate: lr })
            }
        }
    }
}

#[derive(Clone, Copy)]
enum Update {
    Adam(Adam),
    Sgd(Sgd),
}

/// What an optimiser remembers: moments over the trainable ranges.
#[derive(Debug)]
pub struct OptimizerState {
    pub(super) slots: Vec<Slot>,
    /// One arena for each of [`Optimizer::moments`].
    pub(super) moments: Vec<Buffer<f32>>,
    /// Updates so far.
    pub(super) updates: u64,
}

/// A trainable parameter.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) id: ParamId,
    /// Its range in the arenas of the moments.
    pub(super) here: Range<usize>,
    /// Its range in the parameter arena.
    there: Range<usize>,
    decays: bool,
}

/// A run of one parameter that one kernel call updates.
struct Piece<'a> {
    w: &'a mut [f32],
    moments: [&'a mut [f32]; 2],
    g: &'a [f32],
    update: Update,
}

impl Piece<'_> {
    fn run(self) {
        let Piece { w, moments: [first, second], g, update } = self;
        match update {
            Update::Adam(c) => adam(w, first, second, g, c),
            Update::Sgd(c) if c.momentum > 0.0 => momentum(w, first, g, c),
            Update::Sgd(c) => descent(w, g, c),
        }
    }
}

impl OptimizerState {
    /// Zero moments for the parameters that `grads` has gradients of.
    pub fn new(optimizer: &Optimizer, no_decay: &[String], params: &Params<f32>, grads: &Grads<f32>) -> Result<Self> {
        optimizer.validate()?;
        let slots = grads
            .ranges()
            .map(|(id, here, there)| {
                let decays = !pattern::any(no_decay, &params.layout().entry(id).name);
                Slot { id, here, there, decays }
            })
            .collect();
        let arena = |_| Buffer::zeroed(grads.len());
        let moments = optimizer.moments().iter().map(arena).collect::<Result<_>>()?;
        Ok(OptimizerState { slots, moments, updates: 0 })
    }

    /// Whether these are gradients of the parameters it has moments of.
    pub fn fits(&self, grads: &Grads<f32>) -> bool {
        self.slots.iter().map(|s| (s.id, s.here.clone(), s.there.clone())).eq(grads.ranges())
    }

    /// How many updates there were.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Name and shape of each moment of each parameter, such as `head.weight.exp_avg`.
    pub(super) fn places<'a>(&self, optimizer: &Optimizer, params: &'a Params<f32>) -> Vec<(String, &'a [usize])> {
        let of = |slot: &Slot| {
            let entry = params.layout().entry(slot.id);
            optimizer.moments().iter().map(move |kind| (format!("{}.{kind}", entry.name), entry.shape.as_slice()))
        };
        self.slots.iter().flat_map(of).collect()
    }

    /// The values of these, in the same order.
    pub(super) fn values(&self) -> impl Iterator<Item = &[f32]> {
        self.slots.iter().flat_map(|slot| self.moments.iter().map(|arena| &arena[slot.here.clone()]))
    }

    /// Where the moment at a place among these lies.
    pub(super) fn moment_mut(&mut self, place: usize) -> &mut [f32] {
        let kinds = self.moments.len();
        &mut self.moments[place % kinds][self.slots[place / kinds].here.clone()]
    }

    /// All moments by name.
    pub fn state_dict<'a>(
        &'a self,
        optimizer: &Optimizer,
        params: &'a Params<f32>,
    ) -> impl Iterator<Item = (String, &'a [usize], &'a [f32])> {
        self.places(optimizer, params)
            .into_iter()
            .zip(self.values())
            .map(|((name, shape), values)| (name, shape, values))
    }

    /// Takes over what `state_dict` gave after so many updates: all of it, or nothing is changed.
    pub fn load_state_dict(
        &mut self,
        optimizer: &Optimizer,
        params: &Params<f32>,
        updates: u64,
        arrays: &[NamedArray<'_>],
    ) -> Result<()> {
        for (name, _, values) in arrays {
            ensure!(
                values.iter().all(|x| x.is_finite()),
                NonFinite,
                "argument `state`: `{name}` holds NaN or infinity"
            );
        }
        let places = self.places(optimizer, params);
        let places: Vec<_> = places.iter().map(|(name, shape)| (name.as_str(), *shape)).collect();
        let offers = arrays.iter().map(|&(name, shape, _)| Offer { name, shape, problem: None });
        for (place, array, _) in match_names("argument `state`", &places, offers, &[])? {
            self.moment_mut(place).copy_from_slice(arrays[array].2);
        }
        self.updates = updates;
        Ok(())
    }

    /// One update of every trainable parameter by the gradient, which must be complete, times both `scales`, one after the other.
    pub fn update(
        &mut self,
        optimizer: &Optimizer,
        params: &mut Params<f32>,
        grads: &Grads<f32>,
        lr: f64,
        scales: [f64; 2],
    ) -> Result<()> {
        if !self.fits(grads) {
            bail!(Config, "optimizer: the gradients belong to another set of trainable parameters; make them anew");
        }
        ensure!(grads.missing().next().is_none(), Internal, "optimizer: a gradient is missing");
        if self.moments.len() != optimizer.moments().len() {
            bail!(Config, "optimizer: the moments were made by another optimiser; start it anew");
        }
        let passes = 3 + 2 * self.moments.len();
        let _timed = profile::span(optimizer.name(), [0, 0], || Work::passes::<f32>(passes, 1, grads.len()));
        let mut w = Cutter::new(params.arena_mut());
        let mut arenas = self.moments.iter_mut();
        let mut moments = [(); 2].map(|()| Cutter::new(arenas.next().map_or(&mut [], |arena| &mut arena[..])));
        self.updates += 1;
        let [spared, decayed] = [false, true].map(|decays| optimizer.update(self.updates, decays, lr, scales));
        let pieces = self.slots.iter().zip(grads.iter()).flat_map(|(slot, g)| {
            let update = if slot.decays { decayed } else { spared };
            let [first, second] = moments.each_mut().map(|arena| {
                let moments = arena.cut(slot.here.start, g.len()).chunks_mut(GRAIN);
                moments.chain(std::iter::repeat_with(Default::default)) // where there is no arena
            });
            let w = w.cut(slot.there.start, g.len()).chunks_mut(GRAIN);
            let parts = w.zip(g.chunks(GRAIN)).zip(first.zip(second));
            parts.map(move |((w, g), (first, second))| Piece { w, moments: [first, second], g, update })
        });
        let tasks = gather(pieces, |piece| piece.g.len());
        for_each(tasks.into_iter(), |task| task.into_iter().for_each(Piece::run))
    }
}

/// Hands out disjoint parts of an arena, from the front to the back.
struct Cutter<'a> {
    rest: &'a mut [f32],
    /// The number of the first element of `rest`.
    at: usize,
}

impl<'a> Cutter<'a> {
    fn new(arena: &'a mut [f32]) -> Self {
        Cutter { rest: arena, at: 0 }
    }

    /// The elements `start..start + len`; nothing where there is no arena.
    fn cut(&mut self, start: usize, len: usize) -> &'a mut [f32] {
        if self.rest.is_empty() {
            return &mut [];
        }
        let (_, rest) = std::mem::take(&mut self.rest).split_at_mut(start - self.at);
        let (part, rest) = rest.split_at_mut(len);
        (self.rest, self.at) = (rest, start + len);
        part
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::rng::Key;
    use crate::tape::{Builder, Init, Pool};
    use crate::threads::with_local_limit;
    use std::sync::Arc;

    fn params(shapes: &[(&str, usize)]) -> Params<f32> {
        let mut b = Builder::new();
        for (name, n) in shapes {
            b.param(name, &[*n], Init::Normal { std: 1.0 });
        }
        Params::init(Arc::new(b.finish()), 1).unwrap()
    }

    fn no_decay() -> Vec<String> {
        NO_DECAY.map(String::from).to_vec()
    }

    fn set_grads(grads: &mut Grads<f32>, params: &Params<f32>, value: impl Fn(&str, usize) -> f32) {
        grads.reset();
        let ids: Vec<ParamId> = grads.ranges().map(|(id, ..)| id).collect();
        for id in ids {
            let entry = params.layout().entry(id);
            let values: Vec<f32> = (0..entry.range.len()).map(|i| value(&entry.name, i)).collect();
            grads.set(id, &values, &mut Pool::default()).unwrap();
        }
    }

    /// Four steps of each rule as PyTorch 2.13 makes them (torch.optim, two groups: decay 0.1 and 0).
    #[test]
    fn the_rules_are_pytorchs() {
        let (lr, betas, eps, weight_decay) = (0.01, (0.9, 0.98), 1e-6, 0.1);
        let sgd = |momentum, nesterov| Optimizer::Sgd { lr: 0.05, momentum, weight_decay, nesterov };
        let cases = [
            (
                Optimizer::AdamW { lr, betas, eps, weight_decay },
                [0.534_262_84, -1.241_088_6, 1.975_189_8],
                [0.063_684_25, -0.203_895_88],
            ),
            (
                Optimizer::Adam { lr, betas, eps, weight_decay },
                [0.535_441_64, -1.238_386_9, 1.973_715_7],
                [0.063_684_25, -0.203_895_88],
            ),
            (sgd(0.0, false), [0.629_525_8, -1.145_287_4, 1.980_647_1], [-0.18, -0.36]),
            (sgd(0.9, false), [0.712_070_5, -1.094_054_5, 1.875_32], [-0.370_89, -0.399_42]),
            (sgd(0.9, true), [0.819_365_14, -1.005_468_6, 1.870_362_6], [-0.603_801, -0.539_478]),
        ];
        for (optimizer, weight, bias) in cases {
            let mut params = params(&[("a.weight", 3), ("a.bias", 2)]);
            let [w, b] = ["a.weight", "a.bias"].map(|name| params.layout().find(name).unwrap());
            params.set(w, &[0.5, -1.25, 2.0]).unwrap();
            params.set(b, &[0.1, -0.2]).unwrap();
            let mut grads = Grads::new(&params).unwrap();
            let mut state = OptimizerState::new(&optimizer, &no_decay(), &params, &grads).unwrap();
            for t in 1..=4 {
                // Summed over 8 tokens and clipped to a half: the scale brings both back.
                set_grads(&mut grads, &params, |name, i| {
                    16.0 * (0.3 * (i + 1) as f32 - 0.4 * t as f32) * if name == "a.weight" { 1.0 } else { -2.0 }
                });
                state.update(&optimizer, &mut params, &grads, optimizer.lr(), [1.0 / 8.0, 0.5]).unwrap();
            }
            for (got, expected) in [(params.get(w), &weight[..]), (params.get(b), &bias[..])] {
                for (a, b) in got.iter().zip(expected) {
                    assert!((a - b).abs() <= 1e-6, "{}: {got:?}, expected {expected:?}", optimizer.name());
                }
            }
        }
    }

    /// The pass over the arenas against one kernel call per parameter: large ones are cut, small ones share a task.
    #[test]
    fn the_pass_gives_the_bits_of_each_parameter_alone_for_any_number_of_threads() {
        let shapes =
            [("a", 3 * GRAIN + 5), ("b.bias", 1), ("c", 0), ("d", 100), ("e", GRAIN), ("f", 17), ("g", GRAIN - 1)];
        for optimizer in [
            Optimizer::default(),
            Optimizer::Sgd { lr: 0.1, momentum: 0.5, weight_decay: 0.1, nesterov: true },
            Optimizer::Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.1, nesterov: false },
        ] {
            let gradient = |name: &str, i: usize| Key::new(2).fold_name(name).normal(i as u64) as f32;
            let whole = |threads| {
                with_local_limit(threads, || {
                    let mut params = params(&shapes);
                    // A frozen one in the middle: the arenas are no longer parallel.
                    params.set_trainable(params.layout().find("d").unwrap(), false);
                    let mut grads = Grads::new(&params).unwrap();
                    let mut state = OptimizerState::new(&optimizer, &no_decay(), &params, &grads).unwrap();
                    set_grads(&mut grads, &params, gradient);
                    for _ in 0..2 {
                        state.update(&optimizer, &mut params, &grads, 0.1, [0.25, 1.0]).unwrap();
                    }
                    params
                })
            };
            let one = whole(1);
            for name in shapes.map(|(name, _)| name) {
                let id = one.layout().find(name).unwrap();
                let mut w = params(&shapes).get(id).to_vec();
                let g: Vec<f32> = (0..w.len()).map(|i| gradient(name, i)).collect();
                let (mut first, mut second) = (vec![0.0; w.len()], vec![0.0; w.len()]);
                for t in 1..=2 {
                    let update = optimizer.update(t, name != "b.bias", 0.1, [0.25, 1.0]);
                    if name != "d" {
                        Piece { w: &mut w, moments: [&mut first, &mut second], g: &g, update }.run();
                    }
                }
                assert!(one.get(id) == w, "{}: `{name}`", optimizer.name());
            }
            for threads in [2, 3, 7] {
                let other = whole(threads);
                assert!(one.layout().ids().all(|id| one.get(id) == other.get(id)), "{threads} threads");
            }
        }
    }

    #[test]
    fn gradients_of_another_trainable_set_are_refused() {
        let optimizer = Optimizer::default();
        let mut params = params(&[("a", 1), ("b", 1)]);
        params.set_trainable(params.layout().find("b").unwrap(), false);
        let mut state = OptimizerState::new(&optimizer, &[], &params, &Grads::new(&params).unwrap()).unwrap();
        params.set_trainable(params.layout().find("b").unwrap(), true);
        let mut grads = Grads::new(&params).unwrap();
        set_grads(&mut grads, &params, |_, _| 1.0);
        assert!(matches!(state.update(&optimizer, &mut params, &grads, 0.1, [1.0, 1.0]), Err(Error::Config(_))));
    }

    #[test]
    fn settings_outside_their_domain_are_refused() {
        let adamw = |lr, betas, eps, weight_decay| Optimizer::AdamW { lr, betas, eps, weight_decay };
        for (optimizer, named) in [
            (adamw(-1.0, (0.9, 0.99), 1e-8, 0.0), "lr"),
            (adamw(f64::NAN, (0.9, 0.99), 1e-8, 0.0), "lr"),
            (adamw(1.0, (1.0, 0.99), 1e-8, 0.0), "betas"),
            (adamw(1.0, (0.9, -0.1), 1e-8, 0.0), "betas"),
            (adamw(1.0, (0.9, 0.99), 0.0, 0.0), "eps"),
            (adamw(1.0, (0.9, 0.99), 1e-8, f64::INFINITY), "weight_decay"),
            (Optimizer::Sgd { lr: 1.0, momentum: 0.0, weight_decay: 0.0, nesterov: true }, "nesterov"),
        ] {
            let error = optimizer.validate().unwrap_err();
            assert!(matches!(&error, Error::Config(text) if text.contains(named)), "{error}");
        }
    }

    #[test]
    fn json_keeps_every_bit() {
        let lr = 0.1 + 0.2;
        let optimizer =
            Optimizer::AdamW { lr, betas: (0.9, 1.0 - 1e-3 / 3.0), eps: 1e-9 / 7.0, weight_decay: 1.0 / 3.0 };
        let json = serde_json::to_string(&optimizer).unwrap();
        assert!(json.contains(r#""kind":"adamw""#), "{json}");
        assert_eq!(serde_json::from_str::<Optimizer>(&json).unwrap(), optimizer);
    }
}
