//! Gradients of the parameters: a flat arena over the trainable ranges.

use super::layout::{ParamId, Stored};
use super::params::Params;
use crate::error::Result;
use crate::kernels::Beta;
use crate::simd::{Buffer, Float};
use crate::{bail, ensure};
use std::ops::Range;

/// The gradient of the *summed* loss, so that accumulation over micro-batches is a plain sum; the trainer divides by the
/// number of tokens once, when all are in.
#[derive(Debug)]
pub struct Grads<T> {
    data: Buffer<T>,
    /// Range in this arena and range in the parameter arena, for each trainable parameter.
    ranges: Vec<Option<(Range<usize>, Range<usize>)>>,
    arrived: Vec<bool>,
}

impl<T: Float> Grads<T> {
    /// Room for the gradients of all trainable parameters; nothing has arrived yet.
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
        Ok(Grads { data: Buffer::zeroed(end)?, arrived: vec![false; ranges.len()], ranges })
    }

    /// Asked before every gradient GEMM: frozen weights cost nothing.
    pub fn wants(&self, id: ParamId) -> bool {
        self.ranges[id.index()].is_some()
    }

    /// Where to put a gradient: the first one assigns, later ones add. `None` for a frozen parameter.
    pub fn slot(&mut self, id: ParamId) -> Option<(&mut [T], Beta)> {
        let (range, _) = self.ranges[id.index()].clone()?;
        let beta = if std::mem::replace(&mut self.arrived[id.index()], true) { Beta::Add } else { Beta::Assign };
        Some((&mut self.data[range], beta))
    }

    /// One slot for a group of parameters; `None` unless all are trainable, their gradients stand side by side, and they
    /// agree on whether the next one assigns or adds.
    pub fn group_slot(&mut self, ids: &[ParamId]) -> Option<(&mut [T], Beta)> {
        let range = |id: &ParamId| self.ranges[id.index()].as_ref().map(|(range, _)| range.clone());
        let whole = range(ids.first()?)?.start..range(ids.last()?)?.end;
        let arrived = self.arrived[ids[0].index()];
        let mut end = whole.start;
        for id in ids {
            let range = range(id)?;
            if range.start != end || self.arrived[id.index()] != arrived {
                return None;
            }
            end = range.end;
        }
        ids.iter().for_each(|id| self.arrived[id.index()] = true);
        Some((&mut self.data[whole], if arrived { Beta::Add } else { Beta::Assign }))
    }

    /// The gradient of a parameter, if it is trainable and has arrived.
    pub fn get(&self, id: ParamId) -> Option<&[T]> {
        let (range, _) = self.ranges[id.index()].as_ref()?;
        self.arrived[id.index()].then(|| &self.data[range.clone()])
    }

    /// Overwrites a gradient from outside, as an all-reduce or `apply(grads)` does.
    pub fn set(&mut self, id: ParamId, values: &[T]) -> Result<()> {
        match self.slot(id) {
            Some((slot, _)) if slot.len() == values.len() => slot.copy_from_slice(values),
            Some((slot, _)) => bail!(Shape, "gradient: expected {} values, got {}", slot.len(), values.len()),
            None => bail!(Config, "gradient: the parameter is frozen"),
        }
        Ok(())
    }

    /// Trainable parameters whose gradient has not arrived.
    pub fn missing(&self) -> impl Iterator<Item = ParamId> + '_ {
        (0..self.ranges.len()).filter(|&i| self.ranges[i].is_some() && !self.arrived[i]).map(ParamId::from_index)
    }

    /// Zeroes what did not arrive: the arena is then whole, for the norm, a reduction and the optimiser.
    pub fn complete(&mut self) {
        for (range, arrived) in self.ranges.iter().zip(&self.arrived) {
            if let (Some((range, _)), false) = (range, arrived) {
                self.data[range.clone()].fill(T::ZERO);
            }
        }
    }

    /// Forgets everything: the next gradients assign again. Costs nothing per element.
    pub fn reset(&mut self) {
        self.arrived.fill(false);
    }

    /// The whole arena. Gaps between parameters are zero.
    pub fn arena(&self) -> &[T] {
        &self.data
    }

    /// The whole arena, writable: for a reduction over processes.
    pub fn arena_mut(&mut self) -> &mut [T] {
        &mut self.data
    }

    /// `(id, range in this arena, range in the parameter arena)` of every trainable parameter.
    pub fn ranges(&self) -> impl Iterator<Item = (ParamId, Range<usize>, Range<usize>)> + '_ {
        self.ranges
            .iter()
            .enumerate()
            .filter_map(|(i, r)| r.clone().map(|(here, there)| (ParamId::from_index(i), here, there)))
    }
}
