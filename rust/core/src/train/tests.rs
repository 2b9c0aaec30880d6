//! The trainer on a model small enough to follow by hand: y = w · dropout(x) + b, squared error.

use super::*;
use crate::checkpoint::{Checkpoint, state_dict};
use crate::error::{Error, Result};
use crate::ops::CrossEntropy;
use crate::rng::Key;
use crate::simd::{Float, keep_scalar};
use crate::tape::{Backward, Builder, Init, Operation, ParamId, Params, StatId, Tape, Tensor};
use crate::threads::{parallel, section, with_local_limit};
use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

mod transformer;

struct Toy {
    w: ParamId,
    b: ParamId,
    seen: StatId,
    dropout: f64,
    uses_b: bool,
}

/// Rows of x, each with its target.
type Rows = Vec<([f32; 3], f32)>;

struct SquaredError<T> {
    w: ParamId,
    b: Option<ParamId>,
    x: Vec<[T; 3]>,
    error: Vec<T>,
}

impl<T: Float> Operation<T> for SquaredError<T> {
    fn name(&self) -> &'static str {
        "squared_error"
    }

    /// loss = Σ error² / 2, error = w · x + b − y: dw = Σ error x, db = Σ error
    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let scale = dy[0];
        cx.accumulate_param(self.w, |dw, beta| {
            for (j, dw) in dw.iter_mut().enumerate() {
                let sum: T = self.x.iter().zip(&self.error).map(|(x, e)| *e * x[j] * scale).sum();
                *dw = if beta == crate::kernels::Beta::Add { *dw + sum } else { sum };
            }
            Ok(())
        })?;
        if let Some(b) = self.b {
            cx.accumulate_param(b, |db, beta| {
                let sum = self.error.iter().map(|e| *e * scale).sum();
                db[0] = if beta == crate::kernels::Beta::Add { db[0] + sum } else { sum };
                Ok(())
            })?;
        }
        cx.pool.recycle(dy);
        Ok(())
    }
}

impl Loss for Toy {
    type Batch = Rows;

    fn loss<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, batch: &Rows, _: f64) -> Result<CrossEntropy> {
        let dropout = tape.dropout(1, self.dropout);
        let (w, b) = (params.get(self.w), params.get(self.b)[0]);
        let (mut inputs, mut errors, mut sum) = (Vec::new(), Vec::new(), 0.0);
        for (r, (x, y)) in batch.iter().enumerate() {
            let kept =
                |j: usize| dropout.map_or(1.0, |d| f64::from(keep_scalar(d.row(r), j as u32, d.threshold)) * d.scale);
            let x: [T; 3] = std::array::from_fn(|j| T::from_f64(f64::from(x[j]) * kept(j)));
            let error = (0..3).map(|j| w[j] * x[j]).sum::<T>() + if self.uses_b { b } else { T::ZERO }
                - T::from_f64(f64::from(*y));
            inputs.push(x);
            errors.push(error);
            sum += error.to_f64() * error.to_f64() / 2.0;
        }
        if tape.is_training() {
            let mean = batch.iter().map(|(x, _)| f64::from(x[0])).sum::<f64>() / batch.len() as f64;
            let old = params.stat(self.seen)[0];
            tape.note_statistic(self.seen, vec![old + T::from_f64(0.5) * (T::from_f64(mean) - old)]);
        }
        let b = self.uses_b.then_some(self.b);
        let wanted = tape.wants(params, &[], &[self.w, self.b]);
        let mut value = tape.pool.tensor(1, 1)?;
        value[0] = T::from_f64(sum);
        let loss = tape.push(value, wanted);
        if wanted {
            tape.record(loss, &[], SquaredError { w: self.w, b, x: inputs, error: errors });
        }
        Ok(CrossEntropy { loss, loss_sum: sum, nll_sum: sum / 2.0, tokens: batch.len() })
    }
}

fn toy(dropout: f64) -> (Toy, Params<f32>) {
    let mut build = Builder::new();
    let w = build.param("layer.weight", &[3], Init::Normal { std: 1.0 });
    let b = build.param("layer.bias", &[1], Init::Constant(0.25));
    let seen = build.stat("norm.running_mean", 1, 0.0);
    let params = Params::init(Arc::new(build.finish()), 3).unwrap();
    (Toy { w, b, seen, dropout, uses_b: true }, params)
}

fn rows(seed: u64, n: usize) -> Rows {
    let draw = |i: usize| Key::new(seed).normal(i as u64) as f32;
    (0..n).map(|r| (std::array::from_fn(|j| draw(4 * r + j)), draw(4 * r + 3))).collect()
}

fn bits(params: &Params<f32>) -> Vec<u32> {
    state_dict(params).iter().flat_map(|(.., values)| values.iter().map(|x| x.to_bits())).collect()
}

fn config() -> TrainerConfig {
    TrainerConfig { clip_norm: Some(0.5), schedule: Schedule::Noam { warmup: 4 }, seed: 9, ..Default::default() }
}

#[test]
fn a_step_by_hand() {
    let (model, mut params) = toy(0.0);
    params.set(model.w, &[1.0, 2.0, 0.0]).unwrap();
    let optimizer = Optimizer::Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.0, nesterov: false };
    let config = TrainerConfig {
        optimizer,
        clip_norm: Some(1.0),
        schedule: Schedule::Constant { warmup: 2 },
        ..Default::default()
    };
    let mut trainer = Trainer::new(config, &mut params).unwrap();
    // Errors 1 + 0.25 − 0.25 = 1 and 4 + 0.25 − 6.25 = −2; dw = (1, −4, 0), db = −1, both summed over two rows.
    let result =
        trainer.step(&model, &mut params, &[vec![([1.0, 0.0, 0.0], 0.25)], vec![([0.0, 2.0, 0.0], 6.25)]]).unwrap();
    let norm = (0.25f64 + 4.0 + 0.25).sqrt();
    assert_eq!((result.loss, result.nll, result.n_tokens, result.step), (1.25, 0.625, 2, 1));
    assert!((result.grad_norm - norm).abs() < 1e-12 && result.lr == 0.05, "{result:?}");
    let moved = (0.05 / (norm + 1e-6)) as f32;
    let expected = [1.0 - 0.5 * moved, 2.0 + 2.0 * moved, 0.0, 0.25 + 0.5 * moved];
    for (got, expected) in params.get(model.w).iter().chain(params.get(model.b)).zip(expected) {
        assert!((got - expected).abs() < 1e-6, "{got}, expected {expected}");
    }
    // The two batches noted 0.5 and 0; their mean is committed once.
    assert_eq!(params.stat(model.seen), [0.25]);
}

#[test]
fn gradients_and_apply_give_the_bits_of_a_step() {
    let ((model, mut whole), (_, mut halves)) = (toy(0.3), toy(0.3));
    let mut one = Trainer::new(config(), &mut whole).unwrap();
    let mut two = Trainer::new(config(), &mut halves).unwrap();
    for i in 0..10 {
        let batches = [rows(i, 5), rows(100 + i, 3)];
        let expected = one.step(&model, &mut whole, &batches).unwrap();
        let before = bits(&halves);
        let (told, gradients) = two.gradients(&model, &halves, &batches).unwrap();
        assert_eq!(bits(&halves), before);
        assert_eq!((two.apply(&mut halves, gradients).unwrap(), told), (expected.clone(), expected));
        assert_eq!(bits(&halves), bits(&whole));
    }
    assert_eq!(one.step_count(), 10);
}

#[test]
fn two_micro_batches_are_one_batch_and_dropout_knows_them_apart() {
    let gradient = |dropout, batches: &[Rows], seed| {
        let (model, mut params) = toy(dropout);
        let mut trainer = Trainer::new(TrainerConfig { seed, ..config() }, &mut params).unwrap();
        let (_, gradients) = trainer.gradients(&model, &params, batches).unwrap();
        gradients.of(model.w).unwrap()
    };
    let (a, b) = (rows(1, 4), rows(2, 4));
    let together = gradient(0.0, &[[a.clone(), b.clone()].concat()], 9);
    for (x, y) in gradient(0.0, &[a.clone(), b], 9).iter().zip(together) {
        assert!((x - y).abs() < 1e-5);
    }
    let dropped = gradient(0.5, &[a.clone(), a.clone()], 9);
    let twice: Vec<f32> = gradient(0.5, std::slice::from_ref(&a), 9).iter().map(|x| 2.0 * x).collect();
    assert_ne!(dropped, twice);
    assert_ne!(dropped, gradient(0.5, &[a.clone(), a.clone()], 8));
    assert_eq!(dropped, gradient(0.5, &[a.clone(), a], 9));
}

#[test]
fn sums_over_processes_with_their_tokens_are_one_larger_batch() {
    let step = |processes: usize| {
        let (model, mut params) = toy(0.0);
        let mut trainer = Trainer::new(config(), &mut params).unwrap();
        let (_, mut gradients) = trainer.gradients(&model, &params, &[rows(1, 4)]).unwrap();
        // As if each process had the same rows.
        gradients.n_tokens *= processes;
        gradients.grads_mut().iter_mut().flatten().for_each(|sum| *sum *= processes as f32);
        let norm = trainer.apply(&mut params, gradients).unwrap().grad_norm;
        (norm, bits(&params))
    };
    assert_eq!(step(4), step(1));
}

#[test]
fn a_gradient_that_never_arrives_is_named_before_anything_moves() {
    let (model, mut params) = toy(0.0);
    let model = Toy { uses_b: false, ..model };
    let before = bits(&params);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    let error = trainer.step(&model, &mut params, &[rows(1, 2)]).unwrap_err();
    assert!(matches!(&error, Error::Config(text) if text.contains("`layer.bias`")), "{error}");
    assert_eq!((bits(&params), trainer.step_count()), (before, 0));
    let frozen = TrainerConfig { freeze: vec!["*.bias".into()], ..config() };
    let mut trainer = Trainer::new(frozen, &mut params).unwrap();
    trainer.step(&model, &mut params, &[rows(1, 2)]).unwrap();
    assert_eq!(params.get(model.b), [0.25]);
}

#[test]
fn what_is_not_finite_is_named_and_changes_nothing() {
    let (model, mut params) = toy(0.0);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    trainer.step(&model, &mut params, &[rows(1, 2)]).unwrap();
    let before = bits(&params);

    let error = trainer.step(&model, &mut params, &[vec![([1e30, 0.0, 0.0], 0.0)]]).unwrap_err();
    assert!(
        matches!(&error, Error::NonFinite(text) if text.contains("step 2") && text.contains("`layer.weight`")),
        "{error}"
    );
    let (_, mut gradients) = trainer.gradients(&model, &params, &[rows(2, 2)]).unwrap();
    gradients.grads_mut().iter_mut().next().unwrap()[1] = f32::NAN;
    let error = trainer.apply(&mut params, gradients).unwrap_err();
    assert!(matches!(&error, Error::NonFinite(text) if text.contains("`layer.weight`")), "{error}");
    assert_eq!((bits(&params), trainer.step_count()), (before, 1));

    params.set(model.b, &[f32::INFINITY]).unwrap();
    let error = trainer.step(&model, &mut params, &[rows(3, 2)]).unwrap_err();
    assert!(matches!(&error, Error::NonFinite(text) if text.contains("`layer.bias` holds")), "{error}");
    params.set(model.b, &[0.0]).unwrap();
    assert_eq!(trainer.step(&model, &mut params, &[rows(3, 2)]).unwrap().step, 2);
}

#[test]
fn gradients_are_used_once_and_for_their_own_step() {
    let (model, mut params) = toy(0.0);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    let (_, old) = trainer.gradients(&model, &params, &[rows(1, 2)]).unwrap();
    trainer.step(&model, &mut params, &[rows(1, 2)]).unwrap();
    let error = trainer.apply(&mut params, old).unwrap_err();
    assert!(matches!(&error, Error::Config(text) if text.contains("step 1")), "{error}");
    assert!(matches!(trainer.step(&model, &mut params, &[]), Err(Error::Shape(_))));
    assert!(matches!(trainer.step(&model, &mut params, &[vec![]]), Err(Error::Shape(_))));
    assert!(matches!(trainer.evaluate(&model, &params, &[]), Err(Error::Shape(_))));
    assert_eq!(trainer.step(&model, &mut params, &[rows(1, 2)]).unwrap().step, 2);
}

#[test]
fn two_trainers_of_a_model_may_freeze_other_parameters() {
    let (model, mut params) = toy(0.0);
    let mut trainer = Trainer::new(TrainerConfig { freeze: vec!["layer.w*".into()], ..config() }, &mut params).unwrap();
    let weight = params.get(model.w).to_vec();
    trainer.step(&model, &mut params, &[rows(1, 2)]).unwrap();
    assert!(params.get(model.w) == weight && params.get(model.b) != [0.25]);

    // Another trainer of the same model wants all of it; the first one is told, and a step of its own sets it right.
    let mut other = Trainer::new(config(), &mut params).unwrap();
    other.step(&model, &mut params, &[rows(1, 2)]).unwrap();
    let weight = params.get(model.w).to_vec();
    assert!(matches!(trainer.gradients(&model, &params, &[rows(1, 2)]), Err(Error::Config(_))));
    trainer.step(&model, &mut params, &[rows(2, 2)]).unwrap();
    assert_eq!(params.get(model.w), weight);
    // Nor do gradients or snapshots of one fit the other.
    let (_, held) = trainer.gradients(&model, &params, &[rows(1, 2)]).unwrap();
    other.step(&model, &mut params, &[rows(1, 2)]).unwrap();
    assert!(matches!(other.apply(&mut params, held), Err(Error::Config(_))));
    assert!(matches!(other.restore(&trainer.snapshot(&params), &mut params), Err(Error::Config(_))));
}

#[test]
fn evaluation_drops_nothing_and_notes_nothing() {
    let (model, mut params) = toy(0.5);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    let before = bits(&params);
    let (a, b) = (rows(1, 4), rows(2, 2));
    let parts = trainer.evaluate(&model, &params, &[a.clone(), b.clone()]).unwrap();
    let whole = trainer.evaluate(&model, &params, &[[a, b].concat()]).unwrap();
    assert!((parts.loss - whole.loss).abs() < 1e-9 && parts.n_tokens == 6 && parts.nll == parts.loss / 2.0);
    assert_eq!(bits(&params), before);
}

#[test]
fn an_interrupt_stops_before_the_update_or_not_at_all() {
    struct Slow(Toy);
    impl Loss for Slow {
        type Batch = Rows;
        fn loss<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, batch: &Rows, s: f64) -> Result<CrossEntropy> {
            std::thread::sleep(std::time::Duration::from_millis(60));
            parallel(1, |_| ())?; // asked on this thread, whatever workers do
            self.0.loss(tape, params, batch, s)
        }
    }
    let (model, mut params) = toy(0.0);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    let before = bits(&params);
    let asked = Cell::new(0);
    let poll = || asked.replace(asked.get() + 1) >= 0;
    let slow = Slow(model);
    let result = section(Some(&poll), || trainer.step(&slow, &mut params, &[rows(1, 2)]));
    assert_eq!((result, asked.get() > 0), (Err(Error::Interrupted), true));
    assert_eq!((bits(&params), trainer.step_count()), (before, 0));
    assert_eq!(trainer.step(&slow, &mut params, &[rows(1, 2)]).unwrap().step, 1);
}

#[test]
fn settings_outside_their_domain_are_refused() {
    let (_, mut params) = toy(0.0);
    for (config, named) in [
        (TrainerConfig { label_smoothing: 1.0, ..config() }, "label_smoothing"),
        (TrainerConfig { clip_norm: Some(0.0), ..config() }, "clip_norm"),
        (TrainerConfig { clip_norm: Some(f64::NAN), ..config() }, "clip_norm"),
        (TrainerConfig { schedule: Schedule::Noam { warmup: 0 }, ..config() }, "warmup"),
        (TrainerConfig { freeze: vec!["nothing".into()], ..config() }, "nothing"),
    ] {
        let error = Trainer::new(config, &mut params).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    }
}

/// Ten steps of data that depend on the step alone.
fn train(trainer: &mut Trainer, model: &Toy, params: &mut Params<f32>, steps: std::ops::Range<u64>) -> Vec<StepResult> {
    steps.map(|i| trainer.step(model, params, &[rows(i, 6), rows(i + 50, 2)]).unwrap()).collect()
}

fn load(folder: &Path) -> Result<(Trainer, Params<f32>, serde_json::Value)> {
    let (_, mut params) = toy(0.3);
    let mut checkpoint = Checkpoint::open(folder)?;
    checkpoint.load_into(&mut params, &[])?;
    let (trainer, cursor) = Trainer::load(&checkpoint, &mut params)?;
    Ok((trainer, params, cursor))
}

#[test]
fn ten_steps_are_five_saved_loaded_and_five_more() {
    for optimizer in [
        Optimizer::AdamW { lr: 0.1 + 0.2, betas: (0.9, 0.98), eps: 1e-9 / 3.0, weight_decay: 0.1 },
        Optimizer::Sgd { lr: 0.1, momentum: 0.9, weight_decay: 0.0, nesterov: true },
        Optimizer::Sgd { lr: 0.1, momentum: 0.0, weight_decay: 0.0, nesterov: false },
    ] {
        let schedule = Schedule::Cosine { warmup: 2, total: None, floor: 0.1 };
        let freeze = vec!["*.bias".to_string()];
        for freeze in [vec![], freeze] {
            let config = TrainerConfig {
                optimizer: optimizer.clone(),
                schedule: schedule.clone(),
                freeze,
                seed: u64::MAX,
                ..config()
            };
            let folder = crate::checkpoint::tests::Folder::new();
            let (model, mut params) = toy(0.3);
            let mut trainer = Trainer::new(config, &mut params).unwrap();
            trainer.total_steps = Some(10);
            train(&mut trainer, &model, &mut params, 0..5);
            let cursor = serde_json::json!({"epoch": 3, "batch": [1, 2]});
            trainer.save(&folder.0, "{}", "toy", &params, cursor.clone()).unwrap();
            let expected = train(&mut trainer, &model, &mut params, 5..10);

            let (mut resumed, mut again, found) = load(&folder.0).unwrap();
            assert_eq!((found, resumed.step_count()), (cursor, 5));
            assert_eq!(resumed.config(), trainer.config());
            assert_eq!(train(&mut resumed, &model, &mut again, 5..10), expected);
            assert_eq!(bits(&again), bits(&params));
        }
    }
}

#[test]
fn a_snapshot_brings_everything_back() {
    let (model, mut params) = toy(0.3);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    train(&mut trainer, &model, &mut params, 0..3);
    let snapshot = trainer.snapshot(&params);
    let expected = train(&mut trainer, &model, &mut params, 3..6);
    let after = bits(&params);
    trainer.restore(&snapshot, &mut params).unwrap();
    assert_eq!(trainer.step_count(), 3);
    assert_eq!(train(&mut trainer, &model, &mut params, 3..6), expected);
    assert_eq!(bits(&params), after);
}

#[test]
fn a_folder_holds_one_state_and_it_belongs_to_the_model() {
    let folder = crate::checkpoint::tests::Folder::new();
    let (model, mut params) = toy(0.0);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    std::fs::write(folder.0.join("trainer-notes.safetensors"), "mine").unwrap();
    let save = |trainer: &Trainer, params: &Params<f32>| {
        trainer.save(&folder.0, "{}", "toy", params, serde_json::Value::Null).unwrap();
        folder.names()
    };
    let rest = ["config.json", "model.safetensors"];
    assert_eq!(save(&trainer, &params), [&rest[..], &["trainer-0.safetensors", "trainer-notes.safetensors"]].concat());
    // The same step again must not touch the file that the model in place names, before the rename.
    assert_eq!(
        save(&trainer, &params),
        [&rest[..], &["trainer-0-1.safetensors", "trainer-notes.safetensors"]].concat()
    );
    train(&mut trainer, &model, &mut params, 0..1);
    assert_eq!(save(&trainer, &params), [&rest[..], &["trainer-1.safetensors", "trainer-notes.safetensors"]].concat());
    assert_eq!(load(&folder.0).unwrap().0.step_count(), 1);

    // The model alone was saved afterwards: its weights are no longer those of the state.
    crate::checkpoint::save_model(&folder.0, "{}", "toy", &params).unwrap();
    let error = load(&folder.0).unwrap_err();
    assert!(matches!(&error, Error::Checkpoint(text) if text.contains("no trainer")), "{error}");
    let mut checkpoint = Checkpoint::open(&folder.0).unwrap();
    checkpoint.load_into(&mut toy(0.0).1, &[]).unwrap();
}

#[test]
fn two_that_save_into_one_folder_do_not_mix() {
    let folder = crate::checkpoint::tests::Folder::new();
    let made = [1, 2].map(|seed| {
        let (model, mut params) = toy(0.3);
        let mut trainer = Trainer::new(TrainerConfig { seed, ..config() }, &mut params).unwrap();
        train(&mut trainer, &model, &mut params, 0..1);
        (trainer, params)
    });
    for _ in 0..50 {
        let start = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for (trainer, params) in &made {
                scope.spawn(|| {
                    start.wait();
                    trainer.save(&folder.0, "{}", "toy", params, serde_json::Value::Null).unwrap();
                });
            }
        });
        let (loaded, params, _) = load(&folder.0).unwrap();
        let (_, expected) = made.iter().find(|(trainer, _)| trainer.config() == loaded.config()).unwrap();
        assert_eq!(bits(&params), bits(expected));
        assert_eq!(folder.names().len(), 3);
    }
}

#[test]
fn damage_to_a_state_is_an_error() {
    let folder = crate::checkpoint::tests::Folder::new();
    let (model, mut params) = toy(0.0);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    train(&mut trainer, &model, &mut params, 0..2);
    trainer.save(&folder.0, "{}", "toy", &params, serde_json::Value::Null).unwrap();
    let path = folder.0.join("trainer-2.safetensors");
    let sound = std::fs::read(&path).unwrap();
    for length in (0..sound.len()).step_by(64).chain([sound.len() - 1]) {
        std::fs::write(&path, &sound[..length]).unwrap();
        assert!(matches!(load(&folder.0), Err(Error::Checkpoint(_))), "{length} bytes");
    }
    let text = String::from_utf8_lossy(&sound).into_owned();
    let header = 8 + u64::from_le_bytes(sound[..8].try_into().unwrap()) as usize;
    for (from, to) in [
        ("layer.bias.exp_avg\"", "layer.bias.exp_avx\""),
        ("\\\"step\\\"", "\\\"stop\\\""),
        ("\\\"seed\\\":9", "\\\"seed\\\":x"),
        ("\\\"layer.bias\\\":2", "\\\"layer.bios\\\":2"),
        ("\\\"layer.bias\\\":2", "\\\"layer.bias\\\":3"),
        ("\\\"kind\\\":\\\"adamw\\\"", "\\\"kind\\\":\\\"adamx\\\""),
        ("\\\"warmup\\\":4", "\\\"warmup\\\":0"),
    ] {
        assert!(text.contains(from), "{from} is not in {text}");
        let mut bytes = text[..header].replace(from, to).into_bytes();
        bytes.extend_from_slice(&sound[header..]);
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(load(&folder.0), Err(Error::Checkpoint(_) | Error::Config(_))), "{to}");
    }
    std::fs::write(&path, &sound).unwrap();
    load(&folder.0).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(load(&folder.0), Err(Error::Storage(_))));
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let run = |threads| {
        with_local_limit(threads, || {
            let (model, mut params) = toy(0.3);
            let mut trainer = Trainer::new(config(), &mut params).unwrap();
            (train(&mut trainer, &model, &mut params, 0..20), bits(&params))
        })
    };
    let one = run(1);
    assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one));
}

/// The other process of the test below: goes on from what the folder holds, saving after every step, until it is killed.
#[test]
#[ignore = "runs until it is killed"]
fn saver() {
    let folder = std::env::var("SAVE_INTO").unwrap();
    let folder = Path::new(&folder);
    let (model, mut params) = toy(0.3);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    if folder.join("model.safetensors").exists() {
        (trainer, params, _) = load(folder).unwrap();
    }
    loop {
        let step = trainer.step_count();
        train(&mut trainer, &model, &mut params, step..step + 1);
        trainer.save(folder, "{}", "toy", &params, (step + 1).into()).unwrap();
    }
}

#[test]
fn training_killed_at_any_moment_goes_on_as_if_nothing_happened() {
    let folder = crate::checkpoint::tests::Folder::new();
    let mut steps = 0;
    for round in 0..12 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["train::tests::saver", "--exact", "--ignored"])
            .env("SAVE_INTO", &folder.0)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // Until it has saved at least once, then a moment that differs each time.
        let started = std::time::Instant::now();
        while load(&folder.0).map_or(0, |(trainer, ..)| trainer.step_count()) <= steps {
            assert!(started.elapsed().as_secs() < 120, "the saver does not save");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(700 * Key::new(4).below(round, 40)));
        child.kill().unwrap();
        child.wait().unwrap();

        let (mut resumed, mut params, cursor) = load(&folder.0).unwrap();
        steps = resumed.step_count();
        assert_eq!(cursor, steps);
        let (model, mut whole) = toy(0.3);
        let mut trainer = Trainer::new(config(), &mut whole).unwrap();
        train(&mut trainer, &model, &mut whole, 0..steps);
        assert_eq!(bits(&params), bits(&whole), "after {steps} steps");
        let more = steps..steps + 3;
        assert_eq!(
            train(&mut resumed, &model, &mut params, more.clone()),
            train(&mut trainer, &model, &mut whole, more)
        );
        assert_eq!(bits(&params), bits(&whole));
    }
    // What the kills left behind goes with the next save.
    let (trainer, params, cursor) = load(&folder.0).unwrap();
    trainer.save(&folder.0, "{}", "toy", &params, cursor).unwrap();
    assert_eq!(folder.names().len(), 3, "{:?}", folder.names());
}
