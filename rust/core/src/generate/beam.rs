//! Beam search over the hypotheses of one source. It knows tokens and their log-probabilities, no model.

use super::options::{GenerateOptions, Hypothesis};
use super::top_k::Token;

/// A token in the tree of everything kept so far; hypotheses share what they have in common.
#[derive(Debug)]
struct Node {
    parent: Option<usize>,
    token: Token,
}

/// A path from the root of the tree.
#[derive(Clone, Copy, Debug)]
struct Path {
    last: Option<usize>,
    /// Σ log p of its tokens.
    sum: f64,
}

/// A path that nothing more is added to.
#[derive(Debug)]
struct Ended {
    path: Path,
    score: f64,
    finished: bool,
}

/// The hypotheses of one source, all alive ones of the same length.
///
/// A step ranks the continuations of all live hypotheses by one token: larger Σ log p first, then the lower beam, then the
/// larger logit, then the lower id. Of the first `beam` of this ranking, those with EOS are finished; the first `beam`
/// without EOS live on. The search ends
/// - when `beam` hypotheses are finished: with `beam = 1` at the first EOS that is the likeliest token, as greedy does;
/// - at `max_len`: what is alive then is returned unfinished, in competition with what is finished;
/// - when no live hypothesis can overtake the `n_best`-th of the finished. As log p ≤ 0 and α ≥ 0, none of its
///   continuations can score above Σ log p / max_lenᵅ; ending there changes no result.
#[derive(Debug)]
pub(super) struct Beam {
    options: GenerateOptions,
    max_len: usize,
    nodes: Vec<Node>,
    live: Vec<Path>,
    ended: Vec<Ended>,
    /// Ids of every live hypothesis.
    len: usize,
}

impl Beam {
    /// One live hypothesis without tokens.
    pub fn new(options: &GenerateOptions, max_len: usize) -> Self {
        let root = Path { last: None, sum: 0.0 };
        Beam { options: options.clone(), max_len, nodes: Vec::new(), live: vec![root], ended: Vec::new(), len: 0 }
    }

    /// The last token of every live hypothesis; before the first step that is BOS, which `first` gives.
    pub fn last_tokens(&self, first: u32) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.live.iter().map(move |path| path.last.map_or(first, |last| self.nodes[last].token.id))
    }

    /// Number of hypotheses that go on.
    pub fn alive(&self) -> usize {
        self.live.len()
    }

    /// One step. `best` holds `k` continuations of every live hypothesis, likeliest first; k = `beam` + 1 is enough, as EOS
    /// is one token. `survivor` is told the number of the parent of every hypothesis that lives on, in order.
    pub fn step(&mut self, best: &[Token], k: usize, eos: u32, mut survivor: impl FnMut(usize)) {
        let mut ranking: Vec<(usize, Token, f64)> = Vec::with_capacity(best.len());
        for (beam, (path, tokens)) in self.live.iter().zip(best.chunks(k)).enumerate() {
            let possible = tokens.iter().filter(|token| token.logprob > f32::NEG_INFINITY);
            ranking.extend(possible.map(|&token| (beam, token, path.sum + f64::from(token.logprob))));
        }
        // Stable: what has equal sums stays in the order of beams and, within a beam, of logits and ids.
        ranking.sort_by(|(.., a), (.., b)| b.total_cmp(a));

        if ranking.is_empty() {
            return self.end_all(); // everything that could follow is forbidden
        }
        let mut next = Vec::with_capacity(self.options.beam.min(ranking.len()));
        for (rank, (beam, token, sum)) in ranking.into_iter().enumerate() {
            if next.len() == self.options.beam {
                break;
            }
            if token.id == eos && rank >= self.options.beam {
                continue;
            }
            self.nodes.push(Node { parent: self.live[beam].last, token });
            let path = Path { last: Some(self.nodes.len() - 1), sum };
            if token.id == eos {
                self.ended.push(Ended { path, score: self.options.score(sum, self.len + 1), finished: true });
            } else {
                next.push((beam, path));
            }
        }
        self.len += 1;
        self.live = next.iter().map(|&(_, path)| path).collect();
        if self.ended.len() >= self.options.beam || self.decided() {
            self.live.clear();
        } else if self.len == self.max_len {
            self.end_all();
        } else {
            next.iter().for_each(|&(beam, _)| survivor(beam));
        }
    }

    /// Whether no live hypothesis can still come among the `n_best`.
    fn decided(&self) -> bool {
        let mut scores: Vec<f64> = self.ended.iter().map(|ended| ended.score).collect();
        scores.sort_by(|a, b| b.total_cmp(a));
        let highest = self.live.first().map_or(f64::NEG_INFINITY, |path| self.options.score(path.sum, self.max_len));
        scores.get(self.options.n_best - 1).is_some_and(|&worst| highest <= worst)
    }

    /// Ends what is alive, unfinished.
    fn end_all(&mut self) {
        for path in self.live.drain(..) {
            self.ended.push(Ended { path, score: self.options.score(path.sum, self.len), finished: false });
        }
    }

    /// The best that ended, best first; among equal scores what ended first.
    pub fn into_best(mut self) -> Vec<Hypothesis> {
        self.ended.sort_by(|a, b| b.score.total_cmp(&a.score));
        self.ended.iter().take(self.options.n_best).map(|ended| self.hypothesis(ended)).collect()
    }

    fn hypothesis(&self, ended: &Ended) -> Hypothesis {
        let path = std::iter::successors(ended.path.last, |&node| self.nodes[node].parent);
        let mut tokens: Vec<Token> = path.map(|node| self.nodes[node].token).collect();
        tokens.reverse();
        let ids = &tokens[..tokens.len() - usize::from(ended.finished)];
        Hypothesis {
            ids: ids.iter().map(|token| token.id).collect(),
            score: ended.score,
            token_logprobs: tokens.iter().map(|token| token.logprob).collect(),
            finished: ended.finished,
            attention: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EOS: u32 = 2;

    /// Rows of likeliest tokens, flat, and how many a row has.
    fn step(beam: &mut Beam, rows: &[&[(u32, f32)]]) -> Vec<usize> {
        let best: Vec<Token> = rows.concat().iter().map(|&(id, logprob)| Token { id, logprob }).collect();
        let mut parents = Vec::new();
        beam.step(&best, rows[0].len(), EOS, |parent| parents.push(parent));
        parents
    }

    fn beam(beam: usize, n_best: usize, length_penalty: f64, max_len: usize) -> Beam {
        Beam::new(&GenerateOptions { beam, n_best, length_penalty, ..GenerateOptions::default() }, max_len)
    }

    #[test]
    fn ties_go_to_the_lower_beam_and_then_to_the_first_of_a_row() {
        let mut beam = beam(3, 3, 0.0, 2);
        assert_eq!(beam.last_tokens(1).collect::<Vec<_>>(), [1]);
        assert_eq!(step(&mut beam, &[&[(5, -1.0), (6, -1.0), (7, -1.0), (8, -1.0)]]), [0, 0, 0]);
        assert_eq!(beam.last_tokens(1).collect::<Vec<_>>(), [5, 6, 7]);
        let rows: [&[(u32, f32)]; 3] = [&[(9, -2.0), (3, -3.0)], &[(9, -1.0), (3, -2.0)], &[(9, -2.0), (3, -2.0)]];
        assert!(step(&mut beam, &rows).is_empty());
        let found: Vec<Vec<u32>> = beam.into_best().into_iter().map(|h| h.ids).collect();
        assert_eq!(found, [[6, 9], [5, 9], [6, 3]]);
    }

    #[test]
    fn eos_finishes_among_the_first_and_is_dropped_behind() {
        let mut beam = beam(2, 2, 1.0, 9);
        assert_eq!(step(&mut beam, &[&[(5, -1.0), (6, -2.0), (EOS, -3.0)]]), [0, 0]);
        assert_eq!(
            step(&mut beam, &[&[(7, -1.0), (EOS, -2.0), (8, -9.0)], &[(7, -5.0), (EOS, -6.0), (8, -7.0)]]),
            [0, 1]
        );
        // 5 EOS was second: it is finished, and both places go to others.
        assert_eq!(beam.ended.len(), 1);
        assert!(
            step(&mut beam, &[&[(EOS, -1.0), (9, -2.0), (8, -3.0)], &[(9, -1.0), (EOS, -2.0), (8, -3.0)]]).is_empty()
        );
        let found = beam.into_best();
        assert_eq!(found.iter().map(|h| &h.ids[..]).collect::<Vec<_>>(), [&[5, 7][..], &[5]]);
        assert_eq!((found[0].score, found[1].score), (-1.0, -1.5));
        assert_eq!(found[0].token_logprobs, [-1.0, -1.0, -1.0]);
    }

    #[test]
    fn the_search_ends_when_nothing_can_overtake() {
        for (length_penalty, max_len, goes_on) in [(0.0, 9, false), (1.0, 3, false), (1.0, 4, true), (3.0, 2, true)] {
            let mut beam = beam(2, 1, length_penalty, max_len);
            // Finished with −1; alive with −4, which over 4 tokens could still come to −1 and over more to better.
            step(&mut beam, &[&[(EOS, -1.0), (5, -3.999), (6, -5.0)]]);
            assert_eq!(beam.alive() > 0, goes_on, "{length_penalty} {max_len}");
        }
    }

    #[test]
    fn a_dead_end_is_returned_unfinished() {
        let mut beam = beam(2, 2, 1.0, 9);
        step(&mut beam, &[&[(5, -1.0), (u32::MAX, f32::NEG_INFINITY), (u32::MAX, f32::NEG_INFINITY)]]);
        assert_eq!((beam.alive(), step(&mut beam, &[&[(u32::MAX, f32::NEG_INFINITY)]])), (1, vec![]));
        let found = beam.into_best();
        assert!(found.len() == 1 && found[0].ids == [5] && !found[0].finished && found[0].score == -1.0);
    }
}
