//! The tape: values, the operations that made them, and the walk back.
//!
//! An operation is one file in `ops/`: it computes a value, records a node with what it saves, and gives the node a
//! `backward`. The tape is an argument and borrows nothing; parameters are an argument too.

mod backward;
mod gradcheck;
mod grads;
mod layout;
mod made;
mod params;
mod pool;
mod tensor;

pub use backward::{Backward, Operation, VarGrads};
pub use gradcheck::gradcheck;
pub use grads::Grads;
pub use layout::{Builder, Entry, Init, Layout, ParamId, StatId, Stored};
pub(crate) use params::check_bf16;
pub use params::{CompactRhs, Params, SHORTLIST_FROM};
pub use pool::Pool;
pub use tensor::Tensor;

use crate::bail;
use crate::error::Result;
use crate::kernels::gemm::Precision;
use crate::rng::{Dropout, Key};
use crate::simd::Float;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};

/// A value on a tape: an index and the tape's number. [`Tape::value`] refuses a stale or foreign one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Var {
    index: u32,
    tape: u32,
}

#[derive(Debug)]
struct Slot<T> {
    value: Option<Tensor<T>>,
    /// Number of nodes that read the value in their backward.
    saved: u32,
    wants_grad: bool,
    /// The node that computes the value again for them.
    recomputed_by: Option<usize>,
}

struct Node<T: Float> {
    output: Var,
    saved: Vec<Var>,
    operation: Box<dyn Operation<T>>,
}

/// Attention weights of one call: `(H, L, M)` of one sequence after the other.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionWeights<T> {
    /// The weights, row-major, sequence by sequence.
    pub values: Vec<T>,
    /// `(n_heads, queries, keys)` of each sequence.
    pub shapes: Vec<(usize, usize, usize)>,
}

/// Values and nodes of one forward pass.
pub struct Tape<T: Float> {
    number: u32,
    slots: Vec<Slot<T>>,
    nodes: Vec<Node<T>>,
    records: bool,
    /// The random key of a training pass; `None` in evaluation.
    training: Option<Key>,
    uses: HashMap<u32, u64>,
    statistics: Vec<(StatId, Vec<T>)>,
    attention: Option<Vec<AttentionWeights<T>>>,
    /// How exactly the large products are computed, forward and backward.
    pub precision: Precision,
    /// Where buffers come from and go to.
    pub pool: Pool<T>,
}

impl<T: Float> Tape<T> {
    /// An evaluation tape that records nothing: values are freed as scopes close.
    pub fn evaluation(pool: Pool<T>) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        Tape {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            slots: Vec::new(),
            nodes: Vec::new(),
            records: false,
            training: None,
            uses: HashMap::new(),
            statistics: Vec::new(),
            attention: None,
            precision: Precision::Full,
            pool,
        }
    }

    /// A tape that records for a backward pass, in evaluation mode.
    pub fn recording(pool: Pool<T>) -> Self {
        Tape { records: true, ..Self::evaluation(pool) }
    }

    /// A tape that records with dropout and batch statistics on.
    pub fn training(pool: Pool<T>, key: Key) -> Self {
        Tape { training: Some(key), ..Self::recording(pool) }
    }

    /// Stops recording, for a training-mode forward pass that needs no gradient.
    pub fn without_recording(mut self) -> Self {
        self.records = false;
        self
    }

    /// Whether nodes are recorded.
    pub fn is_recording(&self) -> bool {
        self.records
    }

    /// Whether dropout and batch statistics are on.
    pub fn is_training(&self) -> bool {
        self.training.is_some()
    }

    /// Whether results alone are wanted: no nodes, batch statistics or attention weights.
    pub fn wants_results_alone(&self) -> bool {
        !self.records && self.training.is_none() && self.attention.is_none()
    }

    /// A value that gets no gradient.
    pub fn constant(&mut self, value: Tensor<T>) -> Var {
        self.push(value, false)
    }

    /// A value whose gradient is wanted.
    pub fn leaf(&mut self, value: Tensor<T>) -> Var {
        let records = self.records;
        self.push(value, records)
    }

    /// The result of an operation. `wants_grad` comes from [`Tape::wants`]; if true, [`Tape::record`] must follow.
    pub fn push(&mut self, value: Tensor<T>, wants_grad: bool) -> Var {
        self.slots.push(Slot { value: Some(value), saved: 0, wants_grad, recomputed_by: None });
        Var { index: self.slots.len() as u32 - 1, tape: self.number }
    }

    /// Whether the result of an operation on these inputs and parameters needs a node.
    pub fn wants(&self, params: &Params<T>, inputs: &[Var], weights: &[ParamId]) -> bool {
        self.wants_any(inputs) || self.records && weights.iter().any(|&id| params.is_trainable(id))
    }

    /// The same for an operation without parameters.
    pub fn wants_any(&self, inputs: &[Var]) -> bool {
        self.records && inputs.iter().any(|v| self.slots[v.index as usize].wants_grad)
    }

    /// Records how `output` was made. Values in `saved` stay until the node has run backward.
    pub fn record(&mut self, output: Var, saved: &[Var], operation: impl Operation<T> + 'static) {
        for var in saved {
            self.slots[var.index as usize].saved += 1;
        }
        self.nodes.push(Node { output, saved: saved.to_vec(), operation: Box::new(operation) });
    }

    /// The same for an operation with an [`Operation::recompute`]: nodes that save `output` do not keep it.
    pub fn record_recomputed(&mut self, output: Var, saved: &[Var], operation: impl Operation<T> + 'static) {
        self.slots[output.index as usize].recomputed_by = Some(self.nodes.len());
        self.record(output, saved, operation);
    }

    /// The value of a variable.
    pub fn value(&self, var: Var) -> Result<&Tensor<T>> {
        match self.slots.get(var.index as usize) {
            Some(Slot { value: Some(value), .. }) if var.tape == self.number => Ok(value),
            _ => bail!(Internal, "tape: a stale or foreign variable was read"),
        }
    }

    /// Takes a value off the tape.
    pub fn take(&mut self, var: Var) -> Result<Tensor<T>> {
        self.value(var)?;
        match self.slots[var.index as usize].value.take() {
            Some(value) => Ok(value),
            None => bail!(Internal, "tape: a stale variable was taken"),
        }
    }

    /// Runs a layer. On leaving, values made inside go back to the pool, except the result and what nodes save and cannot
    /// compute again.
    pub fn scope(&mut self, layer: impl FnOnce(&mut Self) -> Result<Var>) -> Result<Var> {
        let first = self.slots.len();
        let result = layer(self)?;
        for (i, slot) in self.slots.iter_mut().enumerate().skip(first) {
            if (slot.saved == 0 || slot.recomputed_by.is_some())
                && i != result.index as usize
                && let Some(value) = slot.value.take()
            {
                self.pool.recycle(value);
            }
        }
        Ok(result)
    }

    /// The dropout of one use of a site; `None` where nothing is dropped. The first use within a tape is number 0.
    pub fn dropout(&mut self, site: u32, p: f64) -> Option<Dropout> {
        let key = self.training.filter(|_| p > 0.0)?;
        let uses = self.uses.entry(site).or_insert(0);
        let key = key.fold(u64::from(site)).fold(*uses);
        *uses += 1;
        Some(Dropout::new(key, p))
    }

    /// Notes a new value for a statistic; [`Tape::take_statistics`] hands them to whoever commits the step.
    pub fn note_statistic(&mut self, id: StatId, values: Vec<T>) {
        self.statistics.push((id, values));
    }

    /// The statistics noted so far, in order.
    pub fn take_statistics(&mut self) -> Vec<(StatId, Vec<T>)> {
        std::mem::take(&mut self.statistics)
    }

    /// Asks every attention of this tape for its weights, before dropout. No other bit changes.
    pub fn collect_attention(&mut self) {
        self.attention = Some(Vec::new());
    }

    /// Where attention puts its weights, if they are wanted.
    pub fn attention_mut(&mut self) -> Option<&mut Vec<AttentionWeights<T>>> {
        self.attention.as_mut()
    }

    /// The weights collected so far, in the order of the calls.
    pub fn take_attention(&mut self) -> Vec<AttentionWeights<T>> {
        self.attention.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Ends the tape; every buffer goes back to the pool.
    pub fn into_pool(mut self) -> Pool<T> {
        let Tape { slots, pool, .. } = &mut self;
        slots.drain(..).filter_map(|slot| slot.value).for_each(|value| pool.recycle(value));
        std::mem::take(pool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_keeps_the_result_alone() {
        let mut tape = Tape::<f32>::evaluation(Pool::default());
        let mut inner = None;
        let result = tape
            .scope(|tape| {
                let a = tape.pool.zeros(2, 3)?;
                inner = Some(tape.constant(a));
                let b = tape.pool.zeros(4, 5)?;
                Ok(tape.constant(b))
            })
            .unwrap();
        assert!(tape.value(inner.unwrap()).is_err());
        assert_eq!(tape.value(result).unwrap().rows(), 4);
        assert!(tape.pool.bytes() > 0);
    }

    #[test]
    fn foreign_variables_are_refused() {
        let mut one = Tape::<f32>::evaluation(Pool::default());
        let two = Tape::<f32>::evaluation(Pool::default());
        let value = one.pool.zeros(1, 1).unwrap();
        let var = one.constant(value);
        assert!(one.value(var).is_ok() && two.value(var).is_err());
    }

    #[test]
    fn dropout_differs_by_site_and_use_and_repeats_with_the_key() {
        let draw = |seed| {
            let mut tape = Tape::<f32>::training(Pool::default(), Key::new(seed));
            [(1, 0.5), (1, 0.5), (2, 0.5)].map(|(site, p)| tape.dropout(site, p).unwrap().row(0))
        };
        let [a, b, c] = draw(0);
        assert!(a != b && a != c && b != c);
        assert_eq!(draw(0), [a, b, c]);
        assert!(Tape::<f32>::recording(Pool::default()).dropout(1, 0.5).is_none());
    }
}
