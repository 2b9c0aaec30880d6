//! Softmax over the last axis.

use crate::error::Result;
use crate::kernels::softmax::{log_softmax, softmax_backward, softmax_forward};
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, Tape, Tensor, Var};

/// y = eˣ / Σ eˣ, over the columns of each row.
pub fn softmax<T: Float>(tape: &mut Tape<T>, x: Var) -> Result<Var> {
    let (rows, cols) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    let _timed = profile::forward("softmax", [cols, 0], || Work::passes::<T>(2, rows, cols));
    let mut y = tape.pool.tensor(rows, cols)?;
    softmax_forward(&mut y, tape.value(x)?, cols)?;
    let wanted = tape.wants_any(&[x]);
    let y = tape.push(y, wanted);
    if wanted {
        tape.record(y, &[y], Node { x, y });
    }
    Ok(y)
}

/// ln softmax of logits (R, V), taken off the tape: what [`super::token_logprobs`] gives for one token of a row, for all.
pub fn log_probabilities<T: Float>(tape: &mut Tape<T>, logits: Var) -> Result<Tensor<T>> {
    let mut rows = tape.take(logits)?;
    let cols = rows.cols();
    let _timed = profile::forward("log_probabilities", [cols, 0], || Work::passes::<T>(2, rows.rows(), cols));
    log_softmax(&mut rows, cols)?;
    Ok(rows)
}

struct Node {
    x: Var,
    y: Var,
}

impl<T: Float> Operation<T> for Node {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, mut dy: Tensor<T>) -> Result<()> {
        // dx = y · (dy − Σ dy · y)
        let y = cx.value(self.y)?;
        let _timed = profile::backward("softmax", [y.cols(), 0], || Work::passes::<T>(3, y.rows(), y.cols()));
        softmax_backward(&mut dy, y, y.cols())?;
        cx.give(self.x, dy)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::tape::{Params, gradcheck};

    #[test]
    fn gradients_equal_differences() {
        let (params, _) = testing::params(&[]);
        for (rows, cols) in [(1, 1), (3, 7), (2, 600)] {
            gradcheck(&params, &[testing::normal(rows, cols, 1)], None, |tape, _, x| softmax(tape, x[0])).unwrap();
        }
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, _) = testing::params::<f32>(&[]);
        let forward = |tape: &mut Tape<f32>, _: &Params<f32>, x: &[Var]| softmax(tape, x[0]);
        testing::same_bits(&params, &[testing::normal(100, 700, 1)], None, forward);
        testing::no_rows(&params, &[testing::normal(0, 5, 1)], None, forward);
        let empty = testing::run(&params, &[testing::normal(3, 0, 1)], None, forward).unwrap();
        assert!(empty.y.is_empty());
    }
}
