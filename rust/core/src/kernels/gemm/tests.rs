//! Against a readable product, and the promise of same bits.

use super::plan::{SLAB_B, SLAB_COLS, SLAB_ROWS, TASK_COLS, TASK_ROWS};
use super::tile::KC;
use super::*;
use crate::kernels::activation::Curve;
use crate::rng::{Dropout, Key};
use crate::simd::{Isa, Simd, isa, keep_scalar};
use crate::threads::with_local_limit;

/// Three loops in f64.
fn gemm_reference<T: Float>(a: Mat<T>, b: Mat<T>, c: &dyn Fn(usize, usize) -> f64) -> Vec<f64> {
    let ((m, k), (_, n)) = (a.shape(), b.shape());
    let element = |i, j| c(i, j) + (0..k).map(|k| a.at(i, k).to_f64() * b.at(k, j).to_f64()).sum::<f64>();
    (0..m).flat_map(|i| (0..n).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect()
}

/// Numbers in [−1, 1] that look random.
fn numbers<T: Float>(len: usize, seed: u64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            T::from_f64((state >> 40) as f64 / (1u64 << 23) as f64 - 1.0)
        })
        .collect()
}

/// A view of the given kind on fresh data: row-major, transposed, with gaps, or both strides above 1.
fn view<T: Float>(data: &mut Vec<T>, rows: usize, cols: usize, kind: usize, seed: u64) -> Mat<'_, T> {
    *data = numbers((rows + 3) * (cols + 3) * 2, seed);
    match kind {
        0 => Mat::new(data, rows, cols),
        1 => Mat::new(data, cols, rows).map(Mat::t),
        2 => Mat::with_stride(data, rows, cols, cols + 3),
        3 => Mat::with_stride(data, cols, rows, rows + 1).map(Mat::t),
        _ => Mat::with_strides(data, rows, cols, 2 * cols + 1, 2),
    }
    .unwrap()
}

const SIZES: [usize; 10] = [0, 1, 2, 3, 5, 7, 16, 31, 33, 50];

fn matches_reference<T: Float>(m: usize, n: usize, k: usize, a_kind: usize, b_kind: usize) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let a = view::<T>(&mut a, m, k, a_kind, 1);
    let b = view::<T>(&mut b, k, n, b_kind, 2);
    let stride = n + 2;
    let before: Vec<T> = numbers(m * stride + 7, 3);
    let packed = PackedRhs::new(b).unwrap();
    for beta in [Beta::Assign, Beta::Add] {
        let expected = gemm_reference(a, b, &|i, j| match beta {
            Beta::Assign => 0.0,
            Beta::Add => before[i * stride + j].to_f64(),
        });
        let mut results: Vec<Vec<T>> = Vec::new();
        for (rhs, workers) in [(Rhs::Plain(b), 2), (Rhs::Plain(b), 1), (Rhs::Packed(&packed), 2)] {
            let mut c = before.clone();
            let out = MatMut::with_stride(&mut c, m, n, stride).unwrap();
            product::<T, _, Exact>(out, a, rhs, beta, &NoEpilogue, workers).unwrap();
            for (at, (c, before)) in c.iter().zip(&before).enumerate() {
                let (i, j) = (at / stride, at % stride);
                if i < m && j < n {
                    let e = expected[i * n + j];
                    let limit = T::EPSILON.to_f64() * 2.0 * (k as f64 + 2.0);
                    assert!((c.to_f64() - e).abs() <= limit, "{m} x {n} x {k}, ({i}, {j}): {c} and {e}");
                } else {
                    assert_eq!(c, before, "{m} x {n} x {k} wrote outside of C at ({i}, {j})");
                }
            }
            results.push(c);
        }
        assert!(results.iter().all(|r| *r == results[0]), "{m} x {n} x {k}: plain, serial and packed differ");
    }
}

#[test]
fn small_products() {
    for m in SIZES {
        for n in SIZES {
            for k in [0, 1, 2, 17] {
                for kind in 0..9 {
                    // All kinds of A with one of B and the other way round.
                    let (a_kind, b_kind) = if kind < 5 { (kind, m % 5) } else { (n % 5, kind - 4) };
                    matches_reference::<f32>(m, n, k, a_kind, b_kind);
                    if kind % 3 == 0 {
                        matches_reference::<f64>(m, n, k, a_kind, b_kind);
                    }
                }
            }
        }
    }
}

#[test]
fn panels_hold_columns_units_and_zeros() {
    fn check<F: Form>(depth: usize, cols: usize, width: usize, kind: usize) {
        let mut data = Vec::new();
        let b = view::<f32>(&mut data, depth, cols, kind, 1);
        let (units, panels) = (F::units(depth), cols.div_ceil(width));
        let len = panel_len(units, width);
        let number = |k: usize, j: usize| if k < depth && j < cols { b.at(k, j) } else { 0.0 };
        let unit = |u: usize, j: usize| match F::STEPS {
            1 => number(u, j).to_bits(),
            _ => bf16(number(2 * u, j)).to_bits() >> 16 | bf16(number(2 * u + 1, j)).to_bits(),
        };
        for (shares, workers) in [(1, 1), (1, 4), (3, 3)] {
            let mut packed = vec![f32::NAN; panels * len];
            pack_shares::<f32, F>(&mut packed, b, width, shares, workers).unwrap();
            for (panel, u) in (0..panels).flat_map(|panel| (0..units).map(move |u| (panel, u))) {
                let row = packed[panel * len + u * width..][..width].iter().map(|x| x.to_bits());
                let expected = (0..width).map(|j| unit(u, panel * width + j));
                assert!(
                    row.eq(expected),
                    "{depth} x {cols} in panels of {width}, kind {kind}, panel {panel}, unit {u}"
                );
            }
        }
    }
    for (depth, cols) in [(1, 1), (3, 31), (70, 12), (70, 700), (257, 100), (5, 2000)] {
        for (width, kind) in [(12, 0), (12, 2), (12, 4), (32, 0), (32, 1), (32, 2), (32, 3), (16, 2)] {
            check::<Exact>(depth, cols, width, kind);
            if form::pairs::<f32>() || form::tiles::<f32>() {
                check::<Pairs<1>>(depth, cols, width, kind);
                check::<Pairs<16>>(depth, cols, width, kind);
            }
        }
    }
}

#[test]
fn products_around_blocks() {
    let (rows, cols) = tile_shape::<f32>();
    for k in [KC - 1, KC, KC + 1, 2 * KC + 3] {
        for (m, n) in [(1, cols * 9 + 1), (3, cols * 4 - 1), (rows + 1, cols), (2 * rows - 1, cols + 1), (4 * rows, 3)]
        {
            for kind in 0..5 {
                matches_reference::<f32>(m, n, k, kind, (kind + m) % 5);
            }
        }
    }
    for (m, n, k) in [(TASK_ROWS + 1, TASK_COLS + 1, 40), (2 * TASK_ROWS - 1, 17, KC + 1), (25, 2 * TASK_COLS + 5, 33)]
    {
        for kind in 0..5 {
            matches_reference::<f32>(m, n, k, kind, 4 - kind);
        }
    }
}

#[test]
fn products_larger_than_the_workspace() {
    // Wider than a packed slab in each direction, and deeper than a slab of that width.
    matches_reference::<f32>(30, 2 * SLAB_COLS + 9, 2 * KC + 5, 0, 1);
    matches_reference::<f32>(SLAB_ROWS + 9, 30, KC + 5, 1, 0);
    matches_reference::<f32>(SLAB_ROWS + 1, SLAB_COLS + 1, KC + 1, 3, 4);
    matches_reference::<f32>(40, 40, SLAB_B / 40 + KC, 1, 0);
}

#[test]
fn a_row_alone_has_the_same_bits() {
    for (m, n, k, a_kind, b_kind) in
        [(70, 90, 300, 0, 0), (70, 90, 300, 1, 1), (401, 70, 520, 2, 3), (64, 130, 257, 3, 0)]
    {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let a = view::<f32>(&mut a, m, k, a_kind, 4);
        let b = view::<f32>(&mut b, k, n, b_kind, 5);
        let packed = PackedRhs::new(b).unwrap();
        let mut all = vec![0.0; m * n];
        gemm(MatMut::new(&mut all, m, n).unwrap(), a, b, Beta::Assign, &NoEpilogue).unwrap();
        for count in [1, 2, 3, 4, 5, 6, 7, 12, 13, 23, 24, 25] {
            for from in [0, 1, m - count] {
                let rows = a.rows(from..from + count).unwrap();
                for rhs in [Rhs::Plain(b), Rhs::Packed(&packed)] {
                    let mut some = vec![0.0; count * n];
                    gemm(MatMut::new(&mut some, count, n).unwrap(), rows, rhs, Beta::Assign, &NoEpilogue).unwrap();
                    assert_eq!(some, all[from * n..(from + count) * n], "{count} rows from {from} of {m} x {n} x {k}");
                }
            }
        }
        // Some columns, by a view.
        let mut some = vec![0.0; m * 11];
        let part = b.columns(30..41).unwrap();
        gemm(MatMut::new(&mut some, m, 11).unwrap(), a, part, Beta::Assign, &NoEpilogue).unwrap();
        for i in 0..m {
            assert_eq!(some[i * 11..][..11], all[i * n + 30..][..11], "columns of row {i}");
        }
    }
}

#[test]
fn one_chain_along_k() {
    let (m, n, k) = (9, 21, 700);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let a = view::<f32>(&mut a, m, k, 0, 6);
    let b = view::<f32>(&mut b, k, n, 0, 7);
    let fused = isa().unwrap() != Isa::Portable;
    let chain = |i: usize, j: usize, start: f32| {
        (0..k).fold(start, |sum, l| {
            let (x, y) = (a.at(i, l), b.at(l, j));
            if fused { libm::fmaf(x, y, sum) } else { x * y + sum }
        })
    };
    let mut c = vec![0.25; m * n];
    gemm(MatMut::new(&mut c, m, n).unwrap(), a, b, Beta::Add, &NoEpilogue).unwrap();
    for i in 0..m {
        for j in 0..n {
            assert_eq!(c[i * n + j], chain(i, j, 0.25));
        }
    }
}

#[test]
fn any_number_of_threads() {
    for (m, n, k, a_kind, b_kind) in [(300, 310, 290, 0, 1), (5, 2000, 300, 0, 0), (513, 257, 600, 1, 0)] {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let a = view::<f32>(&mut a, m, k, a_kind, 8);
        let b = view::<f32>(&mut b, k, n, b_kind, 9);
        let results: Vec<Vec<f32>> = [1, 2, 3, 7]
            .into_iter()
            .map(|threads| {
                let mut c = vec![0.0; m * n];
                let out = MatMut::new(&mut c, m, n).unwrap();
                with_local_limit(threads, || gemm(out, a, b, Beta::Assign, &NoEpilogue)).unwrap();
                c
            })
            .collect();
        assert!(results.iter().all(|r| *r == results[0]), "{m} x {n} x {k}");
    }
}

#[derive(Clone, Copy)]
struct Square;

impl Curve for Square {
    #[inline(always)]
    fn value<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        s.mul(x, x)
    }
    #[inline(always)]
    fn slope<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        s.add(x, x)
    }
    fn reference(x: f64) -> f64 {
        x * x
    }
}

fn epilogues_match<T: Float>(m: usize, n: usize, k: usize) {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let a = view::<T>(&mut a, m, k, 0, 10);
    let b = view::<T>(&mut b, k, n, 1, 11);
    let bias: Vec<T> = numbers(n, 13);
    let run = |epilogue: &dyn Fn(MatMut<T>) -> Result<()>| {
        let mut c = vec![T::ONE; m * n];
        epilogue(MatMut::new(&mut c, m, n).unwrap()).unwrap();
        c
    };
    for beta in [Beta::Assign, Beta::Add] {
        let plain = run(&|c| gemm(c, a, b, beta, &NoEpilogue));
        let biased = run(&|c| gemm(c, a, b, beta, &Affine::bias(Some(&bias))));
        let dropout = Dropout::new(Key::new(3), 0.25);
        let all = Affine { bias: Some(&bias), activation: Square, dropout: Some(dropout) };
        let all = run(&|c| gemm(c, a, b, beta, &all));
        for i in 0..m * n {
            let x = plain[i] + bias[i % n];
            assert_eq!(biased[i], x);
            let kept = keep_scalar(dropout.row(i / n), (i % n) as u32, dropout.threshold);
            let y = if kept { T::from_f64(dropout.scale) * (x * x) } else { T::ZERO };
            assert_eq!(all[i], y);
        }
    }
}

#[test]
fn epilogues() {
    for (m, n, k) in [(1, 1, 1), (3, 19, 0), (7, 50, 300), (200, 300, 50), (30, 4200, 530)] {
        epilogues_match::<f32>(m, n, k);
    }
    epilogues_match::<f64>(13, 29, 31);
}

#[test]
fn wrong_shapes_are_errors() {
    use crate::error::Error;
    let data = [0.0f32; 12];
    let a = Mat::new(&data, 3, 4).unwrap();
    assert!(matches!(Mat::new(&data, 4, 4), Err(Error::Shape(_))));
    assert!(matches!(Mat::with_strides(&data, 2, 2, usize::MAX, 2), Err(Error::Shape(_))));
    assert!(matches!(a.rows(2..4), Err(Error::Shape(_))));
    assert!(matches!(a.columns(0..5), Err(Error::Shape(_))));
    let mut out = [0.0f32; 12];
    assert!(matches!(MatMut::with_stride(&mut out, 2, 4, 3), Err(Error::Shape(_))));
    let mut try_shape = |m, n, b: Mat<f32>| gemm(MatMut::new(&mut out, m, n).unwrap(), a, b, Beta::Assign, &NoEpilogue);
    assert!(matches!(try_shape(3, 3, a), Err(Error::Shape(text)) if text.contains("4 rows")));
    assert!(matches!(try_shape(2, 3, a.t()), Err(Error::Shape(_))));
    assert!(try_shape(3, 3, a.t()).is_ok());
    let c = MatMut::new(&mut out, 3, 3).unwrap();
    let error = gemm(c, a, a.t(), Beta::Assign, &Affine::bias(Some(&data[..4]))).unwrap_err();
    assert!(matches!(error, Error::Shape(text) if text.contains("bias")));
}

/// x with the 8 significant bits of bf16, ties to even.
fn bf16(x: f32) -> f32 {
    half::bf16::from_f32(x).to_f32()
}

#[test]
fn bf16_is_the_product_of_rounded_factors() {
    let shapes = [(1, 1, 1), (3, 7, 5), (13, 33, 2), (70, 40, 129), (200, 300, 64), (97, 530, 1100), (12, 32, 1025)];
    for (m, n, k) in shapes {
        for (left, right) in [(0, 0), (1, 0), (0, 1), (1, 1), (2, 2), (3, 3)] {
            let (mut a, mut b) = (Vec::new(), Vec::new());
            let (a, b) = (view::<f32>(&mut a, m, k, left, 20), view::<f32>(&mut b, k, n, right, 21));
            let mut rounded = (Vec::new(), Vec::new());
            rounded.0.extend((0..m * k).map(|i| bf16(a.at(i / k, i % k))));
            rounded.1.extend((0..k * n).map(|i| bf16(b.at(i / n, i % n))));
            let exact =
                gemm_reference(Mat::new(&rounded.0, m, k).unwrap(), Mat::new(&rounded.1, k, n).unwrap(), &|_, _| 1.0);
            let run = |threads| {
                let mut c = vec![1.0f32; m * n];
                let out = MatMut::new(&mut c, m, n).unwrap();
                with_local_limit(threads, || gemm_with(Precision::Bf16, out, a, b, Beta::Add, &NoEpilogue)).unwrap();
                c
            };
            let c = run(1);
            for (c, exact) in c.iter().zip(&exact) {
                // Ties may be rounded either way, which nobody but this test can tell apart: none in these numbers.
                assert!(
                    (f64::from(*c) - exact).abs() < 3e-6 * (k as f64).sqrt() + 1e-6,
                    "{m} {n} {k}: {c}, not {exact}"
                );
            }
            assert!(run(3) == c && run(7) == c, "the number of threads shows");
            let last = m - 1;
            let mut alone = vec![1.0f32; n];
            let out = MatMut::new(&mut alone, 1, n).unwrap();
            gemm_with(Precision::Bf16, out, a.rows(last..m).unwrap(), b, Beta::Add, &NoEpilogue).unwrap();
            assert_eq!(alone, c[last * n..], "a row's bits depend on the others");
        }
    }
}

#[test]
fn tiles_sum_up_blocks_of_32_steps() {
    if !form::tiles::<f32>() {
        println!("skipped: no tiles of AMX on this path");
        return;
    }
    // Of each block the even and the odd steps are chains of their own, from +0.
    let chain = |x: &dyn Fn(usize) -> (f32, f32), k: usize, start: f32| {
        (0..k).step_by(32).fold(start, |sum, block| {
            let mut halves = [0.0f32; 2];
            for l in block..k.min(block + 32) {
                let (x, y) = x(l);
                halves[l % 2] = libm::fmaf(bf16(x), bf16(y), halves[l % 2]);
            }
            sum + (halves[0] + halves[1])
        })
    };
    for k in [1, 31, 32, 33, 600, 1025, 2100] {
        for (m, n) in [(1, 1), (15, 33), (16, 16), (17, 32), (31, 15), (33, 17), (100, 65), (32, 1040)] {
            let kinds = (m + k) % 5;
            let (mut a, mut b) = (Vec::new(), Vec::new());
            let (a, b) = (view::<f32>(&mut a, m, k, kinds, 30), view::<f32>(&mut b, k, n, (n + k) % 5, 31));
            for beta in [Beta::Assign, Beta::Add] {
                let mut c = vec![0.25f32; m * (n + 1)];
                let out = MatMut::with_stride(&mut c, m, n, n + 1).unwrap();
                gemm_with(Precision::Bf16, out, a, b, beta, &NoEpilogue).unwrap();
                for (at, c) in c.iter().enumerate() {
                    let (i, j) = (at / (n + 1), at % (n + 1));
                    let start = if beta == Beta::Add { 0.25 } else { 0.0 };
                    let expected = if j < n { chain(&|l| (a.at(i, l), b.at(l, j)), k, start) } else { 0.25 };
                    assert_eq!(*c, expected, "{m} x {n} x {k}, ({i}, {j})");
                }
            }
        }
    }
}

#[test]
fn bf16_has_epilogues() {
    for (m, n, k) in [(1, 1, 1), (7, 50, 300), (200, 300, 50), (30, 2100, 1030), (3, 5, 0)] {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        let (a, b) = (view::<f32>(&mut a, m, k, 1, 10), view::<f32>(&mut b, k, n, 1, 11));
        let bias: Vec<f32> = numbers(n, 13);
        for beta in [Beta::Assign, Beta::Add] {
            let (mut plain, mut biased) = (vec![1.0; m * n], vec![1.0; m * n]);
            let out = MatMut::new(&mut plain, m, n).unwrap();
            gemm_with(Precision::Bf16, out, a, b, beta, &NoEpilogue).unwrap();
            let out = MatMut::new(&mut biased, m, n).unwrap();
            gemm_with(Precision::Bf16, out, a, b, beta, &Affine::bias(Some(&bias))).unwrap();
            assert!(biased.iter().zip(&plain).enumerate().all(|(at, (y, x))| *y == x + bias[at % n]), "{m} {n} {k}");
        }
    }
}

#[test]
fn bf16_keeps_infinities_and_nan() {
    for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 3e38] {
        let a = [special, 1.0, 1.0, 1.0];
        let mut c = [0.0f32; 2];
        let (a, b) = (Mat::new(&a, 2, 2).unwrap(), Mat::new(&[1.0, 1.0], 2, 1).unwrap());
        gemm_with(Precision::Bf16, MatMut::new(&mut c, 2, 1).unwrap(), a, b, Beta::Assign, &NoEpilogue).unwrap();
        assert!(
            c[1] == 2.0
                && (c[0] == special + 1.0 || (c[0] / special - 1.0).abs() < 0.01 || special.is_nan() && c[0].is_nan()),
            "{c:?}"
        );
    }
}

#[test]
fn a_weight_kept_in_bf16_is_a_rounded_one_bit_for_bit() {
    fn check<T: Float>(rows: usize, widths: &[usize], depth: usize) {
        let n: usize = widths.iter().sum();
        let (x, bias): (Vec<T>, Vec<T>) = (numbers(rows * depth, 40), numbers(n, 41));
        let weight: Vec<T> = numbers(n * depth, 42);
        let rounded: Vec<T> = weight.iter().map(|w| T::from_f64(f64::from(bf16(w.to_f64() as f32)))).collect();
        let mut rest = &weight[..];
        let kept: Vec<_> = widths
            .iter()
            .map(|&width| {
                let (weight, after) = rest.split_at(width * depth);
                rest = after;
                let mut kept = Bf16Rhs::zeros(width, depth).unwrap();
                kept.set(weight).unwrap();
                std::sync::Arc::new(kept)
            })
            .collect();
        for threads in [1, 3] {
            let (mut expected, mut got) = (vec![T::ONE; rows * n], vec![T::ONE; rows * n]);
            with_local_limit(threads, || {
                let (x, w) = (Mat::new(&x, rows, depth).unwrap(), Mat::new(&rounded, n, depth).unwrap());
                let out = MatMut::new(&mut expected, rows, n).unwrap();
                gemm(out, x, w.t(), Beta::Assign, &Affine::bias(Some(&bias))).unwrap();
                product_bf16(&mut got, x.data, &kept, &Affine::bias(Some(&bias))).unwrap();
            });
            assert!(got == expected, "{rows} x {widths:?} x {depth}, {} threads {threads}", T::NAME);
        }
        let mut first = 0;
        for w in kept {
            let mut values = vec![T::ONE; w.outputs * depth];
            let mut table = Bf16Rhs::table(w.outputs, depth).unwrap();
            table.set(&weight[first..first + values.len()]).unwrap();
            for one in [&w, &table, &table.packed().unwrap(), &w.packed().unwrap(), &table.copy().unwrap()] {
                values.fill(T::ONE);
                one.values(&mut values).unwrap();
                assert_eq!(values, rounded[first..first + values.len()]);
            }
            assert!(Bf16Rhs::foreign(&values).is_none());
            assert!(table.is_table() && !w.is_table());
            first += values.len();
        }
    }
    let (rows, cols) = tile_shape::<f32>();
    for rows in [0, 1, 2, 3, 5, rows, rows + 1, 4 * rows + 1, 100, 700] {
        check::<f32>(rows, &[cols], 37);
        check::<f32>(rows, &[5, 4 * cols, 3 * cols + 1], KC + 3);
        check::<f32>(rows, &[8 * cols], 1);
    }
    check::<f32>(3, &[7], 0);
    check::<f32>(2, &[], 5);
    check::<f32>(1, &[3 * TASK_COLS], 2 * KC + 1);
    check::<f64>(9, &[5, 12], 30);
}

#[test]
fn bf16_rounds_to_nearest_even_and_keeps_what_it_can() {
    let bits = |x: u32| f32::from_bits(x);
    let cases = [
        (bits(0x3f80_8000), bits(0x3f80_0000)), // a tie goes down to the even one,
        (bits(0x3f81_8000), bits(0x3f82_0000)), // and up
        (bits(0x3f80_8001), bits(0x3f81_0000)),
        (bits(0x0000_8001), bits(0x0001_0000)), // below the normal numbers
        (-0.0, -0.0),
        (f32::INFINITY, f32::INFINITY),
        (f32::MAX, f32::INFINITY),
    ];
    let numbers = cases.map(|(given, _)| given);
    let mut w = Bf16Rhs::zeros(1, numbers.len()).unwrap();
    w.set(&numbers).unwrap();
    let mut row = [1.0; 7];
    w.row(0, &mut row);
    assert_eq!(row.map(f32::to_bits), cases.map(|(_, kept)| kept.to_bits()));
    assert!(w.bits(0).eq(row.map(|x| (x.to_bits() >> 16) as u16)));
    assert_eq!(Bf16Rhs::foreign(&numbers), Some(numbers[0]));
    let mut w = w.copy().unwrap();
    w.set(&[f32::NAN; 7]).unwrap();
    w.row(0, &mut row);
    assert!(row.iter().all(|x| x.is_nan()) && Bf16Rhs::foreign(&row).is_none());
    assert!(w.set(&[0.0; 6]).is_err() && w.values(&mut [0.0; 8]).is_err());
}
