//! exp, tanh, erf and sigmoid of whole vectors, without the platform's libm.
//!
//! Largest error over all 2³² inputs in f32 (the ignored test `every_f32` prints and checks it), in units in the last
//! place against f64:
//!
//! | | AVX2, AVX-512 | portable | notes |
//! |---|---|---|---|
//! | exp | 1.1 | 1.1 | 0 below 2⁻¹²⁶, ∞ above the largest number |
//! | exp2, x < 127 | 1.0 | 1.0 | 0 below 2⁻¹²⁶ |
//! | tanh | 1.6 | 1.7 | |
//! | erf | 1.3 | 1.5 | |
//! | sigmoid | 2.2 | 2.2 | 0 below 2⁻¹²⁷ |
//!
//! NaN gives NaN. In f64 all four go lane by lane through the pure-Rust `libm` crate: below 1e-15 relative.

use super::{Float, MAX_LANES, Simd};

/// eˣ, lane by lane.
#[inline(always)]
pub fn exp<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
    T::vector_exp(s, x)
}

/// 2ˣ for x < 127, lane by lane; fewer instructions than [`exp`] and as exact.
#[inline(always)]
pub fn exp2<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
    T::vector_exp2(s, x)
}

/// The hyperbolic tangent, lane by lane.
#[inline(always)]
pub fn tanh<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
    T::vector_tanh(s, x)
}

/// The error function, lane by lane.
#[inline(always)]
pub fn erf<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
    T::vector_erf(s, x)
}

/// 1 / (1 + e⁻ˣ), lane by lane.
#[inline(always)]
pub fn sigmoid<T: Float, S: Simd<T>>(s: S, x: S::V) -> S::V {
    let one = s.splat(T::ONE);
    s.div(one, s.add(one, exp(s, s.neg(x))))
}

/// c₀ + c₁ x + c₂ x² + ..., from the highest power down.
#[inline(always)]
pub fn polynomial<T: Float, S: Simd<T>, const N: usize>(s: S, x: S::V, c: [T; N]) -> S::V {
    let mut sum = s.splat(c[N - 1]);
    for c in c[..N - 1].iter().rev() {
        sum = s.mul_add(sum, x, s.splat(*c));
    }
    sum
}

/// What differs between the two types: see the functions of this module.
#[doc(hidden)]
pub trait VectorMath: Sized {
    fn vector_exp<S: Simd<Self>>(s: S, x: S::V) -> S::V
    where
        Self: Float;
    fn vector_exp2<S: Simd<Self>>(s: S, x: S::V) -> S::V
    where
        Self: Float;
    fn vector_tanh<S: Simd<Self>>(s: S, x: S::V) -> S::V
    where
        Self: Float;
    fn vector_erf<S: Simd<Self>>(s: S, x: S::V) -> S::V
    where
        Self: Float;
}

impl VectorMath for f32 {
    /// x = n ln 2 + r with |r| ≤ ln 2 / 2; eˣ = 2ⁿ (1 + r + r² q(r)).
    #[inline(always)]
    fn vector_exp<S: Simd<f32>>(s: S, x: S::V) -> S::V {
        // The highest and lowest x whose power is a normal number.
        let (highest, lowest) = (s.splat(88.722_83), s.splat(-87.336_54));
        let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts: the first has so few bits that n times it is exact.
        let r = s.neg_mul_add(n, s.splat(0.693_359_4), x);
        let r = s.neg_mul_add(n, s.splat(-2.121_944_4e-4), r);
        let q = polynomial(s, r, [0.5, 0.166_665_76, 0.041_666_374, 0.008_363_205, 0.001_394_116_6]);
        let power = s.add(s.splat(1.0), s.mul_add(s.mul(r, r), q, r));
        let y = s.scale2(power, n);
        let y = s.select(s.lt(x, lowest), s.zero(), y);
        // Above the highest x the sum is ∞, for NaN it is NaN.
        s.select(s.le(x, highest), y, s.add(x, s.splat(f32::INFINITY)))
    }

    /// x = n + r with |r| ≤ 1/2; 2ˣ = 2ⁿ (1 + r q(r)). NaN, which is not below the lowest x, goes through to the result.
    #[inline(always)]
    fn vector_exp2<S: Simd<f32>>(s: S, x: S::V) -> S::V {
        let n = s.round(x);
        let r = s.sub(x, n);
        let q = polynomial(
            s,
            r,
            [std::f32::consts::LN_2, 0.240_226_5, 0.055_503_27, 0.009_618_057, 0.001_340_042_8, 0.000_154_614_45],
        );
        let y = s.scale2(s.mul_add(q, r, s.splat(1.0)), n);
        s.select(s.lt(x, s.splat(-126.0)), s.zero(), y)
    }

    /// Near 0 an odd polynomial, elsewhere 1 − 2 / (e²ˣ + 1).
    #[inline(always)]
    fn vector_tanh<S: Simd<f32>>(s: S, x: S::V) -> S::V {
        let (one, two) = (s.splat(1.0), s.splat(2.0));
        let u = s.mul(x, x);
        let p = polynomial(s, u, [-0.333_333_05, 0.133_319_47, -0.053_775_78, 0.020_743_09, -0.005_809_872_4]);
        let near = s.mul_add(s.mul(p, u), x, x);
        let a = s.abs(x);
        let far = s.sub(one, s.div(two, s.add(exp(s, s.mul(two, a)), one)));
        s.select(s.lt(a, s.splat(0.625)), near, s.copysign(far, x))
    }

    /// Near 0 an odd polynomial, elsewhere 1 − eᵖ⁽|ˣ|⁾ where p approaches ln erfc.
    #[inline(always)]
    fn vector_erf<S: Simd<f32>>(s: S, x: S::V) -> S::V {
        let u = s.mul(x, x);
        let p = polynomial(
            s,
            u,
            [0.128_379_15, -0.376_125_34, 0.112_822_3, -0.026_781_958, 0.005_016_228_6, -0.000_611_129_45],
        );
        let near = s.mul_add(p, x, x);
        // From 3.93 on the result rounds to 1. (The order of the arguments lets NaN through.)
        let a = s.min(s.splat(3.93), s.abs(x));
        let p = polynomial(
            s,
            a,
            [
                -0.000_166_455_81,
                -1.127_797_2,
                -0.636_976_2,
                -0.104_113_61,
                0.022_315_174,
                -0.003_065_479_7,
                0.000_198_218_46,
            ],
        );
        let far = s.sub(s.splat(1.0), exp(s, p));
        s.select(s.lt(a, s.splat(0.9)), near, s.copysign(far, x))
    }
}

impl VectorMath for f64 {
    #[inline(always)]
    fn vector_exp<S: Simd<f64>>(s: S, x: S::V) -> S::V {
        lane_by_lane(s, x, libm::exp)
    }
    #[inline(always)]
    fn vector_exp2<S: Simd<f64>>(s: S, x: S::V) -> S::V {
        lane_by_lane(s, x, libm::exp2)
    }
    #[inline(always)]
    fn vector_tanh<S: Simd<f64>>(s: S, x: S::V) -> S::V {
        lane_by_lane(s, x, libm::tanh)
    }
    #[inline(always)]
    fn vector_erf<S: Simd<f64>>(s: S, x: S::V) -> S::V {
        lane_by_lane(s, x, libm::erf)
    }
}

#[inline(always)]
fn lane_by_lane<S: Simd<f64>>(s: S, x: S::V, f: impl Fn(f64) -> f64) -> S::V {
    let mut lanes = [0.0; MAX_LANES];
    s.store(x, &mut lanes);
    for x in &mut lanes[..S::LANES] {
        *x = f(*x);
    }
    s.load(&lanes)
}
