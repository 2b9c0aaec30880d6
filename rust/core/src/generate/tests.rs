//! Decoding against a plain search that decodes every prefix again, alone and without a cache.

use super::*;
use crate::error::Error;
use crate::kernels::softmax::log_sum_exp;
use crate::models::{Batch, PositionKind, Tie, TransformerConfig};
use crate::nn::FeedForwardActivation;
use crate::tape::SHORTLIST_FROM;
use crate::threads::{section, with_local_limit};

const PAD: u32 = 0;
const BOS: u32 = 1;
const EOS: u32 = 2;

pub(super) struct Fixture {
    model: Transformer,
    params: Params<f32>,
}

pub(super) fn config() -> TransformerConfig {
    TransformerConfig {
        d_model: 16,
        n_heads: 2,
        n_encoder_layers: 2,
        n_decoder_layers: 2,
        d_ff: 24,
        ..TransformerConfig::new(9, 8)
    }
}

impl Fixture {
    /// A random model whose head is large enough to make some tokens much likelier than others.
    pub(super) fn new(config: TransformerConfig, seed: u64) -> Self {
        let model = Transformer::new(config).unwrap();
        let mut fixture = Fixture { params: Params::init(model.layout().clone(), seed).unwrap(), model };
        let head = if fixture.model.config().tie_embeddings.is_none() { "head.weight" } else { "tgt_embedding.weight" };
        fixture.change(head, |_, w| 3.0 * w);
        fixture
    }

    /// Changes the elements of a parameter, given their numbers.
    pub(super) fn change(&mut self, name: &str, f: impl Fn(usize, f32) -> f32) {
        let id = self.params.layout().find(name).unwrap();
        let values: Vec<f32> = self.params.get(id).iter().enumerate().map(|(i, &w)| f(i, w)).collect();
        self.params.set(id, &values).unwrap();
    }

    pub(super) fn loaded(&self) -> Loaded<'_> {
        Loaded { layers: &self.model, params: &self.params }
    }

    pub(super) fn search(&self, sources: &[&[u32]], options: &GenerateOptions) -> Result<Vec<Vec<Hypothesis>>> {
        self.search_with(None, sources, options)
    }

    pub(super) fn search_with(
        &self,
        draft: Option<&Fixture>,
        sources: &[&[u32]],
        options: &GenerateOptions,
    ) -> Result<Vec<Vec<Hypothesis>>> {
        let rows = Rows::from_lengths(&sources.iter().map(|s| s.len()).collect::<Vec<_>>());
        let draft = draft.map(Fixture::loaded);
        hypotheses(self.loaded(), draft, &mut Pool::default(), &sources.concat(), &rows, options, None)
    }

    /// The logits after a prefix.
    fn next(&self, src: &[u32], prefix: &[u32]) -> Vec<f32> {
        let (src_rows, rows) = (Rows::from_lengths(&[src.len()]), Rows::from_lengths(&[prefix.len() + 1]));
        let mut tape = Tape::evaluation(Pool::default());
        let memory = self.model.encode(&mut tape, &self.params, src, &src_rows).unwrap();
        let tgt_in = [&[BOS], prefix].concat();
        let hidden = self.model.decode(&mut tape, &self.params, &tgt_in, &rows, memory, &src_rows).unwrap();
        let logits = self.model.logits(&mut tape, &self.params, hidden).unwrap();
        tape.value(logits).unwrap().row(prefix.len()).to_vec()
    }

    /// What may follow a prefix: id, logit and log-probability.
    fn continuations(&self, src: &[u32], prefix: &[u32], min_len: usize) -> Vec<(u32, f32, f32)> {
        let logits = self.next(src, prefix);
        let lse = log_sum_exp(&logits);
        let all = (0..).zip(&logits).map(|(id, &logit)| (id, logit, lse.log_probability(logit)));
        all.filter(|&(id, ..)| id != PAD && id != BOS && (id != EOS || prefix.len() >= min_len)).collect()
    }

    /// Beam search in plain words. It never ends early because the outcome is certain.
    fn plain_search(&self, src: &[u32], options: &GenerateOptions) -> Vec<Hypothesis> {
        let Plan { max_len, min_len, .. } =
            options.plans(self.model.config(), &Rows::from_lengths(&[src.len()]), 0..).unwrap()[0];
        let mut live = vec![(Vec::new(), Vec::new())];
        let mut ended = Vec::new();
        for len in 0..max_len {
            let mut all = Vec::new();
            for (beam, (ids, logprobs)) in live.iter().enumerate() {
                for (id, logit, logprob) in self.continuations(src, ids, min_len) {
                    let logprobs = [logprobs.as_slice(), &[logprob]].concat();
                    all.push((sum(&logprobs), beam, logit, id, logprobs));
                }
            }
            all.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(b.2.total_cmp(&a.2)).then(a.3.cmp(&b.3)));
            for (_, beam, _, id, logprobs) in all.iter().take(options.beam) {
                if *id == EOS {
                    ended.push(hypothesis(live[*beam].0.clone(), logprobs.clone(), true, options));
                }
            }
            let others = all.iter().filter(|&&(.., id, _)| id != EOS).take(options.beam);
            live = others
                .map(|(_, beam, _, id, logprobs)| ([&live[*beam].0[..], &[*id]].concat(), logprobs.clone()))
                .collect();
            if ended.len() as f64 >= options.patience * options.beam as f64 {
                break;
            }
            if len + 1 == max_len {
                ended.extend(live.drain(..).map(|(ids, logprobs)| hypothesis(ids, logprobs, false, options)));
            }
        }
        ended.sort_by(|a, b| b.score.total_cmp(&a.score));
        ended.truncate(options.n_best);
        ended
    }
}

fn sum(logprobs: &[f32]) -> f64 {
    logprobs.iter().map(|&x| f64::from(x)).sum()
}

fn hypothesis(ids: Vec<u32>, token_logprobs: Vec<f32>, finished: bool, options: &GenerateOptions) -> Hypothesis {
    let score = sum(&token_logprobs) / libm::pow(token_logprobs.len() as f64, options.length_penalty);
    Hypothesis { ids, score, token_logprobs, finished, alternatives: Vec::new() }
}

/// Ragged sources, one of them empty.
pub(super) const SOURCES: [&[u32]; 5] = [&[3, 4, 5, 6, 7, 8], &[8, 3], &[], &[5, 5, 5, 1, 2, 4, 3, 6, 7], &[6]];

pub(super) fn fixed(n: usize) -> Option<Length> {
    Some(Length::Fixed(n))
}

pub(super) fn beams(beam: usize, n_best: usize) -> GenerateOptions {
    GenerateOptions { beam, n_best, ..GenerateOptions::default() }
}

#[test]
fn every_option_equals_the_plain_search_bit_for_bit() {
    let configs = [
        config(),
        TransformerConfig { norm_first: false, tie_embeddings: Some(Tie::Target), head_bias: false, ..config() },
        TransformerConfig {
            positions: PositionKind::Learned,
            max_positions: Some(40),
            activation: FeedForwardActivation::Swiglu,
            ..config()
        },
    ];
    let options = [
        beams(1, 1),
        GenerateOptions { min_len: Length::Fixed(4), ..beams(1, 1) },
        GenerateOptions { max_len: fixed(3), ..beams(1, 1) },
        beams(2, 1),
        beams(3, 3),
        GenerateOptions { length_penalty: 0.0, ..beams(4, 2) },
        GenerateOptions { length_penalty: 0.6, ..beams(4, 1) },
        GenerateOptions { length_penalty: 2.5, min_len: Length::Fixed(2), ..beams(3, 2) },
        GenerateOptions { max_len: fixed(6), min_len: Length::Fixed(6), ..beams(2, 2) },
        GenerateOptions { max_len: fixed(1), ..beams(2, 2) },
        GenerateOptions { max_len: fixed(5), ..beams(20, 7) },
        GenerateOptions { patience: 2.0, ..beams(3, 3) },
        GenerateOptions { patience: 0.2, max_len: Some(Length::Relative(1.5, 2)), ..beams(3, 1) },
    ];
    let (mut finished, mut cut_off) = (0, 0);
    for (seed, config) in configs.into_iter().enumerate() {
        let fixture = Fixture::new(config, seed as u64);
        for options in &options {
            let found = fixture.search(&SOURCES, options).unwrap();
            for (src, found) in SOURCES.iter().zip(&found) {
                assert_eq!(found, &fixture.plain_search(src, options), "{src:?} {options:?}");
                finished += found.iter().filter(|h| h.finished).count();
                cut_off += found.iter().filter(|h| !h.finished).count();
            }
        }
    }
    assert!(finished > 50 && cut_off > 50, "{finished} finished, {cut_off} cut off");
}

#[test]
fn greedy_follows_the_likeliest_token() {
    let fixture = Fixture::new(config(), 3);
    let found = fixture.search(&SOURCES, &GenerateOptions::default()).unwrap();
    for (src, found) in SOURCES.iter().zip(&found) {
        let mut ids = Vec::new();
        let finished = loop {
            let logits = fixture.next(src, &ids);
            let likeliest = (EOS..8).max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize])).unwrap();
            if likeliest == EOS {
                break true;
            }
            ids.push(likeliest);
            if ids.len() == 2 * src.len() + 10 {
                break false;
            }
        };
        assert_eq!((found.len(), &found[0].ids, found[0].finished), (1, &ids, finished));
    }
}

#[test]
fn a_beam_wider_than_the_language_finds_its_best() {
    // Letters 3 and 4, at most 4 of them: 15 ways to finish, 16 to be cut off.
    let fixture = Fixture::new(TransformerConfig { tgt_vocab: 5, ..config() }, 5);
    for length_penalty in [0.0, 1.0, 3.0] {
        let options = GenerateOptions { max_len: fixed(4), length_penalty, ..beams(1000, 31) };
        let src: &[u32] = &[4, 7, 3];
        let mut all = Vec::new();
        let mut prefixes = vec![(Vec::new(), Vec::new())];
        while let Some((ids, logprobs)) = prefixes.pop() {
            if ids.len() == 4 {
                all.push(hypothesis(ids, logprobs, false, &options));
                continue;
            }
            for (id, _, logprob) in fixture.continuations(src, &ids, 0) {
                let logprobs = [logprobs.as_slice(), &[logprob]].concat();
                if id == EOS {
                    all.push(hypothesis(ids.clone(), logprobs, true, &options));
                } else {
                    prefixes.push(([ids.as_slice(), &[id]].concat(), logprobs));
                }
            }
        }
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        assert_eq!(all.len(), 31);
        assert!(all.windows(2).all(|pair| pair[0].score > pair[1].score), "no ties in this test");
        for n_best in [1, 5, 31] {
            let found = fixture.search(&[src], &GenerateOptions { n_best, ..options.clone() }).unwrap();
            assert_eq!(found[0], all[..n_best]);
        }
    }
}

#[test]
fn a_source_gets_the_same_bits_alone_in_any_batch_order_and_number_of_threads() {
    let fixture = Fixture::new(config(), 8);
    for options in [GenerateOptions::default(), beams(4, 3)] {
        let together = fixture.search(&SOURCES, &options).unwrap();
        for (src, expected) in SOURCES.iter().zip(&together) {
            assert_eq!(&fixture.search(&[src], &options).unwrap()[0], expected);
        }
        let turned: Vec<&[u32]> = SOURCES.iter().rev().copied().chain([SOURCES[1]; 3]).collect();
        let mut again = fixture.search(&turned, &options).unwrap();
        assert_eq!(again.split_off(5), vec![together[1].clone(); 3]);
        again.reverse();
        assert_eq!(again, together);
        for threads in [1, 2, 3, 7] {
            assert_eq!(with_local_limit(threads, || fixture.search(&SOURCES, &options)).unwrap(), together);
        }
    }
}

/// Options that all do something to these sources.
pub(super) fn everything() -> Vec<GenerateOptions> {
    let sampling = |seeds, top_p| Sampling { seeds, temperature: 0.8, top_k: Some(5), top_p, min_p: Some(0.01) };
    let each = Seeds::Each(vec![7, 8, 9, 10, 11]);
    let common = GenerateOptions {
        repetition_penalty: 1.3,
        no_repeat_ngram: Some(2),
        suppress: vec![4],
        forced: [(2, 5)].into(),
        prefixes: vec![vec![3], vec![], vec![6, 6], vec![7], vec![]],
        alternatives: 3,
        min_len: Length::Relative(0.5, 2),
        ..GenerateOptions::default()
    };
    vec![
        common.clone(),
        GenerateOptions { beam: 4, n_best: 3, patience: 2.0, ..common.clone() },
        GenerateOptions { n_best: 3, sampling: Some(sampling(each.clone(), None)), ..common.clone() },
        GenerateOptions { sampling: Some(sampling(each, Some(0.9))), ..common },
    ]
}

/// The options for one of the sources alone.
fn only(options: &GenerateOptions, i: usize) -> GenerateOptions {
    let mut options = options.clone();
    options.prefixes = vec![options.prefixes[i].clone()];
    if let Some(Sampling { seeds: Seeds::Each(seeds), .. }) = &mut options.sampling {
        *seeds = vec![seeds[i]];
    }
    options
}

#[test]
fn every_option_gives_the_same_bits_alone_and_on_any_threads() {
    let fixture = Fixture::new(config(), 8);
    let mut said = Vec::new();
    for options in everything() {
        let together = fixture.search(&SOURCES, &options).unwrap();
        for (i, (src, expected)) in SOURCES.iter().zip(&together).enumerate() {
            assert_eq!(&fixture.search(&[src], &only(&options, i)).unwrap()[0], expected);
            assert_eq!(expected.len(), options.n_best);
            for h in expected {
                assert!(h.ids.starts_with(&options.prefixes[i]) && h.ids[2] == 5 && !h.ids.contains(&4));
                assert_eq!(h.alternatives.len(), 3 * h.token_logprobs.len());
                let best = h.alternatives.chunks(3).zip(&h.token_logprobs);
                assert!(best.clone().all(|(best, &p)| best[0].value >= p && best[0].value >= best[2].value));
                said.push(h.ids.clone());
            }
        }
        for threads in [1, 2, 3] {
            assert_eq!(with_local_limit(threads, || fixture.search(&SOURCES, &options)).unwrap(), together);
        }
    }
    said.sort();
    said.dedup();
    assert!(said.len() > 20, "draws and searches differ: {}", said.len());
}

#[test]
fn sources_take_the_places_of_those_that_are_done() {
    let fixture = Fixture::new(config(), 8);
    let options = GenerateOptions { beam: 90, n_best: 2, ..GenerateOptions::default() }; // two places
    let many: Vec<&[u32]> = (0..11).map(|i| SOURCES[i * 7 % 5]).collect();
    for (src, found) in many.iter().zip(fixture.search(&many, &options).unwrap()) {
        assert_eq!(fixture.search(&[src], &options).unwrap(), [found]);
    }
    let many: Vec<&[u32]> = (0..300).map(|i| SOURCES[i * 7 % 5]).collect();
    let found = fixture.search(&many, &GenerateOptions::default()).unwrap();
    assert!((5..300).all(|i| found[i] == found[i % 5]));
}

#[test]
fn a_shared_seed_draws_differently_in_every_row_and_hypothesis_and_repeats() {
    let fixture = Fixture::new(config(), 8);
    let draw = |seeds| {
        let sampling = Sampling { seeds, temperature: 2.0, top_k: None, top_p: None, min_p: None };
        let options = GenerateOptions { n_best: 4, sampling: Some(sampling), ..GenerateOptions::default() };
        let found = fixture.search(&[SOURCES[0]; 4], &options).unwrap();
        found.into_iter().flatten().map(|h| h.ids).collect::<Vec<_>>()
    };
    let mut first = draw(Seeds::Shared(5));
    assert_eq!(draw(Seeds::Shared(5)), first);
    assert_ne!(draw(Seeds::Shared(6)), first);
    // Row 0 of a seed is any row that has the seed for itself.
    let alone = draw(Seeds::Each(vec![9, 5, 5, 8]));
    assert!(alone[4..8] == first[..4] && alone[8..12] == first[..4]);
    first.sort();
    first.dedup();
    assert!(first.len() > 14);
}

#[test]
fn a_processor_has_its_way_but_for_what_is_forbidden() {
    let fixture = Fixture::new(config(), 8);
    let rows = Rows::from_lengths(&SOURCES.map(<[u32]>::len));
    let run = |options: &GenerateOptions, processor: &mut Processor<'_>| {
        let mut pool = Pool::default();
        hypotheses(fixture.loaded(), None, &mut pool, &SOURCES.concat(), &rows, options, Some(processor))
    };
    for options in everything() {
        // What changes nothing changes no bit.
        let expected = fixture.search(&SOURCES, &options).unwrap();
        assert_eq!(run(&options, &mut |_, logits| Ok(logits.to_vec())).unwrap(), expected);
    }
    let mut seen = Vec::new();
    let mut only_six = |ids: &[u32], logits: &[f32]| {
        seen.push(ids.to_vec());
        Ok((0..logits.len()).map(|id| if [0, 1, 4, 6].contains(&id) { 1e6 } else { f32::NEG_INFINITY }).collect())
    };
    for options in [beams(1, 1), beams(3, 2)] {
        let options = GenerateOptions { suppress: vec![4], max_len: fixed(3), ..options };
        for found in run(&options, &mut only_six).unwrap() {
            assert!(found[0].ids == [6, 6, 6] && found[0].token_logprobs.iter().all(|&p| p < 0.0));
        }
    }
    assert!(seen.contains(&vec![]) && seen.contains(&vec![6, 6]) && !seen.contains(&vec![6, 6, 6]));
    for (bad, text) in [(vec![0.0; 7], "expected 8 logits, got 7"), (vec![f32::NAN; 8], "NaN for id 0")] {
        let error = run(&beams(2, 1), &mut |_, _| Ok(bad.clone())).unwrap_err().to_string();
        assert!(error.contains("logits_processor: token 0 of source 0") && error.contains(text), "{error}");
    }
    let stop = Error::Internal("stop".into());
    assert_eq!(run(&beams(2, 1), &mut |_, _| Err(stop.clone())), Err(stop.clone()));
    // Where everything is forbidden the hypothesis ends.
    let dead = run(&beams(1, 1), &mut |_, logits| Ok(vec![f32::NEG_INFINITY; logits.len()])).unwrap();
    assert!(dead.iter().all(|found| found.len() == 1 && found[0].ids.is_empty() && !found[0].finished));
}

#[test]
fn what_the_memory_cannot_hold_is_refused_before_it_starts() {
    let fixture = Fixture::new(config(), 1);
    let options = GenerateOptions { max_len: fixed(usize::MAX), ..beams(1000, 1) };
    let error = fixture.search(&SOURCES, &options).unwrap_err();
    assert!(
        matches!(&error, Error::OutOfMemory(text) if text.contains("1000 hypotheses") && text.contains("GiB")),
        "{error}"
    );
}

#[test]
fn weights_that_change_between_steps_are_an_error() {
    let mut fixture = Fixture::new(config(), 1);
    let (options, mut pool) = (beams(2, 1), Pool::default());
    let plans = options.plans(fixture.model.config(), &Rows::from_lengths(&[2]), 0..).unwrap();
    let mut decoding = Decoding::new(&fixture.model, None, &options, false).unwrap();
    decoding.push(plans, &[3, 4]).unwrap();
    assert!(decoding.step(fixture.loaded(), None, &mut pool, None).unwrap().is_empty());
    fixture.change("head.bias", |_, b| b + 1.0);
    let error = decoding.step(fixture.loaded(), None, &mut pool, None).unwrap_err();
    assert!(matches!(&error, Error::Config(text) if text.contains("weights")), "{error}");
    assert_eq!(decoding.sources(), 0);

    // The same goes for a draft.
    let (mut draft, options) = (Fixture::new(config(), 2), beams(1, 1));
    let plans = options.plans(fixture.model.config(), &Rows::from_lengths(&[2]), 0..).unwrap();
    let mut decoding = Decoding::new(&fixture.model, Some(&draft.model), &options, false).unwrap();
    decoding.push(plans, &[3, 4]).unwrap();
    decoding.step(fixture.loaded(), Some(draft.loaded()), &mut pool, None).unwrap();
    draft.change("head.bias", |_, b| b + 1.0);
    let error = decoding.step(fixture.loaded(), Some(draft.loaded()), &mut pool, None).unwrap_err();
    assert!(matches!(&error, Error::Config(text) if text.contains("weights")), "{error}");
}

#[test]
fn log_probabilities_are_those_that_score_gives() {
    let mut fixture = Fixture::new(config(), 13);
    // What may never be said is likeliest here: the rest must keep its small share.
    fixture.change("head.bias", |id, b| if id == BOS as usize || id == PAD as usize { 6.0 } else { b });
    let options = GenerateOptions { min_len: Length::Fixed(3), ..beams(4, 4) };
    let found = fixture.search(&SOURCES, &options).unwrap();
    for finished in [true, false] {
        let pairs: Vec<(&[u32], &Hypothesis)> = SOURCES
            .iter()
            .zip(&found)
            .flat_map(|(&src, found)| found.iter().map(move |h| (src, h)))
            .filter(|(_, h)| h.finished == finished)
            .collect();
        assert!(pairs.len() >= 2, "{found:?}");
        let src: Vec<&[u32]> = pairs.iter().map(|&(src, _)| src).collect();
        let tgt: Vec<&[u32]> = pairs.iter().map(|(_, h)| &h.ids[..]).collect();
        let batch = Batch::new(&src, &tgt, BOS, EOS).unwrap();
        let mut tape = Tape::evaluation(Pool::default());
        let scores = fixture.model.score(&mut tape, &fixture.params, &batch).unwrap();
        for (i, (_, h)) in pairs.iter().enumerate() {
            // Without EOS the last score is that of a token the hypothesis does not have.
            let scores = &scores[batch.tgt_rows.range(i)];
            assert_eq!(h.token_logprobs, scores[..h.ids.len() + usize::from(finished)]);
            assert!(h.ids.len() >= 3 && h.ids.iter().all(|&id| id > EOS) && h.token_logprobs[0] < -3.0);
        }
    }
}

#[test]
fn a_prefix_read_at_once_is_the_same_forced_token_by_token() {
    let fixture = Fixture::new(config(), 5);
    for n in [2, 17, 300] {
        let prefix: Vec<u32> = (0..n).map(|i| 3 + i * i % 5).collect();
        let max_len = Some(Length::Fixed(n as usize + 4));
        let options = GenerateOptions { max_len, alternatives: 2, ..beams(3, 2) };
        let forced = GenerateOptions { forced: (0..).zip(prefix.clone()).collect(), ..options.clone() };
        let prefixes = vec![prefix.clone(), vec![4], prefix];
        let read = GenerateOptions { prefixes, ..options };
        let expected = fixture.search(&[SOURCES[0]], &forced).unwrap();
        let found = fixture.search(&[SOURCES[0], SOURCES[1], SOURCES[0]], &read).unwrap();
        assert!(found[0] == expected[0] && found[2] == expected[0], "{n} tokens");
    }
}

#[test]
fn weights_that_are_not_finite_are_an_error_with_step_and_source() {
    let mut fixture = Fixture::new(config(), 1);
    let good = fixture.search(&SOURCES, &beams(2, 1)).unwrap();
    // Source id 8 is used by the first two.
    let before = Fixture::new(config(), 1).params;
    fixture.change("src_embedding.weight", |i, w| if i / 16 == 8 { f32::NAN } else { w });
    let error = fixture.search(&[SOURCES[4], SOURCES[1]], &beams(2, 1)).unwrap_err();
    assert!(matches!(&error, Error::NonFinite(text) if text.contains("token 0 of source 1")), "{error}");
    assert_eq!(fixture.search(&[SOURCES[4]], &beams(2, 1)).unwrap()[0], good[4]);
    // An embedding that is first read in the second step.
    fixture.params = before;
    let first = good[4][0].ids[0] as usize;
    fixture.change("tgt_embedding.weight", |i, w| if i / 16 == first { f32::INFINITY } else { w });
    let error =
        fixture.search(&[SOURCES[4]], &GenerateOptions { min_len: Length::Fixed(2), ..beams(8, 1) }).unwrap_err();
    assert!(matches!(&error, Error::NonFinite(text) if text.contains("token 1 of source 0")), "{error}");
}

#[test]
fn bad_input_is_refused_and_little_input_is_served() {
    let fixture = Fixture::new(config(), 1);
    let greedy = GenerateOptions::default();
    assert_eq!(fixture.search(&[], &greedy).unwrap(), Vec::<Vec<Hypothesis>>::new());
    assert!(matches!(fixture.search(&[&[3, 9]], &greedy), Err(Error::TokenOutOfRange(_))));
    assert!(matches!(fixture.search(&[], &beams(0, 0)), Err(Error::Config(_))));
    let rows = Rows::from_lengths(&[3]);
    let error = hypotheses(fixture.loaded(), None, &mut Pool::default(), &[3, 4], &rows, &greedy, None).unwrap_err();
    assert!(matches!(error, Error::Shape(_)), "{error}");
    // A vocabulary that has no letters: with EOS forbidden nothing can follow.
    let mute = Fixture::new(TransformerConfig { tgt_vocab: 3, ..config() }, 1);
    let found = mute.search(&[&[3]], &GenerateOptions { min_len: Length::Fixed(1), ..beams(2, 2) }).unwrap();
    assert_eq!(found, [[hypothesis(vec![], vec![], false, &greedy)].map(|h| Hypothesis { score: 0.0, ..h })]);
    let found = mute.search(&[&[3]], &beams(2, 2)).unwrap();
    assert!(found[0].len() == 1 && found[0][0].finished && found[0][0].ids.is_empty());
}

#[test]
fn a_decoding_can_be_interrupted() {
    let fixture = Fixture::new(config(), 1);
    let endless = GenerateOptions { min_len: Length::Fixed(100_000), max_len: fixed(100_000), ..beams(4, 1) };
    let result = section(Some(&|| true), || fixture.search(&SOURCES, &endless));
    assert_eq!(result, Err(Error::Interrupted));
    assert!(fixture.search(&SOURCES, &beams(4, 1)).is_ok());
}

#[test]
fn buffers_do_not_grow_with_the_steps() {
    let fixture = Fixture::new(config(), 1);
    let bytes = |steps: usize| {
        let mut pool = Pool::default();
        let options = GenerateOptions { min_len: Length::Fixed(steps), max_len: fixed(steps), ..beams(3, 3) };
        hypotheses(fixture.loaded(), None, &mut pool, &[3, 4, 5], &Rows::from_lengths(&[3]), &options, None).unwrap();
        pool.bytes()
    };
    assert_eq!(bytes(100), bytes(10));
}

/// A vocabulary so large that the likeliest tokens are sought without the logits of all.
fn large(config: TransformerConfig) -> TransformerConfig {
    TransformerConfig { tgt_vocab: SHORTLIST_FROM / config.d_model, ..config }
}

#[test]
fn without_scores_the_ids_are_the_same() {
    let tied = TransformerConfig { tie_embeddings: Some(Tie::Target), head_bias: false, ..config() };
    let sampling = |top_p| Sampling { seeds: Seeds::Shared(7), temperature: 0.8, top_k: Some(40), top_p, min_p: None };
    let common = GenerateOptions { max_len: fixed(8), ..GenerateOptions::default() };
    let mut all = vec![
        common.clone(),
        GenerateOptions { min_len: fixed(8).unwrap(), ..common.clone() },
        GenerateOptions { no_repeat_ngram: Some(1), suppress: vec![4, 7], forced: [(2, 5)].into(), ..common.clone() },
        GenerateOptions { prefixes: vec![vec![3], vec![], vec![6, 6], vec![7; 8], vec![]], ..common.clone() },
        GenerateOptions { sampling: Some(sampling(None)), n_best: 3, ..common.clone() },
        GenerateOptions { sampling: Some(sampling(Some(0.9))), ..common.clone() },
        GenerateOptions { patience: 2.0, ..common.clone() },
        GenerateOptions { beam: 3, n_best: 2, ..common },
    ];
    all.extend(everything());
    for (seed, config) in [large(config()), large(tied), config()].into_iter().enumerate() {
        let fixture = Fixture::new(config, seed as u64);
        for options in &all {
            let expected = fixture.search(&SOURCES, options).unwrap();
            let options = GenerateOptions { scores: false, alternatives: 0, ..options.clone() };
            let bare = |h: Hypothesis| Hypothesis { score: 0.0, token_logprobs: vec![], alternatives: vec![], ..h };
            let expected: Vec<Vec<_>> = expected.into_iter().map(|best| best.into_iter().map(bare).collect()).collect();
            for threads in [1, 3] {
                let found = with_local_limit(threads, || fixture.search(&SOURCES, &options)).unwrap();
                assert_eq!(found, expected, "{options:?}");
            }
            if options.width() == 1 {
                assert_eq!(fixture.search_with(Some(&fixture), &SOURCES, &options).unwrap(), expected, "{options:?}");
            }
        }
    }
}

#[test]
fn without_scores_the_logits_must_be_finite_too() {
    let mut fixture = Fixture::new(large(config()), 8);
    let options = GenerateOptions { scores: false, max_len: fixed(20), ..GenerateOptions::default() };
    assert!(fixture.search(&SOURCES, &options).is_ok());
    // Of one token; then of all, where all are as likely, which only the whole product can tell.
    fixture.change("head.weight", |i, w| if i == 900 { f32::NAN } else { w });
    let error = fixture.search(&SOURCES, &options).unwrap_err();
    assert!(matches!(&error, Error::NonFinite(text) if text.contains("token 0 of source 0")), "{error}");
    fixture.change("head.weight", |_, _| 0.0);
    fixture.change("head.bias", |_, _| 0.0);
    let found = fixture.search(&SOURCES, &options).unwrap();
    assert!(found.iter().all(|best| best[0].ids.is_empty() && best[0].finished), "of equals the lowest id, EOS");
    let found = fixture.search(&SOURCES, &GenerateOptions { min_len: Length::Fixed(20), ..options }).unwrap();
    assert!(found.iter().all(|best| best[0].ids == [3; 20]), "or the one behind it");
}
