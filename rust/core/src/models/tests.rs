//! Whole small models: gradients in f64, and the promises about bits in f32.

use super::*;
use crate::error::Result;
use crate::nn::{FeedForwardActivation, NormKind};
use crate::rng::Key;
use crate::rows::Rows;
use crate::tape::{Grads, Params, Pool, Stored, Tape, Tensor, gradcheck};
use crate::threads;

fn tiny() -> TransformerConfig {
    TransformerConfig {
        d_model: 12,
        n_heads: 3,
        n_encoder_layers: 2,
        n_decoder_layers: 2,
        d_ff: 20,
        dropout: 0.0,
        ..TransformerConfig::new(11, 13)
    }
}

fn tied_and_learned() -> [TransformerConfig; 2] {
    [
        TransformerConfig { tie_embeddings: Some(Tie::Target), activation: FeedForwardActivation::Swiglu, ..tiny() },
        TransformerConfig { positions: PositionKind::Learned, max_positions: Some(6), ..tiny() },
    ]
}

fn batch() -> Batch {
    let src: [&[u32]; 3] = [&[3, 4, 5, 10], &[7], &[9, 8, 3]];
    let tgt: [&[u32]; 3] = [&[12, 3], &[4, 5, 6, 7], &[]];
    Batch::new(&src, &tgt, 1, 2).unwrap()
}

fn params(model: &Transformer) -> Params<f32> {
    Params::init(model.layout().clone(), 42).unwrap()
}

/// In f32 and in int8.
fn both(model: &Transformer) -> [Params<f32>; 2] {
    let params = params(model);
    let int8 = params.convert(model.layout_in(Stored::Int8)).unwrap();
    [params, int8]
}

#[test]
fn gradients_of_whole_models_are_right() {
    use FeedForwardActivation::*;
    let variants = [
        ("pre-norm", tiny()),
        ("post-norm", TransformerConfig { norm_first: false, activation: Gelu, ..tiny() }),
        (
            "post-norm, final norm",
            TransformerConfig { norm_first: false, final_norm: Some(true), bias: false, ..tiny() },
        ),
        ("RMSNorm, SwiGLU", TransformerConfig { norm: NormKind::Rms, activation: Swiglu, head_bias: false, ..tiny() }),
        ("BatchNorm, GLU", TransformerConfig { norm: NormKind::Batch, activation: Glu, ..tiny() }),
        (
            "learned positions, tied target",
            TransformerConfig {
                positions: PositionKind::Learned,
                max_positions: Some(6),
                tie_embeddings: Some(Tie::Target),
                activation: GeluTanh,
                ..tiny()
            },
        ),
        (
            "all tied, no positions, unscaled",
            TransformerConfig {
                src_vocab: 13,
                tie_embeddings: Some(Tie::All),
                positions: PositionKind::None,
                scale_embeddings: false,
                activation: Silu,
                ..tiny()
            },
        ),
        ("dropout", TransformerConfig { dropout: 0.3, activation: Silu, ..tiny() }),
    ];
    for (name, config) in variants {
        let model = Transformer::new(TransformerConfig { n_encoder_layers: 1, n_decoder_layers: 1, ..config }).unwrap();
        // Every row of the learned tables is used; an unused one would have no gradient to compare.
        let params = params(&model).cast::<f64>().unwrap();
        gradcheck(&params, &[], Some(Key::new(3)), |tape, params, _| Ok(model.loss(tape, params, &batch(), 0.1)?.loss))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

/// Logits of each sequence, all tokens at once.
fn logits(model: &Transformer, params: &Params<f32>, batch: &Batch, tape: Tape<f32>) -> Vec<Vec<f32>> {
    let mut tape = tape;
    let run = |tape: &mut Tape<f32>| -> Result<Vec<Vec<f32>>> {
        let memory = model.encode(tape, params, &batch.src, &batch.src_rows)?;
        let hidden = model.decode(tape, params, &batch.tgt_in, &batch.tgt_rows, memory, &batch.src_rows)?;
        let logits = model.logits(tape, params, hidden)?;
        let logits = tape.value(logits)?;
        let rows = &batch.tgt_rows;
        Ok((0..rows.sequences()).map(|i| rows.range(i).flat_map(|r| logits.row(r).to_vec()).collect()).collect())
    };
    run(&mut tape).unwrap()
}

fn evaluation() -> Tape<f32> {
    Tape::evaluation(Pool::default())
}

fn bits(x: &[Vec<f32>]) -> Vec<Vec<u32>> {
    x.iter().map(|x| x.iter().map(|x| x.to_bits()).collect()).collect()
}

fn norms() -> [TransformerConfig; 4] {
    [
        tiny(),
        TransformerConfig { norm_first: false, ..tiny() },
        TransformerConfig { norm: NormKind::Rms, activation: FeedForwardActivation::Swiglu, ..tiny() },
        TransformerConfig { norm: NormKind::Batch, ..tiny() },
    ]
}

#[test]
fn a_sequence_alone_has_the_bits_it_has_in_a_batch() {
    let src: [&[u32]; 3] = [&[3, 4, 5, 10], &[7], &[9, 8, 3]];
    let tgt: [&[u32]; 3] = [&[12, 3], &[4, 5, 6, 7], &[]];
    for config in norms() {
        let model = Transformer::new(config).unwrap();
        for params in both(&model) {
            let together = logits(&model, &params, &batch(), evaluation());
            for i in 0..3 {
                let alone = Batch::new(&src[i..=i], &tgt[i..=i], 1, 2).unwrap();
                let alone = logits(&model, &params, &alone, evaluation());
                assert_eq!(bits(&alone), bits(&together[i..=i]));
            }
        }
    }
}

#[test]
fn a_batch_too_large_for_one_run_has_the_bits_of_the_whole() {
    let model = Transformer::new(tiny()).unwrap();
    let params = params(&model);
    let ids: Vec<u32> = (0..6000).map(|i| 3 + i * 7 % 8).collect();
    let sequences = |lengths: [usize; 6]| lengths.map(|n| &ids[n % 50..][..n]);
    // Sources and targets together exceed a run in other places than either alone; one pair is longer than a run.
    let (src, tgt) = (sequences([900, 1500, 4200, 0, 600, 2000]), sequences([700, 1200, 10, 1000, 2000, 30]));
    let batch = Batch::new(&src, &tgt, 1, 2).unwrap();
    let whole = logits(&model, &params, &batch, Tape::recording(Pool::default()));
    assert!(bits(&logits(&model, &params, &batch, evaluation())) == bits(&whole));
}

#[test]
fn training_without_dropout_has_the_bits_of_evaluation() {
    for config in norms().into_iter().filter(|c| c.norm != NormKind::Batch) {
        let model = Transformer::new(config).unwrap();
        let params = params(&model);
        let training = logits(&model, &params, &batch(), Tape::training(Pool::default(), Key::new(1)));
        assert_eq!(bits(&training), bits(&logits(&model, &params, &batch(), evaluation())));
    }
}

#[test]
fn cached_decoding_has_the_bits_of_the_whole() {
    for (config, which) in norms().into_iter().flat_map(|config| [(config.clone(), 0), (config, 1)]) {
        let model = Transformer::new(config).unwrap();
        let params = &both(&model)[which];
        let src = [3, 4, 5, 10, 7];
        let src_rows = Rows::from_lengths(&[4, 1]);
        let tgt: [&[u32]; 2] = [&[1, 12, 3, 5, 5, 6], &[1, 4, 4, 4, 9, 8]];
        let whole = Batch {
            src: src.to_vec(),
            src_rows: src_rows.clone(),
            tgt_in: tgt.concat(),
            tgt_out: tgt.concat(),
            tgt_rows: Rows::from_lengths(&[6, 6]),
        };
        let expected = logits(&model, params, &whole, evaluation());

        let mut tape = evaluation();
        let memory = model.encode(&mut tape, params, &src, &src_rows).unwrap();
        let mut state = model.start(&mut tape, params, memory, &src_rows).unwrap();
        let mut got = vec![Vec::new(), Vec::new()];
        // Two tokens first, then one by one, the sequences changing places half-way.
        let mut order = vec![0, 1];
        for steps in [0..2, 2..3, 3..4, 4..5, 5..6] {
            if steps.start == 3 {
                state.reorder(&[1, 0]);
                order = vec![1, 0];
            }
            let tokens: Vec<u32> = order.iter().flat_map(|&i| tgt[i][steps.clone()].to_vec()).collect();
            let rows = Rows::from_lengths(&[steps.len(), steps.len()]);
            let hidden = model.advance(&mut tape, params, &tokens, &rows, &mut state).unwrap();
            let logits = model.logits(&mut tape, params, hidden).unwrap();
            for (s, &i) in order.iter().enumerate() {
                for r in rows.range(s) {
                    got[i].extend_from_slice(tape.value(logits).unwrap().row(r));
                }
            }
        }
        assert_eq!(bits(&got), bits(&expected));
    }
}

#[test]
fn int8_stays_near_f32_with_positions_as_they_were_and_is_not_trained() {
    for config in norms().into_iter().chain(tied_and_learned()) {
        let model = Transformer::new(config).unwrap();
        let [params, int8] = both(&model);
        let [exact, near] = [&params, &int8].map(|params| logits(&model, params, &batch(), evaluation()).concat());
        let largest = exact.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
        let off = exact.iter().zip(&near).fold(0.0f32, |off, (x, y)| off.max((x - y).abs()));
        assert!(off > 0.0 && off < 0.03 * largest, "{off} of {largest}");
        for id in params.layout().ids() {
            let entry = params.layout().entry(id);
            let turns = entry.shape.len() == 2 && !entry.name.contains("positions");
            assert_eq!(int8.int8(id).is_some(), turns, "{}", entry.name);
            assert!(turns || int8.get(id) == params.get(id));
        }

        let mut tape = Tape::recording(Pool::default());
        let refused = |error: crate::error::Error| matches!(error, crate::error::Error::Unsupported(_));
        assert!(refused(model.loss(&mut tape, &int8, &batch(), 0.0).map(|_| ()).unwrap_err()));
        assert!(refused(Grads::new(&int8).map(|_| ()).unwrap_err()));
        assert!(refused(int8.convert(model.layout_in(Stored::Int8)).map(|_| ()).unwrap_err()));
    }
}

#[test]
fn bf16_is_f32_with_rounded_matrices_bit_for_bit_and_is_not_trained() {
    for config in norms().into_iter().chain(tied_and_learned()) {
        let model = Transformer::new(config).unwrap();
        let params = params(&model);
        let bf16 = params.convert(model.layout_in(Stored::Bf16)).unwrap();
        let rounded = bf16.convert(model.layout().clone()).unwrap();
        let run = |params: &Params<f32>| {
            let mut said = logits(&model, params, &batch(), evaluation());
            said.push(model.score(&mut evaluation(), params, &batch()).unwrap());
            said.push(model.log_probabilities(&mut evaluation(), params, &batch()).unwrap().to_vec());
            bits(&said)
        };
        assert!(run(&bf16) == run(&rounded) && run(&rounded) != run(&params));
        for id in params.layout().ids() {
            let entry = params.layout().entry(id);
            assert_eq!(bf16.bf16(id).is_some(), entry.shape.len() == 2, "{}", entry.name);
        }
        let mut tape = Tape::recording(Pool::default());
        for error in [
            model.loss(&mut tape, &bf16, &batch(), 0.0).map(|_| ()).unwrap_err(),
            Grads::new(&bf16).map(|_| ()).unwrap_err(),
        ] {
            assert!(matches!(&error, crate::error::Error::Unsupported(text) if text.contains("bf16")), "{error}");
        }
    }
}

#[test]
fn asking_for_attention_changes_no_bit_and_gives_every_layer() {
    let model = Transformer::new(tiny()).unwrap();
    let params = params(&model);
    let mut tape = evaluation();
    tape.collect_attention();
    let batch = batch();
    let memory = model.encode(&mut tape, &params, &batch.src, &batch.src_rows).unwrap();
    let hidden = model.decode(&mut tape, &params, &batch.tgt_in, &batch.tgt_rows, memory, &batch.src_rows).unwrap();
    let weights = tape.take_attention();
    // Two encoder layers, then self and cross of two decoder layers; three sequences each.
    let shapes: Vec<_> = weights.iter().map(|w| w.shapes.clone()).collect();
    let (own, decoder, cross) = (
        vec![(3, 4, 4), (3, 1, 1), (3, 3, 3)],
        vec![(3, 3, 3), (3, 5, 5), (3, 1, 1)],
        vec![(3, 3, 4), (3, 5, 1), (3, 1, 3)],
    );
    assert_eq!(shapes, [own.clone(), own, decoder.clone(), cross.clone(), decoder, cross]);
    for w in &weights {
        let mut at = 0;
        for &(heads, queries, keys) in &w.shapes {
            for row in w.values[at..][..heads * queries * keys].chunks(keys) {
                assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
            }
            at += heads * queries * keys;
        }
    }
    let logits = model.logits(&mut tape, &params, hidden).unwrap();
    let with = tape.value(logits).unwrap().to_vec();
    let without = super::tests::logits(&model, &params, &batch, evaluation()).concat();
    assert_eq!(bits(&[with]), bits(&[without]));
}

#[test]
fn gradients_have_the_same_bits_on_any_number_of_threads() {
    // Large enough that the work is really divided.
    let config = TransformerConfig { d_model: 64, n_heads: 4, d_ff: 128, dropout: 0.1, ..tiny() };
    let model = Transformer::new(config).unwrap();
    let params = params(&model);
    let sentence = |i: usize, n: usize| (0..n).map(|t| 3 + ((i * 31 + t * 7) % 8) as u32).collect::<Vec<u32>>();
    let src: Vec<Vec<u32>> = (0..40).map(|i| sentence(i, 5 + i % 30)).collect();
    let tgt: Vec<Vec<u32>> = (0..40).map(|i| sentence(i + 1, 3 + i * 7 % 30)).collect();
    let slices = |x: &[Vec<u32>]| x.iter().map(|x| x.to_vec()).collect::<Vec<_>>();
    let (src, tgt) = (slices(&src), slices(&tgt));
    let batch = Batch::new(
        &src.iter().map(Vec::as_slice).collect::<Vec<_>>(),
        &tgt.iter().map(Vec::as_slice).collect::<Vec<_>>(),
        1,
        2,
    )
    .unwrap();
    let run = |n: usize| {
        threads::with_local_limit(n, || {
            let mut tape = Tape::training(Pool::default(), Key::new(9));
            let mut grads = Grads::new(&params).unwrap();
            let loss = model.loss(&mut tape, &params, &batch, 0.1).unwrap();
            let dy = Tensor::from_slice(1, 1, &[1.0]).unwrap();
            tape.backward(&params, &mut grads, [(loss.loss, dy)]).unwrap();
            grads.complete(&mut tape.pool).unwrap();
            (loss.loss_sum.to_bits(), grads.iter().flatten().map(|g| g.to_bits()).collect::<Vec<_>>())
        })
    };
    let one = run(1);
    for n in [2, 3, 7] {
        assert!(run(n) == one, "{n} threads differ");
    }
}

#[test]
fn parameters_have_the_names_of_the_checkpoint_format() {
    let model = Transformer::new(TransformerConfig {
        norm: NormKind::Batch,
        activation: FeedForwardActivation::Swiglu,
        n_encoder_layers: 1,
        n_decoder_layers: 1,
        ..tiny()
    })
    .unwrap();
    let layout = model.layout();
    let shape = |name: &str| layout.entry(layout.find(name).unwrap_or_else(|| panic!("{name}"))).shape.clone();
    assert_eq!(shape("src_embedding.weight"), [11, 12]);
    assert_eq!(shape("tgt_embedding.weight"), [13, 12]);
    assert_eq!(shape("head.weight"), [13, 12]);
    assert_eq!(shape("head.bias"), [13]);
    for prefix in
        ["encoder.layers.0.self_attention", "decoder.layers.0.self_attention", "decoder.layers.0.cross_attention"]
    {
        for part in ["q", "k", "v", "out"] {
            assert_eq!(shape(&format!("{prefix}.{part}.weight")), [12, 12]);
            assert_eq!(shape(&format!("{prefix}.{part}.bias")), [12]);
        }
        assert_eq!(shape(&format!("{prefix}_norm.weight")), [12]);
    }
    assert_eq!(shape("decoder.layers.0.feed_forward.gate.weight"), [20, 12]);
    assert_eq!(shape("decoder.layers.0.feed_forward.down.weight"), [12, 20]);
    assert_eq!(shape("encoder.norm.bias"), [12]);
    assert!(layout.stat_ids().any(|id| layout.stat_entry(id).name == "decoder.norm.running_var"));
    // Two embeddings, head, 3 attentions, 2 feed-forwards (gated), 5 norms of layers and 2 final ones.
    assert_eq!(layout.ids().len(), 2 + 2 + 3 * 8 + 2 * 6 + 5 * 2 + 2 * 2);
}

#[test]
fn layers_do_not_start_as_copies() {
    let model = Transformer::new(tiny()).unwrap();
    let params = params(&model);
    let get = |name: &str| params.get(params.layout().find(name).unwrap());
    let name = |side: &str, i: usize| format!("{side}.layers.{i}.self_attention.q.weight");
    assert_ne!(get(&name("encoder", 0)), get(&name("encoder", 1)));
    assert_ne!(get(&name("encoder", 0)), get(&name("decoder", 0)));
}
