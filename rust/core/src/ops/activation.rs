//! Nonlinearities and gates.

use crate::ensure;
use crate::error::Result;
use crate::kernels::activation as kernels;
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, Tape, Tensor, Var};

/// A function applied to every element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// max(x, 0)
    Relu,
    /// x · Φ(x), exactly (by erf).
    Gelu,
    /// GELU approximated by tanh.
    GeluTanh,
    /// x · σ(x)
    Silu,
}

/// What a gate applies to the gating half.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// σ(gate) · up (Dauphin and others 2017).
    Glu,
    /// gate · σ(gate) · up (Shazeer 2020).
    Swiglu,
}

/// y = f(x), element by element.
pub fn activation<T: Float>(tape: &mut Tape<T>, x: Var, kind: Activation) -> Result<Var> {
    let (rows, cols) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    let _timed = profile::forward("activation", [cols, 0], || Work::passes::<T>(2, rows, cols));
    let mut y = tape.pool.tensor(rows, cols)?;
    kind.apply(&mut y, tape.value(x)?)?;
    let wanted = tape.wants_any(&[x]);
    let y = tape.push(y, wanted);
    if wanted {
        tape.record_recomputed(y, &[x], Pointwise { x, kind });
    }
    Ok(y)
}

impl Activation {
    fn apply<T: Float>(self, y: &mut [T], x: &[T]) -> Result<()> {
        match self {
            Activation::Relu => kernels::activation_forward(kernels::Relu, y, x),
            Activation::Gelu => kernels::activation_forward(kernels::Gelu, y, x),
            Activation::GeluTanh => kernels::activation_forward(kernels::GeluTanh, y, x),
            Activation::Silu => kernels::activation_forward(kernels::Silu, y, x),
        }
    }
}

struct Pointwise {
    x: Var,
    kind: Activation,
}

impl<T: Float> Operation<T> for Pointwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, mut dy: Tensor<T>) -> Result<()> {
        let x = cx.value(self.x)?;
        let _timed = profile::backward("activation", [x.cols(), 0], || Work::passes::<T>(3, x.rows(), x.cols()));
        match self.kind {
            Activation::Relu => kernels::activation_backward(kernels::Relu, &mut dy, x),
            Activation::Gelu => kernels::activation_backward(kernels::Gelu, &mut dy, x),
            Activation::GeluTanh => kernels::activation_backward(kernels::GeluTanh, &mut dy, x),
            Activation::Silu => kernels::activation_backward(kernels::Silu, &mut dy, x),
        }?;
        cx.give(self.x, dy)
    }

    fn recompute(&self, cx: &mut Backward<'_, T>) -> Result<Tensor<T>> {
        let x = cx.value(self.x)?;
        let _timed = profile::backward("activation", [x.cols(), 0], || Work::passes::<T>(2, x.rows(), x.cols()));
        let mut y = cx.pool.tensor(x.rows(), x.cols())?;
        self.kind.apply(&mut y, x)?;
        Ok(y)
    }
}

/// y = f(gate) · up, where a row of x is [gate | up]: (R, 2 F) becomes (R, F).
pub fn gated<T: Float>(tape: &mut Tape<T>, x: Var, gate: Gate) -> Result<Var> {
    let (rows, both) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    ensure!(
        both > 0 && both.is_multiple_of(2),
        Shape,
        "gated: argument `x`: expected an even number of columns, gate and up side by side, got {both}"
    );
    let cols = both / 2;
    let _timed = profile::forward("gated", [cols, 0], || Work::passes::<T>(3, rows, cols));
    let mut y = tape.pool.tensor(rows, cols)?;
    gate.apply(&mut y, tape.value(x)?, cols)?;
    let wanted = tape.wants_any(&[x]);
    let y = tape.push(y, wanted);
    if wanted {
        tape.record_recomputed(y, &[x], Gated { x, gate });
    }
    Ok(y)
}

impl Gate {
    fn apply<T: Float>(self, y: &mut [T], x: &[T], cols: usize) -> Result<()> {
        match self {
            Gate::Glu => kernels::gated_forward(kernels::Sigmoid, y, x, cols),
            Gate::Swiglu => kernels::gated_forward(kernels::Silu, y, x, cols),
        }
    }
}

struct Gated {
    x: Var,
    gate: Gate,
}

impl<T: Float> Operation<T> for Gated {
    fn name(&self) -> &'static str {
        "gated"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let x = cx.value(self.x)?;
        let _timed = profile::backward("gated", [dy.cols(), 0], || Work::passes::<T>(5, dy.rows(), dy.cols()));
        let mut dx = cx.pool.tensor(x.rows(), x.cols())?;
        match self.gate {
            Gate::Glu => kernels::gated_backward(kernels::Sigmoid, &mut dx, &dy, x, dy.cols()),
            Gate::Swiglu => kernels::gated_backward(kernels::Silu, &mut dx, &dy, x, dy.cols()),
        }?;
        cx.pool.recycle(dy);
        cx.give(self.x, dx)
    }

    fn recompute(&self, cx: &mut Backward<'_, T>) -> Result<Tensor<T>> {
        let x = cx.value(self.x)?;
        let (rows, cols) = (x.rows(), x.cols() / 2);
        let _timed = profile::backward("gated", [cols, 0], || Work::passes::<T>(3, rows, cols));
        let mut y = cx.pool.tensor(rows, cols)?;
        self.gate.apply(&mut y, x, cols)?;
        Ok(y)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::tape::{Params, Pool, gradcheck};

    const ALL: [Activation; 4] = [Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu];

    #[test]
    fn gradients_equal_differences() {
        let (params, _) = testing::params(&[]);
        for kind in ALL {
            gradcheck(&params, &[testing::normal(3, 11, 1)], None, |tape, _, x| activation(tape, x[0], kind)).unwrap();
        }
        for gate in [Gate::Glu, Gate::Swiglu] {
            gradcheck(&params, &[testing::normal(3, 14, 1)], None, |tape, _, x| gated(tape, x[0], gate)).unwrap();
        }
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, _) = testing::params::<f32>(&[]);
        for kind in ALL {
            let forward = |tape: &mut Tape<f32>, _: &Params<f32>, x: &[Var]| activation(tape, x[0], kind);
            testing::same_bits(&params, &[testing::normal(900, 50, 1)], None, forward);
            testing::no_rows(&params, &[testing::normal(0, 50, 1)], None, forward);
        }
        let forward = |tape: &mut Tape<f32>, _: &Params<f32>, x: &[Var]| gated(tape, x[0], Gate::Swiglu);
        testing::same_bits(&params, &[testing::normal(900, 50, 1)], None, forward);
        testing::no_rows(&params, &[testing::normal(0, 50, 1)], None, forward);
    }

    #[test]
    fn an_odd_number_of_columns_cannot_be_gated() {
        let mut tape = Tape::<f32>::evaluation(Pool::default());
        let x = tape.constant(testing::normal(2, 5, 1));
        assert!(gated(&mut tape, x, Gate::Glu).unwrap_err().to_string().starts_with("gated: argument `x`"));
    }
}
