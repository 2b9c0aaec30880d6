//! Gradients of the parameters.

use super::layout::{ParamId, Stored};
use super::params::Params;
use super::{Pool, Tensor};
use crate::error::Result;
use crate::kernels::Beta;
use crate::kernels::elementwise::add_assign;
use crate::simd::Float;
use crate::{bail, ensure};
use std::ops::Range;

/// The gradient of the *summed* loss, so that accumulation over micro-batches is a plain sum; the trainer divides by the
/// number of tokens once, when all are in.
///
/// A gradient has memory from its arrival on, out of the pool that values which the backward pass is done with go back to:
/// a step needs room for its activations or its gradients, not for both.
#[derive(Debug)]
pub struct Grads<T> {
    /// The place of each trainable parameter among all of them, and in the parameter arena.
    ranges: Vec<Option<(Range<usize>, Range<usize>)>>,
    /// Which block holds the gradient of a parameter that has arrived, and from which number on.
    arrived: Vec<Option<(usize, usize)>>,
    /// What arrived together: a parameter or a group side by side, at the index of the first. Others wait to be used again.
    blocks: Vec<Option<Tensor<T>>>,
}

impl<T: Float> Grads<T> {
    /// For the gradients of all trainable parameters; nothing has arrived yet.
    pub fn new(params: &Params<T>) -> Result<Self> {
        ensure!(
            params.stored() == Stored::F32,
            Unsupported,
            "gradients: the weights are in {}, which is not trained; train the f32 model and {} it",
            params.stored().name(),
            if params.stored() == Stored::Int8 { "quantize" } else { "convert" }
        );
        let mut end = 0usize;
        let ranges: Vec<_> = params
            .layout()
            .ids()
            .map(|id| {
                params.is_trainable(id).then(|| {
                    let source = params.layout().entry(id).range.clone();
                    let start = end.next_multiple_of(16);
                    end = start + source.len();
                    (start..end, source)
                })
            })
            .collect();
        let blocks = ranges.iter().map(|_| None).collect();
        Ok(Grads { arrived: vec![None; ranges.len()], blocks, ranges })
    }

    /// Asked before every gradient GEMM: frozen weights cost nothing.
    pub fn wants(&self, id: ParamId) -> bool {
        self.ranges[id.index()].is_some()
    }

    /// Whether they are of the parameters that are trainable now.
    pub fn fit(&self, params: &Params<T>) -> bool {
        params.layout().ids().all(|id| params.is_trainable(id) == self.wants(id))
    }

    /// The numbers of a trainable parameter; 0 for a frozen one.
    fn size(&self, i: usize) -> usize {
        self.ranges[i].as_ref().map_or(0, |(range, _)| range.len())
    }

    /// Where to put a gradient: the first one assigns, later ones add. `None` for a frozen parameter.
    pub fn slot(&mut self, id: ParamId, pool: &mut Pool<T>) -> Result<Option<(&mut [T], Beta)>> {
        self.group_slot(&[id], pool)
    }

    /// One slot for the gradients of several parameters side by side; `None` unless all are trainable and have arrived
    /// like this or not at all.
    pub fn group_slot(&mut self, ids: &[ParamId], pool: &mut Pool<T>) -> Result<Option<(&mut [T], Beta)>> {
        let Some(first) = ids.first().map(|id| id.index()) else { return Ok(None) };
        let known = self.arrived[first];
        let (block, start) = known.unwrap_or((first, 0));
        let mut end = start;
        for &id in ids {
            if !self.wants(id) || self.arrived[id.index()] != known.map(|_| (block, end)) {
                return Ok(None);
            }
            end += self.size(id.index());
        }
        if known.is_none() {
            if self.blocks[first].as_ref().is_none_or(|waits| waits.len() != end) {
                let new = pool.lasting(1, end)?;
                self.blocks[first].replace(new).into_iter().for_each(|old| pool.recycle(old));
            }
            let mut at = 0;
            for id in ids.iter().map(|id| id.index()) {
                self.arrived[id] = Some((first, at));
                at += self.size(id);
            }
        }
        let beta = if known.is_some() { Beta::Add } else { Beta::Assign };
        Ok(self.blocks[block].as_mut().map(|block| (&mut block[start..end], beta)))
    }

    /// Gives a parameter a gradient that is ready: the first is moved in, later ones are added.
    pub fn give(&mut self, id: ParamId, dw: Tensor<T>, pool: &mut Pool<T>) -> Result<()> {
        let i = id.index();
        if !self.wants(id) {
            pool.recycle(dw);
        } else if self.arrived[i].is_none() {
            self.blocks[i].replace(dw).into_iter().for_each(|block| pool.recycle(block));
            self.arrived[i] = Some((i, 0));
        } else if let Some((sum, _)) = self.slot(id, pool)? {
            add_assign(sum, &dw)?;
            pool.recycle(dw);
        }
        Ok(())
    }

    /// The gradient of a parameter, if it is trainable and has arrived.
    pub fn get(&self, id: ParamId) -> Option<&[T]> {
        let (block, start) = self.arrived[id.index()]?;
        self.blocks[block].as_ref().map(|block| &block[start..][..self.size(id.index())])
    }

    /// Overwrites a gradient from outside, as an all-reduce or `apply(grads)` does.
    pub fn set(&mut self, id: ParamId, values: &[T], pool: &mut Pool<T>) -> Result<()> {
        match self.slot(id, pool)? {
            Some((slot, _)) if slot.len() == values.len() => slot.copy_from_slice(values),
            Some((slot, _)) => bail!(Shape, "gradient: expected {} values, got {}", slot.len(), values.len()),
            None => bail!(Config, "gradient: the parameter is frozen"),
        }
        Ok(())
    }

    /// Trainable parameters whose gradient has not arrived.
    pub fn missing(&self) -> impl Iterator<Item = ParamId> + '_ {
        (0..self.ranges.len())
            .filter(|&i| self.ranges[i].is_some() && self.arrived[i].is_none())
            .map(ParamId::from_index)
    }

    /// Zeros for what did not arrive: everything is then there, for the norm, a reduction and the optimiser.
    pub fn complete(&mut self, pool: &mut Pool<T>) -> Result<()> {
        let missing: Vec<_> = self.missing().collect();
        for id in missing {
            if let Some((slot, _)) = self.slot(id, pool)? {
                slot.fill(T::ZERO);
            }
        }
        Ok(())
    }

    /// Forgets everything: the next gradients assign again. Costs nothing per element.
    pub fn reset(&mut self) {
        self.arrived.fill(None);
    }

    /// Forgets everything and gives all memory back.
    pub fn release(&mut self, pool: &mut Pool<T>) {
        self.reset();
        self.blocks.iter_mut().filter_map(Option::take).for_each(|block| pool.recycle(block));
    }

    /// Numbers of all trainable parameters, with gaps that put each at the beginning of a cache line.
    pub fn len(&self) -> usize {
        self.ranges.iter().flatten().last().map_or(0, |(range, _)| range.end)
    }

    /// Whether there is nothing to train.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The gradients that have arrived, in the order of the parameters.
    pub fn iter(&self) -> impl Iterator<Item = &[T]> {
        (0..self.ranges.len()).filter_map(|i| self.get(ParamId::from_index(i)))
    }

    /// The same, writable: for a reduction over processes.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        let (arrived, ranges) = (&self.arrived, &self.ranges);
        self.blocks.iter_mut().enumerate().flat_map(move |(first, block)| {
            let mut rest = block.as_deref_mut().unwrap_or_default();
            let members =
                (first..arrived.len()).take_while(move |&i| arrived[i].is_some_and(|(block, _)| block == first));
            members.map(move |i| {
                let size = ranges[i].as_ref().map_or(0, |(range, _)| range.len());
                let (part, behind) = std::mem::take(&mut rest).split_at_mut(size);
                rest = behind;
                part
            })
        })
    }

    /// Of every trainable parameter its number, its place among all of them, and its range in the parameter arena.
    pub fn ranges(&self) -> impl Iterator<Item = (ParamId, Range<usize>, Range<usize>)> + '_ {
        self.ranges
            .iter()
            .enumerate()
            .filter_map(|(i, r)| r.clone().map(|(here, there)| (ParamId::from_index(i), here, there)))
    }
}
