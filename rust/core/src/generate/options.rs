//! What a caller may ask of a decoding.

use super::sampling::{Sampling, Seeds};
use crate::error::{Error, Result};
use crate::models::TransformerConfig;
use crate::rng::Key;
use crate::rows::Rows;
use crate::{bail, ensure};
use std::collections::BTreeMap;

/// A number of ids.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Length {
    /// The same for every source.
    Fixed(usize),
    /// ⌊a · S⌋ + b for a source of S ids, as in fairseq's `max_len_a` and `max_len_b`.
    Relative(f64, i64),
}

impl Length {
    /// The number for a source of so many ids; 0 where it would be negative.
    fn of(self, source: usize) -> usize {
        match self {
            Length::Fixed(n) => n,
            // What is too large for a number of ids becomes the largest.
            Length::Relative(a, b) => ((a * source as f64).floor() + b as f64) as usize,
        }
    }
}

/// How to decode. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// The most ids a hypothesis may have, BOS and EOS not counted. `None`: twice the length of its source plus 10, but
    /// no more than a learned position table serves.
    pub max_len: Option<Length>,
    /// The fewest ids a hypothesis may have: EOS cannot be said before.
    pub min_len: Length,
    /// Hypotheses of a source that are kept alive; 1 is greedy.
    pub beam: usize,
    /// Hypotheses of a source that are returned, best first: at most `beam`, and fewer where there are fewer. When
    /// sampling, so many are drawn, independently.
    pub n_best: usize,
    /// α in score = Σ log p / nᵅ, n the number of tokens with EOS: 0 compares sums, 1 compares means, more favours long ones.
    pub length_penalty: f64,
    /// The search of a source ends when `patience` · `beam` hypotheses are finished (Kasai et al. 2022); little patience
    /// ends it at the first.
    pub patience: f64,
    /// Draw tokens instead of searching for the likeliest.
    pub sampling: Option<Sampling>,
    /// θ: logits of tokens that a hypothesis holds already are divided by it if positive, multiplied otherwise (Keskar et
    /// al. 2019). 1 changes nothing.
    pub repetition_penalty: f64,
    /// No hypothesis holds the same sequence of so many ids twice (Paulus et al. 2018).
    pub no_repeat_ngram: Option<usize>,
    /// Tokens that are never chosen, beside BOS and PAD.
    pub suppress: Vec<u32>,
    /// Tokens that must stand at these places, counted from 0; whatever else is asked for. EOS may be one.
    pub forced: BTreeMap<usize, u32>,
    /// The ids that the hypotheses of each source begin with: none at all, or one list for each source.
    pub prefixes: Vec<Vec<u32>>,
    /// How many of the model's likeliest tokens to give at every step, beside the one chosen.
    pub alternatives: usize,
    /// Whether hypotheses come with scores and log-probabilities. Where they do not, one that is searched greedily, or drawn from the
    /// `top_k`, takes less time: not every logit need be known.
    pub scores: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions {
            max_len: None,
            min_len: Length::Fixed(0),
            beam: 1,
            n_best: 1,
            length_penalty: 1.0,
            patience: 1.0,
            sampling: None,
            repetition_penalty: 1.0,
            no_repeat_ngram: None,
            suppress: Vec::new(),
            forced: BTreeMap::new(),
            prefixes: Vec::new(),
            alternatives: 0,
            scores: true,
        }
    }
}

/// What the options say about one source.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Its number, for messages and for whoever waits for its hypotheses.
    pub source: usize,
    /// Its number of ids.
    pub(super) ids: usize,
    pub(super) max_len: usize,
    pub(super) min_len: usize,
    pub(super) prefix: Vec<u32>,
    /// Decides the tokens that are drawn.
    pub(super) key: Key,
}

impl Plan {
    /// The error of logits that are not finite, at a token of this source.
    pub(super) fn not_finite(&self, token: usize) -> Error {
        Error::NonFinite(format!(
            "decoding: token {token} of source {}: the logits are not finite; is there NaN in the weights?",
            self.source
        ))
    }
}

impl GenerateOptions {
    /// Hypotheses of a source that are decoded side by side.
    pub fn width(&self) -> usize {
        if self.sampling.is_some() { self.n_best } else { self.beam }
    }

    /// What all sources of a decoding share: all but that which [`GenerateOptions::plans`] gives to each.
    pub fn shared(&self) -> Self {
        let sampling = self.sampling.clone().map(|sampling| Sampling { seeds: Seeds::Shared(0), ..sampling });
        let (max_len, min_len, prefixes) = (None, Length::Fixed(0), Vec::new());
        GenerateOptions { max_len, min_len, prefixes, sampling, ..self.clone() }
    }

    /// Whether nobody asks how likely tokens are: neither the caller nor a search that compares hypotheses.
    pub(super) fn ids_alone(&self) -> bool {
        let one = self.width() == 1 && (self.sampling.is_some() || self.patience <= 1.0);
        one && !self.scores && self.alternatives == 0
    }

    /// score = Σ log p / nᵅ; 0 for no tokens.
    pub(super) fn score(&self, sum: f64, tokens: usize) -> f64 {
        sum / libm::pow(tokens.max(1) as f64, self.length_penalty)
    }

    /// Checks every field against the others and the model; `numbers` are those of the sources.
    pub fn plans(
        &self,
        config: &TransformerConfig,
        sources: &Rows,
        numbers: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<Plan>> {
        self.check(config, Some(sources.sequences()))?;
        // The last id is returned without being read, so BOS and `max_len - 1` ids need positions.
        let positions = config.longest();
        let mut plans = Vec::with_capacity(sources.sequences());
        for ((i, ids), source) in sources.lengths().enumerate().zip(numbers) {
            let max_len = self.max_len.map_or_else(|| Length::Relative(2.0, 10).of(ids).min(positions), |l| l.of(ids));
            let min_len = self.min_len.of(ids);
            let prefix = self.prefixes.get(i).cloned().unwrap_or_default();
            ensure!(max_len >= 1, Config, "max_len = 0 for source {source} of {ids} ids: expected at least 1");
            ensure!(
                max_len <= positions,
                Config,
                "max_len = {max_len} needs as many positions, the learned table has max_positions = {positions}; lower max_len"
            );
            for (what, n) in [("min_len =", min_len), ("a prefix of", prefix.len())] {
                ensure!(
                    n <= max_len,
                    Config,
                    "{what} {n} is above max_len = {max_len} of source {source}; raise max_len"
                );
            }
            let key = self.sampling.as_ref().map_or(Key::new(0), |sampling| sampling.seeds.key(i, source));
            plans.push(Plan { source, ids, max_len, min_len, prefix, key });
        }
        Ok(plans)
    }

    /// Checks what can be checked before the sources are known, or with their number what belongs to each of them.
    pub fn check(&self, config: &TransformerConfig, sources: Option<usize>) -> Result<()> {
        let GenerateOptions { beam, n_best, length_penalty, patience, .. } = *self;
        ensure!(beam >= 1, Config, "argument `beam`: expected at least 1, which is greedy, got 0");
        if let Some(sampling) = &self.sampling {
            ensure!(
                beam == 1,
                Config,
                "argument `beam`: sampling draws one token at a time, got {beam}; leave it out, n_best= draws several"
            );
            ensure!(n_best >= 1, Config, "argument `n_best`: expected at least 1, got 0");
            sampling.check(sources)?;
        } else {
            ensure!(
                (1..=beam).contains(&n_best),
                Config,
                "argument `n_best`: expected 1 to beam = {beam}, got {n_best}; raise beam"
            );
        }
        ensure!(
            length_penalty.is_finite() && length_penalty >= 0.0,
            Config,
            "argument `length_penalty`: expected a number that is not negative, got {length_penalty}"
        );
        for (name, number) in [("patience", patience), ("repetition_penalty", self.repetition_penalty)] {
            ensure!(
                number.is_finite() && number > 0.0,
                Config,
                "argument `{name}`: expected a number above 0, got {number}"
            );
        }
        for (name, length) in [("max_len", self.max_len), ("min_len", Some(self.min_len))] {
            if let Some(Length::Relative(a, _)) = length {
                ensure!(
                    a.is_finite() && a >= 0.0,
                    Config,
                    "argument `{name}`: expected a factor that is not negative, got ({a}, ..)"
                );
            }
        }
        ensure!(
            self.no_repeat_ngram != Some(0),
            Config,
            "argument `no_repeat_ngram`: expected at least 1, got 0; leave it out"
        );
        let vocabulary = config.tgt_vocab;
        ensure!(
            self.alternatives <= vocabulary,
            Config,
            "argument `alternatives`: expected at most the vocabulary, {vocabulary}, got {}",
            self.alternatives
        );
        if let Some(n) = sources {
            let given = self.prefixes.len();
            ensure!(
                given == 0 || given == n,
                Shape,
                "argument `prefixes`: expected one for each of {n} sources, got {given}"
            );
        }
        let known = |name: &str, id: u32| {
            ensure!(
                (id as usize) < vocabulary,
                TokenOutOfRange,
                "argument `{name}`: id {id} is outside the vocabulary of {vocabulary}"
            );
            Ok(())
        };
        self.suppress.iter().try_for_each(|&id| known("suppress", id))?;
        self.forced.values().try_for_each(|&id| known("forced", id))?;
        self.prefixes.iter().flatten().try_for_each(|&id| known("prefixes", id))?;
        for (name, id) in [("bos_id", Some(config.bos_id)), ("pad_id", config.pad_id), ("eos_id", Some(config.eos_id))]
        {
            if let Some(row) = self.prefixes.iter().position(|prefix| prefix.iter().any(|&token| Some(token) == id)) {
                bail!(Config, "prefixes: the prefix of row {row} holds {name}; pass plain ids");
            }
            if name != "eos_id" && self.forced.values().any(|&token| Some(token) == id) {
                bail!(Config, "forced: {name} is never said; force another token");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::PositionKind;

    fn relative(a: f64, b: i64) -> Option<Length> {
        Some(Length::Relative(a, b))
    }

    #[test]
    fn impossible_options_are_refused_by_name() {
        let learned = TransformerConfig {
            positions: PositionKind::Learned,
            max_positions: Some(16),
            ..TransformerConfig::new(10, 10)
        };
        let d = GenerateOptions::default();
        let draw = Sampling { seeds: Seeds::Shared(0), temperature: 1.0, top_k: None, top_p: None, min_p: None };
        let sampling = |sampling: Sampling| GenerateOptions { sampling: Some(sampling), ..d.clone() };
        let fixed = |n| Some(Length::Fixed(n));
        for (names, options) in [
            (vec!["`beam`", "got 0"], GenerateOptions { beam: 0, ..d.clone() }),
            (vec!["`n_best`", "got 0"], GenerateOptions { n_best: 0, ..d.clone() }),
            (vec!["`n_best`", "beam = 2, got 3"], GenerateOptions { n_best: 3, beam: 2, ..d.clone() }),
            (vec!["length_penalty"], GenerateOptions { length_penalty: -0.1, ..d.clone() }),
            (vec!["length_penalty"], GenerateOptions { length_penalty: f64::NAN, ..d.clone() }),
            (vec!["`patience`", "got 0"], GenerateOptions { patience: 0.0, ..d.clone() }),
            (vec!["repetition_penalty"], GenerateOptions { repetition_penalty: -1.0, ..d.clone() }),
            (vec!["`no_repeat_ngram`", "got 0"], GenerateOptions { no_repeat_ngram: Some(0), ..d.clone() }),
            (vec!["`alternatives`", "got 11"], GenerateOptions { alternatives: 11, ..d.clone() }),
            (vec!["max_len = 0", "source 0"], GenerateOptions { max_len: fixed(0), ..d.clone() }),
            (vec!["max_len = 0", "source 1"], GenerateOptions { max_len: relative(1.0, -2), ..d.clone() }),
            (vec!["`max_len`", "got (-1, ..)"], GenerateOptions { max_len: relative(-1.0, 0), ..d.clone() }),
            (vec!["max_len = 17", "max_positions = 16"], GenerateOptions { max_len: fixed(17), ..d.clone() }),
            (
                vec!["min_len = 6", "max_len = 5"],
                GenerateOptions { min_len: Length::Fixed(6), max_len: fixed(5), ..d.clone() },
            ),
            (vec!["min_len = 15", "source 1"], GenerateOptions { min_len: Length::Fixed(15), ..d.clone() }),
            (vec!["prefixes", "2 sources", "got 1"], GenerateOptions { prefixes: vec![vec![3]], ..d.clone() }),
            (vec!["prefix of 15", "source 1"], GenerateOptions { prefixes: vec![vec![3], vec![3; 15]], ..d.clone() }),
            (vec!["prefixes", "id 10"], GenerateOptions { prefixes: vec![vec![3], vec![10]], ..d.clone() }),
            (vec!["prefixes", "row 1", "eos_id"], GenerateOptions { prefixes: vec![vec![3], vec![2]], ..d.clone() }),
            (vec!["suppress", "id 12"], GenerateOptions { suppress: vec![3, 12], ..d.clone() }),
            (vec!["forced", "id 12"], GenerateOptions { forced: [(0, 12)].into(), ..d.clone() }),
            (vec!["forced", "bos_id"], GenerateOptions { forced: [(0, 1)].into(), ..d.clone() }),
            (vec!["`beam`: sampling", "got 2"], GenerateOptions { beam: 2, ..sampling(draw.clone()) }),
            (vec!["`temperature`", "got 0"], sampling(Sampling { temperature: 0.0, ..draw.clone() })),
            (vec!["temperature"], sampling(Sampling { temperature: f64::NAN, ..draw.clone() })),
            (vec!["`top_k`", "got 0"], sampling(Sampling { top_k: Some(0), ..draw.clone() })),
            (vec!["`top_p`", "got 2"], sampling(Sampling { top_p: Some(2.0), ..draw.clone() })),
            (vec!["`top_p`", "got 0"], sampling(Sampling { top_p: Some(0.0), ..draw.clone() })),
            (vec!["`min_p`", "from 0 to 1, got 1.5"], sampling(Sampling { min_p: Some(1.5), ..draw.clone() })),
            (
                vec!["seed", "2 sources", "got 3"],
                sampling(Sampling { seeds: Seeds::Each(vec![1, 2, 3]), ..draw.clone() }),
            ),
        ] {
            let message = options.plans(&learned, &Rows::from_lengths(&[5, 2]), 0..).unwrap_err().to_string();
            assert!(names.iter().all(|name| message.contains(name)), "{names:?}: {message}");
        }
    }

    #[test]
    fn lengths_follow_the_source_and_stop_at_a_learned_table() {
        let sources = Rows::from_lengths(&[0, 2, 9]);
        let options = GenerateOptions::default();
        let config = TransformerConfig::new(10, 10);
        let of = |options: &GenerateOptions, config: &TransformerConfig| {
            let plans = options.plans(config, &sources, 5..).unwrap();
            assert!(plans.iter().map(|plan| plan.source).eq(5..8));
            plans.iter().map(|plan| (plan.min_len, plan.max_len)).collect::<Vec<_>>()
        };
        assert_eq!(of(&options, &config), [(0, 10), (0, 14), (0, 28)]);
        let learned = TransformerConfig { positions: PositionKind::Learned, max_positions: Some(13), ..config.clone() };
        assert_eq!(of(&options, &learned), [(0, 10), (0, 13), (0, 13)]);
        let fixed = GenerateOptions { max_len: Some(Length::Fixed(usize::MAX)), ..options.clone() };
        assert_eq!(of(&fixed, &config), [(0, usize::MAX); 3]);
        let relative = GenerateOptions { max_len: relative(1.5, 3), min_len: Length::Relative(0.5, -1), ..options };
        assert_eq!(of(&relative, &config), [(0, 3), (0, 6), (3, 16)]);
    }
}
