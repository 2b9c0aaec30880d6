//! What a decoding gives.

use crate::kernels::top_k::Entry;

/// One thing the model may say for a source.
#[derive(Clone, Debug, PartialEq)]
pub struct Hypothesis {
    /// The tokens, without BOS and EOS.
    pub ids: Vec<u32>,
    /// Σ `token_logprobs` / nᵅ, n their number and α the length penalty; summed in f64, first to last. 0 if not asked for.
    pub score: f64,
    /// The model's log-probability of every id, before anything was changed or forbidden; EOS last if `finished`.
    /// None if not asked for.
    pub token_logprobs: Vec<f32>,
    /// Whether it ended with EOS; otherwise `max_len` cut it off, or nothing could follow.
    pub finished: bool,
    /// The likeliest tokens at each step with their log-probabilities, as many for each of `token_logprobs` as were asked
    /// for: the model's own, BOS and PAD among them, likeliest first and the lower id first among equals.
    pub alternatives: Vec<Entry>,
}
