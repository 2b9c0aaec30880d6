//! Weights in the order in which tiles read them.

use super::{MAX_DEPTH, quantize_rows};
use crate::error::Result;
use crate::simd::bytes::{Bytes, PANEL, STEP};
use crate::simd::{Buffer, Float};
use crate::{bail, ensure, threads};
use std::ops::Range;

/// A weight (O, K) in int8, for each row a scale: for each panel of outputs, for each four of the depth, the bytes of all outputs.
#[derive(Debug)]
pub struct Int8Rhs {
    pub(super) bytes: Bytes,
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
    /// Zeros, for values that come from elsewhere.
    pub fn zeros(outputs: usize, depth: usize) -> Result<Self> {
        Self::by(Bytes::best(), outputs, depth)
    }

    pub(super) fn by(bytes: Bytes, outputs: usize, depth: usize) -> Result<Self> {
        ensure!(depth <= MAX_DEPTH, Unsupported, "int8: sums of {depth} products are longer than {MAX_DEPTH}");
        let (count, panel_len) = (outputs.div_ceil(PANEL), bytes.depth(depth) * PANEL);
        let mut panels = Buffer::zeroed(count * panel_len / 4)?;
        bytes_of_mut(&mut panels).fill(bytes.offset());
        Ok(Int8Rhs { bytes, panels, panel_len, scales: vec![0.0; count * PANEL], outputs, depth })
    }

    /// The nearest bytes of a weight (O, K), by the largest magnitude of each row.
    pub fn quantize<T: Float>(w: &[T], outputs: usize, depth: usize) -> Result<Self> {
        let mut new = Self::zeros(outputs, depth)?;
        let (mut values, mut sums) = (Vec::new(), vec![0; outputs]);
        if values.try_reserve_exact(outputs * depth).is_err() {
            bail!(OutOfMemory, "int8: cannot allocate {outputs} x {depth} bytes for a weight");
        }
        values.resize(outputs * depth, 0);
        quantize_rows(&mut values, &mut new.scales[..outputs], &mut sums, w, depth, depth, threads::num_threads())?;
        if let Some(o) = new.scales.iter().position(|scale| scale.is_nan()) {
            bail!(NonFinite, "int8: row {o} of a weight has numbers that are not finite");
        }
        new.set(&values)?;
        Ok(new)
    }

    /// Takes the bytes (O, K), none of them −128.
    pub fn set(&mut self, values: &[i8]) -> Result<()> {
        debug_assert_eq!(values.len(), self.outputs * self.depth);
        let (offset, depth) = (self.bytes.offset(), self.depth.max(1));
        let panels = bytes_of_mut(&mut self.panels).chunks_mut(self.panel_len.max(1)).zip(values.chunks(PANEL * depth));
        threads::for_each(panels, |(panel, rows)| {
            for (o, row) in rows.chunks(depth).enumerate() {
                for (k, &w) in row.iter().enumerate() {
                    panel[place(o, k)] = w.cast_unsigned().wrapping_add(offset);
                }
            }
        })
    }

    /// The bytes of one output, (K,).
    pub fn row(&self, output: usize) -> impl Iterator<Item = i8> + '_ {
        let panel = self.panel(output / PANEL..output / PANEL + 1);
        (0..self.depth).map(move |k| panel[place(output % PANEL, k)].wrapping_sub(self.bytes.offset()).cast_signed())
    }

    /// All bytes, (O, K).
    pub fn values(&self) -> Vec<i8> {
        (0..self.outputs).flat_map(|output| self.row(output)).collect()
    }

    /// The scale of each output, (O,).
    pub fn scales(&self) -> &[f32] {
        &self.scales[..self.outputs]
    }

    /// The same, to be set.
    pub fn scales_mut(&mut self) -> &mut [f32] {
        &mut self.scales[..self.outputs]
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

/// Where in a panel the byte of an output at a place of the depth is.
fn place(output: usize, k: usize) -> usize {
    k / STEP * STEP * PANEL + output * STEP + k % STEP
}

fn bytes_of(numbers: &[f32]) -> &[u8] {
    // SAFETY: the bytes of the slice; any bits are bytes.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers)) }
}

fn bytes_of_mut(numbers: &mut [f32]) -> &mut [u8] {
    // SAFETY: the bytes of the slice; any bits are bytes and any bits are an f32.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers)) }
}
