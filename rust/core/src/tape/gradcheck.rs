//! Gradients against central differences, in f64, projected on a random `dy`.

use super::{Grads, Params, Pool, Tape, Tensor, Var};
use crate::error::Result;
use crate::rng::Key;
use crate::{bail, ensure};

const STEP: f64 = 1e-5;
const TOLERANCE: f64 = 1e-6;
/// Elements tried per tensor; larger tensors are sampled.
const TRIES: usize = 64;

/// Checks the gradient of `forward` with respect to every input and every trainable parameter: the loss is the sum of
/// `dy * y` for a random `dy` (a plain sum would let a wrong softmax or norm pass). Also runs the backward pass twice
/// into the same gradients, which must double. `training` is the random key of a training pass.
/// The error names the tensor, the element and both values.
pub fn gradcheck(
    params: &Params<f64>,
    inputs: &[Tensor<f64>],
    training: Option<Key>,
    forward: impl Fn(&mut Tape<f64>, &Params<f64>, &[Var]) -> Result<Var>,
) -> Result<()> {
    let copy = |t: &Tensor<f64>| Tensor::from_slice(t.rows(), t.cols(), t);
    let tape = || match training {
        Some(key) => Tape::training(Pool::default(), key),
        None => Tape::recording(Pool::default()),
    };
    let project = |tensor: &Tensor<f64>| -> Result<Tensor<f64>> {
        let mut dy = copy(tensor)?;
        dy.iter_mut().enumerate().for_each(|(i, dy)| *dy = Key::new(0xD1).normal(i as u64));
        Ok(dy)
    };
    let loss = |params: &Params<f64>, inputs: &[Tensor<f64>]| -> Result<f64> {
        let mut tape = tape();
        let vars = inputs.iter().map(|x| Ok(tape.leaf(copy(x)?))).collect::<Result<Vec<_>>>()?;
        let y = forward(&mut tape, params, &vars)?;
        let y = tape.value(y)?;
        Ok(y.iter().zip(project(y)?.iter()).map(|(y, dy)| y * dy).sum())
    };

    let mut grads = Grads::new(params)?;
    let mut backward = || -> Result<Vec<Option<Tensor<f64>>>> {
        let mut tape = tape();
        let vars = inputs.iter().map(|x| Ok(tape.leaf(copy(x)?))).collect::<Result<Vec<_>>>()?;
        let y = forward(&mut tape, params, &vars)?;
        let dy = project(tape.value(y)?)?;
        let mut dvars = tape.backward(params, &mut grads, [(y, dy)])?;
        Ok(vars.into_iter().map(|v| dvars.take(v)).collect())
    };
    let dinputs = backward()?;
    backward()?;

    for (i, dx) in dinputs.iter().enumerate() {
        let Some(dx) = dx else { bail!(Internal, "gradcheck: input {i} got no gradient") };
        ensure!(dx.len() == inputs[i].len(), Internal, "gradcheck: the gradient of input {i} has another size");
        compare(&format!("input {i}"), dx, |e, step| {
            let mut moved = inputs.iter().map(copy).collect::<Result<Vec<_>>>()?;
            moved[i][e] += step;
            loss(params, &moved)
        })?;
    }
    for id in params.layout().ids().filter(|&id| params.is_trainable(id)) {
        let name = &params.layout().entry(id).name;
        let Some(twice) = grads.get(id) else { bail!(Internal, "gradcheck: `{name}` got no gradient") };
        let once: Vec<f64> = twice.iter().map(|g| g / 2.0).collect();
        compare(name, &once, |e, step| {
            let mut moved = params.cast::<f64>()?;
            let mut values = moved.get(id).to_vec();
            values[e] += step;
            moved.set(id, &values)?;
            loss(&moved, inputs)
        })?;
    }
    Ok(())
}

fn compare(what: &str, analytic: &[f64], loss_at: impl Fn(usize, f64) -> Result<f64>) -> Result<()> {
    let n = analytic.len();
    let chosen = Key::new(n as u64).permutation(n);
    for &e in chosen.iter().take(TRIES) {
        let numeric = (loss_at(e, STEP)? - loss_at(e, -STEP)?) / (2.0 * STEP);
        let error = (numeric - analytic[e]).abs() / numeric.abs().max(analytic[e].abs()).max(1.0);
        if error.is_nan() || error > TOLERANCE {
            bail!(Internal, "gradcheck: {what}[{e}]: backward gives {}, differences give {numeric}", analytic[e]);
        }
    }
    Ok(())
}
