//! What every operation is put through besides its gradient check.

use crate::error::Result;
use crate::rng::Key;
use crate::simd::Float;
use crate::tape::{Builder, Grads, Init, ParamId, Params, Pool, Tape, Tensor, Var};
use crate::threads::with_local_limit;
use std::sync::Arc;

/// Parameters of these shapes, normal numbers.
pub fn params<T: Float>(shapes: &[&[usize]]) -> (Params<T>, Vec<ParamId>) {
    let mut b = Builder::new();
    let mut declare = |(i, shape): (usize, &&[usize])| b.param(&format!("p{i}"), shape, Init::Normal { std: 1.0 });
    let ids = shapes.iter().enumerate().map(&mut declare).collect();
    (Params::init(Arc::new(b.finish()), 11).unwrap(), ids)
}

/// A matrix of normal numbers.
pub fn normal<T: Float>(rows: usize, cols: usize, seed: u64) -> Tensor<T> {
    Tensor::from_slice(rows, cols, &crate::kernels::testing::normal(rows * cols, seed)).unwrap()
}

/// Everything a pass forward and backward gives.
#[derive(Debug, PartialEq)]
pub struct Outcome<T> {
    pub y: Vec<T>,
    pub dinputs: Vec<Option<Vec<T>>>,
    pub dparams: Vec<Option<Vec<T>>>,
}

/// Runs forward and backward for a random `dy`. The pool and the gradients hold NaN before, so that a buffer which is
/// not written shows.
pub fn run<T: Float>(
    params: &Params<T>,
    inputs: &[Tensor<T>],
    training: Option<Key>,
    forward: impl Fn(&mut Tape<T>, &Params<T>, &[Var]) -> Result<Var>,
) -> Result<Outcome<T>> {
    let mut pool = Pool::default();
    for n in (6..18).map(|e| 1 << e) {
        for _ in 0..8 {
            pool.recycle(Tensor::from_slice(1, n, &vec![T::NAN; n])?);
        }
    }
    let mut tape = match training {
        Some(key) => Tape::training(pool, key),
        None => Tape::recording(pool),
    };
    let mut grads = Grads::new(params)?;
    grads.arena_mut().fill(T::NAN);
    let mut vars = Vec::new();
    for x in inputs {
        vars.push(tape.leaf(Tensor::from_slice(x.rows(), x.cols(), x)?));
    }
    let result = forward(&mut tape, params, &vars)?;
    let (rows, cols) = (tape.value(result)?.rows(), tape.value(result)?.cols());
    let y = tape.value(result)?.to_vec();
    let mut dvars = tape.backward(params, &mut grads, [(result, normal(rows, cols, 77))])?;
    Ok(Outcome {
        y,
        dinputs: vars.into_iter().map(|var| dvars.take(var).map(|dx| dx.to_vec())).collect(),
        dparams: params.layout().ids().map(|id| grads.get(id).map(|dw| dw.to_vec())).collect(),
    })
}

/// Fails unless 1, 2, 3 and 7 threads give the same bits, all of them numbers.
pub fn same_bits(
    params: &Params<f32>,
    inputs: &[Tensor<f32>],
    training: Option<Key>,
    forward: impl Fn(&mut Tape<f32>, &Params<f32>, &[Var]) -> Result<Var>,
) {
    let with = |threads| with_local_limit(threads, || run(params, inputs, training, &forward).unwrap());
    let one = with(1);
    let numbers = one.y.iter().chain(one.dinputs.iter().chain(&one.dparams).flatten().flatten());
    assert!(numbers.into_iter().all(|x| !x.is_nan()), "a stale or undefined number");
    // Numbers that are not NaN and compare equal differ by the sign of zero at most.
    assert!([2, 3, 7].into_iter().all(|threads| with(threads) == one), "the number of threads shows");
}

/// Fails unless no rows give no result and zero gradients for every parameter.
pub fn no_rows(
    params: &Params<f32>,
    inputs: &[Tensor<f32>],
    training: Option<Key>,
    forward: impl Fn(&mut Tape<f32>, &Params<f32>, &[Var]) -> Result<Var>,
) {
    let Outcome { y, dinputs, dparams } = run(params, inputs, training, forward).unwrap();
    assert!(y.is_empty() && dinputs.iter().all(|dx| dx.as_ref().is_some_and(|dx| dx.is_empty())));
    assert!(dparams.iter().all(|dw| dw.as_ref().is_some_and(|dw| dw.iter().all(|&g| g == 0.0))), "{dparams:?}");
}
