//! A decoding under way: sources come, their hypotheses grow a token a step, and leave when they are done; others that wait
//! take their places.

use super::beam::{Beam, Candidate, Follow};
use super::constraints::{Constraints, Next};
use super::hypothesis::Hypothesis;
use super::memory::Room;
use super::on_tape;
use super::options::{GenerateOptions, Plan};
use crate::error::{Error, Result};
use crate::kernels::softmax::{LogSumExp, log_sum_exp};
use crate::kernels::top_k::{Entry, top_k};
use crate::models::{DecoderState, Transformer};
use crate::profile::{self, Work};
use crate::rows::Rows;
use crate::tape::{Params, Pool, Tape};
use crate::threads::{self, for_each};
use crate::{bail, ensure};
use std::collections::VecDeque;
use std::sync::Arc;

/// Tokens of prefixes whose logits are in memory together.
const PREFIX_ROWS: usize = 256;

/// Replaces the logits of one hypothesis: (its ids so far, the model's logits (V,)) -> logits (V,), −∞ for what must not
/// follow. It is called on the calling thread, hypothesis by hypothesis. Nothing that it returns allows what is forbidden
/// otherwise.
pub type Processor<'a> = dyn FnMut(&[u32], &[f32]) -> Result<Vec<f32>> + 'a;

/// A batch of sources that may change between its steps.
#[derive(Debug)]
pub struct Decoding {
    options: Arc<GenerateOptions>,
    constraints: Constraints,
    /// Whether values never rise above 0.
    falling: bool,
    /// One sequence for every live hypothesis: those of the first source, of the second, ...
    state: Option<DecoderState<f32>>,
    beams: Vec<Beam>,
    /// Sources that have no place yet.
    waiting: VecDeque<(Plan, Vec<u32>)>,
    room: Room,
    /// Of the parameters that the state was computed with.
    version: Option<u64>,
}

/// A live hypothesis whose next token is to be found.
struct Row<'a> {
    beam: &'a Beam,
    live: usize,
    /// Its ids, where somebody reads them.
    ids: Vec<u32>,
    /// What a processor made of the logits.
    processed: Option<Vec<f32>>,
}

impl Decoding {
    /// No sources yet. `processed` says whether [`Decoding::step`] will get a processor.
    pub fn new(model: &Transformer, options: &GenerateOptions, processed: bool) -> Self {
        let constraints = Constraints::new(options, model.config());
        let falling = !(processed || constraints.raises());
        let (room, options) = (Room::of(model, options), Arc::new(options.clone()));
        let (beams, waiting) = Default::default();
        Decoding { options, constraints, falling, state: None, beams, waiting, room, version: None }
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
    fn admit(&mut self, model: &Transformer, pool: &mut Pool<f32>, params: &Params<f32>) -> Result<()> {
        let here = self.beams.iter().map(|beam| &beam.plan);
        let n = self.room.admits(here, self.waiting.iter().map(|(plan, _)| plan));
        if n == 0 {
            return Ok(());
        }
        let (plans, src): (Vec<Plan>, Vec<Vec<u32>>) = self.waiting.drain(..n).unzip();
        let rows = Rows::from_lengths(&plans.iter().map(|plan| plan.ids).collect::<Vec<_>>());
        let beams = plans.into_iter().map(|plan| Beam::new(self.options.clone(), plan, self.falling));
        let mut beams: Vec<Beam> = beams.collect();
        let mut state = on_tape(pool, |tape| {
            let memory = model.encode(tape, params, &src.concat(), &rows)?;
            let mut state = model.start(tape, params, memory, &rows)?;
            self.read_prefixes(model, tape, params, &mut state, &mut beams)?;
            Ok(state)
        })?;
        // What is drawn begins as copies of one beginning.
        let roots: Vec<usize> = beams.iter().enumerate().flat_map(|(i, beam)| vec![i; beam.alive()]).collect();
        if roots.len() > beams.len() {
            state.reorder(&roots);
        }
        match &mut self.state {
            Some(all) => all.join(state),
            None => self.state = Some(state),
        }
        self.beams.extend(beams);
        Ok(())
    }

    /// Lets the model read all but the last token of long prefixes at once.
    fn read_prefixes(
        &self,
        model: &Transformer,
        tape: &mut Tape<f32>,
        params: &Params<f32>,
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
            [model.config().bos_id]
                .into_iter()
                .chain(beam.plan.prefix.iter().copied())
                .take(long(beam))
                .collect::<Vec<_>>()
        };
        let tokens: Vec<u32> = beams.iter().flat_map(read).collect();
        let hidden = model.advance(tape, params, &tokens, &rows, state)?;
        let places: Vec<(usize, usize)> =
            (0..beams.len()).flat_map(|i| (0..rows.length(i)).map(move |at| (i, at))).collect();
        let d = tape.value(hidden)?.cols();
        for (places, first) in places.chunks(PREFIX_ROWS).zip((0..).step_by(PREFIX_ROWS)) {
            let mut part = tape.pool.tensor(places.len(), d)?;
            part.copy_from_slice(&tape.value(hidden)?[first * d..][..places.len() * d]);
            let part = tape.constant(part);
            let logits = model.logits(tape, params, part)?;
            let logits = tape.take(logits)?;
            let mut follows = vec![None; places.len()];
            let plans: Vec<&Plan> = places.iter().map(|&(i, _)| &beams[i].plan).collect();
            let of = plans.iter().zip(places).zip(logits.chunks(logits.cols()));
            for_each(of.zip(&mut follows), |(((plan, &(_, at)), logits), follow)| {
                let id = plan.prefix[at];
                *follow = self.follow(logits, None, &[Entry { id, value: logits[id as usize] }]);
            })?;
            for (&(i, at), follow) in places.iter().zip(follows) {
                let source = beams[i].plan.source;
                beams[i].ahead.push_back(follow.ok_or_else(|| not_finite(at, source))?);
            }
            tape.pool.recycle(logits);
        }
        Ok(())
    }

    /// Adds a token to every live hypothesis. Returns the sources that are done by it, each with its hypotheses. An error
    /// ends all of them: caches may be half filled.
    pub fn step(
        &mut self,
        model: &Transformer,
        pool: &mut Pool<f32>,
        params: &Params<f32>,
        processor: Option<&mut Processor<'_>>,
    ) -> Result<Vec<(usize, Vec<Hypothesis>)>> {
        let _timed = profile::span("decoding", [0, 0], || Work::of_parts(self.beams.iter().map(Beam::alive).sum()));
        let follows = threads::section(None, || self.follows(model, pool, params, processor));
        let (mut beams, state) = (std::mem::take(&mut self.beams), self.state.take());
        let waiting = std::mem::take(&mut self.waiting);
        let (follows, mut parents) = (follows?, Vec::new());
        self.waiting = waiting;
        let search = profile::part("search", [0, 0], || Work::of_parts(follows.len()));
        let mut row = 0;
        for beam in &mut beams {
            let alive = beam.alive();
            beam.step(&follows[row..row + alive], model.config().eos_id, |parent| parents.push(row + parent));
            row += alive;
        }
        drop(search);
        let (done, live) = beams.into_iter().partition::<Vec<_>, _>(|beam| beam.alive() == 0);
        if let Some(mut state) = state.filter(|_| !live.is_empty()) {
            profile::part("reorder", [0, 0], || Work::of_parts(parents.len())).run(|| state.reorder(&parents));
            (self.state, self.beams) = (Some(state), live);
        }
        Ok(done.into_iter().map(|beam| (beam.plan.source, beam.into_best())).collect())
    }

    /// What may follow each live hypothesis.
    fn follows(
        &mut self,
        model: &Transformer,
        pool: &mut Pool<f32>,
        params: &Params<f32>,
        processor: Option<&mut Processor<'_>>,
    ) -> Result<Vec<Follow>> {
        self.same_weights(params)?;
        self.admit(model, pool, params)?;
        let Some(state) = &mut self.state else { return Ok(Vec::new()) };
        // What the model has read already stays as it is.
        let lengths = |beam: &Beam| vec![usize::from(beam.ahead.is_empty()); beam.alive()];
        let rows = Rows::from_lengths(&self.beams.iter().flat_map(lengths).collect::<Vec<_>>());
        let mut found = Vec::new();
        if rows.total() > 0 {
            let reading = self.beams.iter().filter(|beam| beam.ahead.is_empty());
            let tokens: Vec<u32> = reading.flat_map(|beam| beam.last_tokens(model.config().bos_id)).collect();
            let logits = on_tape(pool, |tape| {
                let hidden = model.advance(tape, params, &tokens, &rows, state)?;
                let logits = model.logits(tape, params, hidden)?;
                tape.take(logits)
            })?;
            let chosen = self.choose(&logits, model.config().tgt_vocab, processor);
            pool.recycle(logits);
            found = chosen?;
        }
        let mut found = found.into_iter();
        let mut follows = Vec::with_capacity(rows.sequences());
        for beam in &mut self.beams {
            match beam.ahead.pop_front() {
                Some(follow) => follows.extend(vec![follow; beam.alive()]),
                None => follows.extend(found.by_ref().take(beam.alive())),
            }
        }
        Ok(follows)
    }

    /// The same for those that read a token, given the logits (R, V) of all of them.
    fn choose(&self, logits: &[f32], v: usize, mut processor: Option<&mut Processor<'_>>) -> Result<Vec<Follow>> {
        let _timed = profile::part("choice", [v, 0], || Work::passes::<f32>(1, logits.len() / v, v));
        let mut rows = Vec::new();
        let reading = self.beams.iter().filter(|beam| beam.ahead.is_empty());
        for (beam, live) in reading.flat_map(|beam| (0..beam.alive()).map(move |live| (beam, live))) {
            let mut row = Row { beam, live, ids: Vec::new(), processed: None };
            if processor.is_some() || self.constraints.reads_ids() {
                row.ids = beam.ids(live);
            }
            if let Some(processor) = processor.as_mut().filter(|_| !self.forced(beam)) {
                row.processed = Some(process(*processor, &row, &logits[rows.len() * v..][..v])?);
            }
            rows.push(row);
        }
        let mut follows = vec![None; rows.len()];
        for_each(rows.iter().zip(logits.chunks(v)).zip(&mut follows), |((row, logits), follow)| {
            *follow = self.candidates(row, logits);
        })?;
        let mut found = Vec::with_capacity(rows.len());
        for (row, follow) in rows.iter().zip(follows) {
            found.push(follow.ok_or_else(|| not_finite(row.beam.len, row.beam.plan.source))?);
        }
        Ok(found)
    }

    fn forced(&self, beam: &Beam) -> bool {
        self.constraints.forced(&beam.plan, beam.len).is_some()
    }

    /// What may follow one hypothesis; `None` if the model's logits are not finite.
    fn candidates(&self, row: &Row<'_>, logits: &[f32]) -> Option<Follow> {
        let read = row.processed.as_deref().unwrap_or(logits);
        let of = |id: u32| Entry { id, value: logits[id as usize] };
        let mut lse = None;
        let chosen = match self.constraints.next(&row.beam.plan, row.beam.len, &row.ids, read) {
            Next::Only(id) => vec![of(id)],
            Next::All(edits) => match &self.options.sampling {
                Some(sampling) => sampling.draw(read, &edits, row.beam.uniform(row.live)).map(of).into_iter().collect(),
                None => {
                    let mut best = vec![Entry::NONE; self.options.beam.saturating_add(1).min(logits.len())];
                    let of_read = top_k(&mut best, read, &edits);
                    lse = row.processed.is_none().then_some(of_read);
                    best.retain(|entry| entry.value > f32::NEG_INFINITY);
                    best
                }
            },
        };
        self.follow(logits, lse, &chosen)
    }

    /// What was chosen, with what the model says of it; `None` if its logits are not finite.
    fn follow(&self, logits: &[f32], lse: Option<LogSumExp<f32>>, chosen: &[Entry]) -> Option<Follow> {
        let lse = lse.unwrap_or_else(|| log_sum_exp(logits));
        if !(lse.max.is_finite() && lse.log.is_finite()) {
            return None;
        }
        let logprob = |value| lse.log_probability(value);
        let candidates = chosen.iter().map(|&Entry { id, value }| Candidate {
            id,
            logprob: logprob(logits[id as usize]),
            value: logprob(value),
        });
        let mut alternatives = vec![Entry::NONE; self.options.alternatives];
        if !alternatives.is_empty() {
            top_k(&mut alternatives, logits, &[]);
        }
        alternatives.iter_mut().for_each(|entry| entry.value = logprob(entry.value));
        Some(Follow { candidates: candidates.collect(), alternatives: alternatives.into() })
    }

    /// Refuses weights that changed since the caches were filled.
    fn same_weights(&mut self, params: &Params<f32>) -> Result<()> {
        if self.beams.is_empty() {
            self.version = None;
        }
        ensure!(
            *self.version.get_or_insert(params.version()) == params.version(),
            Config,
            "decoding: the weights have changed since it began; begin anew"
        );
        Ok(())
    }
}

fn not_finite(token: usize, source: usize) -> Error {
    Error::NonFinite(format!(
        "decoding: token {token} of source {source}: the logits are not finite; is there NaN in the weights?"
    ))
}

/// Asks a processor, and checks what it says.
fn process(processor: &mut Processor<'_>, row: &Row<'_>, logits: &[f32]) -> Result<Vec<f32>> {
    let processed = processor(&row.ids, logits)?;
    let (token, source) = (row.beam.len, row.beam.plan.source);
    ensure!(
        processed.len() == logits.len(),
        Shape,
        "logits_processor: token {token} of source {source}: expected {} logits, got {}",
        logits.len(),
        processed.len()
    );
    if let Some(id) = processed.iter().position(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        bail!(
            NonFinite,
            "logits_processor: token {token} of source {source}: expected numbers, or -inf for what must not follow, got {} for id {id}",
            processed[id]
        );
    }
    Ok(processed)
}
