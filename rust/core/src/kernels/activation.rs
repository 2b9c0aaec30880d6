//! Pointwise nonlinearities and gates, with their derivatives.

use super::lanes::map;
use super::task_len;
use crate::error::Result;
use crate::kernel;
use crate::simd::{Float, Simd, math};
use crate::threads::{GRAIN, for_each};

/// A function of one number and its derivative.
pub trait Curve: Copy + Send + Sync + 'static {
    /// f(x)
    fn value<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V;
    /// f'(x)
    fn slope<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V;
    /// f(x) in plain words.
    fn reference(x: f64) -> f64;
}

/// x
#[derive(Clone, Copy, Debug)]
pub struct Identity;

impl Curve for Identity {
    #[inline(always)]
    fn value<T: Float, S: Simd<T>>(_: S, x: S::V) -> S::V {
        x
    }
    #[inline(always)]
    fn slope<T: Float, S: Simd<T>>(s: S, _: S::V) -> S::V {
        s.splat(T::ONE)
    }
    fn reference(x: f64) -> f64 {
        x
    }
}

/// max(x, 0)
#[derive(Clone, Copy, Debug)]
pub struct Relu;

impl Curve for Relu {
    #[inline(always)]
    fn value<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        s.max(s.zero(), x) // in this order NaN stays NaN
    }
    #[inline(always)]
    fn slope<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        s.select(s.le(x, s.zero()), s.zero(), s.splat(T::ONE))
    }
    fn reference(x: f64) -> f64 {
        if x <= 0.0 { 0.0 } else { x }
    }
}

/// x · Φ(x), with Φ the normal distribution (Hendrycks and Gimpel 2016).
#[derive(Clone, Copy, Debug)]
pub struct Gelu;

impl Curve for Gelu {
    #[inline(always)]
    fn value<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        // With Q(a) = 1 − Φ(a):  x Φ(x) = max(x, 0) − |x| Q(|x|)
        let a = s.abs(x);
        let bounded = s.min(s.splat(T::MAX), a); // ∞ · 0 would be NaN
        s.neg_mul_add(bounded, math::normal_tail(s, a), s.max(s.zero(), x))
    }
    #[inline(always)]
    fn slope<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        let tail = math::normal_tail_slope(s, s.abs(x));
        s.select(s.lt(x, s.zero()), tail, s.sub(s.splat(T::ONE), tail))
    }
    fn reference(x: f64) -> f64 {
        x * 0.5 * (1.0 + libm::erf(x / std::f64::consts::SQRT_2))
    }
}

/// x · (1 + tanh(√(2/π) (x + 0.044715 x³))) / 2, the approximation of GELU that GPT-2 uses.
#[derive(Clone, Copy, Debug)]
pub struct GeluTanh;

const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const CUBIC: f64 = 0.044_715;

impl GeluTanh {
    /// (1 + tanh |u|) / 2 and (1 − tanh |u|) / 2, each with all its digits.
    #[inline(always)]
    fn shares<T: Float, S: Simd<T>>(s: S, x: S::V) -> (S::V, S::V) {
        // tanh u = (1 − e^(−2u)) / (1 + e^(−2u))
        let (linear, cubic) =
            (s.splat(T::from_f64(-2.0 * SQRT_2_OVER_PI)), s.splat(T::from_f64(-2.0 * SQRT_2_OVER_PI * CUBIC)));
        let e = math::exp(s, s.mul(s.abs(x), s.mul_add(s.mul(x, x), cubic, linear)));
        let high = s.div(s.splat(T::ONE), s.add(s.splat(T::ONE), e));
        (high, s.mul(e, high))
    }
}

impl Curve for GeluTanh {
    #[inline(always)]
    fn value<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        let (_, low) = Self::shares(s, x);
        let bounded = s.min(s.splat(T::MAX), s.abs(x)); // ∞ · 0 would be NaN
        s.neg_mul_add(bounded, low, s.max(s.zero(), x))
    }
    #[inline(always)]
    fn slope<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        // (1 + tanh u) / 2 + x · (1 − tanh² u) / 2 · u'
        let (high, low) = Self::shares(s, x);
        let du = s.mul_add(
            s.mul(x, x),
            s.splat(T::from_f64(6.0 * SQRT_2_OVER_PI * CUBIC)),
            s.splat(T::from_f64(2.0 * SQRT_2_OVER_PI)),
        );
        s.mul_add(s.mul(x, s.mul(high, low)), du, s.select(s.lt(x, s.zero()), low, high))
    }
    fn reference(x: f64) -> f64 {
        0.5 * x * (1.0 + libm::tanh(SQRT_2_OVER_PI * (x + CUBIC * x * x * x)))
    }
}

/// x · σ(x), also called swish.
#[derive(Clone, Copy, Debug)]
pub struct Silu;

impl Curve for Silu {
    #[inline(always)]
    fn value<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        s.mul(x, math::sigmoid(s, x))
    }
    #[inline(always)]
    fn slope<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        // (x σ)' = σ + x σ (1 − σ)
        let sigma = math::sigmoid(s, x);
        s.mul_add(s.mul(x, sigma), s.sub(s.splat(T::ONE), sigma), sigma)
    }
    fn reference(x: f64) -> f64 {
        x / (1.0 + libm::exp(-x))
    }
}

/// σ(x) = 1 / (1 + e^(−x))
#[derive(Clone, Copy, Debug)]
pub struct Sigmoid;

impl Curve for Sigmoid {
    #[inline(always)]
    fn value<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        math::sigmoid(s, x)
    }
    #[inline(always)]
    fn slope<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
        let sigma = math::sigmoid(s, x);
        s.mul(sigma, s.sub(s.splat(T::ONE), sigma))
    }
    fn reference(x: f64) -> f64 {
        1.0 / (1.0 + libm::exp(-x))
    }
}

/// y = f(x)
pub fn activation_forward<T: Float, C: Curve>(_: C, y: &mut [T], x: &[T]) -> Result<()> {
    kernel! {
        fn block<'a, T, C: Curve>(s: S; y: &'a mut [T], x: &'a [T]) {
            map(s, [y], [x], #[inline(always)] |_, [x]| [C::value(s, x)]);
        }
    }
    for_each(y.chunks_mut(GRAIN).zip(x.chunks(GRAIN)), |(y, x)| block::<T, C>(y, x))
}

/// dx = dy · f'(x), in the place of dy.
pub fn activation_backward<T: Float, C: Curve>(_: C, dy_dx: &mut [T], x: &[T]) -> Result<()> {
    kernel! {
        fn block<'a, T, C: Curve>(s: S; dy: &'a mut [T], x: &'a [T]) {
            map(s, [dy], [x], #[inline(always)] |[dy], [x]| [s.mul(dy, C::slope(s, x))]);
        }
    }
    for_each(dy_dx.chunks_mut(GRAIN).zip(x.chunks(GRAIN)), |(dy, x)| block::<T, C>(dy, x))
}

/// dx = dy · scale where y > 0, else 0, in the place of dy: back through y = max(x, 0), and through dropout after it, whose
/// survivors were multiplied with `scale`: what it dropped is 0 as well.
pub fn relu_backward<T: Float>(dy_dx: &mut [T], y: &[T], scale: T) -> Result<()> {
    kernel! {
        fn block<'a, T>(s: S; dy: &'a mut [T], y: &'a [T], scale: T) {
            let scale = s.splat(scale);
            map(s, [dy], [y], #[inline(always)] |[dy], [y]| [s.mul(dy, s.select(s.le(y, s.zero()), s.zero(), scale))]);
        }
    }
    for_each(dy_dx.chunks_mut(GRAIN).zip(y.chunks(GRAIN)), |(dy, y)| block(dy, y, scale))
}

/// y = f(gate) · up, where a row of x is [gate | up] and y has `cols` columns.
pub fn gated_forward<T: Float, C: Curve>(_: C, y: &mut [T], x: &[T], cols: usize) -> Result<()> {
    kernel! {
        fn rows<'a, T, C: Curve>(s: S; y: &'a mut [T], x: &'a [T], cols: usize) {
            for (y, x) in y.chunks_mut(cols).zip(x.chunks(2 * cols)) {
                let (gate, up) = x.split_at(cols);
                map(s, [y], [gate, up], #[inline(always)] |_, [gate, up]| [s.mul(C::value(s, gate), up)]);
            }
        }
    }
    let n = task_len(cols);
    for_each(y.chunks_mut(n).zip(x.chunks(2 * n)), |(y, x)| rows::<T, C>(y, x, cols))
}

/// dgate = dy · up · f'(gate), dup = dy · f(gate), side by side in dx.
pub fn gated_backward<T: Float, C: Curve>(_: C, dx: &mut [T], dy: &[T], x: &[T], cols: usize) -> Result<()> {
    kernel! {
        fn rows<'a, T, C: Curve>(s: S; dx: &'a mut [T], dy: &'a [T], x: &'a [T], cols: usize) {
            for ((dx, dy), x) in dx.chunks_mut(2 * cols).zip(dy.chunks(cols)).zip(x.chunks(2 * cols)) {
                let (dgate, dup) = dx.split_at_mut(cols);
                let (gate, up) = x.split_at(cols);
                map(s, [dgate, dup], [dy, gate, up], #[inline(always)] |_, [dy, gate, up]| {
                    [s.mul(s.mul(dy, up), C::slope(s, gate)), s.mul(dy, C::value(s, gate))]
                });
            }
        }
    }
    let n = task_len(cols);
    for_each(dx.chunks_mut(2 * n).zip(dy.chunks(n)).zip(x.chunks(2 * n)), |((dx, dy), x)| rows::<T, C>(dx, dy, x, cols))
}

/// y = f(x) in plain words.
pub fn activation_reference<T: Float, C: Curve>(_: C, y: &mut [T], x: &[T]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y = T::from_f64(C::reference(x.to_f64())));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, normal};

    fn check<T: Float, C: Curve>(curve: C, tolerance: f64) {
        for (rows, cols) in [(1, 1), (3, 7), (5, 33), (2, 9000)] {
            let x: Vec<T> = normal::<T>(2 * rows * cols, 1).into_iter().map(|x| x * T::from_f64(3.0)).collect();
            let (mut y, mut expected) = (vec![T::NAN; x.len()], vec![T::NAN; x.len()]);
            activation_forward(curve, &mut y, &x).unwrap();
            activation_reference(curve, &mut expected, &x);
            assert_close(&y, &expected, tolerance);

            let mut gated = vec![T::NAN; rows * cols];
            gated_forward(curve, &mut gated, &x, cols).unwrap();
            for (r, row) in gated.chunks(cols).enumerate() {
                let at = 2 * r * cols;
                let product: Vec<T> = (0..cols).map(|c| expected[at + c] * x[at + cols + c]).collect();
                assert_close(row, &product, 10.0 * tolerance);
            }
        }
        let mut y = [T::ZERO; 3];
        activation_forward(curve, &mut y, &[T::ZERO, T::NAN, T::ONE]).unwrap();
        assert!(y[1].is_nan() && !y[0].is_nan() && !y[2].is_nan(), "NaN stays where it is");
    }

    fn check_both(curve: impl Curve) {
        check::<f32, _>(curve, 1e-6);
        check::<f64, _>(curve, 1e-14);
    }

    #[test]
    fn every_curve_equals_its_reference() {
        check_both(Identity);
        check_both(Relu);
        check_both(Gelu);
        check_both(GeluTanh);
        check_both(Silu);
        check_both(Sigmoid);
    }
}
