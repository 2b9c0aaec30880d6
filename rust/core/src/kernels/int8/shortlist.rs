//! The few outputs of x Wᵀ + b that may be the largest, found from W in int8: a quarter of the bytes of f32, and a quarter of
//! the time where bytes are multiplied four times as fast.
//!
//! With ŵ and x̂ for what int8 holds of a row w of W and of x, the inequality of Cauchy and Schwarz gives
//!
//! |x·w − x̂·ŵ| = |x·(w − ŵ) + (x − x̂)·ŵ| ≤ ‖x‖ ‖w − ŵ‖ + ‖x − x̂‖ ‖ŵ‖.
//!
//! So each output lies within a known distance of the product in int8. One whose upper end is below the lower ends of k others
//! is not among the k largest. Nothing is guessed: what is left holds these for certain.

use super::{Int8Rhs, product, quantize_rows};
use crate::error::{Error, Result};
use crate::kernel;
use crate::kernels::gemm::Affine;
use crate::kernels::lanes::largest;
use crate::simd::Float;
use crate::threads::{for_each, rows_per_task};
use std::sync::Arc;

/// Above any rounding of f32, relative to what is rounded: 2⁻²², four times that of one operation.
const ROUNDING: f64 = 1.0 / (1 << 22) as f64;
/// Longer products are left alone: a bound, or an output with its bias, could leave the range of f32.
const LONGEST: f64 = 1e30;
/// Outputs that are looked at together; of most blocks none comes into question.
const BLOCK: usize = 64;

/// A weight (O, K) in int8, and how far that is from the weight itself.
#[derive(Debug)]
pub struct Shortlist<T> {
    weight: [Arc<Int8Rhs>; 1],
    /// Of the row of each output.
    lengths: Vec<Lengths<T>>,
    /// The largest of each block, and of all.
    longest: Vec<Lengths<T>>,
    longest_of_all: Lengths<T>,
}

/// Of a vector v and what int8 holds of it, v̂.
#[derive(Clone, Copy, Debug)]
struct Lengths<T> {
    /// ‖v − v̂‖
    error: T,
    /// ‖v̂‖
    near: T,
}

impl<T: Float> Lengths<T> {
    const ZERO: Self = Lengths { error: T::ZERO, near: T::ZERO };

    /// Of v and the bytes of v̂; neither is below the length itself.
    fn of(v: &[T], bytes: impl Iterator<Item = i8>, scale: f32) -> Self {
        let (mut error, mut near) = (0.0, 0.0);
        for (v, byte) in v.iter().zip(bytes) {
            let there = f64::from(scale) * f64::from(byte);
            let away = v.to_f64() - there;
            error += away * away;
            near += there * there;
        }
        Lengths { error: above(error.sqrt()), near: above(near.sqrt()) }
    }

    fn longest(all: &[Self]) -> Self {
        let larger = |a, b| if b > a { b } else { a };
        let of = |a: Self, b: &Self| Lengths { error: larger(a.error, b.error), near: larger(a.near, b.near) };
        all.iter().fold(Lengths::ZERO, of)
    }
}

/// A number of T that is not below x.
fn above<T: Float>(x: f64) -> T {
    T::from_f64(x * (1.0 + ROUNDING))
}

impl<T: Float> Shortlist<T> {
    /// Of a weight (O, K), to which a bias (O,) may be added; `None` where they have numbers that are not finite, or int8 does
    /// not serve such a K.
    pub fn new(w: &[T], bias: Option<&[T]>, outputs: usize, depth: usize) -> Result<Option<Self>> {
        let weight = match Int8Rhs::quantize(w, outputs, depth) {
            Ok(weight) if bias.is_none_or(|bias| bias.iter().all(|b| b.is_finite())) => weight,
            Ok(_) | Err(Error::NonFinite(_) | Error::Unsupported(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut lengths = vec![Lengths::ZERO; outputs];
        let (depth, some) = (depth.max(1), rows_per_task(depth));
        let parts = lengths.chunks_mut(some).zip(w.chunks(some * depth));
        for_each(parts.enumerate(), |(part, (lengths, w))| {
            for ((lengths, w), output) in lengths.iter_mut().zip(w.chunks(depth)).zip(part * some..) {
                *lengths = Lengths::of(w, weight.row(output), weight.scales[output]);
            }
        })?;
        let longest: Vec<_> = lengths.chunks(BLOCK).map(Lengths::longest).collect();
        let longest_of_all = Lengths::longest(&longest);
        Ok(Some(Shortlist { weight: [weight.into()], lengths, longest, longest_of_all }))
    }

    /// y (R, O) = x̂ ŵᵀ + b, for [`Shortlist::likely`].
    pub fn product(&self, y: &mut [T], x: &[T], bias: Option<&[T]>) -> Result<()> {
        product(y, x, &self.weight, &Affine::bias(bias))
    }

    /// The outputs of one row, ids going up, that may be among the `k` largest of those that are not `forbidden`: x (K,) and
    /// what [`Shortlist::product`] made of it. `None` where more than `most` may be, or nothing can be said.
    pub fn likely(&self, x: &[T], y: &mut [T], k: usize, most: usize, forbidden: &[(u32, T)]) -> Option<Vec<u32>> {
        let reach = self.reach(x)?;
        forbidden.iter().for_each(|&(id, _)| y[id as usize] = T::NEG_INFINITY);
        let mut highest = vec![T::NEG_INFINITY; self.longest.len()];
        maxima(&mut highest, y);
        // In each block the highest is no lower than this.
        let lower = highest.iter().zip(&self.longest).map(|(&y, longest)| y - reach.of(y, longest));
        let worst = nth_largest(k, lower);
        let mut found: Vec<(u32, [T; 2])> = Vec::new();
        let blocks = y.chunks(BLOCK).zip(self.lengths.chunks(BLOCK)).zip((0..).step_by(BLOCK));
        for (((y, lengths), first), (&highest, longest)) in blocks.zip(highest.iter().zip(&self.longest)) {
            if highest + reach.of(highest, longest) < worst {
                continue;
            }
            for ((&y, lengths), id) in y.iter().zip(lengths).zip(first..) {
                // Forbidden or not, −∞ is not among the largest.
                if y > T::NEG_INFINITY && y + reach.of(y, longest) >= worst {
                    let distance = reach.of(y, lengths);
                    found.push((id, [y - distance, y + distance]));
                }
            }
        }
        let worst = nth_largest(k, found.iter().map(|(_, [lower, _])| *lower));
        found.retain(|(_, [_, upper])| *upper >= worst);
        (found.len() <= most).then(|| found.into_iter().map(|(id, _)| id).collect())
    }

    /// How far outputs of x may be from their products in int8.
    fn reach(&self, x: &[T]) -> Option<Reach<T>> {
        let (mut bytes, mut scale, mut sum) = (vec![0; x.len()], [0.0], [0]);
        quantize_rows(&mut bytes, &mut scale, &mut sum, x, x.len(), x.len(), 1).ok()?;
        let Lengths { error, near } = Lengths::of(x, bytes.into_iter(), scale[0]);
        // A sum of K products is rounded K times, and each bound now and then.
        let (length, rounding) = (error + near, T::from_f64((x.len() + 16) as f64 * ROUNDING));
        let Lengths { error: w_error, near: w_near } = self.longest_of_all;
        let fits = (length * (w_error + w_near)).to_f64() < LONGEST; // NaN does not
        fits.then(|| Reach { error: length + length * rounding, near: error + length * rounding })
    }
}

/// What a row of x makes of the lengths of weights.
#[derive(Clone, Copy)]
struct Reach<T> {
    error: T,
    near: T,
}

impl<T: Float> Reach<T> {
    /// How far from y, the product in int8, an output may be, whose weights have these lengths.
    fn of(self, y: T, lengths: &Lengths<T>) -> T {
        lengths.error * self.error + lengths.near * self.near + y.abs() * T::from_f64(ROUNDING)
    }
}

/// −∞ where there are fewer than n.
fn nth_largest<T: Float>(n: usize, numbers: impl Iterator<Item = T>) -> T {
    let mut largest = vec![T::NEG_INFINITY; n];
    for x in numbers {
        if largest.last().is_some_and(|&last| x > last) {
            let at = largest.partition_point(|&other| other >= x);
            largest[at..].rotate_right(1);
            largest[at] = x;
        }
    }
    largest.last().copied().unwrap_or(T::INFINITY)
}

kernel! {
    /// The largest number of each block.
    fn maxima<'a, T>(s: S; highest: &'a mut [T], y: &'a [T]) {
        for (highest, y) in highest.iter_mut().zip(y.chunks(BLOCK)) {
            *highest = largest(s, y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Beta;
    use crate::kernels::gemm::{Mat, MatMut, gemm};
    use crate::kernels::testing::normal;
    use crate::kernels::top_k::{Entry, top_k_reference};
    use crate::rng::Key;

    /// The ids in question in each row, after a check that the k largest are among them.
    fn ids<T: Float>(x: &[T], w: &[T], bias: Option<&[T]>, depth: usize, k: usize, no: &[(u32, T)]) -> Vec<Vec<u32>> {
        let (rows, outputs) = (x.len() / depth, w.len() / depth);
        let mut exact = vec![T::ZERO; rows * outputs];
        let (c, a) = (MatMut::new(&mut exact, rows, outputs).unwrap(), Mat::new(x, rows, depth).unwrap());
        let b = Mat::new(w, outputs, depth).unwrap().t();
        gemm(c, a, b, Beta::Assign, &Affine::bias(bias)).unwrap();
        let shortlist = Shortlist::new(w, bias, outputs, depth).unwrap().unwrap();
        let mut y = vec![T::NAN; rows * outputs];
        shortlist.product(&mut y, x, bias).unwrap();
        let likely = |((x, y), exact): ((&[T], &mut [T]), &[T])| {
            let ids = shortlist.likely(x, y, k, outputs, no).unwrap();
            let mut best = vec![Entry::NONE; k.min(outputs - no.len())];
            top_k_reference(&mut best, exact, no);
            assert!(best.iter().all(|entry| ids.contains(&entry.id)), "{best:?} {ids:?}");
            assert!(ids.windows(2).all(|pair| pair[0] < pair[1]) && no.iter().all(|(id, _)| !ids.contains(id)));
            ids
        };
        x.chunks(depth).zip(y.chunks_mut(outputs)).zip(exact.chunks(outputs)).map(likely).collect()
    }

    #[test]
    fn the_largest_are_always_in_question_and_most_others_are_not() {
        let (depth, outputs, rows) = (130, 2000, 6);
        let (x, w) = (normal::<f32>(rows * depth, 1), normal::<f32>(outputs * depth, 2));
        let bias: Vec<f32> =
            normal::<f32>(outputs, 3).iter().zip(0..).map(|(b, i)| b * [0.0, 1.0, 1e4][i % 3]).collect();
        for (k, most) in [(1, 40), (7, 100), (64, 400)] {
            for bias in [None, Some(&bias[..])] {
                for found in ids(&x, &w, bias, depth, k, &[]) {
                    assert!(found.len() <= most, "{k}: {}", found.len());
                    let no: Vec<_> = found.iter().step_by(2).map(|&id| (id, f32::NEG_INFINITY)).collect();
                    ids(&x, &w, bias, depth, k, &no);
                }
            }
        }
        let wide = |v: &[f32]| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        assert!(ids(&wide(&x), &wide(&w), None, depth, 3, &[]).iter().all(|found| found.len() < 60));
    }

    #[test]
    fn they_are_where_numbers_are_nearly_equal_or_of_any_size() {
        let (depth, outputs) = (65, 300);
        for seed in 0..40 {
            let key = Key::new(seed);
            let row = normal::<f32>(depth, seed);
            // Few rows that differ, each many times and changed by some last digits; now and then one that is much larger.
            let number = |i: usize| {
                let (o, k) = (i / depth, i % depth);
                let digits = f32::from_bits(row[k].to_bits() ^ key.below(i as u64, 3) as u32);
                digits * if o % 97 == 0 { 1e3 } else { 1.0 + (o % 3) as f32 * 1e-6 }
            };
            let w: Vec<f32> = (0..outputs * depth).map(number).collect();
            for size in [1e-30f32, 1e-3, 1.0, 1e9] {
                let x: Vec<f32> = normal::<f32>(2 * depth, 99 + seed).iter().map(|x| x * size).collect();
                ids(&x, &w, None, depth, 1 + seed as usize % 5, &[]);
            }
        }
        // Nothing to tell them apart: all are in question.
        assert_eq!(ids(&[0.0; 65], &normal::<f32>(65 * outputs, 5), None, depth, 1, &[])[0].len(), outputs);
    }

    #[test]
    fn they_are_where_all_rounding_goes_one_way() {
        let of = |first: f32, n: usize, some: f32, others: f32| -> Vec<f32> {
            [first].into_iter().chain((0..60).map(|k| if k < n { some } else { others })).collect()
        };
        // A number of 127 makes the scale 1. The first weight is larger, 20.49 against 20.48 a number; in bytes it is 20.
        let x = of(127.0, 60, 127.0, 127.0);
        let w = [of(127.0, 60, 20.49, 20.49), of(127.0, 29, 21.0, 20.0)];
        assert_eq!(ids(&x, &w.concat(), None, x.len(), 1, &[]), [[0, 1]]);
        // The first meets 60 times 0.49, 29.4 against 29.3; in bytes nothing.
        let x = of(127.0, 60, 0.49, 0.49);
        let w = [of(0.0, 60, 127.0, 127.0), of(29.3, 60, 0.0, 0.0)];
        assert_eq!(ids(&x, &w.concat(), None, x.len(), 1, &[]), [[0, 1]]);
    }

    #[test]
    fn what_cannot_be_bounded_is_left_to_others() {
        let (depth, w) = (32, normal::<f32>(32 * 100, 1));
        let new = |w: &[f32], bias: Option<&[f32]>| Shortlist::new(w, bias, w.len() / depth, depth).unwrap();
        let shortlist = new(&w, None).unwrap();
        let asked = |x: &[f32], k, most| {
            let mut y = vec![0.0; 100];
            shortlist.product(&mut y, x, None).unwrap();
            shortlist.likely(x, &mut y, k, most, &[])
        };
        let x = normal::<f32>(depth, 2);
        assert!(asked(&x, 1, 100).is_some() && asked(&x, 90, 10).is_none());
        for bad in [f32::NAN, f32::INFINITY, 1e31] {
            let mut x = x.clone();
            x[7] = bad;
            assert!(asked(&x, 1, 100).is_none());
            if !bad.is_finite() {
                let mut w = w.clone();
                w[70] = bad;
                assert!(new(&w, None).is_none() && new(&w[..32], Some(&[bad])).is_none());
            }
        }
    }
}
