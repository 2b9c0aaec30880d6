//! Speculative decoding (Leviathan et al. 2023): a smaller model, the draft, guesses the next tokens of a hypothesis. The model reads
//! them all at once, for which its weights come from memory once, and keeps those that it would have said itself.
//!
//! What follows a hypothesis depends on its ids, the model's logits and, where tokens are drawn, a number that belongs to the
//! place. So what is kept is what the model says alone, bit for bit, whatever the draft guesses.

use super::beam::Beam;
use super::choice::Choice;
use super::options::GenerateOptions;
use super::{Loaded, join, on_tape, some_rows};
use crate::ensure;
use crate::error::Result;
use crate::models::{DecoderState, TransformerConfig};
use crate::profile::{self, Work};
use crate::rows::Rows;
use crate::tape::Pool;

/// Tokens that are guessed of a source at first, and at most.
const FIRST: usize = 6;
const MOST_GUESSES: usize = 10;
/// Rows that the model reads at a time: with more of them its products take longer than the weights take to come from memory.
const ROWS: usize = 16;
/// Sources that are guessed for, two tokens at least of each.
const MOST_SOURCES: usize = ROWS / 3;

/// What a draft knows of the sources under way, a sequence of each.
#[derive(Debug, Default)]
pub(super) struct Guesser {
    state: Option<DecoderState<f32>>,
    /// How many tokens to guess next.
    counts: Vec<usize>,
}

/// Refuses a draft that cannot help this model with these options.
pub(super) fn check(
    config: &TransformerConfig,
    other: &TransformerConfig,
    options: &GenerateOptions,
    processed: bool,
) -> Result<()> {
    for (name, expected, got) in [
        ("src_vocab", config.src_vocab, other.src_vocab),
        ("tgt_vocab", config.tgt_vocab, other.tgt_vocab),
        ("bos_id", config.bos_id as usize, other.bos_id as usize),
        ("eos_id", config.eos_id as usize, other.eos_id as usize),
    ] {
        ensure!(got == expected, Config, "argument `draft`: expected a model with {name} = {expected}, got {got}");
    }
    let width = options.width();
    ensure!(
        width == 1,
        Config,
        "argument `draft`: a draft guesses for one hypothesis of each source, there are {width}; leave it out, or beam and n_best"
    );
    ensure!(
        !processed,
        Config,
        "argument `draft`: a logits_processor would be asked about tokens that are only guessed; leave one of them out"
    );
    Ok(())
}

impl Guesser {
    /// Takes in sources beside those `here`. Where there are too many, or one is too long for the draft, it gives up until all
    /// are done.
    pub fn admit(
        &mut self,
        draft: Loaded<'_>,
        pool: &mut Pool<f32>,
        src: &[u32],
        rows: &Rows,
        here: &[Beam],
    ) -> Result<()> {
        let few = self.knows_all(here) && here.len() + rows.sequences() <= MOST_SOURCES;
        if !few || rows.lengths().any(|n| n > draft.layers.config().longest()) {
            *self = Guesser::default();
            return Ok(());
        }
        join(&mut self.state, on_tape(pool, |tape| draft.start(tape, src, rows))?);
        self.counts.resize(self.counts.len() + rows.sequences(), FIRST);
        Ok(())
    }

    /// Whether there is a sequence for each of the sources.
    pub fn knows_all(&self, beams: &[Beam]) -> bool {
        self.counts.len() == beams.len()
    }

    /// The sources that go on.
    pub fn reorder(&mut self, parents: &[usize]) {
        if let Some(state) = &mut self.state {
            state.reorder(parents);
            self.counts = parents.iter().map(|&p| self.counts[p]).collect();
        }
    }

    /// What may come next in each source that the model is about to read, behind what follows it in any case.
    pub fn guess(
        &mut self,
        draft: Loaded<'_>,
        pool: &mut Pool<f32>,
        choice: &Choice,
        beams: &[Beam],
        reads: &[bool],
    ) -> Result<Vec<Vec<u32>>> {
        let config = draft.layers.config();
        let mut guesses = vec![Vec::new(); beams.len()];
        let reading = reads.iter().filter(|&&reads| reads).count();
        let Some(state) = self.state.as_mut().filter(|_| reading > 0) else { return Ok(guesses) };
        let _timed = profile::part("draft", [0, 0], || Work::of_parts(reading));
        let behind: Vec<Vec<u32>> = beams.iter().map(Beam::behind).collect();
        let mut wanted: Vec<usize> = (0..beams.len())
            .map(|i| {
                // The last token of all is not read, by the model or the draft.
                let len = beams[i].len + behind[i].len();
                let most = beams[i].plan.max_len.saturating_sub(len + 1).min(config.longest().saturating_sub(len));
                if reads[i] { self.counts[i].min(ROWS / reading - 1).min(most) } else { 0 }
            })
            .collect();
        loop {
            let goes_on: Vec<usize> = (0..beams.len()).filter(|&i| guesses[i].len() < wanted[i]).collect();
            if goes_on.is_empty() {
                return Ok(guesses);
            }
            let mut unread = vec![Vec::new(); beams.len()];
            for &i in &goes_on {
                let text = [&[config.bos_id][..], &beams[i].ids(0), &behind[i], &guesses[i]].concat();
                unread[i] = text[state.positions()[i]..].to_vec();
            }
            let rows = Rows::from_lengths(&unread.iter().map(Vec::len).collect::<Vec<_>>());
            let last: Vec<usize> = goes_on.iter().map(|&i| rows.range(i).end - 1).collect();
            let asked = goes_on.iter().map(|&i| choice.row(&beams[i], 0, &[&behind[i][..], &guesses[i]].concat()));
            let follows = on_tape(pool, |tape| {
                let hidden = draft.layers.advance(tape, draft.params, &unread.concat(), &rows, state)?;
                let hidden = some_rows(tape, hidden, &last)?;
                choice.choose(draft, tape, hidden, asked.collect(), true, None)
            })?;
            for (&i, follow) in goes_on.iter().zip(follows) {
                match follow.and_then(|follow| follow.first()).filter(|&id| id != config.eos_id) {
                    Some(id) => guesses[i].push(id),
                    None => wanted[i] = guesses[i].len(),
                }
            }
        }
    }

    /// So many guesses of a source were right: about as many will be the next time.
    pub fn learn(&mut self, source: usize, guesses: usize, right: usize) {
        if guesses > 0 {
            self.counts[source] = (right + 2).min(MOST_GUESSES);
        }
    }

    /// Forgets what was guessed wrong: all but so many tokens of each source.
    pub fn keep(&mut self, lengths: &[usize]) -> Result<()> {
        self.state.as_mut().map_or(Ok(()), |state| state.keep(lengths))
    }
}

#[cfg(test)]
mod tests {
    use super::super::beam::{Candidate, Follow};
    use super::super::tests::{Fixture, SOURCES, beams, config, everything, fixed};
    use super::super::{Decoding, Length, Sampling, Seeds, hypotheses};
    use super::*;
    use crate::error::Error;
    use crate::models::{PositionKind, Transformer, TransformerConfig};
    use crate::tape::Params;
    use crate::threads::with_local_limit;
    use std::sync::Arc;

    #[test]
    fn a_model_guesses_what_it_says_as_far_as_it_may() {
        let config = TransformerConfig { d_model: 16, n_heads: 2, d_ff: 24, ..TransformerConfig::new(9, 8) };
        let model = Transformer::new(config.clone()).unwrap();
        let params = Params::init(model.layout().clone(), 8).unwrap();
        let loaded = Loaded { layers: &model, params: &params };
        let (src, rows) = ([3, 4, 5], Rows::from_lengths(&[3]));
        let n = Length::Fixed(20);
        let options = GenerateOptions { min_len: n, max_len: Some(n), ..GenerateOptions::default() };
        let mut pool = Pool::default();
        let said = hypotheses(loaded, None, &mut pool, &src, &rows, &options, None).unwrap()[0][0].ids.clone();

        let plan = options.plans(&config, &rows, 0..).unwrap().remove(0);
        let options = Arc::new(options);
        let choice = Choice::new(options.clone(), &config, false);
        let follow = |id| {
            let candidates = vec![Candidate { id, logprob: -1.0, value: -1.0 }];
            Follow { candidates, ..Follow::default() }
        };
        let mut guesser = Guesser::default();
        guesser.admit(loaded, &mut pool, &src, &rows, &[]).unwrap();
        let mut beams = vec![Beam::new(options.clone(), plan.clone(), true)];
        let grow = |beams: &mut [Beam], n: usize| {
            for _ in 0..n {
                let id = said[beams[0].len];
                beams[0].step(&[follow(id)], config.eos_id, |_| ());
            }
        };
        let guess = |guesser: &mut Guesser, beams: &[Beam]| {
            guesser.guess(loaded, &mut Pool::default(), &choice, beams, &[true]).unwrap().remove(0)
        };
        assert_eq!(guess(&mut guesser, &beams), said[..FIRST]);
        // All were right, and the model itself said one more, ...
        grow(&mut beams, FIRST + 1);
        guesser.learn(0, FIRST, FIRST);
        assert_eq!(guess(&mut guesser, &beams), said[FIRST + 1..][..FIRST + 2]);
        // ... then one alone was right, ...
        grow(&mut beams, 2);
        guesser.keep(&[FIRST + 1 + 1 + 1]).unwrap();
        guesser.learn(0, FIRST, 1);
        assert_eq!(guess(&mut guesser, &beams), said[FIRST + 3..][..3]);
        // ... and before the end there is less to guess.
        grow(&mut beams, 16 - (FIRST + 3));
        guesser.learn(0, FIRST, 9);
        assert_eq!(guess(&mut guesser, &beams), said[16..19]);
        // What follows in any case is not guessed.
        guesser.keep(&[17]).unwrap();
        beams[0].ahead.extend([follow(said[16]), follow(said[17])]);
        assert_eq!(guess(&mut guesser, &beams), said[18..19]);
        // Nobody guesses for many, until they are done.
        let many = Rows::from_lengths(&[3; MOST_SOURCES]);
        guesser.admit(loaded, &mut pool, &src.repeat(MOST_SOURCES), &many, &beams).unwrap();
        assert!(!guesser.knows_all(&beams) && guess(&mut guesser, &beams).is_empty());
        guesser.admit(loaded, &mut pool, &src.repeat(MOST_SOURCES), &many, &[]).unwrap();
        assert_eq!(guesser.counts, [FIRST; MOST_SOURCES]);
    }

    #[test]
    fn a_draft_makes_no_difference() {
        let fixture = Fixture::new(config(), 8);
        let (mut near, mut broken) = (Fixture::new(config(), 8), Fixture::new(config(), 8));
        near.change("decoder.layers.1.feed_forward.down.weight", |i, w| if i % 3 == 0 { 0.0 } else { w });
        broken.change("head.bias", |_, _| f32::NAN);
        let short = TransformerConfig { positions: PositionKind::Learned, max_positions: Some(12), ..config() };
        let stranger = Fixture::new(TransformerConfig { d_model: 8, n_decoder_layers: 1, ..short }, 3);
        let sampling =
            Sampling { seeds: Seeds::Shared(4), temperature: 0.7, top_k: None, top_p: Some(0.9), min_p: None };
        // Longer than pages of the caches, which wrong guesses fill and leave again.
        let long = GenerateOptions { min_len: Length::Fixed(45), max_len: fixed(50), ..GenerateOptions::default() };
        let longer = [7; 13];
        let found = fixture.search_with(Some(&stranger), &[&longer], &beams(1, 1)).unwrap();
        assert_eq!(found, fixture.search(&[&longer], &beams(1, 1)).unwrap());
        let mut all = everything();
        all.retain(|options| options.width() == 1);
        all.extend([
            beams(1, 1),
            long.clone(),
            GenerateOptions { sampling: Some(sampling), ..long },
            GenerateOptions { patience: 3.0, max_len: fixed(9), ..GenerateOptions::default() },
            GenerateOptions { max_len: fixed(1), ..GenerateOptions::default() },
        ]);
        let many: Vec<&[u32]> = (0..40).map(|i| SOURCES[i % 5]).collect();
        for options in all {
            let expected = fixture.search(&SOURCES, &options).unwrap();
            for draft in [&fixture, &near, &stranger, &broken] {
                let draft = Some(draft);
                assert_eq!(fixture.search_with(draft, &SOURCES, &options).unwrap(), expected, "{options:?}");
                for threads in [1, 3] {
                    let found = with_local_limit(threads, || fixture.search_with(draft, &SOURCES, &options));
                    assert_eq!(found.unwrap(), expected);
                }
                if options.prefixes.is_empty() && options.sampling.is_none() {
                    for (src, expected) in SOURCES.iter().zip(&expected) {
                        assert_eq!(&fixture.search_with(draft, &[src], &options).unwrap()[0], expected);
                    }
                    // Too many for guesses, until few are left.
                    let found = fixture.search_with(draft, &many, &options).unwrap();
                    assert!((0..40).all(|i| found[i] == expected[i % 5]));
                }
            }
        }
    }

    #[test]
    fn a_draft_that_cannot_help_is_refused() {
        let fixture = Fixture::new(config(), 8);
        let sampling = Sampling { seeds: Seeds::Shared(4), temperature: 0.7, top_k: None, top_p: None, min_p: None };
        let other = Fixture::new(TransformerConfig { tgt_vocab: 9, ..config() }, 8);
        let greedy = beams(1, 1);
        for (draft, options, text) in [
            (&fixture, beams(2, 1), "there are 2"),
            (&fixture, GenerateOptions { sampling: Some(sampling), n_best: 3, ..greedy.clone() }, "there are 3"),
            (&other, greedy.clone(), "tgt_vocab = 8, got 9"),
        ] {
            let error = fixture.search_with(Some(draft), &SOURCES, &options).unwrap_err();
            assert!(
                matches!(&error, Error::Config(message) if message.contains("`draft`") && message.contains(text)),
                "{error}"
            );
        }
        let layers = fixture.loaded().layers;
        let error = Decoding::new(layers, Some(layers), &greedy, true).unwrap_err();
        assert!(matches!(&error, Error::Config(message) if message.contains("logits_processor")), "{error}");
    }
}
