//! The few largest numbers of a row, found while something is learnt of all of them: mostly the logarithm of its softmax's
//! denominator.

use super::lanes::largest;
use super::softmax::BLOCK;
pub use super::softmax::Survey;
use crate::kernel;
use crate::simd::{Float, Simd};

/// A number of a row and its column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry<T = f32> {
    /// The column: of logits, a token.
    pub id: u32,
    /// The number.
    pub value: T,
}

impl<T: Float> Entry<T> {
    /// What a place holds that the row has no number for.
    pub const NONE: Self = Entry { id: u32::MAX, value: T::NEG_INFINITY };
}

/// Whether the logarithm of softmax's denominator is finite: no number is NaN, and the largest is finite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Finite<T> {
    largest: T,
    nan: bool,
}

impl<T: Float> Finite<T> {
    /// Whether it is so.
    pub fn holds(self) -> bool {
        !self.nan && self.largest.is_finite()
    }
}

impl<T: Float> Survey<T> for Finite<T> {
    fn empty() -> Self {
        Finite { largest: T::NEG_INFINITY, nan: false }
    }

    #[inline(always)]
    fn add<S: Simd<T>>(&mut self, s: S, block: &[T]) -> T {
        let highest = largest(s, block);
        let is_nan = |x: &[T]| {
            let x = s.load_first(x, T::ZERO);
            s.any(s.not(s.eq(x, x)))
        };
        self.nan |= block.chunks(S::LANES).any(is_nan);
        self.largest = if highest > self.largest { highest } else { self.largest };
        highest
    }

    fn finish(self) -> Self {
        self
    }
}

kernel! {
    /// Fills `best` with the largest numbers of a row: value down, then column up; [`Entry::NONE`] where there are too few,
    /// as neither NaN nor −∞ is taken. `edits`, columns going up, hold what is to be read instead of some numbers; what is
    /// returned is of the row itself.
    ///
    /// The row is read once: a block stays in the cache between the two, and is passed over where its largest number is
    /// no larger than the smallest of `best`.
    pub fn top_k<'a, T, R: Survey<T>>(s: S; best: &'a mut [Entry<T>], row: &'a [T], edits: &'a [(u32, T)]) -> R {
        best.fill(Entry::NONE);
        let (mut survey, mut edited) = (R::empty(), [T::ZERO; BLOCK]);
        let mut edits = edits;
        for (b, block) in row.chunks(BLOCK).enumerate() {
            let (first, mut highest) = (b * BLOCK, survey.add(s, block));
            let here = edits.partition_point(|&(id, _)| (id as usize) < first + block.len());
            let (now, later) = edits.split_at(here);
            edits = later;
            let mut read = block;
            if !now.is_empty() {
                edited[..block.len()].copy_from_slice(block);
                for &(id, value) in now {
                    edited[id as usize - first] = value;
                    highest = if value > highest { value } else { highest };
                }
                read = &edited[..block.len()];
            }
            if best.last().is_some_and(|worst| highest > worst.value) {
                insert(s, best, read, first);
            }
        }
        survey.finish()
    }
}

/// Puts the numbers of a block into `best`, which is not empty.
#[inline(always)]
fn insert<T: Float, S: Simd<T>>(s: S, best: &mut [Entry<T>], block: &[T], first: usize) {
    let last = best.len() - 1;
    for (i, x) in block.chunks(S::LANES).enumerate() {
        // Strictly above the worst: an equal one that came before has the lower column.
        if !s.any(s.lt(s.splat(best[last].value), s.load_first(x, T::NEG_INFINITY))) {
            continue;
        }
        for (lane, &value) in x.iter().enumerate() {
            if value > best[last].value {
                let at = best.partition_point(|entry| entry.value >= value);
                best[at..].rotate_right(1);
                best[at] = Entry { id: (first + i * S::LANES + lane) as u32, value };
            }
        }
    }
}

/// [`top_k`] alone: sorts the whole row.
pub fn top_k_reference<T: Float>(best: &mut [Entry<T>], row: &[T], edits: &[(u32, T)]) {
    let mut all: Vec<Entry<T>> = (0..).zip(row).map(|(id, &value)| Entry { id, value }).collect();
    edits.iter().for_each(|&(id, value)| all[id as usize].value = value);
    all.retain(|entry| entry.value > T::NEG_INFINITY);
    // Stable: columns go up among equals.
    all.sort_by(|a, b| b.value.to_f64().total_cmp(&a.value.to_f64()));
    let none = std::iter::repeat(Entry::NONE);
    best.iter_mut().zip(all.into_iter().chain(none)).for_each(|(best, entry)| *best = entry);
}

#[cfg(test)]
mod tests {
    use super::super::softmax::{LogSumExp, log_sum_exp};
    use super::*;
    use crate::rng::Key;

    fn check<T: Float>(row: &[T], k: usize, edits: &[(u32, T)]) {
        let junk = Entry { id: 7, value: T::from_f64(7.0) };
        let (mut best, mut expected) = (vec![junk; k], vec![junk; k]);
        assert_eq!(top_k::<T, LogSumExp<T>>(&mut best, row, edits), log_sum_exp(row));
        top_k_reference(&mut expected, row, edits);
        assert_eq!(best, expected, "{} {k} {edits:?}", row.len());
        best.fill(junk);
        assert_eq!(top_k::<T, Finite<T>>(&mut best, row, edits).holds(), log_sum_exp(row).log.is_finite());
        assert_eq!(best, expected);
    }

    #[test]
    fn it_is_a_stable_sort_beside_the_sum() {
        let sizes = [(1, 1), (7, 3), (8, 8), (9, 20), (31, 31), (33, 0), (BLOCK, 2), (BLOCK + 1, 17), (4099, 3)];
        for (n, k) in sizes {
            for values in [2, 10, 1 << 20] {
                let mut row: Vec<f32> = (0..n as u64).map(|i| Key::new(9).below(i, values) as f32 - 3.0).collect();
                for special in 0..3 {
                    check(&row, k, &[]);
                    check(&row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), k, &[]);
                    // Forbidden, lowered, and raised above all, at the ends of rows and blocks.
                    let at = |i: usize| (i < n).then_some(i as u32);
                    let ends = [at(0), at(1), at(BLOCK - 1), at(BLOCK), at(2 * BLOCK + 5)];
                    let values = [f32::NEG_INFINITY, 1e9, -1.0, 3.0, f32::NEG_INFINITY];
                    let edits: Vec<_> =
                        ends.into_iter().zip(values).filter_map(|(id, value)| Some((id?, value))).collect();
                    check(&row, k, &edits);
                    // Then with −∞ in some places, then nearly everywhere.
                    row.iter_mut().skip(special).step_by(3 - special).for_each(|x| *x = f32::NEG_INFINITY);
                }
            }
        }
    }

    #[test]
    fn nan_is_never_taken_and_makes_the_sum_nan() {
        let mut row = vec![0.5f32; 700];
        (row[600], row[3]) = (f32::NAN, 1.0);
        let mut best = [Entry::NONE; 3];
        assert!(top_k::<f32, LogSumExp<f32>>(&mut best, &row, &[]).sum.is_nan());
        assert_eq!(best.map(|entry| entry.id), [3, 0, 1]);
        let finite = |row: &[f32]| top_k::<f32, Finite<f32>>(&mut [], row, &[]).holds();
        for n in 0..row.len() {
            assert_eq!(finite(&row[..n + 1]), n < 600, "{n}");
        }
        row[600] = f32::INFINITY;
        assert!(finite(&row[..600]) && !finite(&row) && !finite(&[f32::NEG_INFINITY; 40]));
    }
}
