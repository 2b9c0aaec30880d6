//! A vector for each sequence from those of its tokens.

use crate::ensure;
use crate::error::Result;
pub use crate::kernels::pooling::Pooling;
use crate::kernels::pooling::{pool_backward, pool_forward};
use crate::profile::{self, Work};
use crate::rows::Rows;
use crate::simd::Float;
use crate::tape::{Backward, Operation, Tape, Tensor, Var};

/// x (R, D) -> (B, D): the first row of each sequence, or the mean of its rows; zeros where it has none.
pub fn pool<T: Float>(tape: &mut Tape<T>, x: Var, rows: &Rows, kind: Pooling) -> Result<Var> {
    let (total, cols) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    ensure!(cols > 0, Shape, "pool: argument `x`: expected at least one column, got none");
    ensure!(
        total == rows.total(),
        Shape,
        "pool: argument `x`: expected a row for each of {} tokens, got {total}",
        rows.total()
    );
    let _timed = profile::forward("pool", [cols, 0], || Work::passes::<T>(1, total + rows.sequences(), cols));
    let mut y = tape.pool.tensor(rows.sequences(), cols)?;
    pool_forward(&mut y, tape.value(x)?, rows, cols, kind)?;
    let wanted = tape.wants_any(&[x]);
    let y = tape.push(y, wanted);
    if wanted {
        tape.record(y, &[], Node { x, rows: rows.clone(), kind });
    }
    Ok(y)
}

struct Node {
    x: Var,
    rows: Rows,
    kind: Pooling,
}

impl<T: Float> Operation<T> for Node {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let Node { x, rows, kind } = *self;
        let cols = dy.cols();
        let _timed = profile::backward("pool", [cols, 0], || Work::passes::<T>(1, rows.total() + dy.rows(), cols));
        // y = Σ x / n  =>  dx = dy / n in every row
        cx.accumulate(x, rows.total(), cols, |dx, beta| pool_backward(dx, beta, &dy, &rows, cols, kind))?;
        cx.pool.recycle(dy);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::tape::{Params, Pool, gradcheck};

    #[test]
    fn gradients_equal_differences() {
        let (params, _) = testing::params(&[]);
        for kind in [Pooling::First, Pooling::Mean] {
            for (lengths, cols) in [(&[1][..], 1), (&[3, 0, 67], 5)] {
                let rows = Rows::from_lengths(lengths);
                let x = [testing::normal(rows.total(), cols, 1)];
                gradcheck(&params, &x, None, |tape, _, x| pool(tape, x[0], &rows, kind)).unwrap();
                // Twice, so that the second gradient is added to the first.
                gradcheck(&params, &x, None, |tape, _, x| {
                    let (a, b) = (pool(tape, x[0], &rows, kind)?, pool(tape, x[0], &rows, Pooling::Mean)?);
                    super::super::add(tape, a, b)
                })
                .unwrap();
            }
        }
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, _) = testing::params::<f32>(&[]);
        let rows = Rows::from_lengths(&[100, 3, 400, 1, 250]);
        for kind in [Pooling::First, Pooling::Mean] {
            testing::same_bits(&params, &[testing::normal(rows.total(), 50, 1)], None, |tape, _, x| {
                pool(tape, x[0], &rows, kind)
            });
            let none = Rows::from_lengths(&[]);
            let forward = |tape: &mut Tape<f32>, _: &Params<f32>, x: &[Var]| pool(tape, x[0], &none, kind);
            testing::no_rows(&params, &[testing::normal(0, 50, 1)], None, forward);
        }
    }

    #[test]
    fn a_sequence_alone_has_the_bits_it_has_in_a_batch() {
        let lengths = [9, 1, 130];
        let rows = Rows::from_lengths(&lengths);
        let x = testing::normal::<f32>(rows.total(), 20, 3);
        let mut tape = Tape::evaluation(Pool::default());
        let all = tape.constant(Tensor::from_slice(rows.total(), 20, &x).unwrap());
        let together = pool(&mut tape, all, &rows, Pooling::Mean).unwrap();
        for (i, &n) in lengths.iter().enumerate() {
            let range = rows.range(i);
            let one = tape.constant(Tensor::from_slice(n, 20, &x[range.start * 20..range.end * 20]).unwrap());
            let alone = pool(&mut tape, one, &Rows::from_lengths(&[n]), Pooling::Mean).unwrap();
            assert_eq!(tape.value(alone).unwrap()[..], *tape.value(together).unwrap().row(i));
        }
    }

    #[test]
    fn rows_that_do_not_fit_are_named() {
        let mut tape = Tape::<f32>::evaluation(Pool::default());
        let x = tape.constant(testing::normal(3, 2, 1));
        let error = pool(&mut tape, x, &Rows::from_lengths(&[4]), Pooling::Mean).unwrap_err().to_string();
        assert!(error.contains("pool: argument `x`: expected a row for each of 4 tokens, got 3"), "{error}");
    }
}
