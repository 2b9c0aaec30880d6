//! From rows of logits to the few likeliest tokens of each.

use crate::error::Result;
use crate::kernel;
use crate::kernels::softmax::log_sum_exp;
use crate::threads::for_each;

/// A token that may come next.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Token<T = f32> {
    pub id: u32,
    /// The model's log-probability; −∞ for what cannot be said.
    pub logprob: T,
}

/// Fills every row of `best` (R, k), k ≤ V, with the likeliest tokens of its row of `logits` (R, V): likeliest first, the
/// lower id first where logits are equal, −∞ where `forbidden` leaves fewer than k. Log-probabilities are those of the
/// whole row, forbidden ids included. The logits are spoilt. Returns the first row that is not finite, if there is one.
pub(super) fn likeliest(
    best: &mut [Token],
    k: usize,
    logits: &mut [f32],
    vocabulary: usize,
    forbidden: &[u32],
) -> Result<Option<usize>> {
    let mut finite = vec![false; logits.len() / vocabulary];
    for_each(best.chunks_mut(k).zip(logits.chunks_mut(vocabulary)).zip(&mut finite), |((best, logits), finite)| {
        let lse = log_sum_exp(&*logits);
        *finite = lse.max.is_finite() && lse.log.is_finite();
        for &id in forbidden {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        top_k(best, logits);
        best.iter_mut().for_each(|token| token.logprob = lse.log_probability(token.logprob));
    })?;
    Ok(finite.iter().position(|finite| !finite))
}

kernel! {
    /// The largest elements of a row, with their columns: value down, then column up. Neither NaN nor −∞ is taken.
    fn top_k<'a, T>(s: S; best: &'a mut [Token<T>], row: &'a [T]) {
        best.fill(Token { id: u32::MAX, logprob: T::NEG_INFINITY });
        let mut worst = T::NEG_INFINITY;
        for (i, x) in row.chunks(S::LANES).enumerate() {
            // Strictly above the worst: an equal one that came before has the lower column.
            if !s.any(s.lt(s.splat(worst), s.load_first(x, T::NEG_INFINITY))) {
                continue;
            }
            for (lane, &logprob) in x.iter().enumerate() {
                if logprob > worst {
                    let at = best.partition_point(|token| token.logprob >= logprob);
                    best[at..].rotate_right(1);
                    best[at] = Token { id: (i * S::LANES + lane) as u32, logprob };
                    worst = best[best.len() - 1].logprob;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Key;

    /// Sorts the whole row.
    fn reference(row: &[f32], k: usize) -> Vec<Token> {
        let mut all: Vec<Token> =
            row.iter().enumerate().map(|(id, &logprob)| Token { id: id as u32, logprob }).collect();
        all.retain(|token| token.logprob > f32::NEG_INFINITY);
        all.sort_by(|a, b| b.logprob.total_cmp(&a.logprob)); // stable: ids go up among equals
        all.resize(k.max(all.len()), Token { id: u32::MAX, logprob: f32::NEG_INFINITY });
        all.truncate(k);
        all
    }

    #[test]
    fn top_k_is_a_stable_sort() {
        for (n, k) in [(1, 1), (7, 3), (8, 8), (9, 2), (31, 31), (33, 5), (1000, 1), (1000, 17), (4099, 3)] {
            for values in [2, 10, 1 << 20] {
                let mut row: Vec<f32> = (0..n).map(|i| Key::new(n).below(i, values) as f32 - 3.0).collect();
                for special in 0..3 {
                    let mut best = vec![Token { id: 7, logprob: 7.0 }; k];
                    top_k(&mut best, &row);
                    assert_eq!(best, reference(&row, k), "{n} {k} {values} {special}");
                    // Then with −∞ in some places, then nearly everywhere.
                    row.iter_mut().skip(special).step_by(3 - special).for_each(|x| *x = f32::NEG_INFINITY);
                }
            }
        }
    }

    #[test]
    fn forbidden_tokens_keep_their_share_of_the_probability() {
        let mut logits = vec![0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0];
        let mut best = vec![Token { id: 0, logprob: 0.0 }; 6];
        let bad = likeliest(&mut best, 3, &mut logits, 4, &[0, 3, 99]).unwrap();
        assert_eq!(bad, None);
        assert_eq!(best.iter().map(|token| token.id).collect::<Vec<_>>(), [1, 2, u32::MAX, 2, 1, u32::MAX]);
        assert!((best[0].logprob + 4.0f32.ln()).abs() < 1e-6 && best[2].logprob == f32::NEG_INFINITY);
        assert!((best[3].logprob - best[4].logprob - 1.0).abs() < 1e-6);
    }

    #[test]
    fn rows_that_are_not_finite_are_named() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = vec![0.5; 30];
            logits[19] = bad;
            let mut best = vec![Token { id: 0, logprob: 0.0 }; 3];
            assert_eq!(likeliest(&mut best, 1, &mut logits, 10, &[9]).unwrap(), Some(1));
        }
        // One impossible token is no harm, nothing possible is.
        let mut logits = vec![0.0, f32::NEG_INFINITY, f32::NEG_INFINITY, f32::NEG_INFINITY];
        let mut best = vec![Token { id: 0, logprob: 0.0 }; 4];
        assert_eq!(likeliest(&mut best, 2, &mut logits, 2, &[]).unwrap(), Some(1));
        assert_eq!((best[0].id, best[1].logprob), (0, f32::NEG_INFINITY));
    }
}
