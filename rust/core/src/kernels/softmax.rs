//! Softmax over a row, the logarithm of its denominator, and the loss made of it.
//!
//! A row is read in blocks of [`BLOCK`] columns counted from column 0. The loss in training, `score` and decoding all use
//! [`log_sum_exp`], so that a token's log-probability has the same bits everywhere.

use super::lanes::{largest, map, sums, sweep};
use super::task_len;
use crate::error::Result;
use crate::kernel;
use crate::simd::{Float, Simd, math};
use crate::threads::for_each;

/// Columns that are summed relative to one maximum. Part of the numeric contract: another value gives other bits.
pub const BLOCK: usize = 512;

/// ln Σ eˣ of a row, as its maximum and the rest: x − max − ln Σ e^(x − max) keeps the digits that one number would lose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogSumExp<T> {
    /// The largest x.
    pub max: T,
    /// Σ e^(x − max)
    pub sum: T,
    /// Its logarithm.
    pub log: T,
}

/// What is learnt of a whole row.
pub trait Survey<T: Float> {
    /// Of no numbers.
    fn empty() -> Self;
    /// Takes in the next block of the row; returns the block's largest number. `#[inline(always)]`.
    fn add<S: Simd<T>>(&mut self, s: S, block: &[T]) -> T;
    /// All blocks are in.
    fn finish(self) -> Self;
}

impl<T: Float> Survey<T> for LogSumExp<T> {
    fn empty() -> Self {
        LogSumExp { max: T::NEG_INFINITY, sum: T::ZERO, log: T::NEG_INFINITY }
    }

    #[inline(always)]
    fn add<S: Simd<T>>(&mut self, s: S, block: &[T]) -> T {
        let highest = largest(s, block);
        self.raise(
            highest,
            #[inline(always)]
            |at| sums(s, [block], power(s, at)),
        );
        highest
    }

    fn finish(self) -> Self {
        LogSumExp { log: self.sum.ln(), ..self }
    }
}

impl<T: Float> LogSumExp<T> {
    /// The logarithm of softmax at an element x of the row.
    pub fn log_probability(&self, x: T) -> T {
        (x - self.max) - self.log
    }

    /// Raises the maximum to `highest`, that of a block, and adds the first of the block's sums. They are made from what
    /// the block's exponents are relative to.
    #[inline(always)]
    fn raise<const Q: usize>(&mut self, highest: T, sums: impl FnOnce(T) -> [T; Q]) -> [T; Q] {
        let before = self.max;
        self.max = if highest > before { highest } else { before };
        let shift = self.shift();
        let sums = sums(shift);
        self.sum = if before == self.max { self.sum + sums[0] } else { self.sum * (before - shift).exp() + sums[0] };
        sums
    }

    /// What exponents are relative to. Nothing but −∞ so far: any finite shift keeps the sum 0.
    #[inline(always)]
    fn shift(&self) -> T {
        if self.max == T::NEG_INFINITY { T::ZERO } else { self.max }
    }

    /// What makes a probability of e^(x − max), where `max` was the largest number up to that block.
    #[inline(always)]
    fn factor(&self, max: T) -> T {
        let rise = if max == self.max { T::ONE } else { (max - self.max).exp() };
        rise / self.sum
    }

    #[inline(always)]
    fn of<S: Simd<T>>(s: S, x: &[T]) -> Self {
        let mut lse = Self::empty();
        for block in x.chunks(BLOCK) {
            lse.add(s, block);
        }
        lse.finish()
    }
}

/// e^(x − at)
#[inline(always)]
fn power<T: Float, S: Simd<T>>(s: S, at: T) -> impl Fn([S::V; 1]) -> [S::V; 1] {
    let at = s.splat(at);
    #[inline(always)]
    move |[x]| [math::exp(s, s.sub(x, at))]
}

kernel! {
    /// ln Σ eˣ of one row. A NaN in the row makes it NaN.
    pub fn log_sum_exp<'a, T>(s: S; x: &'a [T]) -> LogSumExp<T> {
        LogSumExp::of(s, x)
    }
}

/// y = softmax(x), row by row.
pub fn softmax_forward<T: Float>(y: &mut [T], x: &[T], cols: usize) -> Result<()> {
    kernel! {
        fn rows<'a, T>(s: S; y: &'a mut [T], x: &'a [T], cols: usize) {
            let mut maxima = Vec::new();
            for (y, x) in y.chunks_mut(cols).zip(x.chunks(cols)) {
                let mut lse = LogSumExp::empty();
                maxima.clear();
                for (y, x) in y.chunks_mut(BLOCK).zip(x.chunks(BLOCK)) {
                    lse.raise(largest(s, x), #[inline(always)] |at| {
                        let power = power(s, at);
                        sweep(s, [y], [x], #[inline(always)] |_, _, x| (power(x), power(x)))
                    });
                    maxima.push(lse.max);
                }
                for (y, &max) in y.chunks_mut(BLOCK).zip(&maxima) {
                    let factor = s.splat(lse.factor(max));
                    map(s, [y], [], #[inline(always)] |[y], []| [s.mul(y, factor)]);
                }
            }
        }
    }
    let n = task_len(cols);
    for_each(y.chunks_mut(n).zip(x.chunks(n)), |(y, x)| rows(y, x, cols.max(1)))
}

/// dx = y · (dy − Σ dy · y), row by row, in the place of dy.
pub fn softmax_backward<T: Float>(dy_dx: &mut [T], y: &[T], cols: usize) -> Result<()> {
    kernel! {
        fn rows<'a, T>(s: S; dy: &'a mut [T], y: &'a [T], cols: usize) {
            for (dy, y) in dy.chunks_mut(cols).zip(y.chunks(cols)) {
                let [dot] = sums(s, [&*dy, y], #[inline(always)] |[dy, y]| [s.mul(dy, y)]);
                let dot = s.splat(dot);
                map(s, [dy], [y], #[inline(always)] |[dy], [y]| [s.mul(y, s.sub(dy, dot))]);
            }
        }
    }
    let n = task_len(cols);
    for_each(dy_dx.chunks_mut(n).zip(y.chunks(n)), |(dy, y)| rows(dy, y, cols.max(1)))
}

/// The target of a row that counts for nothing.
pub const IGNORE: u32 = u32::MAX;

/// What the loss of one row is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowLoss {
    /// (1 − ε) · nll + ε / V · Σ (−log p)
    pub smoothed: f64,
    /// −log p of the target.
    pub nll: f64,
}

/// A row of logits whose loss is being taken.
struct Loss<T> {
    lse: LogSumExp<T>,
    /// Σ (x − max) over the numbers seen so far, and how many they are.
    below: f64,
    seen: f64,
}

impl<T: Float> Loss<T> {
    fn empty() -> Self {
        Loss { lse: LogSumExp::empty(), below: 0.0, seen: 0.0 }
    }

    /// Takes in a block of `len` numbers, the largest `highest`, of which `sums` makes Σ e^(x − at) and Σ (x − at).
    #[inline(always)]
    fn add(&mut self, len: usize, highest: T, sums: impl FnOnce(T) -> [T; 2]) {
        let before = self.lse.shift().to_f64();
        let [_, here] = self.lse.raise(highest, sums);
        self.below += self.seen * (before - self.lse.shift().to_f64()) + here.to_f64();
        self.seen += len as f64;
    }

    /// All blocks are in.
    #[inline(always)]
    fn finish(self, of_target: T, smoothing: f64) -> (LogSumExp<T>, RowLoss) {
        let lse = self.lse.finish();
        let nll = -lse.log_probability(of_target).to_f64();
        let mut smoothed = nll;
        if smoothing > 0.0 {
            // Σ −log p = V · log − Σ (x − max)
            let uniform = lse.log.to_f64() - self.below / self.seen;
            smoothed = (1.0 - smoothing) * nll + smoothing * uniform;
        }
        (lse, RowLoss { smoothed, nll })
    }
}

/// The loss of rows of logits against their targets, with label smoothing ε uniform over the vocabulary
/// (Szegedy and others 2016). It is 0 where the target is [`IGNORE`].
pub fn cross_entropy_rows<T: Float>(
    losses: &mut [RowLoss],
    logits: &[T],
    targets: &[u32],
    cols: usize,
    smoothing: f64,
) -> Result<()> {
    kernel! {
        fn row<'a, T>(s: S; logits: &'a [T], target: usize, smoothing: f64) -> RowLoss {
            let mut loss = Loss::empty();
            for block in logits.chunks(BLOCK) {
                loss.add(block.len(), largest(s, block), #[inline(always)] |at| {
                    let (power, at) = (power(s, at), s.splat(at));
                    sums(s, [block], #[inline(always)] |[x]| [power([x])[0], s.sub(x, at)])
                });
            }
            loss.finish(logits[target], smoothing).1
        }
    }
    let n = task_len(cols);
    let rows = n / cols.max(1);
    for_each(losses.chunks_mut(rows).zip(logits.chunks(n)).zip(targets.chunks(rows)), |((losses, logits), targets)| {
        for ((loss, logits), &target) in losses.iter_mut().zip(logits.chunks(cols)).zip(targets) {
            *loss = match target {
                IGNORE => RowLoss::default(),
                target => row(logits, target as usize, smoothing),
            };
        }
    })
}

/// The same, and the logits are replaced by their gradients: dloss · (softmax − (1 − ε) · onehot(target) − ε / V), with the
/// `dloss` of each row; zeros where the target is [`IGNORE`].
pub fn cross_entropy_rows_backward<T: Float>(
    losses: &mut [RowLoss],
    logits: &mut [T],
    targets: &[u32],
    cols: usize,
    smoothing: f64,
    dloss: &[T],
) -> Result<()> {
    kernel! {
        // `maxima` is room for one number per block.
        fn row<'a, T>(
            s: S; logits: &'a mut [T], maxima: &'a mut Vec<T>, target: usize, smoothing: f64, dloss: T,
        ) -> RowLoss {
            let (v, of_target) = (logits.len() as f64, logits[target]);
            let mut loss = Loss::empty();
            maxima.clear();
            for block in logits.chunks_mut(BLOCK) {
                loss.add(block.len(), largest(s, block), #[inline(always)] |at| {
                    let (power, at) = (power(s, at), s.splat(at));
                    sweep(s, [block], [], #[inline(always)] |_, [x], []| {
                        let [e] = power([x]);
                        ([e], [e, s.sub(x, at)])
                    })
                });
                maxima.push(loss.lse.max);
            }
            let (lse, loss) = loss.finish(of_target, smoothing);
            let share = s.splat(-dloss * T::from_f64(smoothing / v));
            for (block, &max) in logits.chunks_mut(BLOCK).zip(&*maxima) {
                let factor = s.splat(dloss * lse.factor(max));
                map(s, [block], [], #[inline(always)] |[e], []| [s.mul_add(e, factor, share)]);
            }
            logits[target] -= dloss * T::from_f64(1.0 - smoothing);
            loss
        }
    }
    let n = task_len(cols);
    let rows = n / cols.max(1);
    let tasks = losses.chunks_mut(rows).zip(logits.chunks_mut(n)).zip(targets.chunks(rows).zip(dloss.chunks(rows)));
    for_each(tasks, |((losses, logits), (targets, dloss))| {
        let mut maxima = Vec::new();
        let rows = losses.iter_mut().zip(logits.chunks_mut(cols)).zip(targets.iter().zip(dloss));
        for ((loss, logits), (&target, &dloss)) in rows {
            if target != IGNORE {
                *loss = row(logits, &mut maxima, target as usize, smoothing, dloss);
            } else {
                *loss = RowLoss::default();
                logits.fill(T::ZERO);
            }
        }
    })
}

/// The log-probability of each row's target; 0 where it is [`IGNORE`].
pub fn log_probabilities<T: Float>(log_p: &mut [T], logits: &[T], targets: &[u32], cols: usize) -> Result<()> {
    let n = task_len(cols);
    let rows = n / cols.max(1);
    for_each(log_p.chunks_mut(rows).zip(logits.chunks(n)).zip(targets.chunks(rows)), |((log_p, logits), targets)| {
        for ((log_p, logits), &target) in log_p.iter_mut().zip(logits.chunks(cols)).zip(targets) {
            *log_p = match target {
                IGNORE => T::ZERO,
                target => log_sum_exp(logits).log_probability(logits[target as usize]),
            };
        }
    })
}

/// y = ln softmax(x), row by row, in the place of x, with the bits of [`LogSumExp::log_probability`].
pub fn log_softmax<T: Float>(x_y: &mut [T], cols: usize) -> Result<()> {
    kernel! {
        fn rows<'a, T>(s: S; x: &'a mut [T], cols: usize) {
            for x in x.chunks_mut(cols) {
                let lse = LogSumExp::of(s, x);
                let (max, log) = (s.splat(lse.max), s.splat(lse.log));
                map(s, [x], [], #[inline(always)] |[x], []| [s.sub(s.sub(x, max), log)]);
            }
        }
    }
    for_each(x_y.chunks_mut(task_len(cols)), |x| rows(x, cols.max(1)))
}

/// [`softmax_forward`] in plain words.
pub fn softmax_reference<T: Float>(y: &mut [T], x: &[T], cols: usize) {
    for (y, x) in y.chunks_mut(cols).zip(x.chunks(cols)) {
        let max = x.iter().fold(f64::NEG_INFINITY, |max, x| max.max(x.to_f64()));
        let sum: f64 = x.iter().map(|x| libm::exp(x.to_f64() - max)).sum();
        y.iter_mut().zip(x).for_each(|(y, x)| *y = T::from_f64(libm::exp(x.to_f64() - max) / sum));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, normal};

    fn check<T: Float>(rows: usize, cols: usize, tolerance: f64) {
        let x: Vec<T> = normal::<T>(rows * cols, 3).into_iter().map(|x| x * T::from_f64(8.0)).collect();
        let (mut y, mut expected) = (vec![T::NAN; x.len()], vec![T::NAN; x.len()]);
        softmax_forward(&mut y, &x, cols).unwrap();
        softmax_reference(&mut expected, &x, cols);
        assert_close(&y, &expected, tolerance);

        let mut log_y = x.clone();
        log_softmax(&mut log_y, cols).unwrap();
        for (log_y, x) in log_y.chunks(cols).zip(x.chunks(cols)) {
            let lse = log_sum_exp(x);
            assert!(log_y.iter().zip(x).all(|(&y, &x)| y == lse.log_probability(x)));
        }

        // The loss and its gradient against the same softmax.
        let targets: Vec<u32> = (0..rows).map(|r| if r % 4 == 3 { IGNORE } else { (r * 5 % cols) as u32 }).collect();
        for smoothing in [0.0, 0.1] {
            let mut losses = vec![RowLoss { smoothed: f64::NAN, nll: f64::NAN }; rows];
            let mut gradient = x.clone();
            let dloss: Vec<T> = (0..rows).map(|r| T::from_f64(1.0 + r as f64)).collect();
            cross_entropy_rows_backward(&mut losses, &mut gradient, &targets, cols, smoothing, &dloss).unwrap();
            let mut again = vec![RowLoss { smoothed: f64::NAN, nll: f64::NAN }; rows];
            cross_entropy_rows(&mut again, &x, &targets, cols, smoothing).unwrap();
            assert_eq!(again, losses);
            for r in 0..rows {
                let row = r * cols..(r + 1) * cols;
                if targets[r] == IGNORE {
                    assert_eq!(losses[r], RowLoss::default());
                    assert!(gradient[row].iter().all(|g| *g == T::ZERO));
                    continue;
                }
                let target = targets[r] as usize;
                let reference = log_sum_exp(&x[row.clone()]);
                let nll = |c: usize| -reference.log_probability(x[r * cols + c]).to_f64();
                let uniform = (0..cols).map(nll).sum::<f64>() / cols as f64;
                assert_eq!(losses[r].nll, nll(target));
                assert!((losses[r].nll + libm::log(expected[r * cols + target].to_f64())).abs() < 20.0 * tolerance);
                let smoothed = (1.0 - smoothing) * nll(target) + smoothing * uniform;
                assert!((losses[r].smoothed - smoothed).abs() < 10.0 * tolerance, "{:?} {smoothed}", losses[r]);
                for (c, g) in gradient[row.clone()].iter().enumerate() {
                    let one_hot = if c == target { 1.0 - smoothing } else { 0.0 };
                    let unit = expected[row.start + c].to_f64() - one_hot - smoothing / cols as f64;
                    assert!((g.to_f64() - dloss[r].to_f64() * unit).abs() < 10.0 * tolerance);
                }
            }
        }
    }

    #[test]
    fn softmax_and_loss_equal_their_references() {
        for (rows, cols) in
            [(0, 3), (1, 1), (5, 2), (7, 9), (4, BLOCK - 1), (4, BLOCK), (4, BLOCK + 1), (5, 3 * BLOCK + 40)]
        {
            check::<f32>(rows, cols, 2e-6);
            check::<f64>(rows, cols, 1e-13);
        }
    }

    #[test]
    fn extremes_stay_finite_and_nan_stays_in_its_row() {
        let mut x = vec![f32::NEG_INFINITY; 3 * 700];
        (x[600], x[699]) = (80.0, 80.0); // the first block holds nothing but −∞
        x[700..1400].fill(-1e30);
        x[1500] = f32::NAN;
        let mut y = vec![0.0; x.len()];
        softmax_forward(&mut y, &x, 700).unwrap();
        assert_eq!((y[600], y[699], y[0]), (0.5, 0.5, 0.0));
        assert!(y[700..1400].iter().all(|y| (y - 1.0 / 700.0).abs() < 1e-9));
        assert!(y[1400..].iter().all(|y| y.is_nan()));
    }
}
