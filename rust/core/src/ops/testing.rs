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

impl<T: Float> Outcome<T> {
    /// Value and gradients, one after the other.
    pub fn parts(self) -> Vec<Vec<f64>> {
        let gradients = self.dinputs.into_iter().chain(self.dparams).map(|gradient| gradient.expect("a gradient"));
        std::iter::once(self.y).chain(gradients).map(|part| part.iter().map(|x| x.to_f64()).collect()).collect()
    }
}

/// Runs forward and backward for a random `dy`. The pool holds NaN before, so that a buffer which is not written shows.
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

/// Fails unless the operation gives in f32 what it gives in f64, value and gradients.
macro_rules! agrees {
    ($name:literal, $shapes:expr, $inputs:expr, |$tape:ident, $params:ident, $ids:ident, $x:ident| $body:expr) => {{
        let (single, $ids) = params::<f32>($shapes);
        let double = single.cast::<f64>().unwrap();
        let inputs: Vec<Tensor<f32>> = $inputs.iter().zip(1..).map(|(&(r, c), seed)| normal(r, c, seed)).collect();
        let doubled = |x: &Tensor<f32>| {
            let values: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            Tensor::from_slice(x.rows(), x.cols(), &values).unwrap()
        };
        let inputs64: Vec<Tensor<f64>> = inputs.iter().map(doubled).collect();
        for training in [None, Some(Key::new(3))] {
            let single = run(&single, &inputs, training, |$tape, $params, $x| $body).unwrap().parts();
            let double = run(&double, &inputs64, training, |$tape, $params, $x| $body).unwrap().parts();
            for (part, (single, double)) in single.iter().zip(&double).enumerate() {
                assert_eq!(single.len(), double.len());
                for (i, (single, double)) in single.iter().zip(double).enumerate() {
                    let error = (single - double).abs() / double.abs().max(1.0);
                    assert!(error < 2e-5, "{}, part {part}, {i}: {single} instead of {double}", $name);
                }
            }
        }
    }};
}

#[test]
fn every_operation_gives_in_f32_what_it_gives_in_f64() {
    use super::*;
    let rows = [(70, 37)];
    for kind in [Activation::Relu, Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
        agrees!("activation", &[], rows, |tape, _p, _i, x| activation(tape, x[0], kind));
        agrees!("linear_activation", &[&[21, 37], &[21]], rows, |tape, p, i, x| {
            linear_activation(tape, p, x[0], &i[..1], &i[1..], kind, (5, 0.3))
        });
    }
    for gate in [Gate::Glu, Gate::Swiglu] {
        agrees!("gated", &[], [(70, 74)], |tape, _p, _i, x| gated(tape, x[0], gate));
    }
    agrees!("linear", &[&[21, 37], &[21]], rows, |tape, p, i, x| linear(tape, p, x[0], &i[..1], &i[1..]));
    agrees!("layer_norm", &[&[37], &[37]], rows, |tape, p, i, x| layer_norm(
        tape,
        p,
        x[0],
        Some(i[0]),
        Some(i[1]),
        1e-5
    ));
    agrees!("rms_norm", &[&[37]], rows, |tape, p, i, x| rms_norm(tape, p, x[0], Some(i[0]), 1e-5));
    agrees!("batch_norm", &[&[37], &[37]], rows, |tape, p, i, x| {
        batch_norm(tape, p, x[0], Some(i[0]), Some(i[1]), None, 1e-5)
    });
    agrees!("softmax", &[], [(9, 1100)], |tape, _p, _i, x| softmax(tape, x[0]));
    agrees!("residual", &[], [(70, 37), (70, 37)], |tape, _p, _i, x| residual(tape, x[0], x[1], 5, 0.3));
    agrees!("dropout", &[], rows, |tape, _p, _i, x| dropout(tape, x[0], 5, 0.3));
    let ids: Vec<u32> = (0..70).map(|i| i * i % 11).collect();
    agrees!("embedding", &[&[11, 37]], [(0, 0); 0], |tape, p, i, _x| embedding(tape, p, i[0], &ids, 6.0));
    agrees!("cross_entropy", &[], [(70, 11)], |tape, _p, _i, x| Ok(cross_entropy(tape, x[0], &ids, 0.1)?.loss));
    agrees!("linear_cross_entropy", &[&[11, 37], &[11]], rows, |tape, p, i, x| {
        Ok(linear_cross_entropy(tape, p, x[0], i[0], Some(i[1]), &ids, 0.1)?.loss)
    });
}

#[test]
fn what_is_computed_again_has_the_same_bits() {
    use super::*;
    type Apply = fn(&mut Tape<f32>, &Params<f32>, Var, Option<ParamId>) -> Result<Var>;
    let operations: [(Apply, usize); 9] = [
        (|tape, _, x, _| activation(tape, x, Activation::Relu), 22),
        (|tape, _, x, _| activation(tape, x, Activation::Gelu), 22),
        (|tape, _, x, _| activation(tape, x, Activation::GeluTanh), 22),
        (|tape, _, x, _| activation(tape, x, Activation::Silu), 22),
        (|tape, _, x, _| gated(tape, x, Gate::Glu), 11),
        (|tape, _, x, _| gated(tape, x, Gate::Swiglu), 11),
        (|tape, params, x, w| layer_norm(tape, params, x, w, w, 1e-5), 22),
        (|tape, params, x, w| rms_norm(tape, params, x, w, 1e-5), 22),
        (|tape, params, x, w| batch_norm(tape, params, x, w, w, None, 1e-5), 22),
    ];
    for (i, (apply, cols)) in operations.into_iter().enumerate() {
        let (params, ids) = params::<f32>(&[&[5, cols], &[22]]);
        for weight in [None, Some(ids[1])] {
            // A layer of two: in a scope the result of the first is dropped, and the second reads it in its backward.
            let layer = |tape: &mut Tape<f32>, params: &Params<f32>, x: &[Var], inner: &mut Option<Var>| {
                let y = apply(tape, params, x[0], weight)?;
                *inner = Some(y);
                linear(tape, params, y, &ids[..1], &[])
            };
            let kept = run(&params, &[normal(70, 22, 1)], None, |tape, params, x| layer(tape, params, x, &mut None));
            let dropped = run(&params, &[normal(70, 22, 1)], None, |tape, params, x| {
                let mut inner = None;
                let y = tape.scope(|tape| layer(tape, params, x, &mut inner))?;
                assert!(tape.value(inner.unwrap()).is_err(), "operation {i} keeps its output");
                Ok(y)
            });
            assert_eq!(kept.unwrap(), dropped.unwrap(), "operation {i}");
        }
    }
}
