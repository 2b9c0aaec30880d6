//! The hypotheses of one source. It knows tokens and their log-probabilities, no model.

use super::hypothesis::Hypothesis;
use super::options::{GenerateOptions, Plan};
use crate::error::Result;
use crate::kernels::top_k::Entry;
use crate::rng::Key;
use std::collections::VecDeque;
use std::sync::Arc;

/// A token that may follow a hypothesis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Candidate {
    pub id: u32,
    /// The model's log-probability.
    pub logprob: f32,
    /// What the search goes by: the same, after penalties and processors.
    pub value: f32,
}

/// What may follow one live hypothesis.
#[derive(Clone, Debug, Default)]
pub(super) struct Follow {
    /// Best first.
    pub candidates: Vec<Candidate>,
    /// The likeliest tokens, for whoever asked to see them.
    pub alternatives: Arc<[Entry]>,
}

impl Follow {
    /// This token, if any, of which nobody asks how likely it is.
    pub fn unscored(id: Option<u32>) -> Self {
        let candidate = |id| Candidate { id, logprob: 0.0, value: 0.0 };
        Follow { candidates: id.map(candidate).into_iter().collect(), ..Follow::default() }
    }

    /// The best token, if any may follow.
    pub fn first(&self) -> Option<u32> {
        self.candidates.first().map(|candidate| candidate.id)
    }
}

/// A token in the tree of everything kept so far; hypotheses share what they have in common.
#[derive(Debug)]
struct Node {
    parent: Option<usize>,
    id: u32,
    logprob: f32,
    alternatives: Arc<[Entry]>,
}

/// A path from the root of the tree.
#[derive(Clone, Copy, Debug)]
struct Path {
    last: Option<usize>,
    /// Σ of the values of its tokens.
    sum: f64,
    /// Its number among the hypotheses that are drawn.
    draw: usize,
}

/// A path that nothing more is added to.
#[derive(Debug)]
struct Ended {
    path: Path,
    /// Σ value / nᵅ
    rank: f64,
    finished: bool,
}

/// The hypotheses of one source, all alive ones of the same length.
///
/// A step of the search ranks the continuations of all live hypotheses by one token: larger Σ value first, then the lower
/// beam, then the larger value, then the lower id. Of the first `beam` of this ranking, those with EOS are finished; the
/// first `beam` without EOS live on. The search ends
/// - when `patience` · `beam` hypotheses are finished: with `beam = 1` at the first EOS that is the best token, as greedy;
/// - at `max_len`: what is alive then is returned unfinished, in competition with what is finished;
/// - when no live hypothesis can overtake the `n_best`-th of the finished. As log p ≤ 0 and α ≥ 0, none of its
///   continuations can rank above Σ value / max_lenᵅ; ending there changes no result.
///
/// Hypotheses that are drawn live side by side, each for itself.
#[derive(Debug)]
pub(super) struct Beam {
    pub plan: Plan,
    options: Arc<GenerateOptions>,
    /// Whether values never rise above 0, so that sums can only fall.
    falling: bool,
    nodes: Vec<Node>,
    live: Vec<Path>,
    ended: Vec<Ended>,
    /// Ids of every live hypothesis.
    pub len: usize,
    /// What follows in the next steps, where the model has read so far already.
    pub ahead: VecDeque<Follow>,
}

impl Beam {
    /// One live hypothesis without tokens, or as many as are to be drawn.
    pub fn new(options: Arc<GenerateOptions>, plan: Plan, falling: bool) -> Self {
        let roots = if options.sampling.is_some() { options.n_best } else { 1 };
        let live = (0..roots).map(|draw| Path { last: None, sum: 0.0, draw }).collect();
        Beam { plan, options, falling, nodes: Vec::new(), live, ended: Vec::new(), len: 0, ahead: VecDeque::new() }
    }

    /// The last token of every live hypothesis; before the first step that is BOS, which `first` gives.
    pub fn last_tokens(&self, first: u32) -> impl ExactSizeIterator<Item = u32> + '_ {
        self.live.iter().map(move |path| path.last.map_or(first, |last| self.nodes[last].id))
    }

    /// What will follow the ids of the only live hypothesis in the next steps.
    pub fn behind(&self) -> Vec<u32> {
        self.ahead.iter().filter_map(Follow::first).collect()
    }

    /// Whether more will follow behind that.
    pub fn goes_on_behind(&self, eos: u32) -> bool {
        let behind = self.behind();
        behind.len() == self.ahead.len() && !behind.contains(&eos) && self.len + behind.len() < self.plan.max_len
    }

    /// Takes in what the model says behind that, and behind each of the guesses as long as they are right; gives how many are.
    pub fn look_ahead(&mut self, said: Vec<Option<Follow>>, guesses: &[u32]) -> Result<usize> {
        let mut right = 0;
        for follow in said {
            let follow = follow.ok_or_else(|| self.plan.not_finite(self.len + self.ahead.len()))?;
            let first = follow.first();
            self.ahead.push_back(follow);
            if first.is_none() || first != guesses.get(right).copied() {
                break;
            }
            right += 1;
        }
        Ok(right)
    }

    /// Number of hypotheses that go on.
    pub fn alive(&self) -> usize {
        self.live.len()
    }

    /// The ids of a live hypothesis.
    pub fn ids(&self, live: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = self.nodes_of(self.live[live]).map(|node| node.id).collect();
        ids.reverse();
        ids
    }

    /// What decides the tokens of a live hypothesis that are drawn, by their places.
    pub fn key(&self, live: usize) -> Key {
        self.plan.key.fold(self.live[live].draw as u64)
    }

    /// One step: what follows each live hypothesis. In a search `beam` + 1 candidates are enough, as EOS is one token; of
    /// what is drawn the first counts. `survivor` is told the parent of every hypothesis that lives on, in order.
    pub fn step(&mut self, follows: &[Follow], eos: u32, mut survivor: impl FnMut(usize)) {
        let next = match self.options.sampling {
            Some(_) => self.draw(follows, eos),
            None => self.search(follows, eos),
        };
        self.live = next.iter().map(|&(_, path)| path).collect();
        if self.len == self.plan.max_len {
            self.end_all();
        } else {
            next.iter().take(self.live.len()).for_each(|&(parent, _)| survivor(parent));
        }
    }

    fn search(&mut self, follows: &[Follow], eos: u32) -> Vec<(usize, Path)> {
        let beam = self.options.beam;
        let mut ranking: Vec<(usize, Candidate, f64)> = Vec::new();
        for (parent, (path, follow)) in self.live.iter().zip(follows).enumerate() {
            ranking.extend(follow.candidates.iter().map(|&c| (parent, c, path.sum + f64::from(c.value))));
        }
        // Stable: what has equal sums stays in the order of beams and, within a beam, of values and ids.
        ranking.sort_by(|(.., a), (.., b)| b.total_cmp(a));

        if ranking.is_empty() {
            self.end_all(); // everything that could follow is forbidden
            return Vec::new();
        }
        let mut next = Vec::with_capacity(beam.min(ranking.len()));
        for (rank, (parent, candidate, sum)) in ranking.into_iter().enumerate() {
            if next.len() == beam {
                break;
            }
            if candidate.id == eos && rank >= beam {
                continue;
            }
            let path = self.grow(parent, candidate, sum, &follows[parent]);
            match candidate.id == eos {
                true => self.end(path, self.len + 1, true),
                false => next.push((parent, path)),
            }
        }
        self.len += 1;
        if self.ended.len() as f64 >= self.options.patience * beam as f64 || self.decided(&next) {
            next.clear();
        }
        next
    }

    fn draw(&mut self, follows: &[Follow], eos: u32) -> Vec<(usize, Path)> {
        let mut next = Vec::with_capacity(self.live.len());
        for (parent, follow) in follows.iter().enumerate() {
            let path = self.live[parent];
            match follow.candidates.first() {
                None => self.end(path, self.len, false), // everything is forbidden
                Some(&candidate) => {
                    let path = self.grow(parent, candidate, path.sum + f64::from(candidate.value), follow);
                    match candidate.id == eos {
                        true => self.end(path, self.len + 1, true),
                        false => next.push((parent, path)),
                    }
                }
            }
        }
        self.len += 1;
        next
    }

    /// A live hypothesis with one token more.
    fn grow(&mut self, parent: usize, candidate: Candidate, sum: f64, follow: &Follow) -> Path {
        let Path { last, draw, .. } = self.live[parent];
        let Candidate { id, logprob, .. } = candidate;
        self.nodes.push(Node { parent: last, id, logprob, alternatives: follow.alternatives.clone() });
        Path { last: Some(self.nodes.len() - 1), sum, draw }
    }

    fn end(&mut self, path: Path, tokens: usize, finished: bool) {
        self.ended.push(Ended { path, rank: self.options.score(path.sum, tokens), finished });
    }

    /// Ends what is alive, unfinished.
    fn end_all(&mut self) {
        for path in std::mem::take(&mut self.live) {
            self.end(path, self.len, false);
        }
    }

    /// Whether no live hypothesis can still come among the `n_best`.
    fn decided(&self, live: &[(usize, Path)]) -> bool {
        let mut ranks: Vec<f64> = self.ended.iter().map(|ended| ended.rank).collect();
        ranks.sort_by(|a, b| b.total_cmp(a));
        let highest =
            live.first().map_or(f64::NEG_INFINITY, |(_, path)| self.options.score(path.sum, self.plan.max_len));
        self.falling && ranks.get(self.options.n_best - 1).is_some_and(|&worst| highest <= worst)
    }

    /// The best that ended, best first; among equal ranks what ended first.
    pub fn into_best(mut self) -> Vec<Hypothesis> {
        self.ended.sort_by(|a, b| b.rank.total_cmp(&a.rank));
        self.ended.iter().take(self.options.n_best).map(|ended| self.hypothesis(ended)).collect()
    }

    fn hypothesis(&self, ended: &Ended) -> Hypothesis {
        let mut nodes: Vec<&Node> = self.nodes_of(ended.path).collect();
        nodes.reverse();
        let scored = nodes.iter().filter(|_| self.options.scores);
        let token_logprobs: Vec<f32> = scored.map(|node| node.logprob).collect();
        let ids = &nodes[..nodes.len() - usize::from(ended.finished)];
        // From +0: the sum of nothing is −0.
        let sum = token_logprobs.iter().fold(0.0, |sum, &p| sum + f64::from(p));
        Hypothesis {
            ids: ids.iter().map(|node| node.id).collect(),
            score: self.options.score(sum, token_logprobs.len()),
            token_logprobs,
            finished: ended.finished,
            alternatives: nodes.iter().flat_map(|node| node.alternatives.iter().copied()).collect(),
        }
    }

    /// The nodes of a path, the last first.
    fn nodes_of(&self, path: Path) -> impl Iterator<Item = &Node> {
        std::iter::successors(path.last.map(|last| &self.nodes[last]), |node| {
            node.parent.map(|parent| &self.nodes[parent])
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::sampling::{Sampling, Seeds};
    use super::*;

    const EOS: u32 = 2;

    /// What follows each live hypothesis; returns the parents of those that live on.
    fn step(beam: &mut Beam, rows: &[&[(u32, f32)]]) -> Vec<usize> {
        let candidate = |&(id, logprob): &(u32, f32)| Candidate { id, logprob, value: logprob };
        let follow =
            |row: &&[(u32, f32)]| Follow { candidates: row.iter().map(candidate).collect(), ..Follow::default() };
        let mut parents = Vec::new();
        beam.step(&rows.iter().map(follow).collect::<Vec<_>>(), EOS, |parent| parents.push(parent));
        parents
    }

    fn of(options: GenerateOptions, max_len: usize) -> Beam {
        let plan = Plan { source: 0, ids: 1, max_len, min_len: 0, prefix: Vec::new(), key: Key::new(0) };
        Beam::new(Arc::new(options), plan, true)
    }

    fn beam(beam: usize, n_best: usize, length_penalty: f64, max_len: usize) -> Beam {
        of(GenerateOptions { beam, n_best, length_penalty, ..GenerateOptions::default() }, max_len)
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
    fn patience_waits_for_more_and_little_of_it_for_less() {
        for (patience, goes_on) in [(0.1, false), (1.0, true), (1.5, true)] {
            let mut beam = of(GenerateOptions { beam: 2, n_best: 2, patience, ..GenerateOptions::default() }, 9);
            step(&mut beam, &[&[(5, -1.0), (EOS, -2.0), (6, -3.0)]]);
            assert_eq!(beam.alive() > 0, goes_on, "{patience}");
            if goes_on {
                step(&mut beam, &[&[(EOS, -0.1), (7, -2.0)], &[(7, -9.0)]]);
                assert_eq!(beam.alive() > 0, patience > 1.0);
            }
        }
    }

    #[test]
    fn the_search_goes_by_values_and_reports_the_models_own() {
        let options = GenerateOptions { beam: 2, n_best: 2, ..GenerateOptions::default() };
        let plan = Plan { source: 0, ids: 1, max_len: 1, min_len: 0, prefix: Vec::new(), key: Key::new(0) };
        let mut beam = Beam::new(Arc::new(options), plan, false);
        let candidates =
            vec![Candidate { id: 5, logprob: -3.0, value: 1.0 }, Candidate { id: 6, logprob: -1.0, value: -1.0 }];
        beam.step(&[Follow { candidates, ..Follow::default() }], EOS, |_| ());
        let found: Vec<_> = beam.into_best().into_iter().map(|h| (h.ids[0], h.score)).collect();
        assert_eq!(found, [(5, -3.0), (6, -1.0)]);
    }

    #[test]
    fn drawn_hypotheses_live_and_end_each_for_itself() {
        let seeds = Seeds::Shared(0);
        let sampling = Some(Sampling { seeds, temperature: 1.0, top_k: None, top_p: None, min_p: None });
        let mut beam = of(GenerateOptions { n_best: 3, sampling, ..GenerateOptions::default() }, 3);
        let uniform = |beam: &Beam, live| beam.key(live).uniform(beam.len as u64);
        let uniforms: Vec<f64> = (0..3).map(|live| uniform(&beam, live)).collect();
        assert!(uniforms[0] != uniforms[1] && uniforms[1] != uniforms[2]);
        assert_eq!(step(&mut beam, &[&[(5, -1.0)], &[(EOS, -4.0)], &[(6, -3.0)]]), [0, 2]);
        assert!((0..2).all(|live| uniform(&beam, live) != uniforms[2 * live]));
        assert_eq!(step(&mut beam, &[&[(7, -1.0)], &[]]), [0]);
        assert!(step(&mut beam, &[&[(8, -1.0)]]).is_empty());
        let found: Vec<_> = beam.into_best().into_iter().map(|h| (h.ids, h.score, h.finished)).collect();
        assert_eq!(found, [(vec![5, 7, 8], -1.0, false), (vec![6], -3.0, false), (vec![], -4.0, true)]);
    }

    #[test]
    fn a_dead_end_is_returned_unfinished() {
        let [mut empty, mut beam] = [1, 2].map(|n_best| beam(2, n_best, 1.0, 9));
        assert!(step(&mut empty, &[&[]]).is_empty());
        let found = empty.into_best();
        assert!(found.len() == 1 && found[0].ids.is_empty() && !found[0].finished);
        assert_eq!(found[0].score.to_bits(), 0); // not −0
        step(&mut beam, &[&[(5, -1.0)]]);
        assert_eq!((beam.alive(), step(&mut beam, &[&[]])), (1, vec![]));
        let found = beam.into_best();
        assert!(found.len() == 1 && found[0].ids == [5] && !found[0].finished && found[0].score == -1.0);
    }
}
