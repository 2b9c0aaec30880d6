//! RMS norm (Zhang and Sennrich 2019).

use super::layer_norm::norm;
use crate::error::Result;
use crate::kernels::norm::Norm;
use crate::simd::Float;
use crate::tape::{ParamId, Params, Tape, Var};

/// y = x / √(mean of x² + eps) · weight, over the columns of each row. Absent weights are ones.
pub fn rms_norm<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weight: Option<ParamId>,
    eps: f64,
) -> Result<Var> {
    norm(tape, params, Norm::Rms, x, weight, None, eps)
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::tape::gradcheck;

    #[test]
    fn gradients_equal_differences() {
        for (rows, cols) in [(1, 1), (5, 7), (67, 3)] {
            let (params, ids) = testing::params(&[&[cols]]);
            gradcheck(&params, &[testing::normal(rows, cols, 1)], None, |tape, params, x| {
                rms_norm(tape, params, x[0], Some(ids[0]), 1e-3)
            })
            .unwrap();
            let (none, _) = testing::params(&[]);
            gradcheck(&none, &[testing::normal(rows, cols, 1)], None, |tape, params, x| {
                rms_norm(tape, params, x[0], None, 1e-3)
            })
            .unwrap();
        }
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, ids) = testing::params::<f32>(&[&[40]]);
        let forward =
            |tape: &mut Tape<f32>, params: &Params<f32>, x: &[Var]| rms_norm(tape, params, x[0], Some(ids[0]), 1e-5);
        testing::same_bits(&params, &[testing::normal(1500, 40, 1)], None, forward);
        testing::no_rows(&params, &[testing::normal(0, 40, 1)], None, forward);
    }

    #[test]
    fn a_known_row() {
        let (params, _) = testing::params::<f64>(&[]);
        let x = crate::tape::Tensor::from_slice(1, 2, &[3.0, 4.0]).unwrap();
        let y = testing::run(&params, &[x], None, |tape, params, x| rms_norm(tape, params, x[0], None, 0.0)).unwrap().y;
        crate::kernels::testing::assert_close(&y, &[3.0 / 12.5f64.sqrt(), 4.0 / 12.5f64.sqrt()], 1e-15);
    }
}
