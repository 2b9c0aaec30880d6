//! Kernels use the vector units: one that lost its vector instructions fails here, not in a benchmark months later. Each is timed on
//! numbers that lie in the L1 cache, in f32, which runs on the path in use, and in f64, which runs the same source on plain instructions;
//! of many turns the best are compared, never seconds. With `lanes::sweep` kept from being inlined, ratios of 3.4 to 71 fell to between
//! 0.2 and 1.8. (tests/test_vectorised.py compares whole operations likewise, as they are shipped.)

use super::Beta;
use super::activation::{Gelu, Relu, activation_backward, activation_forward, relu_backward};
use super::batch_norm::{batch_norm_backward, batch_norm_forward, batch_norm_sums};
use super::dropout::dropout_rows;
use super::elementwise::add_into;
use super::gemm::{Bf16Rhs, Mat, MatMut, NoEpilogue, PackedRhs, gemm, product_bf16};
use super::int8::{self, Int8Rhs};
use super::norm::{Norm, norm_backward, norm_forward};
use super::optimizer::{Adam, adam};
use super::reduce::{partial_rows, sum_blocks};
use super::softmax::{softmax_backward, softmax_forward};
use super::testing::normal;
use crate::error::Result;
use crate::rng::{Dropout, Key};
use crate::simd::{Float, Isa, isa};
use crate::threads::{section, with_local_limit};
use std::sync::Arc;
use std::time::Instant;

const ROWS: usize = 4;
const COLS: usize = 512;
const TURNS: usize = 60;
const REPEATS: usize = 40;
/// How many times faster f32 must be, on 8 or 16 lanes: some 60 % of the least that was seen (an Intel Xeon).
const LEAST: f64 = 2.0;
/// And products with weights in another form, beside those in f32: likewise.
const LEAST_OF_F32: f64 = 0.6;

type Job<'a> = (&'static str, Box<dyn FnMut() -> Result<()> + 'a>);

/// The least seconds of each, turn by turn.
fn least(mut jobs: Vec<Job>) -> Vec<(&'static str, f64)> {
    let mut least: Vec<_> = jobs.iter().map(|(name, _)| (*name, f64::INFINITY)).collect();
    let all = || {
        for _ in 0..TURNS {
            for ((_, job), (_, least)) in jobs.iter_mut().zip(&mut least) {
                let start = Instant::now();
                for _ in 0..REPEATS {
                    job()?;
                }
                *least = least.min(start.elapsed().as_secs_f64() / REPEATS as f64);
            }
        }
        Ok(())
    };
    with_local_limit(1, || section(None, all)).unwrap();
    least
}

fn kernels<T: Float>() -> Vec<(&'static str, f64)> {
    let n = ROWS * COLS;
    let numbers = |seed| normal::<T>(n, seed);
    let (x, y, w, per_row) = (numbers(1), numbers(2), normal::<T>(COLS, 3), vec![T::ONE; ROWS]);
    let dropout = Dropout::new(Key::new(1), 0.1);
    let partials = vec![T::ZERO; partial_rows(ROWS) * 2 * COLS];
    let (x, y, w, per_row, dropout) = (&x[..], &y[..], &w[..], &per_row[..], &dropout);
    let out = || numbers(4);
    let step =
        Adam { mean: 1.0, scale: 1.0, shrink: 0.99, l2: 0.0, betas: (0.9, 0.98), eps: 1e-8, rate: 1e-3, unbias: 1.0 };
    macro_rules! job {
        ($name:literal, [$($own:ident = $value:expr),*] $work:expr) => {
            ($name, { $(let mut $own = $value;)* Box::new(move || $work) as Box<dyn FnMut() -> Result<()>> })
        };
    }
    least(vec![
        job!("add", [z = out()] add_into(&mut z, x, y)),
        job!("relu", [z = out()] activation_forward(Relu, &mut z, x)),
        job!("gelu", [z = out()] activation_forward(Gelu, &mut z, x)),
        // In place: numbers that dwindle would become subnormal.
        job!("gelu backward", [z = out()] { z.copy_from_slice(y); activation_backward(Gelu, &mut z, x) }),
        job!("relu backward", [z = out()] { z.copy_from_slice(y); relu_backward(&mut z, x, T::ONE) }),
        job!("dropout and residual", [z = out()] dropout_rows(&mut z, Some(x), y, COLS, dropout)),
        job!("layer_norm", [z = out(), mean = per_row.to_vec(), rstd = per_row.to_vec()]
            norm_forward(Norm::Layer, &mut z, &mut mean, &mut rstd, x, w, w, 1e-5)),
        job!("layer_norm backward", [z = out(), partials = partials.clone()]
            norm_backward(Norm::Layer, &mut z, Beta::Assign, &mut partials, y, x, w, per_row, per_row)),
        job!("rms_norm", [z = out(), mean = per_row.to_vec(), rstd = per_row.to_vec()]
            norm_forward(Norm::Rms, &mut z, &mut mean, &mut rstd, x, w, w, 1e-5)),
        job!("batch_norm", [z = out()] batch_norm_forward(&mut z, x, w, w, w, w)),
        job!("batch_norm sums", [partials = partials.clone()] batch_norm_sums(&mut partials, y, x, w, w)),
        job!("batch_norm backward", [z = out()] batch_norm_backward(&mut z, Beta::Assign, y, x, w, w, w, w, w)),
        job!("softmax", [z = out()] softmax_forward(&mut z, x, COLS)),
        job!("softmax backward", [z = out()] { z.copy_from_slice(x); softmax_backward(&mut z, y, COLS) }),
        job!("AdamW", [w = out(), m = out(), v = vec![T::ONE; n]] {
            adam(&mut w, &mut m, &mut v, x, step);
            Ok(())
        }),
        job!("column sums", [partials = partials[..COLS].to_vec()] sum_blocks(&mut partials, x, COLS)),
    ])
}

/// Products of the same size, on weights in f32, bf16 and int8.
fn products() -> Vec<(&'static str, f64)> {
    const ROWS: usize = 32;
    const SIZE: usize = 256;
    let (x, w) = (normal::<f32>(ROWS * SIZE, 1), normal::<f32>(SIZE * SIZE, 2));
    let packed = PackedRhs::new(Mat::new(&w, SIZE, SIZE).unwrap().t()).unwrap();
    let mut bf16 = Bf16Rhs::zeros(SIZE, SIZE).unwrap();
    bf16.set(&w).unwrap();
    let (bf16, int8) = ([Arc::new(bf16)], [Arc::new(Int8Rhs::quantize(&w, SIZE, SIZE).unwrap())]);
    let [mut of_f32, mut of_bf16, mut of_int8] = [const { [0.0; ROWS * SIZE] }; 3];
    let product = || {
        let y = MatMut::new(&mut of_f32, ROWS, SIZE)?;
        gemm(y, Mat::new(&x, ROWS, SIZE)?, &packed, Beta::Assign, &NoEpilogue)
    };
    least(vec![
        ("f32", Box::new(product)),
        ("bf16", Box::new(|| product_bf16(&mut of_bf16, &x, &bf16, &NoEpilogue))),
        ("int8", Box::new(|| int8::product(&mut of_int8, &x, &int8, &NoEpilogue))),
    ])
}

#[test]
fn kernels_are_far_faster_than_the_same_source_on_plain_instructions() {
    if isa() == Ok(Isa::Portable) {
        return;
    }
    let ratios = || {
        let beside_f64 = kernels::<f32>().into_iter().zip(kernels::<f64>());
        let beside_f64 = beside_f64.map(|((name, fast), (_, plain))| (name, plain / fast, LEAST));
        let products = products();
        let beside_f32 = products[1..].iter().map(|&(name, time)| (name, products[0].1 / time, LEAST_OF_F32));
        beside_f64.chain(beside_f32).collect::<Vec<_>>()
    };
    // A busy machine may spoil a run; what is lost is lost in all of them.
    let mut lost = Vec::new();
    for _ in 0..3 {
        lost = ratios();
        lost.retain(|&(_, ratio, least)| ratio < least);
        if lost.is_empty() {
            return;
        }
    }
    panic!("name, ratio, least: {lost:.2?}");
}
