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
/// Weights that are summed together. Part of the numeric contract.
const BLOCK: usize = 512;
/// Weights are sorted by their upper bits into so many sizes, which reach from 1 to 2⁻³².
const SIZES: usize = 1024;
const SIZE_BITS: u32 = 18;

impl Sampling {
    pub(super) fn check(&self, sources: Option<usize>) -> Result<()> {
        let Sampling { seeds, temperature, top_k, top_p, min_p } = self;
        ensure!(
            temperature.is_finite() && *temperature > 0.0,
            Config,
            "argument `temperature`: expected a number above 0, got {temperature}; leave it out for the likeliest tokens"
        );
        ensure!(*top_k != Some(0), Config, "argument `top_k`: expected at least 1, got 0");
        for (name, share, least, expected) in
            [("top_p", top_p, f64::MIN_POSITIVE, "above 0, at most 1"), ("min_p", min_p, 0.0, "from 0 to 1")]
        {
            if let Some(share) = share {
                ensure!(
                    (least..=1.0).contains(share),
                    Config,
                    "argument `{name}`: expected a share {expected}, got {share}"
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
        self.draw_by(first[0].value, w, |at| at as u32, uniform)
    }

    /// The same from the `top_k` largest entries of the edited row, largest first.
    pub(super) fn draw_from(&self, best: &[Entry], uniform: f64) -> Option<u32> {
        let max = best.first()?.value;
        let mut by_id: Vec<_> = best.iter().map(|entry| (entry.id, entry.value)).collect();
        by_id.sort_unstable_by_key(|&(id, _)| id);
        let (ids, logits): (Vec<u32>, _) = by_id.into_iter().unzip();
        self.draw_by(max, logits, |at| ids[at], uniform)
    }

    /// The same from logits, ids going up; `max` is the largest, `id` says whose one is.
    fn draw_by(&self, max: f32, logits: Vec<f32>, id: impl Fn(usize) -> u32, uniform: f64) -> Option<u32> {
        if max == f32::NEG_INFINITY {
            return None;
        }
        let mut w = logits;
        weights(&mut w, max, self.inverse_temperature());
        let (top_p, min_p) = (self.top_p.unwrap_or(1.0), self.min_p.unwrap_or(0.0));
        if top_p == 1.0 && min_p == 0.0 {
            return pick(&w, uniform).map(id);
        }
        let (last, least) = if top_p < 1.0 { last_of_nucleus(&w, top_p * sum(&w)) } else { (w.len(), 0.0) };
        let (mut places, mut kept) = (Vec::new(), Vec::new());
        between(&w, least.max(f32::MIN_POSITIVE), f32::INFINITY, |at, w| {
            // The largest w is e⁰.
            if (w > least || at <= last) && f64::from(w) >= min_p {
                places.push(at);
                kept.push(w);
            }
        });
        pick(&kept, uniform).map(|at| id(places[at]))
    }

    fn inverse_temperature(&self) -> f32 {
        // Never ∞, which would make 0 · ∞ of the likeliest, and never 0, which would make ∞ · 0 of the forbidden.
        ((1.0 / self.temperature) as f32).clamp(f32::MIN_POSITIVE, f32::MAX)
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

/// The last, by weight and place, of the fewest likeliest tokens whose weights make up so much. Weights are 1 at most.
fn last_of_nucleus(w: &[f32], needed: f64) -> (usize, f32) {
    // The sums of weights of about one size, from 1 down; the very smallest are left over.
    let mut sums = [0.0; SIZES];
    between(w, smallest(SIZES - 1), f32::INFINITY, |_, w| sums[size(w)] += f64::from(w));
    let (mut so_far, mut least, mut most) = (0.0, f32::MIN_POSITIVE, f32::INFINITY);
    for (size, sum) in sums.into_iter().enumerate() {
        if so_far + sum >= needed {
            least = smallest(size);
            break;
        }
        (so_far, most) = (so_far + sum, smallest(size));
    }
    // The last one is of this size.
    let mut ranked = Vec::new();
    between(w, least, most, |at, w| ranked.push((at, w)));
    ranked.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let last = ranked.iter().find(|&&(_, w)| {
        so_far += f64::from(w);
        so_far >= needed
    });
    // Sums are rounded: then it is the last one of all.
    last.or(ranked.last()).copied().unwrap_or((w.len(), 0.0))
}

/// Which of the sizes a weight has: 32 to each power of 2.
fn size(w: f32) -> usize {
    (1f32.to_bits().saturating_sub(w.to_bits()) >> SIZE_BITS) as usize
}

/// The least weight of a size.
fn smallest(size: usize) -> f32 {
    f32::from_bits(1f32.to_bits() - ((size as u32 + 1) << SIZE_BITS) + 1)
}

/// Calls `with` the weights from `least` on, below `most`, and their places, which go up.
fn between(w: &[f32], least: f32, most: f32, mut with: impl FnMut(usize, f32)) {
    let is_in = |w: f32| w >= least && w < most;
    for (some, first) in w.chunks(HEAD).zip((0..).step_by(HEAD)) {
        // Without a branch for each: mostly there is none.
        if some.iter().fold(false, |any, &w| any | is_in(w)) {
            for (at, &w) in (first..).zip(some).filter(|&(_, &w)| is_in(w)) {
                with(at, w);
            }
        }
    }
}

/// The first place at which the sum of weights, places going up, exceeds `uniform` of all.
fn pick(w: &[f32], uniform: f64) -> Option<usize> {
    let sums: Vec<f64> = w.chunks(BLOCK).map(sum).collect();
    let (goal, mut before) = (uniform * sums.iter().sum::<f64>(), 0.0);
    for (block, (sum, some)) in sums.into_iter().zip(w.chunks(BLOCK)).enumerate() {
        if before + sum > goal {
            let at = some.iter().position(|&w| {
                before += f64::from(w);
                before > goal
            });
            // Sums are rounded: then it is the last one that is possible.
            return at.or(some.iter().rposition(|&w| w > 0.0)).map(|at| block * BLOCK + at);
        }
        before += sum;
    }
    w.iter().rposition(|&w| w > 0.0)
}

/// In chains that do not wait for each other.
fn sum(w: &[f32]) -> f64 {
    let mut chains = [0.0; 8];
    for some in w.chunks(chains.len()) {
        chains.iter_mut().zip(some).for_each(|(sum, &w)| *sum += f64::from(w));
    }
    chains.iter().sum()
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
        // However hot, all that is possible is alike.
        for temperature in [1e38, 1e46, f64::MAX] {
            let hottest = Sampling { temperature, ..sampling() };
            assert_eq!(draws(&hottest, &[]), [0, 0, 0, 1, 2, 3, 3, 3]);
            assert_eq!(draws(&hottest, &[(0, f32::NEG_INFINITY)]), [1, 1, 1, 2, 2, 3, 3, 3]);
        }
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

    /// The draw in plain words.
    fn plain(options: &Sampling, logits: &[f32], uniform: f64) -> Option<u32> {
        let w: Vec<f32> = logits.iter().map(|x| (x / options.temperature as f32).exp()).collect();
        let mut ranked: Vec<usize> = (0..w.len()).collect();
        ranked.sort_by(|&a, &b| w[b].total_cmp(&w[a]).then(a.cmp(&b)));
        let largest = f64::from(w[*ranked.first()?]);
        let sum = |ids: &[usize]| ids.iter().map(|&id| f64::from(w[id])).sum::<f64>();
        ranked.truncate(options.top_k.unwrap_or(w.len()));
        let needed = options.top_p.unwrap_or(1.0) * sum(&ranked);
        let fewest = (1..ranked.len()).find(|&n| sum(&ranked[..n]) >= needed).unwrap_or(ranked.len());
        ranked.truncate(fewest);
        ranked.retain(|&id| f64::from(w[id]) >= options.min_p.unwrap_or(0.0) * largest && w[id] > 0.0);
        ranked.sort();
        let drawn = (1..=ranked.len()).find(|&n| sum(&ranked[..n]) > uniform * sum(&ranked));
        drawn.map(|n| ranked[n - 1] as u32)
    }

    #[test]
    fn a_draw_is_the_plain_one_however_flat_or_steep() {
        let mut drawn = Vec::new();
        for (seed, spread) in [0.0, 0.01, 1.0, 8.0, 60.0, 400.0].into_iter().enumerate() {
            let key = Key::new(seed as u64);
            for n in [1, 7, 700, 1500] {
                // The likeliest has the logit 0; many are equal.
                let logits: Vec<f32> = (0..n).map(|i| -(key.below(i, 97) as f32 / 96.0) * spread).collect();
                let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let logits: Vec<f32> = logits.iter().map(|x| x - most).collect();
                for (i, (top_k, top_p, min_p)) in [
                    (None, None, None),
                    (None, Some(0.9), None),
                    (None, Some(1e-3), None),
                    (None, Some(1.0 - 1e-12), None),
                    (None, None, Some(0.3)),
                    (Some(5), Some(0.5), None),
                    (Some(300), Some(0.99), Some(0.01)),
                ]
                .into_iter()
                .enumerate()
                {
                    let options = Sampling { temperature: 0.7, top_k, top_p, min_p, ..sampling() };
                    for u in 0..8 {
                        let uniform = key.fold(n).fold(i as u64).uniform(u);
                        let found = options.draw(&logits, &[], uniform);
                        assert_eq!(found, plain(&options, &logits, uniform), "{n} {spread} {options:?} {uniform}");
                        drawn.extend(found);
                    }
                }
            }
        }
        drawn.sort();
        drawn.dedup();
        assert!(drawn.len() > 300, "{}", drawn.len());
    }

    #[test]
    fn the_last_that_is_possible_is_drawn_where_sums_are_rounded() {
        for zeros in [0, 3, BLOCK, 3 * BLOCK] {
            let w = [vec![0.1f32; BLOCK + 5], vec![0.0; zeros]].concat();
            for uniform in [1.0 - f64::EPSILON / 2.0, 1.0] {
                assert_eq!(pick(&w, uniform), Some(BLOCK + 4));
            }
        }
        assert_eq!((pick(&[], 0.5), pick(&[0.0; 9], 0.5), pick(&[0.0, 2.0], 0.0)), (None, None, Some(1)));
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
