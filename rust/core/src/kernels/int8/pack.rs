//! Weights in the order in which tiles read them.

use super::Int8Matrix;
use crate::ensure;
use crate::error::Result;
use crate::simd::Buffer;
use crate::simd::bytes::{Bytes, PANEL, STEP};
use std::ops::Range;

/// Weights of int8 for many products: for each panel of outputs, for each four of the depth, the bytes of all outputs.
#[derive(Debug)]
pub struct Int8Rhs {
    /// Bytes, in memory for f32.
    panels: Buffer<f32>,
    /// Bytes of one of them.
    panel_len: usize,
    /// Of all outputs of all panels; 0 for those that fill up the last one.
    pub(super) scales: Vec<f32>,
    pub(super) outputs: usize,
    pub(super) depth: usize,
}

impl Int8Rhs {
    /// Packs weights of one depth, one below the other.
    pub fn new(weights: &[&Int8Matrix]) -> Result<Self> {
        Self::by(Bytes::best(), weights)
    }

    pub(super) fn by(bytes: Bytes, weights: &[&Int8Matrix]) -> Result<Self> {
        let depth = weights.first().map_or(0, |w| w.depth);
        ensure!(weights.iter().all(|w| w.depth == depth), Shape, "int8: weights of one depth stand together");
        let mut scales: Vec<f32> = weights.iter().flat_map(|w| w.scales.iter().copied()).collect();
        let steps = bytes.depth(depth) / STEP;
        let outputs = scales.len();
        let count = outputs.div_ceil(PANEL);
        scales.resize(count * PANEL, 0.0);
        let mut panels = Buffer::zeroed(count * steps * STEP * PANEL / 4)?;
        let all = bytes_of_mut(&mut panels);
        all.fill(bytes.offset());
        let rows = weights.iter().flat_map(|w| w.values.chunks(depth.max(1)));
        for (o, row) in rows.enumerate() {
            let panel = &mut all[o / PANEL * steps * STEP * PANEL..];
            for (k, &w) in row.iter().enumerate() {
                panel[k / STEP * STEP * PANEL + o % PANEL * STEP + k % STEP] = (w as u8).wrapping_add(bytes.offset());
            }
        }
        Ok(Int8Rhs { panels, panel_len: steps * STEP * PANEL, scales, outputs, depth })
    }

    pub(super) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// Where a panel begins.
    pub(super) fn start(&self, panel: usize) -> *const u8 {
        bytes_of(&self.panels).as_ptr().wrapping_add(panel * self.panel_len)
    }

    /// The bytes of some panels.
    pub(super) fn panel(&self, range: Range<usize>) -> &[u8] {
        let len = self.panel_len;
        &bytes_of(&self.panels)[range.start * len..range.end * len]
    }
}

fn bytes_of(numbers: &[f32]) -> &[u8] {
    // SAFETY: the bytes of the slice; any bits are bytes.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

fn bytes_of_mut(numbers: &mut [f32]) -> &mut [u8] {
    // SAFETY: the bytes of the slice; any bits are bytes and any bits are an f32.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
