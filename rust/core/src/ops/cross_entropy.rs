//! Cross-entropy with label smoothing, summed or of each row, alone and fused with the projection that makes the logits.

use super::embedding::check_ids;
use super::expect_len;
use super::linear::{column_sums, matrix, product, product_compact, product_dw, product_dx, transposed};
use crate::error::{Result, Shape};
use crate::kernels::Beta;
use crate::kernels::elementwise::{copy, multiple, scale_assign};
use crate::kernels::gemm::Mat;
use crate::kernels::reduce::sum;
use crate::kernels::softmax::{RowLoss, cross_entropy_rows, cross_entropy_rows_backward, log_probabilities};
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, ParamId, Params, Stored, Tape, Tensor, Var};
use crate::{bail, ensure};

pub use crate::kernels::softmax::IGNORE;

/// A loss, summed over the rows whose target is not [`IGNORE`].
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// What is minimised, (1, 1): Σ (1 − ε) · nll + ε / V · Σ −log p, smoothed uniformly over V (Szegedy and others 2016).
    pub loss: Var,
    /// The same in f64.
    pub loss_sum: f64,
    /// Σ −log p of the targets.
    pub nll_sum: f64,
    /// Number of rows that count.
    pub tokens: usize,
}

impl CrossEntropy {
    /// From the rows that count.
    fn of<T: Float>(tape: &mut Tape<T>, losses: &[RowLoss], wanted: bool) -> Result<Self> {
        let total = |part: fn(&RowLoss) -> f64| sum(&losses.iter().map(part).collect::<Vec<_>>());
        let (loss_sum, nll_sum) = (total(|row| row.smoothed), total(|row| row.nll));
        let mut value = tape.pool.tensor(1, 1)?;
        value[0] = T::from_f64(loss_sum);
        Ok(CrossEntropy { loss: tape.push(value, wanted), loss_sum, nll_sum, tokens: losses.len() })
    }
}

fn check(op: &str, rows: usize, targets: &[u32], vocabulary: usize, smoothing: f64) -> Result<()> {
    ensure!(
        targets.len() == rows,
        Shape,
        "{op}: argument `targets`: expected one for each of {rows} rows, got {}",
        targets.len()
    );
    ensure!(
        (0.0..=1.0).contains(&smoothing),
        Config,
        "{op}: argument `smoothing`: expected a share from 0 to 1, got {smoothing}"
    );
    // An ignored target counts as 0 here; without a vocabulary there is nothing to choose from.
    ensure!(vocabulary > 0, Shape, "{op}: expected a vocabulary of at least one token, got none");
    check_ids(op, "targets", targets.iter().map(|&id| if id == IGNORE { 0 } else { id }), vocabulary)
}

/// The loss of logits (R, V) against one target per row.
pub fn cross_entropy<T: Float>(
    tape: &mut Tape<T>,
    logits: Var,
    targets: &[u32],
    smoothing: f64,
) -> Result<CrossEntropy> {
    let name = "cross_entropy";
    let losses = losses(name, tape, logits, targets, smoothing)?;
    let counted: Vec<_> =
        losses.into_iter().zip(targets).filter(|&(_, &t)| t != IGNORE).map(|(loss, _)| loss).collect();
    let wanted = tape.wants_any(&[logits]);
    let result = CrossEntropy::of(tape, &counted, wanted)?;
    if wanted {
        tape.record(result.loss, &[logits], OfLogits { name, logits, targets: targets.into(), smoothing });
    }
    Ok(result)
}

/// The losses (R, 1) of logits (R, V) against one target per row; 0 where it is [`IGNORE`]. Their sum is the loss of
/// [`cross_entropy`].
pub fn token_losses<T: Float>(tape: &mut Tape<T>, logits: Var, targets: &[u32], smoothing: f64) -> Result<Var> {
    let name = "token_losses";
    let losses = losses(name, tape, logits, targets, smoothing)?;
    let mut y = tape.pool.tensor(losses.len(), 1)?;
    y.iter_mut().zip(&losses).for_each(|(y, loss)| *y = T::from_f64(loss.smoothed));
    let wanted = tape.wants_any(&[logits]);
    let y = tape.push(y, wanted);
    if wanted {
        tape.record(y, &[logits], OfLogits { name, logits, targets: targets.into(), smoothing });
    }
    Ok(y)
}

fn losses<T: Float>(
    name: &'static str,
    tape: &Tape<T>,
    logits: Var,
    targets: &[u32],
    smoothing: f64,
) -> Result<Vec<RowLoss>> {
    let logits = tape.value(logits)?;
    let (rows, v) = (logits.rows(), logits.cols());
    check("cross_entropy", rows, targets, v, smoothing)?;
    let _timed = profile::forward(name, [v, 0], || Work::passes::<T>(1, rows, v));
    let mut losses = vec![RowLoss::default(); rows];
    cross_entropy_rows(&mut losses, logits, targets, v, smoothing)?;
    Ok(losses)
}

struct OfLogits {
    name: &'static str,
    logits: Var,
    targets: Box<[u32]>,
    smoothing: f64,
}

impl<T: Float> Operation<T> for OfLogits {
    fn name(&self) -> &'static str {
        self.name
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dloss: Tensor<T>) -> Result<()> {
        let logits = cx.value(self.logits)?;
        let (rows, v) = (logits.rows(), logits.cols());
        let _timed = profile::backward(self.name, [v, 0], || Work::passes::<T>(2, rows, v));
        let mut dlogits = cx.pool.tensor(rows, v)?;
        copy(&mut dlogits, logits)?;
        // One for each row, or for the sum of all.
        let each = if dloss.len() == rows { dloss.to_vec() } else { vec![dloss[0]; rows] };
        let mut losses = vec![RowLoss::default(); rows];
        // dlogits = dloss · (softmax − (1 − ε) · onehot(target) − ε / V)
        cross_entropy_rows_backward(&mut losses, &mut dlogits, &self.targets, v, self.smoothing, &each)?;
        cx.pool.recycle(dloss);
        cx.give(self.logits, dlogits)
    }
}

/// How many of these rows have their logits at a time. At least so many that packing the weight, anew for each chunk, is cheap
/// beside the products, and for small vocabularies some megabytes; less than twice as many, and no chunk is much shorter. What is
/// computed of a row does not depend on it.
fn chunk_rows(rows: usize, vocabulary: usize) -> usize {
    let least = ((1 << 20) / vocabulary).clamp(320, 4096);
    rows.div_ceil((rows / least).max(1)).max(1)
}

/// The size of the vocabulary of a projection (V, D) for x of D columns.
fn vocabulary<T: Float>(
    params: &Params<T>,
    op: &str,
    d: usize,
    weight: ParamId,
    bias: Option<ParamId>,
) -> Result<usize> {
    let shape = &params.layout().entry(weight).shape;
    let &[v, columns] = &shape[..] else {
        bail!(Shape, "{op}: argument `weight`: expected a matrix, got shape {}", Shape(shape))
    };
    ensure!(
        columns == d,
        Shape,
        "{op}: argument `weight`: expected (V, {d}) for `x` of {d} columns, got {}",
        Shape(shape)
    );
    bias.map_or(Ok(()), |bias| expect_len(params, op, "bias", bias, v, "the rows of `weight`"))?;
    Ok(v)
}

/// [`cross_entropy`] of x Wᵀ + b, without ever storing all the logits. The gradients are computed on the way, chunk by
/// chunk, while the chunk's logits exist; the backward pass only scales them.
pub fn linear_cross_entropy<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weight: ParamId,
    bias: Option<ParamId>,
    targets: &[u32],
    smoothing: f64,
) -> Result<CrossEntropy> {
    let (rows, d) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    let v = vocabulary(params, "linear_cross_entropy", d, weight, bias)?;
    check("linear_cross_entropy", rows, targets, v, smoothing)?;
    ensure!(
        params.layout().entry(weight).stored == Stored::F32,
        Unsupported,
        "linear_cross_entropy: a weight in {} gives no gradients; take those of the f32 model",
        params.stored().name()
    );
    let (w, b, precision) = (params.get(weight), bias.map(|bias| params.get(bias)), tape.precision);

    let _timed = profile::forward("linear_cross_entropy", [d, v], || Work::of_parts(rows));
    let counted: Vec<usize> = (0..rows).filter(|&row| targets[row] != IGNORE).collect();
    let all = counted.len() == rows;
    let wants = [
        tape.wants_any(&[x]),
        tape.wants(params, &[], &[weight]),
        bias.is_some_and(|bias| tape.wants(params, &[], &[bias])),
    ];
    let wanted = wants.contains(&true);
    let mut gradient = |i: usize, rows, cols| wants[i].then(|| tape.pool.tensor(rows, cols)).transpose();
    let (mut dx, mut dw, mut db) = (gradient(0, rows, d)?, gradient(1, v, d)?, gradient(2, 1, v)?);
    if !all && let Some(dx) = &mut dx {
        dx.fill(T::ZERO);
    }
    if counted.is_empty() {
        [&mut dw, &mut db].into_iter().flatten().for_each(|gradient| gradient.fill(T::ZERO));
    }

    let chunk = chunk_rows(counted.len(), v);
    let mut losses = vec![RowLoss::default(); counted.len()];
    for (i, (counted, losses)) in counted.chunks(chunk).zip(losses.chunks_mut(chunk)).enumerate() {
        let (n, beta) = (counted.len(), if i == 0 { Beta::Assign } else { Beta::Add });
        let targets: Vec<u32> = counted.iter().map(|&row| targets[row]).collect();
        // Where rows are ignored, the others are gathered.
        let mut gathered = tape.pool.tensor(if all { 0 } else { n }, d)?;
        let mut logits = tape.pool.tensor(n, v)?;
        let x = tape.value(x)?;
        if !all {
            counted.iter().zip(gathered.chunks_mut(d.max(1))).for_each(|(&row, to)| to.copy_from_slice(x.row(row)));
        }
        let x = if all { Mat::new(&x[counted[0] * d..], n, d)? } else { Mat::new(&gathered, n, d)? };
        profile::part("logits", [d, v], || Work::product::<T>(n, d, v))
            .run(|| product(precision, &mut logits, x, transposed(w, v, d)?, b, None, None))?;
        profile::part("softmax", [v, 0], || Work::passes::<T>(1 + usize::from(wanted), n, v)).run(|| match wanted {
            true => cross_entropy_rows_backward(losses, &mut logits, &targets, v, smoothing, &vec![T::ONE; n]),
            false => cross_entropy_rows(losses, &logits, &targets, v, smoothing),
        })?;
        let dlogits = &logits;
        if let Some(dw) = &mut dw {
            product_dw(precision, dw, beta, matrix(dlogits)?, x)?;
        }
        if let Some(dx) = &mut dx {
            if all {
                product_dx(precision, &mut dx[counted[0] * d..], Beta::Assign, matrix(dlogits)?, w, d)?;
            } else {
                product_dx(precision, &mut gathered, Beta::Assign, matrix(dlogits)?, w, d)?;
                let part = gathered.chunks(d.max(1));
                counted.iter().zip(part).for_each(|(&row, part)| dx[row * d..][..d].copy_from_slice(part));
            }
        }
        if let Some(db) = &mut db {
            let sums = column_sums(dlogits, &mut tape.pool)?;
            multiple(db, beta, T::ONE, &sums[..v])?;
            tape.pool.recycle(sums);
        }
        tape.pool.recycle(gathered);
        tape.pool.recycle(logits);
    }

    let result = CrossEntropy::of(tape, &losses, wanted)?;
    if wanted {
        tape.record(result.loss, &[], OfProjection { x, dx, params: [(Some(weight), dw), (bias, db)] });
    }
    Ok(result)
}

struct OfProjection<T> {
    x: Var,
    dx: Option<Tensor<T>>,
    params: [(Option<ParamId>, Option<Tensor<T>>); 2],
}

impl<T: Float> Operation<T> for OfProjection<T> {
    fn name(&self) -> &'static str {
        "linear_cross_entropy"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dloss: Tensor<T>) -> Result<()> {
        let scale = dloss[0];
        let _timed = profile::backward("linear_cross_entropy", [0, 0], || {
            let gradients = self.params.iter().filter_map(|(_, gradient)| gradient.as_ref());
            Work::passes::<T>(2, 1, gradients.map(|gradient| gradient.len()).sum())
        });
        cx.pool.recycle(dloss);
        if let Some(mut dx) = self.dx {
            if scale != T::ONE {
                scale_assign(&mut dx, scale)?;
            }
            cx.give(self.x, dx)?;
        }
        for (id, gradient) in self.params {
            if let (Some(id), Some(mut gradient)) = (id, gradient) {
                if scale != T::ONE {
                    scale_assign(&mut gradient, scale)?;
                }
                cx.give_param(id, gradient)?;
            }
        }
        Ok(())
    }
}

/// The log-probability of each target under softmax(x Wᵀ + b); 0 where it is [`IGNORE`]. No gradient. The bits are those
/// of the loss and of decoding.
pub fn token_logprobs<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    x: Var,
    weight: ParamId,
    bias: Option<ParamId>,
    targets: &[u32],
) -> Result<Vec<T>> {
    let (rows, d) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    let v = vocabulary(params, "token_logprobs", d, weight, bias)?;
    check("token_logprobs", rows, targets, v, 0.0)?;
    let _timed = profile::forward("token_logprobs", [d, v], || Work::product::<T>(rows, d, v));
    let (mut log_p, bias, compact) =
        (vec![T::ZERO; rows], bias.map(|bias| params.get(bias)), params.compact(&[weight])?);
    let chunk = chunk_rows(rows, v);
    for (i, (log_p, targets)) in log_p.chunks_mut(chunk).zip(targets.chunks(chunk)).enumerate() {
        let (mut logits, n) = (tape.pool.tensor(log_p.len(), v)?, log_p.len());
        let x = &tape.value(x)?[i * chunk * d..][..n * d];
        match &compact {
            Some(w) => product_compact(&mut logits, x, w, bias)?,
            None => {
                let w = transposed(params.get(weight), v, d)?;
                product(tape.precision, &mut logits, Mat::new(x, n, d)?, w, bias, None, None)?;
            }
        }
        log_probabilities(log_p, &logits, targets, v)?;
        tape.pool.recycle(logits);
    }
    Ok(log_p)
}

#[cfg(test)]
mod tests {
    use super::super::{linear, testing};
    use super::*;
    use crate::error::Error;
    use crate::tape::{Pool, gradcheck};

    /// Targets spread over the vocabulary; every `ignored`-th row counts for nothing.
    fn targets(rows: usize, v: usize, ignored: usize) -> Vec<u32> {
        (0..rows).map(|r| if r % ignored == ignored - 1 { IGNORE } else { (r * 7 % v) as u32 }).collect()
    }

    #[test]
    fn gradients_equal_differences() {
        for (rows, d, v) in [(1, 2, 1), (5, 3, 7), (6, 4, 530)] {
            let (params, ids) = testing::params(&[&[v, d], &[v]]);
            let (none, _) = testing::params(&[]);
            for (ignored, smoothing) in [(100, 0.0), (100, 0.1), (3, 0.1)] {
                let targets = targets(rows, v, ignored);
                gradcheck(&none, &[testing::normal(rows, v, 1)], None, |tape, _, x| {
                    Ok(cross_entropy(tape, x[0], &targets, smoothing)?.loss)
                })
                .unwrap();
                gradcheck(&params, &[testing::normal(rows, d, 1)], None, |tape, params, x| {
                    Ok(linear_cross_entropy(tape, params, x[0], ids[0], Some(ids[1]), &targets, smoothing)?.loss)
                })
                .unwrap();
            }
        }
    }

    /// The fused operation and its parts, over several chunks.
    fn fused_and_composed(ignored: usize, freeze: bool) -> [(testing::Outcome<f64>, CrossEntropy); 2] {
        let (rows, d, v) = (3 * 320 + 31, 6, 5000);
        assert_eq!((chunk_rows(rows, v), chunk_rows(319, v), chunk_rows(0, v)), (331, 319, 1));
        let (mut params, ids) = testing::params::<f64>(&[&[v, d], &[v]]);
        params.set_trainable(ids[0], !freeze);
        let (x, targets) = ([testing::normal(rows, d, 1)], targets(rows, v, ignored));
        [true, false].map(|fused| {
            let result = std::cell::Cell::new(None);
            let outcome = testing::run(&params, &x, None, |tape, params, x| {
                let loss = if fused {
                    linear_cross_entropy(tape, params, x[0], ids[0], Some(ids[1]), &targets, 0.1)?
                } else {
                    let logits = linear(tape, params, x[0], &[ids[0]], &[ids[1]])?;
                    cross_entropy(tape, logits, &targets, 0.1)?
                };
                result.set(Some(loss));
                Ok(loss.loss)
            });
            (outcome.unwrap(), result.get().unwrap())
        })
    }

    #[test]
    fn fused_equals_composed() {
        for (ignored, freeze) in [(usize::MAX, false), (5, false), (5, true)] {
            let [(fused, a), (composed, b)] = fused_and_composed(ignored, freeze);
            assert_eq!((a.loss_sum, a.nll_sum, a.tokens), (b.loss_sum, b.nll_sum, b.tokens));
            assert_eq!(fused.dparams[0].is_none(), freeze);
            for (fused, composed) in
                fused.dinputs.iter().chain(&fused.dparams).zip(composed.dinputs.iter().chain(&composed.dparams))
            {
                match (fused, composed) {
                    (Some(fused), Some(composed)) => crate::kernels::testing::assert_close(fused, composed, 1e-12),
                    neither => assert_eq!(*neither.0, *neither.1),
                }
            }
        }
    }

    #[test]
    fn log_probabilities_are_those_of_the_loss() {
        let (rows, d, v) = (300, 9, 700);
        let (params, ids) = testing::params::<f32>(&[&[v, d], &[v]]);
        let targets = targets(rows, v, 4);
        let mut tape = Tape::evaluation(Pool::default());
        let x = tape.constant(testing::normal(rows, d, 1));
        let log_p = token_logprobs(&mut tape, &params, x, ids[0], Some(ids[1]), &targets).unwrap();
        let loss = linear_cross_entropy(&mut tape, &params, x, ids[0], Some(ids[1]), &targets, 0.0).unwrap();
        let of_rows: Vec<f64> = (0..rows).filter(|&r| targets[r] != IGNORE).map(|r| f64::from(-log_p[r])).collect();
        assert_eq!(loss.nll_sum.to_bits(), sum(&of_rows).to_bits());
        assert_eq!((loss.tokens, loss.loss_sum), (of_rows.len(), loss.nll_sum));
        assert!((0..rows).all(|r| targets[r] != IGNORE || log_p[r] == 0.0));
    }

    #[test]
    fn threads_do_not_show_and_no_rows_are_fine() {
        let (params, ids) = testing::params::<f32>(&[&[5000, 12], &[5000]]);
        for (rows, ignored) in [(600, usize::MAX), (600, 7)] {
            let targets = targets(rows, 5000, ignored);
            testing::same_bits(&params, &[testing::normal(rows, 12, 1)], None, |tape, params, x| {
                Ok(linear_cross_entropy(tape, params, x[0], ids[0], Some(ids[1]), &targets, 0.1)?.loss)
            });
        }
        for targets in [&[][..], &[IGNORE, IGNORE]] {
            let x = [testing::normal(targets.len(), 12, 1)];
            let outcome = testing::run(&params, &x, None, |tape, params, x| {
                let loss = linear_cross_entropy(tape, params, x[0], ids[0], Some(ids[1]), targets, 0.1)?;
                assert_eq!((loss.loss_sum, loss.nll_sum, loss.tokens), (0.0, 0.0, 0));
                Ok(loss.loss)
            });
            let outcome = outcome.unwrap();
            assert_eq!(outcome.dinputs[0].as_ref().unwrap().len(), x[0].len());
            assert!(outcome.dinputs.iter().chain(&outcome.dparams).flatten().flatten().all(|&g| g == 0.0));
        }
    }

    #[test]
    fn wrong_arguments_are_named() {
        let (params, ids) = testing::params::<f32>(&[&[7, 4], &[6]]);
        let mut tape = Tape::evaluation(Pool::default());
        let x = tape.constant(testing::normal(2, 4, 1));
        let error = cross_entropy(&mut tape, x, &[0, 4], 0.0).unwrap_err();
        assert!(matches!(&error, Error::TokenOutOfRange(text) if text.contains("4 in row 1")), "{error}");
        assert!(cross_entropy(&mut tape, x, &[0], 0.0).unwrap_err().to_string().contains("each of 2 rows, got 1"));
        assert!(cross_entropy(&mut tape, x, &[0, 0], 1.5).unwrap_err().to_string().contains("`smoothing`"));
        let mut error = |weight, bias| {
            let result = linear_cross_entropy(&mut tape, &params, x, weight, bias, &[0, 0], 0.0);
            result.unwrap_err().to_string()
        };
        assert!(error(ids[0], Some(ids[1])).contains("`bias`: expected shape (7,), got (6,)"));
        assert!(error(ids[1], None).contains("`weight`: expected a matrix"));
    }

    const EACH: [u32; 5] = [3, 0, IGNORE, 6, 2];

    #[test]
    fn gradients_of_each_loss_equal_differences() {
        let (params, _) = testing::params(&[]);
        for smoothing in [0.0, 0.1] {
            gradcheck(&params, &[testing::normal(5, 7, 1)], None, |tape, _, x| {
                token_losses(tape, x[0], &EACH, smoothing)
            })
            .unwrap();
        }
    }

    #[test]
    fn each_loss_is_a_part_of_the_sum_and_zero_where_ignored() {
        let mut tape = Tape::<f64>::evaluation(Pool::default());
        let logits = tape.constant(testing::normal(5, 7, 1));
        let losses = token_losses(&mut tape, logits, &EACH, 0.1).unwrap();
        let whole = cross_entropy(&mut tape, logits, &EACH, 0.1).unwrap().loss_sum;
        let losses = tape.value(losses).unwrap();
        assert!(losses[2] == 0.0 && (losses.iter().sum::<f64>() - whole).abs() < 1e-12);
    }
}
