//! Int8 against plain loops, on every path of the machine, and the promises about bits.

use super::super::gemm::{Affine, NoEpilogue};
use super::*;
use crate::kernels::testing::normal;
use crate::threads::with_local_limit;

const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (1, 64, 130),
    (2, 7, 33),
    (5, 130, 31),
    (13, 4, 32),
    (24, 37, 100),
    (97, 384, 64),
    (3, 513, 300),
    (200, 65, 257),
    (600, 20, 500), // y is larger than the L2 cache
];

fn quantized(x: &[f32], depth: usize) -> (Vec<i8>, Vec<f32>) {
    let rows = x.len() / depth;
    let (mut q, mut scales, mut sums) = (vec![9; x.len()], vec![f32::NAN; rows], vec![9; rows]);
    quantize_rows(&mut q, &mut scales, &mut sums, x, depth, depth, 1).unwrap();
    for (q, sum) in q.chunks(depth).zip(sums) {
        assert_eq!(q.iter().map(|&q| i32::from(q)).sum::<i32>(), sum);
    }
    (q, scales)
}

/// A weight as the products of this path read it.
fn packed(bytes: Bytes, w: &[f32], depth: usize) -> [Arc<Int8Rhs>; 1] {
    let (values, scales) = quantized(w, depth);
    let mut packed = Int8Rhs::by(bytes, scales.len(), depth).unwrap();
    packed.set(&values).unwrap();
    packed.scales_mut().copy_from_slice(&scales);
    [Arc::new(packed)]
}

#[test]
fn every_path_gives_the_integers_of_the_reference() {
    for (rows, depth, outputs) in SHAPES {
        let (x, w) = (normal::<f32>(rows * depth, 1), normal::<f32>(outputs * depth, 2));
        let (q, x_scales) = quantized(&x, depth);
        let (values, scales) = quantized(&w, depth);
        let expected = product_reference((&q, &x_scales), (&values, &scales), depth);
        for bytes in Bytes::all() {
            let w = packed(bytes, &w, depth);
            assert!(w[0].values() == values && w[0].scales() == scales);
            let mut last = vec![f32::NAN; depth];
            w[0].numbers(outputs - 1, &mut last);
            assert!(
                last.iter()
                    .zip(&values[(outputs - 1) * depth..])
                    .all(|(x, &q)| *x == f32::from(q) * scales[outputs - 1])
            );
            let mut y = vec![f32::NAN; rows * outputs];
            product(&mut y, &x, &w, &NoEpilogue).unwrap();
            assert!(y == expected, "{bytes:?}: {rows} x {depth} x {outputs}");
        }
    }
}

#[test]
fn the_largest_sums_are_exact() {
    let (depth, outputs) = (20_000, 33);
    let x = vec![1.0f32; depth];
    for sign in [1.0f32, -1.0] {
        let w = vec![sign; outputs * depth];
        for bytes in Bytes::all() {
            let mut y = vec![f32::NAN; outputs];
            product(&mut y, &x, &packed(bytes, &w, depth), &NoEpilogue).unwrap();
            let sum = (127 * 127 * depth as i32) as f32 * (1.0f32 / 127.0 * (1.0f32 / 127.0));
            assert_eq!(y, vec![sign * sum; outputs], "{bytes:?}");
        }
    }
    assert!(Int8Rhs::quantize(&[0.0f32; MAX_DEPTH + 1], 1, MAX_DEPTH + 1).is_err());
}

#[test]
fn whole_numbers_up_to_127_are_exact_in_both_types_with_an_epilogue() {
    fn check<T: Float>() {
        let (rows, depth, outputs) = (14, 10, 45);
        let whole = |len: usize, step: usize| -> Vec<i32> {
            (0..len).map(|i| if i % depth == 3 { 127 } else { (i * step % 255) as i32 - 127 }).collect()
        };
        let (x, w) = (whole(rows * depth, 37), whole(outputs * depth, 91));
        let numbers = |whole: &[i32]| -> Vec<T> { whole.iter().map(|&i| T::from_f64(f64::from(i))).collect() };
        let packed = [Arc::new(Int8Rhs::quantize(&numbers(&w), outputs, depth).unwrap())];
        let bias: Vec<i32> = (0..outputs as i32).collect();
        let mut y = vec![T::NAN; rows * outputs];
        product(&mut y, &numbers(&x), &packed, &Affine::bias(Some(&numbers(&bias)))).unwrap();
        let dot = |x: &[i32], w: &[i32]| -> i32 { x.iter().zip(w).map(|(x, w)| x * w).sum() };
        let row = |x| w.chunks(depth).zip(&bias).map(move |(w, b)| dot(x, w) + b);
        assert!(y == numbers(&x.chunks(depth).flat_map(row).collect::<Vec<_>>()));
    }
    check::<f32>();
    check::<f64>();
}

#[test]
fn a_row_is_rounded_to_the_nearest_by_its_own_scale() {
    let (q, scales) = quantized(&[1.0, -2.54, 0.01, 0.03, 0.0, 0.0, 0.0, 0.0, f32::NAN, 1.0, 1.0, 1.0], 4);
    assert_eq!(q[..8], [50, -127, 0, 2, 0, 0, 0, 0]); // 0.5 and 1.5 to the even one
    assert!((scales[0] - 0.02).abs() < 1e-8 && scales[1] == 0.0 && scales[2].is_nan());
    for bad in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
        let mut x = vec![1.0; 40];
        x[33] = bad;
        assert!(quantized(&x, 40).1[0].is_nan());
    }
    assert_eq!(quantized(&[1e-44, -1e-42], 2), (vec![0, 0], vec![0.0]));
    let x: Vec<f32> = normal(5 * 300, 3);
    let (q, scales) = quantized(&x, 300);
    for ((x, q), &scale) in x.chunks(300).zip(q.chunks(300)).zip(&scales) {
        assert!(q.iter().any(|q| q.unsigned_abs() == 127) && q.iter().all(|&q| q > -128));
        assert!(x.iter().zip(q).all(|(x, &q)| (x - f32::from(q) * scale).abs() <= 0.5001 * scale));
    }
}

#[test]
fn a_row_has_the_same_bits_alone_in_a_batch_and_on_any_threads() {
    let (rows, depth, outputs) = (230, 192, 160);
    let x: Vec<f32> = normal(rows * depth, 1);
    let packed = [Arc::new(Int8Rhs::quantize(&normal::<f32>(outputs * depth, 2), outputs, depth).unwrap())];
    let bias: Vec<f32> = normal(outputs, 3);
    let epilogue = Affine::bias(Some(&bias[..]));
    let run = |x: &[f32]| {
        let mut y = vec![f32::NAN; x.len() / depth * outputs];
        product(&mut y, x, &packed, &epilogue).unwrap();
        y
    };
    let one = with_local_limit(1, || run(&x));
    for n in [2, 3, 7] {
        assert!(with_local_limit(n, || run(&x)) == one, "{n} threads differ");
    }
    for r in [0, 11, 12, 95, 96, 229] {
        assert_eq!(run(&x[r * depth..(r + 1) * depth]), one[r * outputs..(r + 1) * outputs]);
    }
}

#[test]
fn weights_that_stand_side_by_side_are_those_alone() {
    let depth = 48;
    for widths in [[5, 32, 70], [160, 16, 33]] {
        let outputs: usize = widths.iter().sum();
        let x: Vec<f32> = normal(300 * depth, 1);
        let bias: Vec<f32> = normal(outputs, 3);
        for bytes in Bytes::all() {
            let parts = widths.map(|o| packed(bytes, &normal::<f32>(o * depth, o as u64), depth)[0].clone());
            for (rows, threads) in [(1, 1), (9, 1), (9, 3), (300, 2)] {
                let mut together = vec![f32::NAN; rows * outputs];
                let x = &x[..rows * depth];
                let all = || product(&mut together, x, &parts, &Affine::bias(Some(&bias)));
                with_local_limit(threads, all).unwrap();
                let mut first = 0;
                for w in &parts {
                    let mut y = vec![f32::NAN; rows * w.outputs];
                    let bias = &bias[first..first + w.outputs];
                    product(&mut y, x, std::slice::from_ref(w), &Affine::bias(Some(bias))).unwrap();
                    for (y, row) in y.chunks(w.outputs).zip(together.chunks(outputs)) {
                        assert_eq!(*y, row[first..first + w.outputs], "{bytes:?}: {widths:?}, {rows} rows");
                    }
                    first += w.outputs;
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_said_and_no_rows_are_fine() {
    let packed = [Arc::new(Int8Rhs::quantize(&[1.0f32; 6], 2, 3).unwrap())];
    let table = [Arc::new(Int8Rhs::table(2, 3).unwrap())];
    assert!(product(&mut [0.0f32; 2], &[1.0; 3], &table, &NoEpilogue).is_err());
    let other = Arc::new(Int8Rhs::quantize(&[1.0f32; 8], 2, 4).unwrap());
    assert!(product::<f32, _>(&mut [0.0; 4], &[0.0; 3], &[packed[0].clone(), other], &NoEpilogue).is_err());
    assert!(product::<f32, _>(&mut [0.0; 4], &[0.0; 5], &packed, &NoEpilogue).is_err());
    product::<f32, _>(&mut [], &[], &packed, &NoEpilogue).unwrap();
}
