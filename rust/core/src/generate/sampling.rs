//! Drawing the next token from the model's distribution, or from the likely part of it.

use crate::ensure;
use crate::error::Result;
use crate::kernel;
use crate::kernels::lanes::map;
use crate::kernels::top_k::{Entry, Finite, top_k};
use crate::rng::Key;
use crate::simd::math;
use std::cmp::Ordering;

/// How tokens are drawn. The steps follow one another as in Hugging Face's `generate`, each on what the last one left:
///
/// 1. w = e^((x − max x) / temperature), x the logits;
/// 2. `top_k` tokens are kept: the likeliest, the lower id first among equals (Fan et al. 2018);
/// 3. the fewest likeliest tokens whose w make up `top_p` of all are kept (Holtzman et al. 2020);
/// 4. tokens with w ≥ `min_p` · max w are kept (Nguyen et al. 2024);
/// 5. with u uniform in [0, 1), the token is the first, ids going up, at which the sum of w exceeds u · Σ w.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Where u comes from.
    pub seeds: Seeds,
    /// Above 0; below 1 favours likely tokens.
    pub temperature: f64,
    /// How many tokens to choose from.
    pub top_k: Option<usize>,
    /// How much of the probability to choose from, in (0, 1].
    pub top_p: Option<f64>,
    /// How likely a token must be, compared with the likeliest, in [0, 1].
    pub min_p: Option<f64>,
}

/// u is a function of a source's seed, the number of the hypothesis among those of its source, and the place of the token.
#[derive(Clone, Debug, PartialEq)]
pub enum Seeds {
    /// Row i uses (seed, i).
    Shared(u64),
    /// Each row uses (its seed, 0), so that it draws the same wherever it stands.
    Each(Vec<u64>),
}

impl Seeds {
    /// The key of row `i` of a call, which is source `source` of all.
    pub(super) fn key(&self, i: usize, source: usize) -> Key {
        match self {
            Seeds::Shared(seed) => Key::new(*seed).fold(source as u64),
            Seeds::Each(seeds) => Key::new(seeds[i]).fold(0),
        }
    }
}

/// So many tokens are sorted, or inserted one by one into a list, rather than divided further.
const HEAD: usize = 64;

impl Sampling {
    pub(super) fn check(&self, sources: Option<usize>) -> Result<()> {
        let Sampling { seeds, temperature, top_k, top_p, min_p } = self;
        ensure!(
            temperature.is_finite() && *temperature > 0.0,
            Config,
            "argument `temperature`: expected a number above 0, got {temperature}; leave it out for the likeliest tokens"
        );
        ensure!(*top_k != Some(0), Config, "argument `top_k`: expected at least 1, got 0");
        for (name, share, least) in [("top_p", top_p, f64::MIN_POSITIVE), ("min_p", min_p, 0.0)] {
            if let Some(share) = share {
                ensure!(
                    (least..=1.0).contains(share),
                    Config,
                    "argument `{name}`: expected a share above 0, at most 1, got {share}"
                );
            }
        }
        if let (Seeds::Each(seeds), Some(n)) = (seeds, sources) {
            ensure!(
                seeds.len() == n,
                Shape,
                "argument `seed`: expected one for each of {n} sources, got {}",
                seeds.len()
            );
        }
        Ok(())
    }

    /// The column drawn from a row of logits with these edits (see [`top_k`]); `None` where nothing can be.
    pub(super) fn draw(&self, row: &[f32], edits: &[(u32, f32)], uniform: f64) -> Option<u32> {
        if let Some(k) = self.top_k {
            return self.draw_from(&largest(row, edits, k.min(row.len())), uniform);
        }
        let mut first = [Entry::NONE];
        top_k::<f32, Finite<f32>>(&mut first, row, edits);
        let mut w = row.to_vec();
        edits.iter().for_each(|&(id, value)| w[id as usize] = value);
        self.draw_by(first[0].value, w, 0.., uniform)
    }

    /// The same from the `top_k` largest entries of the edited row, largest first.
    pub(super) fn draw_from(&self, best: &[Entry], uniform: f64) -> Option<u32> {
        let max = best.first()?.value;
        let mut by_id: Vec<_> = best.iter().map(|entry| (entry.id, entry.value)).collect();
        by_id.sort_unstable_by_key(|&(id, _)| id);
        let (ids, logits): (Vec<u32>, _) = by_id.into_iter().unzip();
        self.draw_by(max, logits, ids.into_iter(), uniform)
    }

    /// The same from logits of these ids, which go up; `max` is the largest.
    fn draw_by(&self, max: f32, mut logits: Vec<f32>, ids: impl Iterator<Item = u32>, uniform: f64) -> Option<u32> {
        if max == f32::NEG_INFINITY {
            return None;
        }
        weights(&mut logits, max, self.inverse_temperature());
        let mut kept: Vec<(u32, f32)> = ids.zip(logits).collect();
        if let Some(top_p) = self.top_p.filter(|&top_p| top_p < 1.0) {
            keep_nucleus(&mut kept, top_p);
        }
        let least = self.min_p.unwrap_or(0.0);
        kept.retain(|&(_, w)| w > 0.0 && f64::from(w) >= least); // the largest w is e⁰
        let goal = uniform * sum(&kept);
        let mut so_far = 0.0;
        let drawn = kept.iter().find(|&&(_, w)| {
            so_far += f64::from(w);
            so_far > goal
        });
        drawn.or(kept.last()).map(|&(id, _)| id)
    }

    fn inverse_temperature(&self) -> f32 {
        // Never ∞, which would make 0 · ∞ of the likeliest.
        ((1.0 / self.temperature) as f32).min(f32::MAX)
    }
}

kernel! {
    /// e^((x − max) · inverse), in the place of x.
    fn weights<'a, T>(s: S; x: &'a mut [T], max: T, inverse: T) {
        let (max, inverse) = (s.splat(max), s.splat(inverse));
        map(s, [x], [], #[inline(always)] |[x], []| [math::exp(s, s.mul(s.sub(x, max), inverse))]);
    }
}

/// The `k` largest entries of an edited row, largest first, the lower id first among equals.
fn largest(row: &[f32], edits: &[(u32, f32)], k: usize) -> Vec<Entry> {
    let mut best = vec![Entry::NONE; k];
    if k <= HEAD {
        top_k::<f32, Finite<f32>>(&mut best, row, edits);
    } else {
        // Inserting one by one into a long list would take longer than sorting.
        best = (0..).zip(row).map(|(id, &value)| Entry { id, value }).collect();
        edits.iter().for_each(|&(id, value)| best[id as usize].value = value);
    }
    best.retain(|entry| entry.value > f32::NEG_INFINITY);
    // Stable; +0 and −0 are equal.
    best.sort_by(|a, b| b.value.partial_cmp(&a.value).unwrap_or(Ordering::Equal));
    best.truncate(k);
    best
}

/// Keeps the fewest likeliest tokens that make up `top_p` of all weight.
fn keep_nucleus(kept: &mut Vec<(u32, f32)>, top_p: f64) {
    let likelier = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let (mut ranked, mut needed) = (kept.clone(), top_p * sum(kept));
    // The first `low` are in, those from `high` on are not. First a small head, which mostly is enough; then halves.
    let (mut low, mut high) = (0, ranked.len());
    let mut middle = HEAD.min(high);
    while high - low > HEAD {
        ranked[low..high].select_nth_unstable_by(middle - low, likelier);
        let half = sum(&ranked[low..middle]);
        if half >= needed {
            high = middle;
        } else {
            (low, needed) = (middle, needed - half);
        }
        middle = low + (high - low) / 2;
    }
    ranked[low..high].sort_unstable_by(likelier);
    let last = ranked[low..high].iter().find(|&&(_, w)| {
        needed -= f64::from(w);
        needed <= 0.0
    });
    if let Some(&last) = last {
        kept.retain(|token| likelier(token, &last).is_le());
    }
}

fn sum(kept: &[(u32, f32)]) -> f64 {
    kept.iter().map(|&(_, w)| f64::from(w)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> Sampling {
        Sampling { seeds: Seeds::Shared(0), temperature: 1.0, top_k: None, top_p: None, min_p: None }
    }

    /// Logits with probabilities 0.1, 0.4, 0.3, 0.2.
    fn row() -> Vec<f32> {
        [0.1f32, 0.4, 0.3, 0.2].map(f32::ln).to_vec()
    }

    #[test]
    fn every_token_has_its_share_of_the_unit_interval() {
        let draws = |options: &Sampling, edits: &[(u32, f32)]| {
            let at = [0.0, 0.05, 0.15, 0.45, 0.55, 0.75, 0.85, 0.999];
            at.map(|u| options.draw(&row(), edits, u).unwrap())
        };
        assert_eq!(draws(&sampling(), &[]), [0, 0, 1, 1, 2, 2, 3, 3]);
        assert_eq!(draws(&Sampling { top_k: Some(2), ..sampling() }, &[]), [1, 1, 1, 1, 1, 2, 2, 2]);
        // 0.4 + 0.3 are less than 0.75 of all, with 0.2 they are more.
        assert_eq!(draws(&Sampling { top_p: Some(0.75), ..sampling() }, &[]), [1, 1, 1, 2, 2, 2, 3, 3]);
        assert_eq!(draws(&Sampling { top_p: Some(1e-9), ..sampling() }, &[]), [1; 8]);
        assert_eq!(draws(&Sampling { min_p: Some(0.6), ..sampling() }, &[]), [1, 1, 1, 1, 1, 2, 2, 2]);
        // Nothing but token 3 is possible.
        let forbidden: Vec<_> = (0..3).map(|id| (id, f32::NEG_INFINITY)).collect();
        assert_eq!(draws(&sampling(), &forbidden), [3; 8]);
        assert_eq!(sampling().draw(&[f32::NEG_INFINITY; 3], &[], 0.5), None);
        // Cold: the likeliest alone. Hot: all alike.
        assert_eq!(draws(&Sampling { temperature: 1e-3, ..sampling() }, &[]), [1; 8]);
        assert_eq!(draws(&Sampling { temperature: 1e6, ..sampling() }, &[]), [0, 0, 0, 1, 2, 2, 3, 3]);
    }

    #[test]
    fn a_flat_nucleus_reaches_beyond_the_head() {
        let n = 10 * HEAD;
        let options = Sampling { top_p: Some(0.5), ..sampling() };
        let drawn = |u| options.draw(&vec![0.0; n], &[], u).unwrap();
        // Equal weights: the lower ids are kept, exactly half of them.
        assert_eq!((drawn(0.0), drawn(0.9999)), (0, n as u32 / 2 - 1));
        let options = Sampling { top_k: Some(2 * HEAD), ..sampling() };
        assert_eq!(options.draw(&vec![0.0; n], &[(0, f32::NEG_INFINITY)], 0.9999), Some(2 * HEAD as u32));
    }

    #[test]
    fn the_largest_are_the_same_however_many_are_asked_for() {
        // Few values, so that most are equal; a zero of either sign is one value.
        let row: Vec<f32> = (0..300).map(|i| [-0.0, 1.0, 0.0, -1.0, f32::NEG_INFINITY][i * i % 7 % 5]).collect();
        let ids = |k| largest(&row, &[(8, 1.0)], k).iter().map(|entry| entry.id).collect::<Vec<_>>();
        for k in [HEAD + 1, 150, 300] {
            assert!(ids(k).starts_with(&ids(HEAD)), "{k}");
            assert!(ids(300).starts_with(&ids(k)), "{k}");
        }
    }

    #[test]
    fn frequencies_are_the_probabilities() {
        let n = 20_000;
        let mut counts = [0.0; 4];
        for i in 0..n {
            counts[sampling().draw(&row(), &[], Key::new(5).uniform(i)).unwrap() as usize] += 1.0 / n as f64;
        }
        assert!(counts.iter().zip([0.1, 0.4, 0.3, 0.2]).all(|(a, b)| (a - b).abs() < 0.01), "{counts:?}");
    }
}
