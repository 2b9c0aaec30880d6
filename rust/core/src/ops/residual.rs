//! The residual connection with dropout on the branch, and both alone.

use crate::ensure;
use crate::error::Result;
use crate::kernels::dropout::dropout_rows;
use crate::kernels::elementwise::{add_into, multiple};
use crate::profile::{self, Work};
use crate::rng::Dropout;
use crate::simd::Float;
use crate::tape::{Backward, Operation, Tape, Tensor, Var};

/// z = x + dropout(y). `site` is the number of this place in the model (see [`crate::tape::Builder::site`]).
pub fn residual<T: Float>(tape: &mut Tape<T>, x: Var, y: Var, site: u32, p: f64) -> Result<Var> {
    let drawn = draw(tape, "residual", site, p)?;
    sum(tape, "residual", Some(x), y, drawn)
}

/// z = x + y
pub fn add<T: Float>(tape: &mut Tape<T>, x: Var, y: Var) -> Result<Var> {
    sum(tape, "add", Some(x), y, None)
}

/// In training, drops elements with probability `p` and scales the others by 1 / (1 − p); else `x` itself.
pub fn dropout<T: Float>(tape: &mut Tape<T>, x: Var, site: u32, p: f64) -> Result<Var> {
    match draw(tape, "dropout", site, p)? {
        None => Ok(x),
        drawn => sum(tape, "dropout", None, x, drawn),
    }
}

/// Draws what a use of dropout drops; `None` where nothing is, as outside of training.
pub(super) fn draw<T: Float>(tape: &mut Tape<T>, op: &str, site: u32, p: f64) -> Result<Option<Dropout>> {
    ensure!(
        (0.0..1.0).contains(&p),
        Config,
        "{op}: argument `p`: expected a probability, at least 0 and below 1, got {p}"
    );
    Ok(tape.dropout(site, p))
}

fn sum<T: Float>(
    tape: &mut Tape<T>,
    name: &'static str,
    x: Option<Var>,
    y: Var,
    dropout: Option<Dropout>,
) -> Result<Var> {
    let (rows, cols) = (tape.value(y)?.rows(), tape.value(y)?.cols());
    let passes = 2 + usize::from(x.is_some());
    let _timed = profile::forward(name, [cols, 0], || Work::passes::<T>(passes, rows, cols));
    let mut z = tape.pool.tensor(rows, cols)?;
    let trunk = x.map(|x| tape.value(x)).transpose()?;
    if let Some(x) = trunk {
        let shape = (x.rows(), x.cols());
        ensure!(
            shape == (rows, cols),
            Shape,
            "{name}: argument `y`: expected the shape of `x`, {shape:?}, got ({rows}, {cols})"
        );
    }
    match (trunk, &dropout) {
        (x, Some(dropout)) => dropout_rows(&mut z, x.map(|x| &**x), tape.value(y)?, cols, dropout)?,
        (Some(x), None) => add_into(&mut z, x, tape.value(y)?)?,
        (None, None) => z.copy_from_slice(tape.value(y)?),
    }
    let wanted = tape.wants_any(&[y]) || tape.wants_any(x.as_slice());
    let z = tape.push(z, wanted);
    if wanted {
        tape.record(z, &[], Node { name, x, y, dropout });
    }
    Ok(z)
}

struct Node {
    name: &'static str,
    x: Option<Var>,
    y: Var,
    dropout: Option<Dropout>,
}

impl<T: Float> Operation<T> for Node {
    fn name(&self) -> &'static str {
        self.name
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dz: Tensor<T>) -> Result<()> {
        let Node { name, x, y, dropout } = *self;
        let (rows, cols) = (dz.rows(), dz.cols());
        let _timed = profile::backward(name, [cols, 0], || Work::passes::<T>(2, rows, cols));
        // dy = dropout(dz), drawn again: the same key gives the same mask.
        match &dropout {
            Some(dropout) if cx.wants(y) => {
                let mut dy = cx.pool.tensor(rows, cols)?;
                dropout_rows(&mut dy, None, &dz, cols, dropout)?;
                cx.give(y, dy)?;
            }
            Some(_) => {}
            None => cx.accumulate(y, rows, cols, |dy, beta| multiple(dy, beta, T::ONE, &dz))?,
        }
        // dx = dz
        match x {
            Some(x) => cx.give(x, dz),
            None => {
                cx.pool.recycle(dz);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::rng::Key;
    use crate::tape::{Params, Pool, gradcheck};

    #[test]
    fn gradients_equal_differences_with_and_without_dropout() {
        let (params, _) = testing::params(&[]);
        let inputs = [testing::normal(5, 7, 1), testing::normal(5, 7, 2)];
        for training in [None, Some(Key::new(3))] {
            gradcheck(&params, &inputs, training, |tape, _, x| residual(tape, x[0], x[1], 4, 0.3)).unwrap();
            gradcheck(&params, &inputs, training, |tape, _, x| {
                let y = add(tape, x[0], x[1])?;
                dropout(tape, y, 4, 0.3)
            })
            .unwrap();
            // The same variable on both sides, so that its gradients are added.
            gradcheck(&params, &inputs[..1], training, |tape, _, x| {
                let y = residual(tape, x[0], x[0], 4, 0.3)?;
                residual(tape, y, x[0], 4, 0.3)
            })
            .unwrap();
        }
    }

    #[test]
    fn evaluation_drops_nothing() {
        let mut tape = Tape::<f32>::evaluation(Pool::default());
        let (x, y) = (tape.constant(testing::normal(3, 5, 1)), tape.constant(testing::normal(3, 5, 2)));
        assert_eq!(dropout(&mut tape, x, 1, 0.5).unwrap(), x);
        let z = residual(&mut tape, x, y, 1, 0.5).unwrap();
        let sum: Vec<f32> =
            tape.value(x).unwrap().iter().zip(tape.value(y).unwrap().iter()).map(|(x, y)| x + y).collect();
        assert_eq!(tape.value(z).unwrap()[..], sum);
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, _) = testing::params::<f32>(&[]);
        let forward = |tape: &mut Tape<f32>, _: &Params<f32>, x: &[Var]| residual(tape, x[0], x[1], 4, 0.3);
        let inputs = |rows| [testing::normal(rows, 50, 1), testing::normal(rows, 50, 2)];
        testing::same_bits(&params, &inputs(1000), Some(Key::new(3)), forward);
        testing::no_rows(&params, &inputs(0), Some(Key::new(3)), forward);
    }

    #[test]
    fn wrong_arguments_are_named() {
        let mut tape = Tape::<f32>::training(Pool::default(), Key::new(0));
        let (x, y) = (tape.constant(testing::normal(3, 5, 1)), tape.constant(testing::normal(5, 3, 2)));
        let error = add(&mut tape, x, y).unwrap_err().to_string();
        assert!(error.contains("add: argument `y`: expected the shape of `x`, (3, 5), got (5, 3)"), "{error}");
        for p in [-0.1, 1.0, f64::NAN] {
            assert!(dropout(&mut tape, x, 0, p).unwrap_err().to_string().starts_with("dropout: argument `p`"));
        }
    }
}
