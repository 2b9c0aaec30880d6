//! exp, sigmoid and the tails of the normal distribution of whole vectors, without the platform's libm.
//!
//! Largest error over all 2³² inputs in f32 (the ignored test `every_f32` prints and checks it), in units in the last
//! place against f64:
//!
//! | | AVX2, AVX-512 | portable | notes |
//! |---|---|---|---|
//! | exp | 1.1 | 1.1 | 0 below 2⁻¹²⁶, ∞ above the largest number |
//! | exp2, x < 127 | 1.0 | 1.0 | 0 below 2⁻¹²⁶ |
//! | sigmoid | 2.2 | 2.2 | 0 below 2⁻¹²⁷ |
//!
//! NaN gives NaN. The tails are exact where they count, beside 1: see there. In f64 all go lane by lane through the pure-Rust `libm` crate: below 1e-15 relative.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

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

/// Q(a) = ½ erfc(a / √2) for a ≥ 0, lane by lane: the share of the normal distribution beyond a.
#[inline(always)]
pub fn normal_tail<T: Float, S: Simd<T>>(s: S, a: S::V) -> S::V {
    T::vector_normal_tail(s, a)
}

/// (a Q(a))' = Q(a) − a e^(−a²/2) / √2π for a ≥ 0, lane by lane.
#[inline(always)]
pub fn normal_tail_slope<T: Float, S: Simd<T>>(s: S, a: S::V) -> S::V {
    T::vector_normal_tail_slope(s, a)
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
    fn vector_normal_tail<S: Simd<Self>>(s: S, a: S::V) -> S::V
    where
        Self: Float;
    fn vector_normal_tail_slope<S: Simd<Self>>(s: S, a: S::V) -> S::V
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

    /// 2ᵖ⁽ᵃ⁾ where p approaches log₂ Q: within 1.5e-8 where a ≤ 1, beyond within 1.5e-8 / a. (The order of the arguments
    /// lets NaN through. At the last a the power is 0.)
    #[inline(always)]
    fn vector_normal_tail<S: Simd<f32>>(s: S, a: S::V) -> S::V {
        let p = polynomial(
            s,
            s.min(s.splat(LAST), a),
            [
                -0.999_999_94,
                -1.151_107,
                -0.459_193_05,
                -0.052_546_438,
                0.007_142_782,
                -0.000_202_479_22,
                -0.000_157_278_66,
                3.296_799e-5,
                -2.275_869_7e-6,
            ],
        );
        exp2(s, p)
    }

    /// e^(−a²/2) r(a) where r approaches the rest: within 2e-8.
    #[inline(always)]
    fn vector_normal_tail_slope<S: Simd<f32>>(s: S, a: S::V) -> S::V {
        let a = s.min(s.splat(LAST), a);
        let r = polynomial(
            s,
            a,
            [
                0.499_999_97,
                -0.797_882_85,
                0.249_972_57,
                -0.132_805_8,
                0.061_923_936,
                -0.025_471_821,
                0.009_003_851,
                -0.002_590_092_1,
                0.000_563_653_3,
                -8.477_111e-5,
                7.708_792_5e-6,
                -3.155_437e-7,
            ],
        );
        s.mul(exp2(s, s.mul(s.mul(a, a), s.splat(-0.5 * std::f32::consts::LOG2_E))), r)
    }
}

/// From here on the tails are 0 in f32.
const LAST: f32 = 14.0;

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
    fn vector_normal_tail<S: Simd<f64>>(s: S, a: S::V) -> S::V {
        lane_by_lane(s, a, |a| 0.5 * libm::erfc(a * FRAC_1_SQRT_2))
    }
    #[inline(always)]
    fn vector_normal_tail_slope<S: Simd<f64>>(s: S, a: S::V) -> S::V {
        let density = |a: f64| 0.5 * FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * libm::exp(-0.5 * a * a);
        lane_by_lane(s, s.min(s.splat(1e9), a), |a| 0.5 * libm::erfc(a * FRAC_1_SQRT_2) - a * density(a))
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
