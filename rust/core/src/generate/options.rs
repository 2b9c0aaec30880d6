//! What a caller may ask of a decoding, and what it gets.

use crate::ensure;
use crate::error::Result;
use crate::models::{PositionKind, TransformerConfig};
use crate::rows::Rows;

/// How to decode. The default is greedy.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateOptions {
    /// The most ids a hypothesis may have, BOS and EOS not counted. `None`: twice the length of its source plus 10, but
    /// no more than a learned position table serves.
    pub max_len: Option<usize>,
    /// The fewest ids a hypothesis may have: EOS cannot be said before.
    pub min_len: usize,
    /// Hypotheses of a source that are kept alive; 1 is greedy.
    pub beam: usize,
    /// Hypotheses of a source that are returned, best first; at most `beam`. Fewer come back where there are fewer.
    pub n_best: usize,
    /// α in score = Σ log p / nᵅ, n the number of tokens with EOS: 0 compares sums, 1 compares means, more favours long ones.
    pub length_penalty: f64,
    /// Whether hypotheses come with the attention their tokens paid to the source.
    pub attention: bool,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        GenerateOptions { max_len: None, min_len: 0, beam: 1, n_best: 1, length_penalty: 1.0, attention: false }
    }
}

impl GenerateOptions {
    /// Checks every field against the others and the model; returns `max_len` of every source.
    pub(super) fn check(&self, config: &TransformerConfig, sources: &Rows) -> Result<Vec<usize>> {
        ensure!(self.beam >= 1, Config, "beam = 0: expected at least 1, which is greedy");
        ensure!(
            (1..=self.beam).contains(&self.n_best),
            Config,
            "n_best = {}: expected 1 to beam = {}; raise beam",
            self.n_best,
            self.beam
        );
        ensure!(
            self.length_penalty.is_finite() && self.length_penalty >= 0.0,
            Config,
            "length_penalty = {}: expected a number that is not negative",
            self.length_penalty
        );
        ensure!(self.max_len != Some(0), Config, "max_len = 0: expected at least 1");
        // The last id is returned without being read, so BOS and `max_len - 1` ids need positions.
        let positions = match config.positions {
            PositionKind::Learned => config.max_positions.unwrap_or(usize::MAX),
            _ => usize::MAX,
        };
        if let Some(max_len) = self.max_len {
            ensure!(
                max_len <= positions,
                Config,
                "max_len = {max_len} needs as many positions, the learned table has max_positions = {positions}; lower max_len"
            );
        }
        sources
            .lengths()
            .enumerate()
            .map(|(i, n)| {
                let max_len = self.max_len.unwrap_or_else(|| (2 * n + 10).min(positions));
                ensure!(
                    self.min_len <= max_len,
                    Config,
                    "min_len = {} is above max_len = {max_len} of source {i}; raise max_len",
                    self.min_len
                );
                Ok(max_len)
            })
            .collect()
    }

    /// score = Σ log p / nᵅ; 0 for no tokens.
    pub(super) fn score(&self, sum: f64, tokens: usize) -> f64 {
        sum / libm::pow(tokens.max(1) as f64, self.length_penalty)
    }
}

/// One thing the model may say for a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The tokens, without BOS and EOS.
    pub ids: Vec<u32>,
    /// Σ `token_logprobs` / nᵅ, n their number and α the length penalty; summed in f64, first to last.
    pub score: f64,
    /// The model's log-probability of every id, before anything was forbidden; EOS last if `finished`.
    pub token_logprobs: Vec<f32>,
    /// Whether it ended with EOS; otherwise `max_len` cut it off.
    pub finished: bool,
    /// What its tokens attended to, if asked for.
    pub attention: Option<CrossAttention>,
}

/// Cross-attention weights of one hypothesis: which part of the source each token was read from.
#[derive(Clone, Debug, PartialEq)]
pub struct CrossAttention {
    /// The weights, row-major.
    pub values: Vec<f32>,
    /// `(decoder layers, heads, tokens, source length)`; the tokens are those of `token_logprobs`.
    pub shape: [usize; 4],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_options_are_refused_by_name() {
        let learned = TransformerConfig {
            positions: PositionKind::Learned,
            max_positions: Some(16),
            ..TransformerConfig::new(10, 10)
        };
        let default = GenerateOptions::default();
        for (names, options) in [
            (vec!["beam = 0"], GenerateOptions { beam: 0, ..default.clone() }),
            (vec!["n_best = 0"], GenerateOptions { n_best: 0, ..default.clone() }),
            (vec!["n_best = 3", "beam = 2"], GenerateOptions { n_best: 3, beam: 2, ..default.clone() }),
            (vec!["length_penalty"], GenerateOptions { length_penalty: -0.1, ..default.clone() }),
            (vec!["length_penalty"], GenerateOptions { length_penalty: f64::NAN, ..default.clone() }),
            (vec!["length_penalty"], GenerateOptions { length_penalty: f64::INFINITY, ..default.clone() }),
            (vec!["max_len = 0"], GenerateOptions { max_len: Some(0), ..default.clone() }),
            (vec!["max_len = 17", "max_positions = 16"], GenerateOptions { max_len: Some(17), ..default.clone() }),
            (vec!["min_len = 6", "max_len = 5"], GenerateOptions { min_len: 6, max_len: Some(5), ..default.clone() }),
            (vec!["min_len = 15", "source 1"], GenerateOptions { min_len: 15, ..default.clone() }),
        ] {
            let message = options.check(&learned, &Rows::from_lengths(&[5, 2])).unwrap_err().to_string();
            assert!(names.iter().all(|name| message.contains(name)), "{names:?}: {message}");
        }
    }

    #[test]
    fn max_len_follows_the_source_and_stops_at_a_learned_table() {
        let sources = Rows::from_lengths(&[0, 2, 9]);
        let options = GenerateOptions::default();
        let config = TransformerConfig::new(10, 10);
        assert_eq!(options.check(&config, &sources).unwrap(), [10, 14, 28]);
        let learned = TransformerConfig { positions: PositionKind::Learned, max_positions: Some(13), ..config.clone() };
        assert_eq!(options.check(&learned, &sources).unwrap(), [10, 13, 13]);
        let fixed = GenerateOptions { max_len: Some(usize::MAX), ..options };
        assert_eq!(fixed.check(&config, &sources).unwrap(), [usize::MAX; 3]);
    }
}
