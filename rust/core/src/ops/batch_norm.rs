//! Batch norm (Ioffe and Szegedy 2015): every column is normalised over the rows of the batch, which are real tokens only.

use super::{GainAndBias, check_gain_and_bias, gain_and_bias, neutral};
use crate::ensure;
use crate::error::Result;
use crate::kernels::batch_norm::{batch_norm_backward, batch_norm_forward, batch_norm_sums, squared_deviations};
use crate::kernels::elementwise::{multiple, scale_assign};
use crate::kernels::reduce::{fold_partials, partial_rows, sum_blocks};
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, ParamId, Params, StatId, Tape, Tensor, Var};

/// The statistics that evaluation uses: new = (1 − momentum) · old + momentum · batch.
#[derive(Clone, Copy, Debug)]
pub struct Running {
    /// The running mean.
    pub mean: StatId,
    /// The running variance, of the unbiased kind.
    pub var: StatId,
    /// The share of each batch, in 0..=1; PyTorch's default is 0.1.
    pub momentum: f64,
}

/// y = (x − mean) / √(var + eps) · weight + bias, over the rows of each column. In training, and without `running`, the
/// statistics are the batch's, with the biased variance; a training pass notes the new running ones on the tape. In
/// evaluation they are the running ones. Absent weights are ones, absent biases zeros.
pub fn batch_norm<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weight: Option<ParamId>,
    bias: Option<ParamId>,
    running: Option<Running>,
    eps: f64,
) -> Result<Var> {
    let (rows, cols) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    ensure!(cols > 0, Shape, "batch_norm: argument `x`: expected at least one column, got none");
    ensure!(
        eps >= 0.0 && eps.is_finite(),
        Config,
        "batch_norm: argument `eps`: expected a number from 0 up, got {eps}"
    );
    check_gain_and_bias(params, "batch_norm", (weight, bias), cols)?;
    if let Some(Running { mean, var, momentum }) = running {
        ensure!(
            (0.0..=1.0).contains(&momentum),
            Config,
            "batch_norm: argument `momentum`: expected a share from 0 to 1, got {momentum}"
        );
        let [mean, var] = [mean, var].map(|id| params.stat(id).len());
        ensure!(
            mean == cols && var == cols,
            Shape,
            "batch_norm: argument `running`: expected {cols} means and variances, got {mean} and {var}"
        );
    }
    let evaluates = running.filter(|_| !tape.is_training());
    ensure!(
        evaluates.is_some() || rows != 1,
        Shape,
        "batch_norm: argument `x`: expected at least two rows for the statistics of a batch, got one; use a larger batch"
    );

    let wanted = tape.wants(params, &[x], weight.as_slice()) || tape.wants(params, &[], bias.as_slice());
    let passes = if evaluates.is_some() { 2 } else { 4 };
    let _timed = profile::forward("batch_norm", [cols, 0], || Work::passes::<T>(passes, rows, cols));
    let (mut mean, mut rstd) = (tape.pool.tensor(1, cols)?, tape.pool.tensor(1, cols)?);
    match evaluates {
        Some(running) => {
            mean.copy_from_slice(params.stat(running.mean));
            rstd.copy_from_slice(params.stat(running.var));
        }
        None => {
            batch_statistics(tape, x, &mut mean, &mut rstd)?;
            if let Some(running) = running
                && rows > 0
            {
                note(tape, params, running, rows, &mean, &rstd);
            }
        }
    }
    rstd.iter_mut().for_each(|var| *var = T::ONE / (*var + T::from_f64(eps)).sqrt());

    let neutral = neutral(&mut tape.pool, cols)?;
    let [w, b] = gain_and_bias(params, (weight, bias), &neutral);
    let mut y = tape.pool.tensor(rows, cols)?;
    batch_norm_forward(&mut y, tape.value(x)?, &mean, &rstd, w, b)?;
    neutral.into_iter().for_each(|row| tape.pool.recycle(row));
    let y = tape.push(y, wanted);
    if wanted {
        let node = Node { x, weights: (weight, bias), of_batch: evaluates.is_none(), mean, rstd };
        tape.record_recomputed(y, &[x], node);
    } else {
        tape.pool.recycle(mean);
        tape.pool.recycle(rstd);
    }
    Ok(y)
}

/// Mean and biased variance of every column: two passes, so that no digits cancel. Zeros without rows.
fn batch_statistics<T: Float>(tape: &mut Tape<T>, x: Var, mean: &mut [T], var: &mut [T]) -> Result<()> {
    let (rows, cols) = (tape.value(x)?.rows(), mean.len());
    let mut partials = tape.pool.tensor(partial_rows(rows), cols)?;
    let x = tape.value(x)?;
    let share = T::from_f64(1.0 / rows.max(1) as f64);
    sum_blocks(&mut partials, x, cols)?;
    fold_partials(&mut partials, cols)?;
    mean.iter_mut().zip(partials.iter()).for_each(|(mean, sum)| *mean = *sum * share);
    squared_deviations(&mut partials, x, mean)?;
    fold_partials(&mut partials, cols)?;
    var.iter_mut().zip(partials.iter()).for_each(|(var, sum)| *var = *sum * share);
    tape.pool.recycle(partials);
    Ok(())
}

fn note<T: Float>(tape: &mut Tape<T>, params: &Params<T>, running: Running, rows: usize, mean: &[T], var: &[T]) {
    let momentum = T::from_f64(running.momentum);
    let unbiased = T::from_f64(rows as f64 / (rows as f64 - 1.0));
    for (id, batch, factor) in [(running.mean, mean, T::ONE), (running.var, var, unbiased)] {
        let blend = |(old, new): (&T, &T)| (T::ONE - momentum) * *old + momentum * (*new * factor);
        tape.note_statistic(id, params.stat(id).iter().zip(batch).map(blend).collect());
    }
}

struct Node<T> {
    x: Var,
    weights: GainAndBias,
    /// Whether mean and rstd depend on x.
    of_batch: bool,
    mean: Tensor<T>,
    rstd: Tensor<T>,
}

impl<T: Float> Operation<T> for Node<T> {
    fn name(&self) -> &'static str {
        "batch_norm"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let Node { x: input, weights: (weight, bias), of_batch, mean, rstd } = *self;
        let (x, params) = (cx.value(input)?, cx.params);
        let (rows, cols) = (x.rows(), x.cols());
        let _timed = profile::backward("batch_norm", [cols, 0], || Work::passes::<T>(5, rows, cols));
        // y = xhat · w + b  =>  dw = Σ dy · xhat, db = Σ dy
        let mut sums = cx.pool.tensor(partial_rows(rows), 2 * cols)?;
        batch_norm_sums(&mut sums, &dy, x, &mean, &rstd)?;
        fold_partials(&mut sums, 2 * cols)?;
        for (id, sum) in [weight, bias].into_iter().zip(sums.chunks(cols)) {
            if let Some(id) = id {
                cx.accumulate_param(id, |dw, beta| multiple(dw, beta, T::ONE, sum))?;
            }
        }
        // dx = w · rstd · (dy − mean of dy − xhat · mean of (dy · xhat)); running statistics are constants: no means.
        let share = if of_batch { 1.0 / rows.max(1) as f64 } else { 0.0 };
        scale_assign(&mut sums[..2 * cols], T::from_f64(share))?;
        let (mean_dy_xhat, mean_dy) = sums[..2 * cols].split_at(cols);
        let neutral = neutral(cx.pool, cols)?;
        let [w, _] = gain_and_bias(params, (weight, bias), &neutral);
        cx.accumulate(input, rows, cols, |dx, beta| {
            batch_norm_backward(dx, beta, &dy, x, &mean, &rstd, w, mean_dy, mean_dy_xhat)
        })?;
        [dy, mean, rstd, sums].into_iter().chain(neutral).for_each(|tensor| cx.pool.recycle(tensor));
        Ok(())
    }

    fn recompute(&self, cx: &mut Backward<'_, T>) -> Result<Tensor<T>> {
        let x = cx.value(self.x)?;
        let (rows, cols) = (x.rows(), x.cols());
        let _timed = profile::backward("batch_norm", [cols, 0], || Work::passes::<T>(2, rows, cols));
        let neutral = neutral(cx.pool, cols)?;
        let [w, b] = gain_and_bias(cx.params, self.weights, &neutral);
        let mut y = cx.pool.tensor(rows, cols)?;
        batch_norm_forward(&mut y, x, &self.mean, &self.rstd, w, b)?;
        neutral.into_iter().for_each(|row| cx.pool.recycle(row));
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::kernels::testing::assert_close;
    use crate::rng::Key;
    use crate::tape::{Builder, Init, Pool, gradcheck};
    use std::sync::Arc;

    fn setup<T: Float>(cols: usize) -> (Params<T>, [ParamId; 2], Running) {
        let mut b = Builder::new();
        let ids = ["weight", "bias"].map(|name| b.param(name, &[cols], Init::Normal { std: 1.0 }));
        let running = Running { mean: b.stat("mean", cols, 0.5), var: b.stat("var", cols, 2.0), momentum: 0.1 };
        (Params::init(Arc::new(b.finish()), 1).unwrap(), ids, running)
    }

    #[test]
    fn gradients_equal_differences() {
        for (rows, cols) in [(2, 1), (5, 3), (130, 2)] {
            let (params, [w, b], running) = setup(cols);
            for training in [None, Some(Key::new(1))] {
                for running in [None, Some(running)] {
                    gradcheck(&params, &[testing::normal(rows, cols, 1)], training, |tape, params, x| {
                        let y = batch_norm(tape, params, x[0], Some(w), Some(b), running, 1e-3)?;
                        super::super::add(tape, x[0], y)
                    })
                    .unwrap();
                }
            }
            let (none, _) = testing::params(&[]);
            gradcheck(&none, &[testing::normal(rows, cols, 1)], None, |tape, params, x| {
                batch_norm(tape, params, x[0], None, None, None, 1e-3)
            })
            .unwrap();
        }
    }

    #[test]
    fn statistics_equal_those_worked_out_by_hand() {
        // Columns (1, 2, 3, 6) and (0, 0, 4, 4): means 3 and 2, biased variances 3.5 and 4, unbiased 14/3 and 16/3.
        let (mut params, [w, b], running) = setup::<f64>(2);
        params.set(w, &[2.0, 1.0]).unwrap();
        params.set(b, &[0.0, 10.0]).unwrap();
        let rows = [1.0, 0.0, 2.0, 0.0, 3.0, 4.0, 6.0, 4.0];
        let evaluate = |tape: &mut Tape<f64>| {
            let x = tape.constant(Tensor::from_slice(4, 2, &rows).unwrap());
            let y = batch_norm(tape, &params, x, Some(w), Some(b), Some(running), 0.0).unwrap();
            tape.value(y).unwrap().to_vec()
        };
        let mut training = Tape::training(Pool::default(), Key::new(0));
        let y = evaluate(&mut training);
        let s = 2.0 / 3.5f64.sqrt();
        assert_close(&y, &[-2.0 * s, 9.0, -s, 9.0, 0.0, 11.0, 3.0 * s, 11.0], 1e-15);
        let noted = training.take_statistics();
        assert_eq!([noted[0].0, noted[1].0], [running.mean, running.var]);
        assert_close(&noted[0].1, &[0.9 * 0.5 + 0.1 * 3.0, 0.9 * 0.5 + 0.1 * 2.0], 1e-15);
        assert_close(&noted[1].1, &[0.9 * 2.0 + 0.1 * 14.0 / 3.0, 0.9 * 2.0 + 0.1 * 16.0 / 3.0], 1e-15);

        let mut evaluation = Tape::evaluation(Pool::default());
        let y = evaluate(&mut evaluation);
        let expected: Vec<f64> = rows
            .chunks(2)
            .flat_map(|x| [(x[0] - 0.5) / 2f64.sqrt() * 2.0, (x[1] - 0.5) / 2f64.sqrt() + 10.0])
            .collect();
        assert_close(&y, &expected, 1e-14);
        assert!(evaluation.take_statistics().is_empty());
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, [w, b], running) = setup::<f32>(40);
        let forward = |tape: &mut Tape<f32>, params: &Params<f32>, x: &[Var]| {
            batch_norm(tape, params, x[0], Some(w), Some(b), Some(running), 1e-5)
        };
        for training in [None, Some(Key::new(1))] {
            testing::same_bits(&params, &[testing::normal(3000, 40, 1)], training, forward);
            testing::no_rows(&params, &[testing::normal(0, 40, 1)], training, forward);
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let (params, [w, b], running) = setup::<f32>(3);
        let mut tape = Tape::training(Pool::default(), Key::new(1));
        let (one, wide) = (tape.constant(testing::normal(1, 3, 1)), tape.constant(testing::normal(4, 5, 1)));
        let mut error =
            |x, w, running| batch_norm(&mut tape, &params, x, w, None, running, 1e-5).unwrap_err().to_string();
        assert!(error(one, Some(w), None).contains("at least two rows"));
        assert!(error(wide, Some(b), None).contains("`weight`: expected shape (5,), got (3,)"));
        assert!(error(wide, None, Some(running)).contains("`running`: expected 5 means and variances, got 3 and 3"));
        let momentum = Running { momentum: 1.5, ..running };
        assert!(error(one, None, Some(momentum)).contains("`momentum`"));
    }
}
