//! One update of an optimiser over a run of parameters: weight, gradient and moments are read and written once.
//!
//! The coefficients of an update are made in f64 and rounded once. Elements do not know of each other, so no bit depends
//! on how the arena is cut.

use super::lanes::map;
use crate::kernel;
use crate::simd::Float;

/// The coefficients of one update by Adam or AdamW (Kingma and Ba 2015; Loshchilov and Hutter 2019).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// What a stored gradient is multiplied with to be that of a token: 1 over their number.
    pub mean: f64,
    /// What that is multiplied with: the clip scale.
    pub scale: f64,
    /// What a weight is multiplied with before the update: 1 − lr·decay in AdamW, else 1.
    pub shrink: f64,
    /// The weight's share in the gradient: the decay in Adam, else 0.
    pub l2: f64,
    /// Decay rates of the two moments.
    pub betas: (f64, f64),
    /// What keeps the quotient finite.
    pub eps: f64,
    /// lr / (1 − β₁ᵗ)
    pub rate: f64,
    /// 1 / √(1 − β₂ᵗ)
    pub unbias: f64,
}

kernel! {
    /// w = shrink w, then with g = scale (mean g) + l2 w: m += (1 − β₁)(g − m), v = β₂ v + (1 − β₂) g²,
    /// w −= rate · m / (unbias √v + eps).
    pub fn adam<'a, T>(s: S; w: &'a mut [T], m: &'a mut [T], v: &'a mut [T], g: &'a [T], c: Adam) {
        let [mean, scale, shrink, l2, eps, rate, unbias, new1, old2, new2] =
            [c.mean, c.scale, c.shrink, c.l2, c.eps, c.rate, c.unbias, 1.0 - c.betas.0, c.betas.1, 1.0 - c.betas.1]
                .map(#[inline(always)] |x| s.splat(T::from_f64(x)));
        map(s, [w, m, v], [g], #[inline(always)] |[w, m, v], [g]| {
            let w = s.mul(shrink, w);
            let g = s.mul_add(l2, w, s.mul(scale, s.mul(mean, g)));
            let m = s.mul_add(new1, s.sub(g, m), m);
            let v = s.mul_add(s.mul(new2, g), g, s.mul(old2, v));
            let root = s.mul_add(unbias, s.sqrt(v), eps);
            [s.neg_mul_add(rate, s.div(m, root), w), m, v]
        });
    }
}

/// [`adam`] in plain words.
pub fn adam_reference<T: Float>(w: &mut [T], m: &mut [T], v: &mut [T], g: &[T], c: Adam) {
    let of = T::from_f64;
    for i in 0..w.len() {
        w[i] = of(c.shrink) * w[i];
        let g = of(c.scale) * (of(c.mean) * g[i]) + of(c.l2) * w[i];
        m[i] += of(1.0 - c.betas.0) * (g - m[i]);
        v[i] = of(c.betas.1) * v[i] + of(1.0 - c.betas.1) * g * g;
        w[i] -= of(c.rate) * (m[i] / (of(c.unbias) * v[i].sqrt() + of(c.eps)));
    }
}

/// The coefficients of one update by gradient descent with momentum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// What a stored gradient is multiplied with to be that of a token: 1 over their number.
    pub mean: f64,
    /// What that is multiplied with: the clip scale.
    pub scale: f64,
    /// The weight's share in the gradient.
    pub l2: f64,
    /// The velocity that is kept.
    pub momentum: f64,
    /// Look ahead (Nesterov).
    pub nesterov: bool,
    /// The learning rate.
    pub rate: f64,
}

kernel! {
    /// With g = scale (mean g) + l2 w: u = momentum u + g, w −= rate · u; looking ahead, w −= rate · (g + momentum u).
    pub fn momentum<'a, T>(s: S; w: &'a mut [T], u: &'a mut [T], g: &'a [T], c: Sgd) {
        let [mean, scale, l2, keep, rate] =
            [c.mean, c.scale, c.l2, c.momentum, c.rate].map(#[inline(always)] |x| s.splat(T::from_f64(x)));
        map(s, [w, u], [g], #[inline(always)] |[w, u], [g]| {
            let g = s.mul_add(l2, w, s.mul(scale, s.mul(mean, g)));
            let u = s.mul_add(keep, u, g);
            let step = if c.nesterov { s.mul_add(keep, u, g) } else { u };
            [s.neg_mul_add(rate, step, w), u]
        });
    }
}

kernel! {
    /// w −= rate · (scale (mean g) + l2 w)
    pub fn descent<'a, T>(s: S; w: &'a mut [T], g: &'a [T], c: Sgd) {
        let [mean, scale, l2, rate] = [c.mean, c.scale, c.l2, c.rate].map(#[inline(always)] |x| s.splat(T::from_f64(x)));
        map(s, [w], [g], #[inline(always)] |[w], [g]| {
            [s.neg_mul_add(rate, s.mul_add(l2, w, s.mul(scale, s.mul(mean, g))), w)]
        });
    }
}

/// [`momentum`], and [`descent`] where the momentum is 0, in plain words.
pub fn sgd_reference<T: Float>(w: &mut [T], u: &mut [T], g: &[T], c: Sgd) {
    let of = T::from_f64;
    for i in 0..w.len() {
        let g = of(c.scale) * (of(c.mean) * g[i]) + of(c.l2) * w[i];
        u[i] = of(c.momentum) * u[i] + g;
        let step = if c.nesterov { g + of(c.momentum) * u[i] } else { u[i] };
        w[i] -= of(c.rate) * step;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, normal};

    const ADAM: Adam =
        Adam { mean: 0.25, scale: 0.3, shrink: 1.0, l2: 0.0, betas: (0.9, 0.98), eps: 1e-8, rate: 1e-2, unbias: 7.1 };

    /// Both element types, sizes 0, 1, odd, and one off a vector, three updates in a row.
    fn kernels_match<T: Float>(tolerance: f64) {
        for n in [0, 1, 3, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 1001] {
            let (w, m, g) = (normal::<T>(n, 1), normal::<T>(n, 2), normal::<T>(n, 3));
            let v: Vec<T> = normal::<T>(n, 4).into_iter().map(T::abs).collect();
            for c in [Adam { shrink: 0.999, ..ADAM }, Adam { l2: 0.1, ..ADAM }] {
                let (mut got, mut expected) = ([w.clone(), m.clone(), v.clone()], [w.clone(), m.clone(), v.clone()]);
                for _ in 0..3 {
                    let [w, m, v] = &mut got;
                    adam(w, m, v, &g, c);
                    let [w, m, v] = &mut expected;
                    adam_reference(w, m, v, &g, c);
                }
                got.iter().zip(&expected).for_each(|(got, expected)| assert_close(got, expected, tolerance));
            }
            for (velocity, nesterov) in [(0.9, false), (0.9, true), (0.0, false)] {
                let c = Sgd { mean: 0.25, scale: 0.3, l2: 0.01, momentum: velocity, nesterov, rate: 0.1 };
                let (mut got, mut expected) = ([w.clone(), m.clone()], [w.clone(), m.clone()]);
                for _ in 0..3 {
                    let [w, u] = &mut got;
                    if velocity > 0.0 {
                        momentum(w, u, &g, c)
                    } else {
                        descent(w, &g, c)
                    }
                    let [w, u] = &mut expected;
                    sgd_reference(w, u, &g, c);
                }
                assert_close(&got[0], &expected[0], tolerance);
                if velocity > 0.0 {
                    assert_close(&got[1], &expected[1], tolerance);
                }
            }
        }
    }

    #[test]
    fn kernels_match_the_references() {
        kernels_match::<f32>(1e-6);
        kernels_match::<f64>(1e-14);
    }

    #[test]
    fn an_element_does_not_know_its_neighbours() {
        let c = Adam { shrink: 0.99, ..ADAM };
        let run = |range: std::ops::Range<usize>| {
            let [mut w, mut m, g] = [1, 2, 3].map(|seed| normal::<f32>(100, seed)[range.clone()].to_vec());
            let mut v = g.clone().iter().map(|g| g * g).collect::<Vec<_>>();
            adam(&mut w, &mut m, &mut v, &g, c);
            w
        };
        let whole = run(0..100);
        for start in 0..40 {
            assert_eq!(run(start..start + 53), whole[start..start + 53]);
        }
    }
}
