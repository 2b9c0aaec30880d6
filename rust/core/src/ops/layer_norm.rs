//! Layer norm (Ba, Kiros and Hinton 2016); also the node that the RMS norm shares.

use super::{GainAndBias, check_gain_and_bias, gain_and_bias, neutral};
use crate::ensure;
use crate::error::Result;
use crate::kernels::Beta;
use crate::kernels::elementwise::multiple;
use crate::kernels::norm::{Norm, norm_backward, norm_forward};
use crate::kernels::reduce::{fold_partials, partial_rows};
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, ParamId, Params, Tape, Tensor, Var};

/// y = (x − mean) / √(var + eps) · weight + bias, over the columns of each row. Absent weights are ones, absent biases zeros.
pub fn layer_norm<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weight: Option<ParamId>,
    bias: Option<ParamId>,
    eps: f64,
) -> Result<Var> {
    norm(tape, params, Norm::Layer, x, weight, bias, eps)
}

pub(super) fn norm<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    norm: Norm,
    x: Var,
    weight: Option<ParamId>,
    bias: Option<ParamId>,
    eps: f64,
) -> Result<Var> {
    let op = name(norm);
    let (rows, cols) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    ensure!(cols > 0, Shape, "{op}: argument `x`: expected at least one column, got none");
    ensure!(eps >= 0.0 && eps.is_finite(), Config, "{op}: argument `eps`: expected a number from 0 up, got {eps}");
    check_gain_and_bias(params, op, (weight, bias), cols)?;
    let wanted = tape.wants(params, &[x], weight.as_slice()) || tape.wants(params, &[], bias.as_slice());
    let _timed = profile::forward(op, [cols, 0], || Work::passes::<T>(2, rows, cols));
    let neutral = neutral(&mut tape.pool, cols)?;
    let (mut mean, mut rstd) = (tape.pool.tensor(rows, 1)?, tape.pool.tensor(rows, 1)?);
    let mut y = tape.pool.tensor(rows, cols)?;
    let [w, b] = gain_and_bias(params, (weight, bias), &neutral);
    norm_forward(norm, &mut y, &mut mean, &mut rstd, tape.value(x)?, w, b, eps)?;
    neutral.into_iter().for_each(|row| tape.pool.recycle(row));
    let y = tape.push(y, wanted);
    if wanted {
        tape.record_recomputed(y, &[x], Node { norm, x, weights: (weight, bias), eps, mean, rstd });
    } else {
        tape.pool.recycle(mean);
        tape.pool.recycle(rstd);
    }
    Ok(y)
}

fn name(norm: Norm) -> &'static str {
    match norm {
        Norm::Layer => "layer_norm",
        Norm::Rms => "rms_norm",
    }
}

struct Node<T> {
    norm: Norm,
    x: Var,
    weights: GainAndBias,
    eps: f64,
    mean: Tensor<T>,
    rstd: Tensor<T>,
}

impl<T: Float> Operation<T> for Node<T> {
    fn name(&self) -> &'static str {
        name(self.norm)
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let Node { norm, x: input, weights: (weight, bias), mean, rstd, .. } = *self;
        let (x, params) = (cx.value(input)?, cx.params);
        let (rows, cols) = (x.rows(), x.cols());
        let _timed = profile::backward(name(norm), [cols, 0], || Work::passes::<T>(3, rows, cols));
        let wanted = weight.into_iter().chain(bias).any(|id| cx.wants_param(id));
        let mut partials = cx.pool.tensor(if wanted { partial_rows(rows) } else { 0 }, 2 * cols)?;
        let neutral = neutral(cx.pool, cols)?;
        let [w, _] = gain_and_bias(params, (weight, bias), &neutral);
        let mut write =
            |dx: &mut Tensor<T>, beta| norm_backward(norm, dx, beta, &mut partials, &dy, x, w, &mean, &rstd);
        if cx.wants(input) {
            cx.accumulate(input, rows, cols, write)?;
        } else {
            let mut unused = cx.pool.tensor(rows, cols)?;
            write(&mut unused, Beta::Assign)?;
            cx.pool.recycle(unused);
        }
        if wanted {
            fold_partials(&mut partials, 2 * cols)?;
            for (id, sum) in [weight, bias].into_iter().zip(partials.chunks(cols)) {
                if let Some(id) = id {
                    cx.accumulate_param(id, |dw, beta| multiple(dw, beta, T::ONE, sum))?;
                }
            }
        }
        [dy, mean, rstd, partials].into_iter().chain(neutral).for_each(|tensor| cx.pool.recycle(tensor));
        Ok(())
    }

    fn recompute(&self, cx: &mut Backward<'_, T>) -> Result<Tensor<T>> {
        let (x, params) = (cx.value(self.x)?, cx.params);
        let (rows, cols) = (x.rows(), x.cols());
        let _timed = profile::backward(name(self.norm), [cols, 0], || Work::passes::<T>(2, rows, cols));
        let neutral = neutral(cx.pool, cols)?;
        let (mut mean, mut rstd) = (cx.pool.tensor(rows, 1)?, cx.pool.tensor(rows, 1)?);
        let mut y = cx.pool.tensor(rows, cols)?;
        let [w, b] = gain_and_bias(params, self.weights, &neutral);
        norm_forward(self.norm, &mut y, &mut mean, &mut rstd, x, w, b, self.eps)?;
        [mean, rstd].into_iter().chain(neutral).for_each(|tensor| cx.pool.recycle(tensor));
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::tape::{Pool, gradcheck};

    #[test]
    fn gradients_equal_differences() {
        for (rows, cols) in [(1, 2), (5, 7), (67, 3)] {
            let (params, ids) = testing::params::<f64>(&[&[cols], &[cols]]);
            for (weight, bias) in
                [(Some(ids[0]), Some(ids[1])), (Some(ids[0]), None), (None, Some(ids[1])), (None, None)]
            {
                let mut params = params.cast().unwrap();
                ids.iter().for_each(|&id| params.set_trainable(id, weight == Some(id) || bias == Some(id)));
                gradcheck(&params, &[testing::normal(rows, cols, 1)], None, |tape, params, x| {
                    layer_norm(tape, params, x[0], weight, bias, 1e-3)
                })
                .unwrap();
            }
        }
    }

    #[test]
    fn a_second_gradient_of_the_input_is_added() {
        let (params, ids) = testing::params(&[&[6], &[6]]);
        gradcheck(&params, &[testing::normal(4, 6, 1)], None, |tape, params, x| {
            let y = layer_norm(tape, params, x[0], Some(ids[0]), Some(ids[1]), 1e-5)?;
            super::super::add(tape, x[0], y)
        })
        .unwrap();
    }

    #[test]
    fn frozen_parts_get_nothing_and_the_others_the_same() {
        let (mut params, ids) = testing::params::<f32>(&[&[6], &[6]]);
        let x = [testing::normal(70, 6, 1)];
        let forward = |tape: &mut Tape<f32>, params: &Params<f32>, x: &[Var]| {
            layer_norm(tape, params, x[0], Some(ids[0]), Some(ids[1]), 1e-5)
        };
        let all = testing::run(&params, &x, None, forward).unwrap();
        params.set_trainable(ids[0], false);
        let some = testing::run(&params, &x, None, forward).unwrap();
        assert_eq!((&some.dinputs, &some.dparams[1]), (&all.dinputs, &all.dparams[1]));
        assert!(some.dparams[0].is_none());
        params.set_trainable(ids[1], false);
        assert_eq!(testing::run(&params, &x, None, forward).unwrap().dinputs, all.dinputs);
    }

    #[test]
    fn parameters_learn_where_the_input_wants_nothing() {
        let (params, ids) = testing::params::<f32>(&[&[6], &[6]]);
        let x = testing::normal(70, 6, 1);
        let with_input = testing::run(&params, std::slice::from_ref(&x), None, |tape, params, x| {
            layer_norm(tape, params, x[0], Some(ids[0]), Some(ids[1]), 1e-5)
        });
        let without = testing::run(&params, &[], None, |tape, params, _| {
            let x = tape.constant(Tensor::from_slice(70, 6, &x)?);
            layer_norm(tape, params, x, Some(ids[0]), Some(ids[1]), 1e-5)
        });
        assert_eq!(without.unwrap().dparams, with_input.unwrap().dparams);
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, ids) = testing::params::<f32>(&[&[40], &[40]]);
        let forward = |tape: &mut Tape<f32>, params: &Params<f32>, x: &[Var]| {
            layer_norm(tape, params, x[0], Some(ids[0]), Some(ids[1]), 1e-5)
        };
        testing::same_bits(&params, &[testing::normal(1500, 40, 1)], None, forward);
        testing::no_rows(&params, &[testing::normal(0, 40, 1)], None, forward);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let (params, ids) = testing::params::<f32>(&[&[4], &[5]]);
        let mut tape = Tape::evaluation(Pool::default());
        let x = tape.constant(testing::normal(2, 4, 1));
        let error = layer_norm(&mut tape, &params, x, Some(ids[0]), Some(ids[1]), 1e-5).unwrap_err().to_string();
        assert!(error.starts_with("layer_norm: argument `bias`: expected shape (4,), got (5,)"), "{error}");
        let empty = tape.constant(testing::normal(2, 0, 1));
        assert!(layer_norm(&mut tape, &params, empty, None, None, 1e-5).is_err());
        assert!(layer_norm(&mut tape, &params, x, None, None, f64::NAN).is_err());
    }
}
