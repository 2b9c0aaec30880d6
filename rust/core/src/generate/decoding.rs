//! A decoding under way: sources come, their hypotheses grow a token a step, and leave when they are done; others that wait
//! take their places.

use super::beam::{Beam, Follow};
use super::choice::{Choice, Processor};
use super::draft::{self, Guesser};
use super::hypothesis::Hypothesis;
use super::memory::Room;
use super::options::{GenerateOptions, Plan};
use super::{Loaded, join, on_tape};
use crate::ensure;
use crate::error::Result;
use crate::kernels::softmax::log_sum_exp;
use crate::kernels::top_k::Entry;
use crate::models::{DecoderState, Transformer};
use crate::profile::{self, Work};
use crate::rows::Rows;
use crate::tape::{Pool, Tape};
use crate::threads::{self, for_each};
use std::collections::VecDeque;
use std::sync::Arc;

/// Tokens of prefixes whose logits are in memory together.
const PREFIX_ROWS: usize = 256;

/// A batch of sources that may change between its steps.
#[derive(Debug)]
pub struct Decoding {
    options: Arc<GenerateOptions>,
    choice: Choice,
    /// One sequence for every live hypothesis: those of the first source, of the second, ...
    state: Option<DecoderState<f32>>,
    beams: Vec<Beam>,
    /// Sources that have no place yet.
    waiting: VecDeque<(Plan, Vec<u32>)>,
    room: Room,
    guesser: Guesser,
    /// Of the parameters that the state was computed with, the model's and the draft's.
    version: Option<(u64, Option<u64>)>,
}

impl Decoding {
    /// No sources yet. `processed` says whether [`Decoding::step`] will get a processor, `draft` is the one that it will get.
    pub fn new(
        model: &Transformer,
        draft: Option<&Transformer>,
        options: &GenerateOptions,
        processed: bool,
    ) -> Result<Self> {
        if let Some(draft) = draft {
            draft::check(model.config(), draft.config(), options, processed)?;
        }
        let room = Room::of([Some(model), draft].into_iter().flatten().map(Transformer::config), options);
        let options = Arc::new(options.clone());
        let choice = Choice::new(options.clone(), model.config(), processed);
        let (beams, waiting, guesser) = Default::default();
        Ok(Decoding { options, choice, state: None, beams, waiting, room, guesser, version: None })
    }

    /// Takes in sources, whose ids lie one after the other in `src`. One whose caches could outgrow the machine's memory is
    /// refused, and all with it.
    pub fn push(&mut self, plans: Vec<Plan>, src: &[u32]) -> Result<()> {
        let ids: usize = plans.iter().map(|plan| plan.ids).sum();
        ensure!(src.len() == ids, Shape, "decoding: {} ids for sources of {ids}", src.len());
        plans.iter().try_for_each(|plan| self.room.check(plan))?;
        let mut rest = src;
        for plan in plans {
            let (ids, later) = rest.split_at(plan.ids);
            rest = later;
            self.waiting.push_back((plan, ids.to_vec()));
        }
        Ok(())
    }

    /// Sources that are not done.
    pub fn sources(&self) -> usize {
        self.beams.len() + self.waiting.len()
    }

    /// The token that the first hypothesis got in the last step, if it goes on.
    pub fn newest(&self) -> Option<u32> {
        self.beams.first().and_then(|beam| beam.last_tokens(u32::MAX).next())
    }

    /// Gives places to sources that wait, as many as there is room for.
    fn admit(&mut self, model: Loaded<'_>, draft: Option<Loaded<'_>>, pool: &mut Pool<f32>) -> Result<()> {
        let here = self.beams.iter().map(|beam| &beam.plan);
        let n = self.room.admits(here, self.waiting.iter().map(|(plan, _)| plan));
        if n == 0 {
            return Ok(());
        }
        let (plans, src): (Vec<Plan>, Vec<Vec<u32>>) = self.waiting.drain(..n).unzip();
        let rows = Rows::from_lengths(&plans.iter().map(|plan| plan.ids).collect::<Vec<_>>());
        let beams = plans.into_iter().map(|plan| Beam::new(self.options.clone(), plan, self.choice.falls()));
        let (mut beams, src): (Vec<Beam>, _) = (beams.collect(), src.concat());
        let mut state = on_tape(pool, |tape| {
            let mut state = model.start(tape, &src, &rows)?;
            self.read_prefixes(model, tape, &mut state, &mut beams)?;
            Ok(state)
        })?;
        if let Some(draft) = draft {
            self.guesser.admit(draft, pool, &src, &rows, &self.beams)?;
        }
        // What is drawn begins as copies of one beginning.
        let roots: Vec<usize> = beams.iter().enumerate().flat_map(|(i, beam)| vec![i; beam.alive()]).collect();
        if roots.len() > beams.len() {
            state.reorder(&roots);
        }
        join(&mut self.state, state);
        self.beams.extend(beams);
        Ok(())
    }

    /// Lets the model read all but the last token of long prefixes at once.
    fn read_prefixes(
        &self,
        model: Loaded<'_>,
        tape: &mut Tape<f32>,
        state: &mut DecoderState<f32>,
        beams: &mut [Beam],
    ) -> Result<()> {
        let long = |beam: &Beam| if beam.plan.prefix.len() > 1 { beam.plan.prefix.len() } else { 0 };
        let rows = Rows::from_lengths(&beams.iter().map(long).collect::<Vec<_>>());
        if rows.total() == 0 {
            return Ok(());
        }
        // BOS says what the first token's chances are, ..., the last but one what the last one's are.
        let read = |beam: &Beam| {
            [model.layers.config().bos_id]
                .into_iter()
                .chain(beam.plan.prefix.iter().copied())
                .take(long(beam))
                .collect::<Vec<_>>()
        };
        let tokens: Vec<u32> = beams.iter().flat_map(read).collect();
        let hidden = model.layers.advance(tape, model.params, &tokens, &rows, state)?;
        if self.options.ids_alone() {
            let ahead = |beam: &mut Beam| {
                let ids = beam.plan.prefix.iter().take(long(beam));
                let follows: Vec<_> = ids.map(|&id| Follow::unscored(Some(id))).collect();
                beam.ahead.extend(follows);
            };
            beams.iter_mut().for_each(ahead);
            return Ok(());
        }
        let places: Vec<(usize, usize)> =
            (0..beams.len()).flat_map(|i| (0..rows.length(i)).map(move |at| (i, at))).collect();
        for (places, first) in places.chunks(PREFIX_ROWS).zip((0..).step_by(PREFIX_ROWS)) {
            let logits = model.logits(tape, hidden, first..first + places.len())?;
            let mut follows = vec![None; places.len()];
            let plans: Vec<&Plan> = places.iter().map(|&(i, _)| &beams[i].plan).collect();
            let of = plans.iter().zip(places).zip(logits.chunks(logits.cols()));
            for_each(of.zip(&mut follows), |(((plan, &(_, at)), logits), follow)| {
                let id = plan.prefix[at];
                *follow = self.choice.follow(logits, log_sum_exp(logits), &[Entry { id, value: logits[id as usize] }]);
            })?;
            for (&(i, at), follow) in places.iter().zip(follows) {
                let follow = follow.ok_or_else(|| beams[i].plan.not_finite(at))?;
                beams[i].ahead.push_back(follow);
            }
            tape.pool.recycle(logits);
        }
        Ok(())
    }

    /// Adds a token to every live hypothesis. Returns the sources that are done by it, each with its hypotheses. An error
    /// ends all of them: caches may be half filled.
    pub fn step(
        &mut self,
        model: Loaded<'_>,
        draft: Option<Loaded<'_>>,
        pool: &mut Pool<f32>,
        processor: Option<&mut Processor<'_>>,
    ) -> Result<Vec<(usize, Vec<Hypothesis>)>> {
        let _timed = profile::span("decoding", [0, 0], || Work::of_parts(self.beams.iter().map(Beam::alive).sum()));
        let follows = threads::section(None, || self.follows(model, draft, pool, processor));
        let (mut beams, state) = (std::mem::take(&mut self.beams), self.state.take());
        let (waiting, mut guesser) = (std::mem::take(&mut self.waiting), std::mem::take(&mut self.guesser));
        let (follows, mut parents) = (follows?, Vec::new());
        self.waiting = waiting;
        let search = profile::part("search", [0, 0], || Work::of_parts(follows.len()));
        let mut row = 0;
        for beam in &mut beams {
            let alive = beam.alive();
            beam.step(&follows[row..row + alive], model.layers.config().eos_id, |parent| parents.push(row + parent));
            row += alive;
        }
        drop(search);
        let (done, live) = beams.into_iter().partition::<Vec<_>, _>(|beam| beam.alive() == 0);
        if let Some(mut state) = state.filter(|_| !live.is_empty()) {
            profile::part("reorder", [0, 0], || Work::of_parts(parents.len())).run(|| state.reorder(&parents));
            guesser.reorder(&parents);
            (self.state, self.guesser, self.beams) = (Some(state), guesser, live);
        }
        Ok(done.into_iter().map(|beam| (beam.plan.source, beam.into_best())).collect())
    }

    /// What may follow each live hypothesis.
    fn follows(
        &mut self,
        model: Loaded<'_>,
        draft: Option<Loaded<'_>>,
        pool: &mut Pool<f32>,
        processor: Option<&mut Processor<'_>>,
    ) -> Result<Vec<Follow>> {
        self.same_weights(model, draft)?;
        self.admit(model, draft, pool)?;
        let Some(state) = &mut self.state else { return Ok(Vec::new()) };
        // While one waits for the model, others may read on as well: behind what will follow them in any case.
        let waits = self.beams.iter().any(|beam| beam.ahead.is_empty());
        let eos = model.layers.config().eos_id;
        let reads = self.beams.iter().map(|beam| {
            beam.ahead.is_empty() || waits && self.guesser.knows_all(&self.beams) && beam.goes_on_behind(eos)
        });
        let reads: Vec<bool> = reads.collect();
        let guesses = match draft {
            Some(draft) => self.guesser.guess(draft, pool, &self.choice, &self.beams, &reads)?,
            None => vec![Vec::new(); self.beams.len()],
        };
        // The newest tokens and what is guessed after them.
        let (mut lengths, mut tokens, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for ((beam, guesses), &reads) in self.beams.iter().zip(&guesses).zip(&reads) {
            let behind = beam.behind();
            for (live, newest) in beam.last_tokens(model.layers.config().bos_id).enumerate() {
                lengths.push(if reads { 1 + guesses.len() } else { 0 });
                if reads {
                    tokens.push(*behind.last().unwrap_or(&newest));
                    tokens.extend(guesses);
                    let more = [&behind[..], guesses].concat();
                    rows.extend((behind.len()..=more.len()).map(|n| self.choice.row(beam, live, &more[..n])));
                }
            }
        }
        let mut found = Vec::new();
        if !rows.is_empty() {
            found = on_tape(pool, |tape| {
                let hidden = model.layers.advance(tape, model.params, &tokens, &Rows::from_lengths(&lengths), state)?;
                self.choice.choose(model, tape, hidden, rows, false, processor)
            })?;
        }
        let (mut found, mut kept) = (found.into_iter(), state.positions().to_vec());
        let mut follows = Vec::with_capacity(lengths.len());
        for (i, (beam, guesses)) in self.beams.iter_mut().zip(guesses).enumerate() {
            if reads[i] && beam.alive() == 1 {
                let right = beam.look_ahead(found.by_ref().take(1 + guesses.len()).collect(), &guesses)?;
                kept[i] -= guesses.len() - right;
                self.guesser.learn(i, guesses.len(), right);
            }
            match beam.ahead.pop_front() {
                Some(follow) => follows.extend(vec![follow; beam.alive()]),
                None => {
                    for follow in found.by_ref().take(beam.alive()) {
                        follows.push(follow.ok_or_else(|| beam.plan.not_finite(beam.len))?);
                    }
                }
            }
        }
        state.keep(&kept)?;
        self.guesser.keep(&kept)?;
        Ok(follows)
    }

    /// Refuses weights that changed since the caches were filled.
    fn same_weights(&mut self, model: Loaded<'_>, draft: Option<Loaded<'_>>) -> Result<()> {
        if self.beams.is_empty() {
            self.version = None;
        }
        let version = (model.params.version(), draft.map(|draft| draft.params.version()));
        ensure!(
            *self.version.get_or_insert(version) == version,
            Config,
            "decoding: the weights have changed since it began; begin anew"
        );
        Ok(())
    }
}
