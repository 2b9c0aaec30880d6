//! Each operation on the path the process runs; the suite is run once per `TRANSFORMER_RS_ISA`.

use super::*;
use crate::kernel;

const SPECIAL: [f64; 27] = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1.5,
    2.5,
    -2.5,
    -0.5,
    3.49,
    1e-30,
    -1e-30,
    88.0,
    -87.0,
    1e30,
    -1e30,
    7.0,
    4.25,
    -3.75,
    0.1,
    1e10,
    8388609.0,
    -8388611.0,
    4194305.0,
    4194304.5,
    -6291457.5,
    2251799813685249.5,
];

kernel! {
    /// One operation, chosen by its number, over whole slices.
    fn operate<'a, T>(s: S; y: &'a mut [T], a: &'a [T], b: &'a [T], c: &'a [T], op: usize) {
        for (i, y) in y.chunks_mut(S::LANES).enumerate() {
            let at = i * S::LANES;
            let [a, b, c] = [a, b, c].map(#[inline(always)] |x| s.load_first(&x[at..], T::ONE));
            let v = match op {
                0 => s.add(a, b),
                1 => s.sub(a, b),
                2 => s.mul(a, b),
                3 => s.div(a, b),
                4 => s.mul_add(a, b, c),
                5 => s.neg_mul_add(a, b, c),
                6 => s.min(a, b),
                7 => s.max(a, b),
                8 => s.sqrt(s.abs(a)),
                9 => s.neg(a),
                10 => s.neg(s.abs(a)),
                11 => s.round(a),
                12 => s.select(s.lt(a, b), a, c),
                13 => s.select(s.not(s.le(a, b)), a, c),
                14 => s.select(s.eq(a, b), a, c),
                15 => s.scale2(a, s.splat(T::from_f64(3.0))),
                16 => s.scale2(a, s.splat(T::from_f64(-5.0))),
                17 => s.select(s.first(at.min(S::LANES)), a, b),
                18 => s.splat(if s.any(s.lt(a, s.zero())) { T::ONE } else { T::ZERO }),
                19 => math::exp(s, a),
                20 => math::normal_tail(s, a),
                21 => math::normal_tail_slope(s, a),
                22 => math::sigmoid(s, a),
                23 => math::exp2(s, s.min(s.splat(T::from_f64(126.5)), a)),
                _ => s.zero(),
            };
            s.store_first(v, y);
        }
    }
}

/// The same in plain Rust; `fused` tells whether `mul_add` rounds once.
fn expected<T: Float>(op: usize, a: T, b: T, c: T, fused: bool) -> Option<T> {
    let (fa, fb, fc) = (a.to_f64(), b.to_f64(), c.to_f64());
    Some(match op {
        0 => a + b,
        1 => a - b,
        2 => a * b,
        3 => a / b,
        // Only f32 has paths with fused operations.
        4 if fused => T::from_f64(libm::fmaf(fa as f32, fb as f32, fc as f32) as f64),
        5 if fused => T::from_f64(libm::fmaf(-fa as f32, fb as f32, fc as f32) as f64),
        4 => a * b + c,
        5 => c - a * b,
        6 => {
            if a < b {
                a
            } else {
                b
            }
        }
        7 => {
            if a > b {
                a
            } else {
                b
            }
        }
        8 => a.abs().sqrt(),
        9 => -a,
        10 => -a.abs(),
        11 => T::from_f64(libm::rint(fa)),
        12 => {
            if a < b {
                a
            } else {
                c
            }
        }
        13 => {
            if a > b {
                a
            } else {
                c
            }
        }
        14 => {
            if a == b {
                a
            } else {
                c
            }
        }
        15 if fa != 0.0 => a * T::from_f64(8.0),
        16 if fa != 0.0 => a * T::from_f64(0.03125),
        _ => return None,
    })
}

fn operations_match<T: Float>(lanes: usize, fused: bool) {
    let n = SPECIAL.len();
    for shift in 0..n {
        // Every length up to three vectors and a tail, so that masked reads and writes are met too.
        let len = if shift == 0 { n } else { shift };
        let a: Vec<T> = SPECIAL[..len].iter().map(|x| T::from_f64(*x)).collect();
        let b: Vec<T> = (0..len).map(|i| T::from_f64(SPECIAL[(i + shift) % n])).collect();
        let c: Vec<T> = (0..len).map(|i| T::from_f64(SPECIAL[(i + 2 * shift) % n] * 0.5)).collect();
        for op in 0..=16 {
            let mut y = vec![T::NAN; len + 3];
            operate(&mut y[..len], &a, &b, &c, op);
            assert!(y[len..].iter().all(|y| y.is_nan()), "operation {op} wrote behind its slice");
            for i in 0..len {
                let Some(e) = expected(op, a[i], b[i], c[i], fused) else { continue };
                let same = e == y[i] && (op == 11 || e.to_f64().is_sign_negative() == y[i].to_f64().is_sign_negative());
                assert!(
                    same || (e.is_nan() && y[i].is_nan()),
                    "operation {op}({}, {}, {}): {e} and {}",
                    a[i],
                    b[i],
                    c[i],
                    y[i]
                );
            }
        }
        let mut y = vec![T::NAN; len];
        operate(&mut y, &a, &b, &c, 17);
        for (i, y) in y.iter().enumerate() {
            let e = if i < lanes { b[i] } else { a[i] };
            assert_eq!(*y, e, "first");
        }
        operate(&mut y, &a, &b, &c, 18);
        for (i, y) in y.iter().enumerate() {
            let at = i / lanes * lanes;
            let any = a[at..len.min(at + lanes)].iter().any(|a| *a < T::ZERO);
            assert_eq!(*y == T::ONE, any, "any");
        }
    }
}

kernel! {
    fn lanes_of<T>(s: S; x: T) -> (usize, bool) {
        // (1 + ε)(1 − ε) − 1 = −ε² is lost where the product is rounded.
        let (a, b) = (s.splat(x + T::EPSILON), s.splat(x - T::EPSILON));
        let difference = s.mul_add(a, b, s.splat(-T::ONE));
        (S::LANES, s.any(s.lt(difference, s.zero())))
    }
}

#[test]
fn operations_of_f32() {
    let (lanes, fused) = lanes_of(1.0f32);
    let isa = isa().unwrap();
    assert_eq!(
        (lanes, fused),
        match isa {
            Isa::Portable => (8, false),
            Isa::Avx2 => (8, true),
            Isa::Avx512 | Isa::Amx => (16, true),
        }
    );
    operations_match::<f32>(lanes, fused);
}

#[test]
fn operations_of_f64() {
    assert_eq!(lanes_of(1.0f64), (4, false));
    operations_match::<f64>(4, false);
}

kernel! {
    /// Squares of LANES x LANES side by side, with both strides larger than that; tells LANES.
    fn transpose<'a, T>(s: S; dst: &'a mut [T], src: &'a [T], src_stride: usize, rows: usize, dst_stride: usize) -> usize {
        let rows = rows.min(S::LANES);
        assert!(rows > 0 && src.len() >= rows * src_stride && dst.len() >= S::LANES * dst_stride);
        assert!(src_stride >= S::LANES && dst_stride >= S::LANES);
        // SAFETY: so many rows of LANES numbers fit both slices.
        unsafe { s.transpose_ptr(src.as_ptr(), src_stride, rows, dst.as_mut_ptr(), dst_stride) };
        S::LANES
    }
}

fn squares_are_transposed<T: Float>() {
    for rows in [MAX_LANES, 7, 1] {
        let src: Vec<T> = (0..rows * 19).map(|i| T::from_f64(i as f64)).collect();
        let mut dst = vec![-T::ONE; MAX_LANES * 21];
        let lanes = transpose(&mut dst, &src, 19, rows, 21);
        for (at, x) in dst.iter().enumerate() {
            let (j, i) = (at / 21, at % 21);
            let expected = if i < lanes && j < lanes { src[i.min(rows - 1) * 19 + j] } else { -T::ONE };
            assert_eq!(*x, expected, "({i}, {j}) of {rows} rows");
        }
    }
}

#[test]
fn transposes() {
    squares_are_transposed::<f32>();
    squares_are_transposed::<f64>();
}

kernel! {
    fn reduce<'a, T>(s: S; x: &'a [T]) -> (T, T) {
        let v = s.load(x);
        (s.reduce_sum(v), s.reduce_max(v))
    }
}

fn reductions_match<T: Float>(lanes: usize) {
    let mut x: Vec<T> = (0..lanes).map(|i| T::from_f64((i * i % 7) as f64 * 0.1 - 0.2)).collect();
    for turn in 0..lanes {
        x.rotate_left(1);
        let (mut tree, mut n) = (x.clone(), lanes / 2);
        while n > 0 {
            for i in 0..n {
                tree[i] = tree[i] + tree[i + n];
            }
            n /= 2;
        }
        let largest = x.iter().copied().fold(T::NEG_INFINITY, |a, b| if a > b { a } else { b });
        assert_eq!(reduce(&x), (tree[0], largest), "turn {turn}");
    }
}

kernel! {
    fn add_squares<'a, T>(s: S; sums: &'a mut [f64], x: &'a [T]) {
        s.add_squares(s.load(x), sums);
    }
}

fn squares_are_summed_lane_by_lane<T: Float>(lanes: usize) {
    let x: Vec<T> = (0..lanes).map(|i| T::from_f64(i as f64 * 1e-3 + 1.0 / 3.0)).collect();
    let mut sums: Vec<f64> = (0..lanes + 3).map(|i| i as f64 * 1e5).collect();
    let expected: Vec<f64> = sums.iter().zip(&x).map(|(sum, x)| sum + x.to_f64() * x.to_f64()).collect();
    add_squares(&mut sums, &x);
    assert_eq!(sums[..lanes], expected);
    assert_eq!(sums[lanes..], [lanes, lanes + 1, lanes + 2].map(|i| i as f64 * 1e5), "no more sums than lanes");
}

#[test]
fn squares_are_summed_in_f64() {
    squares_are_summed_lane_by_lane::<f32>(lanes_of(1.0f32).0);
    squares_are_summed_lane_by_lane::<f64>(4);
}

#[test]
fn reductions_follow_the_tree() {
    reductions_match::<f32>(lanes_of(1.0f32).0);
    reductions_match::<f64>(4);
}

kernel! {
    fn keep_row<'a, T>(s: S; y: &'a mut [T], key: [u32; 2], first_column: u32, threshold: u32) {
        for (i, y) in y.chunks_mut(S::LANES).enumerate() {
            let m = s.keep(key, first_column.wrapping_add((i * S::LANES) as u32), threshold);
            s.store_first(s.select(m, s.splat(T::ONE), s.zero()), y);
        }
    }
}

#[test]
fn keep_is_the_same_on_every_path() {
    for (key, first, threshold) in [
        ([0, 0], 0, 0),
        ([1, 2], 5, 1 << 30),
        ([0xdead_beef, 0x1234_5678], u32::MAX - 3, 1 << 31),
        ([u32::MAX, 7], 100_000, u32::MAX),
        ([3, u32::MAX], 77, 429_496_730),
    ] {
        let (mut single, mut double) = ([0.0f32; 101], [0.0f64; 101]);
        keep_row(&mut single, key, first, threshold);
        keep_row(&mut double, key, first, threshold);
        for i in 0..101 {
            let keep = keep_scalar(key, first.wrapping_add(i as u32), threshold);
            assert_eq!((single[i] == 1.0, double[i] == 1.0), (keep, keep), "column {i}");
        }
        if threshold == 0 {
            assert!(single.iter().all(|k| *k == 1.0), "nothing is dropped at probability 0");
        }
    }
}

/// Frequencies, neighbours and rows: what a mask must not show.
#[test]
fn keep_looks_random() {
    let mut state = 12345u64;
    let mut word = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 32) as u32
    };
    const ROWS: usize = 512;
    const COLUMNS: usize = 512;
    for p in [0.1, 0.5] {
        let threshold = (p * 4_294_967_296.0) as u32;
        let mask: Vec<Vec<f64>> = (0..ROWS)
            .map(|_| {
                let key = [word(), word()];
                (0..COLUMNS as u32).map(|c| keep_scalar(key, c, threshold) as u32 as f64 - (1.0 - p)).collect()
            })
            .collect();
        let deviation = (p * (1.0 - p)).sqrt();
        // Five standard deviations of a mean of n products of independent, centred values.
        let limit = |n: usize, each: f64| 5.0 * each / (n as f64).sqrt();
        let mean: f64 = mask.iter().flatten().sum::<f64>() / (ROWS * COLUMNS) as f64;
        assert!(mean.abs() < limit(ROWS * COLUMNS, deviation), "mean {mean}");
        for lag in [1, 2, 3, 4, 7, 8, 16, 32, 64, 128, 256] {
            let n = ROWS * (COLUMNS - lag);
            let along: f64 = mask.iter().map(|r| (lag..COLUMNS).map(|c| r[c] * r[c - lag]).sum::<f64>()).sum();
            assert!((along / n as f64).abs() < limit(n, p * (1.0 - p)), "columns {lag} apart: {}", along / n as f64);
            let n = (ROWS - lag) * COLUMNS;
            let across: f64 =
                (lag..ROWS).map(|r| (0..COLUMNS).map(|c| mask[r][c] * mask[r - lag][c]).sum::<f64>()).sum();
            assert!((across / n as f64).abs() < limit(n, p * (1.0 - p)), "rows {lag} apart: {}", across / n as f64);
        }
        for c in 0..COLUMNS {
            let mean: f64 = mask.iter().map(|r| r[c]).sum::<f64>() / ROWS as f64;
            assert!(mean.abs() < limit(ROWS, deviation), "column {c}: {mean}");
        }
    }
}

/// Each function with its number in `operate`, its true value and its allowed error in ulp.
type Function = (&'static str, usize, fn(f64) -> f64, f64);
const FUNCTIONS: [Function; 3] = [
    ("exp", 19, libm::exp, 1.2),
    ("sigmoid", 22, |x| 1.0 / (1.0 + libm::exp(-x)), 2.6),
    ("exp2 below 127", 23, |x| libm::exp2(if x > 126.5 { 126.5 } else { x }), 1.2),
];

/// The largest error in ulp over these inputs; panics where it is above the limit.
fn check_f32(function: Function, x: &[f32], y: &mut [f32]) -> f64 {
    let (name, op, truth, limit) = function;
    operate(y, x, x, x, op);
    let mut worst = 0.0;
    for (x, y) in x.iter().zip(y) {
        let t = truth(*x as f64);
        let small = 1.176e-38;
        let error = if t.is_nan() {
            if y.is_nan() { 0.0 } else { f64::INFINITY }
        } else if t as f32 == *y || (t.abs() < small && y.abs() < small as f32) {
            0.0
        } else {
            let ulp = libm::exp2(libm::floor(libm::log2(t.abs())) - 23.0);
            (*y as f64 - t).abs() / ulp
        };
        assert!(error <= limit, "{name}({x:e}) = {y:e}, not {t:e}: {error} ulp");
        worst = f64::max(worst, error);
    }
    worst
}

#[test]
fn functions_of_f32() {
    let mut x: Vec<f32> = vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-45, -1e-45];
    x.extend([88.72283, 88.72284, 88.8, -87.33654, -87.3366, -87.34, -104.0, 1e30, -1e30, 0.625]);
    x.extend((0..u32::MAX - 9_973).step_by(9_973).map(f32::from_bits));
    x.extend((-20_000..20_000).map(|i| i as f32 * 0.001));
    let mut y = vec![0.0; x.len()];
    for function in FUNCTIONS {
        check_f32(function, &x, &mut y);
    }
}

/// Beside 1, which is what they are added to.
#[test]
fn tails_of_the_normal_distribution() {
    let a: Vec<f32> = (0..40_000).map(|i| i as f32 * 0.001).chain([1e30, f32::INFINITY]).collect();
    let double: Vec<f64> = a.iter().map(|a| *a as f64).collect();
    let (mut single, mut exact) = (vec![0.0; a.len()], vec![0.0; a.len()]);
    let tail = |a: f64| 0.5 * libm::erfc(a / std::f64::consts::SQRT_2);
    let density = |a: f64| libm::exp(-0.5 * a * a) / libm::sqrt(std::f64::consts::TAU);
    let finite = |a: f64| a.min(1e9);
    for (op, truth) in [(20, &tail as &dyn Fn(f64) -> f64), (21, &|a| tail(a) - finite(a) * density(a))] {
        operate(&mut single, &a, &a, &a, op);
        operate(&mut exact, &double, &double, &double, op);
        for (i, &a) in double.iter().enumerate() {
            let (t, error) = (truth(a), (single[i] as f64 - truth(a)).abs());
            assert!(error * a.clamp(1.0, 40.0) <= 1.2e-7, "{op} of {a}: {}, not {t}", single[i]);
            assert!((exact[i] - t).abs() <= 1e-15, "{op} of {a}: {}, not {t}", exact[i]);
        }
        for nan in [f32::NAN, f32::from_bits(0x7fc0_0001)] {
            operate(&mut single[..1], &[nan], &[0.0], &[0.0], op);
            assert!(single[0].is_nan());
        }
    }
}

#[test]
#[ignore = "all 2³² bit patterns of three functions: minutes"]
fn every_f32() {
    let mut y = vec![0.0; 1 << 16];
    for function in FUNCTIONS {
        let worst = (0..1u32 << 16).fold(0.0, |worst, high| {
            let x: Vec<f32> = (0..1u32 << 16).map(|low| f32::from_bits(high << 16 | low)).collect();
            f64::max(worst, check_f32(function, &x, &mut y))
        });
        println!("{}: {worst:.2} ulp on {}", function.0, isa().unwrap());
    }
}

#[test]
fn functions_of_f64() {
    let x: Vec<f64> = (-4_000..4_000).map(|i| i as f64 * 0.013).chain([f64::INFINITY, f64::NEG_INFINITY]).collect();
    let mut y = vec![0.0; x.len()];
    for (name, op, truth, _) in FUNCTIONS {
        operate(&mut y, &x, &x, &x, op);
        for (x, y) in x.iter().zip(&y) {
            let t = truth(*x);
            assert!(t == *y || (t - y).abs() <= 1e-15 * t.abs(), "{name}({x}) = {y}, not {t}");
        }
    }
}

#[test]
fn levels_are_checked() {
    use dispatch::choose;
    assert_eq!(choose(None, Isa::Avx2), Ok(Isa::Avx2));
    assert_eq!(choose(Some(""), Isa::Avx512), Ok(Isa::Avx512));
    assert_eq!(choose(Some("portable"), Isa::Avx2), Ok(Isa::Portable));
    assert_eq!(choose(Some("avx2"), Isa::Avx512), Ok(Isa::Avx2));
    assert_eq!(choose(Some("avx512"), Isa::Amx), Ok(Isa::Avx512));
    let error = choose(Some("avx512"), Isa::Avx2).unwrap_err();
    assert!(
        matches!(&error, crate::error::Error::Unsupported(text) if text.contains("avx512") && text.contains("avx2"))
    );
    let error = choose(Some("sse9"), Isa::Avx2).unwrap_err();
    assert!(matches!(&error, crate::error::Error::Config(text) if text.contains("sse9")));
}

#[test]
fn bytes_are_multiplied_by_what_the_cpu_has() {
    use bytes::{Bytes, Multiplier, Sums};
    let all = Bytes::all();
    assert!(all.contains(&Bytes::Portable) && all.contains(&Bytes::best()));
    for bytes in [Bytes::Portable, Bytes::Avx2, Bytes::Vnni, Bytes::Amx] {
        let made = std::panic::catch_unwind(|| {
            let mut sums = Sums::ZERO;
            drop(Multiplier::new(bytes, &mut sums));
        });
        assert_eq!(made.is_ok(), all.contains(&bytes), "{bytes:?}");
    }
}

#[test]
fn buffers_are_aligned_and_refuse_politely() {
    for len in [0, 1, 15, 16, 17, 1000] {
        let mut buffer = Buffer::<f32>::zeroed(len).unwrap();
        assert_eq!(buffer.len(), len);
        assert_eq!(buffer.as_ptr() as usize % 64, 0);
        buffer.fill(1.0);
        assert!(buffer.iter().all(|x| *x == 1.0));
        assert_eq!(Buffer::<f64>::zeroed(len).unwrap().as_ptr() as usize % 64, 0);
    }
    // Two huge pages.
    let mut buffer = Buffer::<f32>::zeroed(1 << 20).unwrap();
    assert!(
        (buffer.as_ptr() as usize).is_multiple_of(2 << 20)
            && buffer.len() == 1 << 20
            && buffer.iter().all(|x| *x == 0.0)
    );
    buffer.fill(1.0);
    assert!(Buffer::<f32>::default().is_empty());
    for len in [usize::MAX, usize::MAX / 4, 1 << 60] {
        let error = Buffer::<f32>::zeroed(len).unwrap_err();
        assert!(matches!(&error, crate::error::Error::OutOfMemory(text) if text.contains("bytes")));
    }
}
