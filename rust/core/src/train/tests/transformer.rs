//! The trainer on whole small Transformers.

use super::*;
use crate::models::{Batch, Tie, Transformer, TransformerConfig};
use crate::nn::NormKind;

fn transformer(norm: NormKind, tie_embeddings: Option<Tie>) -> (Transformer, Params<f32>) {
    let config = TransformerConfig {
        d_model: 24,
        n_heads: 3,
        n_encoder_layers: 2,
        n_decoder_layers: 2,
        d_ff: 40,
        norm,
        tie_embeddings,
        ..TransformerConfig::new(17, 17)
    };
    let model = Transformer::new(config).unwrap();
    let params = Params::init(model.layout().clone(), 5).unwrap();
    (model, params)
}

/// Sequences of many lengths; the target is the source backwards.
fn reversed(step: u64, n: usize) -> Batch {
    let draw = |i: u64, below| Key::new(step).below(i, below);
    let src: Vec<Vec<u32>> = (0..n as u64)
        .map(|s| (0..1 + draw(1000 + s, 12)).map(|t| 3 + draw(100 * s + t, 14) as u32).collect())
        .collect();
    let tgt: Vec<Vec<u32>> = src.iter().map(|s| s.iter().rev().copied().collect()).collect();
    let [src, tgt] = [&src, &tgt].map(|list| list.iter().map(Vec::as_slice).collect::<Vec<_>>());
    Batch::new(&src, &tgt, 1, 2).unwrap()
}

fn config() -> TrainerConfig {
    TrainerConfig {
        optimizer: Optimizer::AdamW { lr: 3e-3, betas: (0.9, 0.98), eps: 1e-9, weight_decay: 0.01 },
        schedule: Schedule::Noam { warmup: 10 },
        label_smoothing: 0.1,
        clip_norm: Some(1.0),
        seed: 11,
        ..Default::default()
    }
}

fn train(
    trainer: &mut Trainer,
    model: &Transformer,
    params: &mut Params<f32>,
    steps: std::ops::Range<u64>,
) -> Vec<StepResult> {
    steps.map(|i| trainer.step(model, params, &[reversed(i, 40), reversed(i + 1000, 7)]).unwrap()).collect()
}

#[test]
fn twenty_steps_are_the_same_for_any_number_of_threads() {
    for (norm, compute) in
        [(NormKind::Layer, Compute::F32), (NormKind::Batch, Compute::F32), (NormKind::Layer, Compute::Bf16)]
    {
        let run = |threads| {
            with_local_limit(threads, || {
                let (model, mut params) = transformer(norm, None);
                let mut trainer = Trainer::new(TrainerConfig { compute, ..config() }, &mut params).unwrap();
                let results = train(&mut trainer, &model, &mut params, 0..20);
                let losses = trainer.evaluate(&model, &params, &[reversed(99, 30)]).unwrap();
                (results, losses, bits(&params))
            })
        };
        let one = run(1);
        assert!(one.0[19].nll < one.0[0].nll - 0.3, "{:?}", one.0);
        for threads in [2, 3, 7] {
            assert!(run(threads) == one, "{norm:?}, {compute:?}, {threads} threads");
        }
    }
}

#[test]
fn bf16_learns_what_f32_learns() {
    let run = |compute| {
        let (model, mut params) = transformer(NormKind::Layer, None);
        let mut trainer = Trainer::new(TrainerConfig { compute, ..config() }, &mut params).unwrap();
        train(&mut trainer, &model, &mut params, 0..60)
    };
    let (full, half) = (run(Compute::F32), run(Compute::Bf16));
    assert!(full != half, "factors are rounded");
    for (full, half) in full.iter().zip(&half) {
        assert!((full.loss / half.loss - 1.0).abs() < 0.03, "{full:?} {half:?}");
        assert!((full.grad_norm / half.grad_norm - 1.0).abs() < 0.2, "{full:?} {half:?}");
    }
    assert!(half[59].loss < 0.8 * half[0].loss, "{half:?}");
}

#[test]
fn ten_steps_are_five_saved_loaded_and_five_more_with_ties_and_statistics() {
    for (norm, tie) in [(NormKind::Batch, Some(Tie::All)), (NormKind::Rms, Some(Tie::Target)), (NormKind::Layer, None)]
    {
        let folder = crate::checkpoint::tests::Folder::new();
        let (model, mut params) = transformer(norm, tie);
        let mut trainer = Trainer::new(config(), &mut params).unwrap();
        train(&mut trainer, &model, &mut params, 0..5);
        let json = model.config().to_json();
        trainer.save(&folder.0, &json, "transformer", &params, serde_json::Value::Null).unwrap();
        let expected = train(&mut trainer, &model, &mut params, 5..10);

        let mut checkpoint = Checkpoint::open(&folder.0).unwrap();
        let model = Transformer::new(TransformerConfig::from_json(checkpoint.config_json()).unwrap()).unwrap();
        let mut again = Params::init(model.layout().clone(), 0).unwrap();
        checkpoint.load_into(&mut again, model.aliases()).unwrap();
        let (mut resumed, _) = Trainer::load(&checkpoint, &mut again).unwrap();
        assert_eq!(train(&mut resumed, &model, &mut again, 5..10), expected);
        assert_eq!(bits(&again), bits(&params));
    }
}

#[test]
fn evaluation_without_dropout_is_the_training_loss_bit_for_bit() {
    let (model, mut params) = transformer(NormKind::Layer, None);
    let config_ = TransformerConfig { dropout: 0.0, ..model.config().clone() };
    let model = Transformer::new(config_).unwrap();
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    let batch = reversed(1, 20);
    let losses = trainer.evaluate(&model, &params, std::slice::from_ref(&batch)).unwrap();
    let (result, _) = trainer.gradients(&model, &params, std::slice::from_ref(&batch)).unwrap();
    assert_eq!((losses.loss, losses.nll, losses.n_tokens), (result.loss, result.nll, result.n_tokens));
}

#[test]
fn frozen_encoders_stay_and_the_rest_learns() {
    let (model, mut params) = transformer(NormKind::Layer, None);
    let before = params.cast::<f32>().unwrap();
    let freeze = vec!["encoder.*".into(), "src_embedding.*".into()];
    let mut trainer = Trainer::new(TrainerConfig { freeze, ..config() }, &mut params).unwrap();
    train(&mut trainer, &model, &mut params, 0..3);
    for id in params.layout().ids() {
        let name = &params.layout().entry(id).name;
        let frozen = name.starts_with("encoder.") || name.starts_with("src_embedding.");
        assert_eq!(params.get(id) == before.get(id), frozen, "{name}");
    }
}

#[test]
fn after_a_step_of_a_shape_nothing_large_is_allocated() {
    let (model, mut params) = transformer(NormKind::Layer, None);
    let mut trainer = Trainer::new(config(), &mut params).unwrap();
    let batch = [reversed(1, 450)];
    assert!(batch[0].src.len() * model.config().d_model > 1 << 16, "a size at which buffers are parts of blocks");
    trainer.step(&model, &mut params, &batch).unwrap();
    let held = trainer.pool_bytes();
    assert!(held > 0);
    for _ in 0..4 {
        trainer.step(&model, &mut params, &batch).unwrap();
        assert_eq!(trainer.pool_bytes(), held);
    }
}
