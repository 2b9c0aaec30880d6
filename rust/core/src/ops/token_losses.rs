//! The label-smoothed loss of each row by itself.

use super::cross_entropy::check;
use crate::error::Result;
use crate::kernels::softmax::{RowLoss, cross_entropy_rows};
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, Tape, Tensor, Var};

/// The losses (R, 1) of logits (R, V) against one target per row; 0 where it is [`super::IGNORE`]. Their sum is the loss
/// of [`super::cross_entropy`].
pub fn token_losses<T: Float>(tape: &mut Tape<T>, logits: Var, targets: &[u32], smoothing: f64) -> Result<Var> {
    let (rows, v) = (tape.value(logits)?.rows(), tape.value(logits)?.cols());
    check("cross_entropy", rows, targets, v, smoothing)?;
    let _timed = profile::forward("token_losses", [v, 0], || Work::passes::<T>(2, rows, v));
    let mut losses = vec![RowLoss::default(); rows];
    let mut scratch = tape.pool.tensor(rows, v)?;
    scratch.copy_from_slice(tape.value(logits)?);
    cross_entropy_rows(&mut losses, &mut scratch, targets, v, smoothing, None)?;
    tape.pool.recycle(scratch);
    let mut y = tape.pool.tensor(rows, 1)?;
    y.iter_mut().zip(&losses).for_each(|(y, loss)| *y = T::from_f64(loss.smoothed));
    let wanted = tape.wants_any(&[logits]);
    let y = tape.push(y, wanted);
    if wanted {
        tape.record(y, &[logits], TokenLosses { logits, targets: targets.into(), smoothing });
    }
    Ok(y)
}

struct TokenLosses {
    logits: Var,
    targets: Box<[u32]>,
    smoothing: f64,
}

impl<T: Float> Operation<T> for TokenLosses {
    fn name(&self) -> &'static str {
        "token_losses"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let logits = cx.value(self.logits)?;
        let v = logits.cols();
        let _timed = profile::backward("token_losses", [v, 0], || Work::passes::<T>(2, logits.rows(), v));
        let mut dlogits = cx.pool.tensor(logits.rows(), v)?;
        dlogits.copy_from_slice(logits);
        // dlogits = dy · (softmax − (1 − ε) · onehot(target) − ε / V), a factor for each row
        let mut losses = vec![RowLoss::default(); logits.rows()];
        cross_entropy_rows(&mut losses, &mut dlogits, &self.targets, v, self.smoothing, Some(T::ONE))?;
        for (row, &dy) in dlogits.chunks_mut(v).zip(dy.iter()) {
            row.iter_mut().for_each(|d| *d *= dy);
        }
        cx.pool.recycle(dy);
        cx.give(self.logits, dlogits)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{IGNORE, cross_entropy, testing};
    use super::*;
    use crate::tape::{Pool, gradcheck};

    const TARGETS: [u32; 5] = [3, 0, IGNORE, 6, 2];

    #[test]
    fn gradients_equal_differences() {
        let (params, _) = testing::params(&[]);
        for smoothing in [0.0, 0.1] {
            gradcheck(&params, &[testing::normal(5, 7, 1)], None, |tape, _, x| {
                token_losses(tape, x[0], &TARGETS, smoothing)
            })
            .unwrap();
        }
    }

    #[test]
    fn their_sum_is_the_loss_and_ignored_rows_are_zero() {
        let mut tape = Tape::<f64>::evaluation(Pool::default());
        let logits = tape.constant(testing::normal(5, 7, 1));
        let losses = token_losses(&mut tape, logits, &TARGETS, 0.1).unwrap();
        let whole = cross_entropy(&mut tape, logits, &TARGETS, 0.1).unwrap().loss_sum;
        let losses = tape.value(losses).unwrap();
        assert!(losses[2] == 0.0 && (losses.iter().sum::<f64>() - whole).abs() < 1e-12);
    }
}
