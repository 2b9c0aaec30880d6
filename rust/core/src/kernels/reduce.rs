//! Sums over rows and over everything: partial sums over blocks of a fixed size, added in a fixed tree.

use super::lanes::{AHEAD, map};
use crate::error::Result;
use crate::kernel;
use crate::simd::{Float, prefetch};
use crate::threads::{GRAIN, for_each, gather};

/// Rows of one partial sum. Part of the numeric contract: another value gives other bits.
pub const ROW_BLOCK: usize = 64;

/// Partial sums that one step of the tree adds up.
const FAN_IN: usize = 8;

/// How many partial rows the sum over `rows` rows needs: at least one, so that the sum over no rows is zero.
pub fn partial_rows(rows: usize) -> usize {
    rows.div_ceil(ROW_BLOCK).max(1)
}

/// Block `i` of the rows of x, empty beyond the last.
pub(super) fn row_block<T>(x: &[T], i: usize, cols: usize) -> &[T] {
    x.chunks(ROW_BLOCK * cols).nth(i).unwrap_or(&[])
}

kernel! {
    /// y += the sum of the rows of x.
    fn add_rows<'a, T>(s: S; y: &'a mut [T], x: &'a [T]) {
        let cols = y.len();
        // Four rows at a time: y is read and written less often.
        let mut fours = x.chunks_exact(4 * cols);
        for four in &mut fours {
            let (ab, cd) = four.split_at(2 * cols);
            let ((a, b), (c, d)) = (ab.split_at(cols), cd.split_at(cols));
            map(s, [&mut *y], [a, b, c, d], #[inline(always)] |[y], [a, b, c, d]| {
                [s.add(y, s.add(s.add(a, b), s.add(c, d)))]
            });
        }
        for row in fours.remainder().chunks_exact(cols) {
            map(s, [&mut *y], [row], #[inline(always)] |[y], [x]| [s.add(y, x)]);
        }
    }
}

/// Sums over the rows of x, block by block: one row of `partials` for each [`ROW_BLOCK`] rows.
pub fn sum_blocks<T: Float>(partials: &mut [T], x: &[T], cols: usize) -> Result<()> {
    let cols = cols.max(1);
    for_each(partials.chunks_mut(cols).enumerate(), |(i, partial)| {
        partial.fill(T::ZERO);
        add_rows(partial, row_block(x, i, cols));
    })
}

/// Adds up the rows of `partials` in a fixed tree; the sum is left in the first row.
pub fn fold_partials<T: Float>(partials: &mut [T], cols: usize) -> Result<()> {
    kernel! {
        fn add<'a, T>(s: S; y: &'a mut [T], x: &'a [T]) {
            map(s, [y], [x], #[inline(always)] |[y], [x]| [s.add(y, x)]);
        }
    }
    let cols = cols.max(1);
    let mut stride = cols;
    while stride < partials.len() {
        for_each(partials.chunks_mut(FAN_IN * stride), |group| {
            let (sum, rest) = group.split_at_mut(cols);
            // The rows at stride, 2 stride, ... hold the sums of the step before.
            for later in rest.get(stride - cols..).unwrap_or(&[]).chunks(stride) {
                add(sum, &later[..cols]);
            }
        })?;
        stride *= FAN_IN;
    }
    Ok(())
}

kernel! {
    /// Σ (a x)², in f64: 16 sums side by side, added in a fixed tree.
    fn block_of_squares<'a, T>(s: S; x: &'a [T], a: T) -> f64 {
        let mut sums = [0.0; 16];
        let factor = s.splat(a);
        let (blocks, rest) = x.as_chunks::<16>();
        for x in blocks {
            prefetch(x.as_ptr().wrapping_add(4 * AHEAD)); // further than where more is done with each number
            for (x, sums) in x.chunks_exact(S::LANES).zip(sums.chunks_exact_mut(S::LANES)) {
                s.add_squares(s.mul(factor, s.load(x)), sums);
            }
        }
        for (sum, x) in sums.iter_mut().zip(rest) {
            let x = (a * *x).to_f64();
            *sum += x * x;
        }
        sum(&sums)
    }
}

/// Σ (a x)² over all parts x, the product rounded, the rest in f64: the square of a gradient's norm. Over tasks of a fixed size,
/// then in a fixed tree.
pub fn sum_of_squares<'a, T: Float>(parts: impl Iterator<Item = &'a [T]>, a: T) -> Result<f64> {
    let tasks = gather(parts.flat_map(|part| part.chunks(GRAIN)), |x| x.len());
    let mut partials = vec![0.0; tasks.len()];
    for_each(partials.iter_mut().zip(tasks), |(partial, task)| {
        *partial = task.into_iter().map(|x| block_of_squares(x, a)).sum();
    })?;
    Ok(sum(&partials))
}

/// The sum in a fixed tree: halves of halves.
pub fn sum(x: &[f64]) -> f64 {
    match x {
        [] => 0.0,
        [x] => *x,
        _ => {
            let (low, high) = x.split_at(x.len() / 2);
            sum(low) + sum(high)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::normal;
    use crate::threads::with_local_limit;

    #[test]
    fn every_row_is_summed_once() {
        for rows in [0, 1, 3, 4, 63, 64, 65, 8 * ROW_BLOCK, 9 * ROW_BLOCK + 5, 64 * ROW_BLOCK, 75 * ROW_BLOCK + 1] {
            for cols in [1, 13] {
                // Small integers: every order of summation is exact.
                let x: Vec<f32> = (0..rows * cols).map(|i| (i % 7) as f32).collect();
                let mut partials = vec![f32::NAN; partial_rows(rows) * cols];
                sum_blocks(&mut partials, &x, cols).unwrap();
                fold_partials(&mut partials, cols).unwrap();
                for c in 0..cols {
                    let expected: f32 = (0..rows).map(|r| x[r * cols + c]).sum();
                    assert_eq!(partials[c], expected, "column {c} of {rows} x {cols}");
                }
            }
        }
    }

    #[test]
    fn squares_of_multiples_are_those_of_what_was_multiplied_before_however_it_is_cut() {
        let x: Vec<f32> = normal(3 * GRAIN + 5, 1);
        let mut scaled = x.clone();
        super::super::elementwise::scale_assign(&mut scaled, 0.3).unwrap();
        let squares = |x: &[f32], a| {
            let mut rest = x;
            let cut = [5, 0, 2 * GRAIN, 7, x.len() - 12 - 2 * GRAIN].map(|n| rest.split_off(..n).unwrap());
            sum_of_squares(cut.into_iter(), a).unwrap()
        };
        assert_eq!(squares(&x, 0.3), squares(&scaled, 1.0));
    }

    #[test]
    fn sums_have_the_same_bits_for_any_number_of_threads() {
        let x: Vec<f32> = normal(100_003, 1);
        let run = |threads| {
            with_local_limit(threads, || {
                let mut partials = vec![f32::NAN; partial_rows(x.len() / 7) * 7];
                sum_blocks(&mut partials, &x[..x.len() / 7 * 7], 7).unwrap();
                fold_partials(&mut partials, 7).unwrap();
                let squares = sum_of_squares(std::iter::once(&x[..]), 1.0).unwrap().to_bits();
                (partials[..7].iter().map(|x| x.to_bits()).collect::<Vec<_>>(), squares)
            })
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one));
    }

    #[test]
    fn the_sum_of_squares_is_exact_where_f32_is_not() {
        let squares = |x: &[f32]| sum_of_squares([x].into_iter(), 1.0).unwrap();
        for n in [0, 1, 15, 16, 17, GRAIN, GRAIN + 1, 5 * GRAIN + 9] {
            let x: Vec<f32> = (0..n).map(|i| (i % 1000) as f32).collect();
            let expected: u64 = (0..n).map(|i| (i as u64 % 1000).pow(2)).sum();
            assert_eq!(squares(&x), expected as f64);
        }
        assert_eq!(squares(&[1e30, 1e-30]), (1e30f32 as f64).powi(2) + (1e-30f32 as f64).powi(2));
        assert!(squares(&[1.0, f32::NAN]).is_nan());
    }
}
