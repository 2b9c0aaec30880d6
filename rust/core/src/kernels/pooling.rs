//! One row for each sequence: the first, or the mean.

use super::Beta;
use super::elementwise::multiple_of_row;
use crate::error::Result;
use crate::rows::Rows;
use crate::simd::Float;
use crate::threads::{for_each, rows_per_task};

/// Which row stands for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The first.
    First,
    /// The mean.
    Mean,
}

/// y[i] = the row that stands for sequence i; zeros where it has no rows. The sum runs in the order of the rows.
pub fn pool_forward<T: Float>(y: &mut [T], x: &[T], rows: &Rows, cols: usize, kind: Pooling) -> Result<()> {
    let many = sequences_per_task(rows, cols);
    for_each(y.chunks_mut(many * cols).enumerate(), |(task, y)| {
        for (y, i) in y.chunks_mut(cols).zip(task * many..) {
            let range = rows.range(i);
            let sequence = &x[range.start * cols..range.end * cols];
            let (of, weight) = match kind {
                Pooling::First => (&sequence[..sequence.len().min(cols)], T::ONE),
                Pooling::Mean => (sequence, one_over(range.len())),
            };
            y.fill(T::ZERO);
            of.chunks(cols).for_each(|x| multiple_of_row(y, Beta::Add, T::ONE, x));
            y.iter_mut().for_each(|y| *y *= weight);
        }
    })
}

/// dx[r] (+)= dy of its sequence: whole for the first row, 1 / length of it for each where the mean was taken.
pub fn pool_backward<T: Float>(
    dx: &mut [T],
    beta: Beta,
    dy: &[T],
    rows: &Rows,
    cols: usize,
    kind: Pooling,
) -> Result<()> {
    let mut parts = Vec::with_capacity(rows.sequences());
    let mut rest = dx;
    for (i, dy) in (0..rows.sequences()).zip(dy.chunks(cols)) {
        let (dx, after) = std::mem::take(&mut rest).split_at_mut(rows.length(i) * cols);
        rest = after;
        parts.push((dx, dy));
    }
    for_each(parts.into_iter(), |(dx, dy)| {
        let weight = one_over(dx.len() / cols);
        for (r, dx) in dx.chunks_mut(cols).enumerate() {
            match (kind, beta) {
                (Pooling::Mean, _) => multiple_of_row(dx, beta, weight, dy),
                (Pooling::First, _) if r == 0 => multiple_of_row(dx, beta, T::ONE, dy),
                (Pooling::First, Beta::Assign) => dx.fill(T::ZERO),
                (Pooling::First, Beta::Add) => {}
            }
        }
    })
}

fn one_over<T: Float>(rows: usize) -> T {
    T::ONE / T::from_f64(rows.max(1) as f64)
}

fn sequences_per_task(rows: &Rows, cols: usize) -> usize {
    let mean = rows.total().div_ceil(rows.sequences().max(1)).max(1);
    rows_per_task(mean * cols)
}

/// [`pool_forward`] in plain words.
pub fn pool_reference<T: Float>(y: &mut [T], x: &[T], rows: &Rows, cols: usize, kind: Pooling) {
    for i in 0..rows.sequences() {
        for c in 0..cols {
            let column = rows.range(i).map(|r| x[r * cols + c]);
            y[i * cols + c] = match kind {
                Pooling::First => column.take(1).sum(),
                Pooling::Mean => column.sum::<T>() / T::from_f64(rows.length(i).max(1) as f64),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, normal};

    #[test]
    fn rows_equal_the_reference() {
        for (lengths, cols) in [(&[][..], 3), (&[1], 1), (&[3, 0, 5, 1], 7), (&[70; 90], 33)] {
            let rows = Rows::from_lengths(lengths);
            let x: Vec<f32> = normal(rows.total() * cols, 1);
            for kind in [Pooling::First, Pooling::Mean] {
                let mut expected = vec![f32::NAN; lengths.len() * cols];
                pool_reference(&mut expected, &x, &rows, cols, kind);
                let mut y = vec![f32::NAN; expected.len()];
                pool_forward(&mut y, &x, &rows, cols, kind).unwrap();
                assert_close(&y, &expected, 1e-5);
            }
        }
    }
}
