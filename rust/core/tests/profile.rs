//! The profile, switched on: what it counts, and that nothing else changes.
//! (A process of its own, because it is one for the process; within it one test at a time.)

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use transformer_core::error::Result;
use transformer_core::generate::{GenerateOptions, Length, Loaded, hypotheses};
use transformer_core::models::{Batch, Transformer, TransformerConfig};
use transformer_core::ops::*;
use transformer_core::profile::{self, Pass, Row, Work};
use transformer_core::rng::Key;
use transformer_core::rows::Rows;
use transformer_core::tape::{Builder, Grads, Init, Params, Pool, Tape, Tensor};
use transformer_core::train::{Trainer, TrainerConfig};

fn alone() -> MutexGuard<'static, ()> {
    static ONE_TEST: Mutex<()> = Mutex::new(());
    ONE_TEST.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// The rows of `body`, which also says what it gave.
fn profiled<R>(body: impl FnOnce() -> R) -> (R, Vec<Row>) {
    let before = profile::rows();
    profile::start();
    let result = body();
    profile::stop();
    (result, profile::since(&before))
}

fn find<'a>(rows: &'a [Row], op: &str, part: &str, pass: Pass) -> &'a Row {
    let mut found = rows.iter().filter(|row| (row.op, row.part, row.pass) == (op, part, pass));
    let row = found.next().unwrap_or_else(|| panic!("no row of {op} {part} {pass:?} in {rows:?}"));
    assert!(found.next().is_none(), "more than one row of {op}");
    row
}

const LENGTH: usize = 16;
const PAIRS: usize = 8;

/// Two steps of training; gives the parameters.
fn train(steps: usize) -> Vec<f32> {
    let config = TransformerConfig { d_model: 64, n_heads: 4, d_ff: 256, ..TransformerConfig::new(50, 60) };
    let model = Transformer::new(config).unwrap();
    let mut params = Params::init(model.layout().clone(), 0).unwrap();
    let ids: Vec<u32> = (0..PAIRS * LENGTH).map(|i| 3 + (i * 37 % 47) as u32).collect();
    let sources: Vec<&[u32]> = ids.chunks(LENGTH).collect();
    let targets: Vec<&[u32]> = ids.chunks(LENGTH).map(|ids| &ids[1..]).collect();
    let batch = [Batch::new(&sources, &targets, 1, 2).unwrap()];
    let config = TrainerConfig { label_smoothing: 0.1, clip_norm: Some(1.0), ..TrainerConfig::default() };
    let mut trainer = Trainer::new(config, &mut params).unwrap();
    for _ in 0..steps {
        trainer.step(&model, &mut params, &batch).unwrap();
    }
    model.layout().ids().flat_map(|id| params.get(id).to_vec()).collect()
}

#[test]
fn a_training_step_is_counted_whole_and_changes_no_bit() {
    let _alone = alone();
    let before = profile::rows();
    let plain = train(2);
    assert!(profile::since(&before).is_empty(), "something was measured while nobody asked");

    let start = Instant::now();
    let (same, rows) = profiled(|| train(2));
    let wall = start.elapsed().as_secs_f64();
    assert_eq!(plain, same);

    // Two steps; what the rows took is what the steps took.
    assert_eq!(find(&rows, "training step", "", Pass::Other).calls, 2);
    let sum: f64 = rows.iter().map(|row| row.seconds).sum();
    assert!(rows.iter().all(|row| row.seconds >= 0.0) && 0.0 < sum && sum <= wall, "{sum} of {wall} s");

    let tokens = (PAIRS * LENGTH) as f64;
    let head = |part, pass| find(&rows, "linear_cross_entropy", part, pass).clone();
    let mut logits = Work::product::<f32>(PAIRS * LENGTH, 64, 60);
    logits += logits;
    assert_eq!(head("logits", Pass::Forward).work, logits);
    assert_eq!(head("dW", Pass::Forward).work.flops, logits.flops);
    assert_eq!(head("", Pass::Backward).calls, 2);
    let of = |sizes: [usize; 2], part: &str, pass| {
        let row = rows.iter().find(|row| (row.op, row.part, row.pass, row.sizes) == ("linear", part, pass, sizes));
        row.unwrap_or_else(|| panic!("no linear {part} {sizes:?}")).work.flops
    };
    // The first half of the feed-forward layers: once forward, twice backward.
    let up = of([64, 256], "", Pass::Forward);
    assert!(up > 0.0 && up % (2.0 * 2.0 * tokens * 64.0 * 256.0) == 0.0);
    assert_eq!([of([64, 256], "dx", Pass::Backward), of([64, 256], "dW", Pass::Backward)], [up, up]);
    // A causal query sees itself and those before it.
    let causal = find(&rows, "attention (causal)", "", Pass::Forward);
    let pairs = (PAIRS * LENGTH * (LENGTH + 1) / 2) as f64;
    assert_eq!(causal.work.flops / causal.calls as f64, 2.0 * 2.0 * pairs * 64.0);
    assert_eq!(find(&rows, "attention", "", Pass::Backward).sizes, [4, 16]);
    assert_eq!(find(&rows, "AdamW", "", Pass::Other).work.bytes, 2.0 * 7.0 * 4.0 * plain.len() as f64);
    let table = profile::table(&rows, None);
    assert!(table.contains("linear: dW") && table.contains("attention (causal)"), "{table}");
}

#[test]
fn decoding_has_its_rows() -> Result<()> {
    let _alone = alone();
    let config = TransformerConfig { d_model: 32, n_heads: 2, d_ff: 64, ..TransformerConfig::new(20, 30) };
    let model = Transformer::new(config).unwrap();
    let params = Params::init(model.layout().clone(), 0).unwrap();
    let rows = Rows::from_lengths(&[3, 4]);
    let five = Length::Fixed(5);
    let options = GenerateOptions { max_len: Some(five), min_len: five, beam: 2, ..Default::default() };
    let model = Loaded { layers: &model, params: &params };
    let src = [3, 4, 5, 3, 4, 5, 6];
    let decode = || hypotheses(model, None, &mut Pool::default(), &src, &rows, &options, None).unwrap();
    let plain = decode();
    let (same, rows) = profiled(decode);
    assert_eq!(plain, same);
    let calls = |op, part| find(&rows, op, part, Pass::Other).calls;
    assert_eq!(["", "choice", "reorder"].map(|part| calls("decoding", part)), [5, 5, 4]);
    assert!(rows.iter().any(|row| row.op == "linear" && row.pass == Pass::Forward));
    Ok(())
}

#[test]
fn every_operation_is_timed_both_ways() {
    let _alone = alone();
    let mut b = Builder::new();
    let normal = Init::Normal { std: 1.0 };
    let [w, c, g, t] = [("w", &[6, 8][..]), ("c", &[6]), ("g", &[8]), ("t", &[5, 8])]
        .map(|(name, shape)| b.param(name, shape, normal));
    let params = Params::<f32>::init(Arc::new(b.finish()), 1).unwrap();
    let (rows, ids) = (Rows::from_lengths(&[2, 3]), [0, 1, 2, 3, 4]);
    let heads = Heads { n_heads: 2, n_kv_heads: 2, head_dim: 4, scale: 0.5 };
    let (done, measured) = profiled(|| -> Result<()> {
        let mut tape = Tape::training(Pool::default(), Key::new(1));
        let x = tape.leaf(Tensor::from_slice(5, 8, &[0.5; 40])?);
        let wide = tape.leaf(Tensor::from_slice(5, 24, &[0.5; 120])?);
        let part = |start| Columns { var: wide, start };
        let packed = KeysValues::Packed { k: part(8), v: part(16), rows: &rows };
        let ends = vec![
            linear(&mut tape, &params, x, &[w], &[c])?,
            linear_activation(&mut tape, &params, x, &[w], &[c], Activation::Relu, (3, 0.1))?,
            activation(&mut tape, x, Activation::Gelu)?,
            gated(&mut tape, x, Gate::Swiglu)?,
            softmax(&mut tape, x)?,
            layer_norm(&mut tape, &params, x, Some(g), Some(g), 1e-5)?,
            rms_norm(&mut tape, &params, x, Some(g), 1e-5)?,
            batch_norm(&mut tape, &params, x, Some(g), Some(g), None, 1e-5)?,
            embedding(&mut tape, &params, t, &ids, 1.0)?,
            add_rows(&mut tape, x, &[1.0; 40], &[0, 1, 2, 3, 4])?,
            add(&mut tape, x, x)?,
            residual(&mut tape, x, x, 1, 0.5)?,
            dropout(&mut tape, x, 2, 0.5)?,
            cross_entropy(&mut tape, x, &ids, 0.1)?.loss,
            linear_cross_entropy(&mut tape, &params, x, w, Some(c), &ids, 0.1)?.loss,
            token_losses(&mut tape, x, &ids, 0.1)?,
            pool(&mut tape, x, &rows, Pooling::Mean)?,
            attention(&mut tape, part(0), &rows, packed, heads, &Masks::default())?,
            attention(&mut tape, part(0), &rows, packed, heads, &Masks { causal: true, ..Masks::default() })?,
        ];
        let ones = |tape: &Tape<f32>, var| {
            let y = tape.value(var)?;
            Tensor::from_slice(y.rows(), y.cols(), &vec![1.0; y.len()])
        };
        let ends = ends.into_iter().map(|end| Ok((end, ones(&tape, end)?))).collect::<Result<Vec<_>>>()?;
        token_logprobs(&mut tape, &params, x, w, Some(c), &ids)?;
        tape.backward(&params, &mut Grads::new(&params)?, ends)?;
        Ok(())
    });
    done.unwrap();
    let names = |pass| measured.iter().filter(|row| row.pass == pass).map(|row| row.op).collect::<HashSet<_>>();
    let both = HashSet::from([
        "linear",
        "activation",
        "gated",
        "softmax",
        "layer_norm",
        "rms_norm",
        "batch_norm",
        "embedding",
        "add_rows",
        "add",
        "residual",
        "dropout",
        "cross_entropy",
        "linear_cross_entropy",
        "token_losses",
        "attention",
        "attention (causal)",
        "pool",
    ]);
    assert_eq!(names(Pass::Backward), both);
    assert_eq!(names(Pass::Forward), &both | &HashSet::from(["token_logprobs"]));
    // Every row says what it did, or has parts that say it; a gradient that is handed on moves nothing.
    for row in measured.iter().filter(|row| row.op != "add_rows" && row.op != "linear_cross_entropy") {
        let idle = row.op == "linear" && row.part.is_empty() && row.pass == Pass::Backward;
        assert!(row.work.bytes > 0.0 || idle, "{row:?}");
    }
}

#[test]
fn no_operation_forgets_its_spans() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ops");
    let mut derivatives = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let Ok(source) = std::fs::read_to_string(entry.unwrap().path()) else { continue };
        let count = |text| source.matches(text).count();
        derivatives += count("> Operation<T> for ");
        assert!(count("profile::backward(") >= count("> Operation<T> for "), "a derivative without a span:\n{source}");
    }
    assert!(derivatives > 10);
}

#[test]
fn spans_nest_and_threads_have_their_own() {
    let _alone = alone();
    fn nap(ms: u64) {
        std::thread::sleep(Duration::from_millis(ms));
    }
    fn nest() {
        let _outer = profile::forward("outer", [1, 2], || Work::passes::<f32>(1, 2, 3));
        nap(4);
        profile::part("inner", [0, 0], Work::default).run(|| nap(20));
        profile::part("inner", [0, 0], Work::default).run(|| nap(20));
        profile::span("other", [0, 0], Work::default).run(|| nap(1));
    }
    let nested = || {
        let start = Instant::now();
        nest();
        start.elapsed().as_secs_f64()
    };
    let (wall, rows) = profiled(|| {
        let other = std::thread::spawn(nested);
        nested() + other.join().unwrap()
    });
    let outer = find(&rows, "outer", "", Pass::Forward);
    assert_eq!((outer.calls, outer.work.bytes, outer.work.rows, outer.sizes), (2, 48.0, 4.0, [1, 2]));
    let inner = find(&rows, "outer", "inner", Pass::Forward);
    assert!(inner.calls == 4 && inner.seconds >= 0.08 && outer.seconds >= 0.008);
    let other = find(&rows, "other", "", Pass::Other);
    assert_eq!(other.calls, 2);
    // Sleeping may last longer, but no two rows share any time: the inner naps, 80 ms at least, are not counted again.
    let sum = outer.seconds + inner.seconds + other.seconds;
    assert!(sum <= wall + 1e-6, "{sum} of {wall} s");
}

#[test]
fn starts_and_stops_count() {
    let _alone = alone();
    assert!(!profile::is_on());
    profile::start();
    profile::start();
    profile::stop();
    assert!(profile::is_on());
    profile::stop();
    profile::stop();
    assert!(!profile::is_on());
    for threads in [1, 3] {
        let peak = profile::peak::measure(threads, Duration::from_millis(20)).unwrap();
        let rates = [peak.flops, peak.read, peak.copy];
        assert!(rates.iter().all(|rate| rate.is_finite() && *rate > 0.0) && peak.threads == threads, "{peak:?}");
    }
}
