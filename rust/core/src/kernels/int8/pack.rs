//! Weights in the order in which tiles read them.

use super::{MAX_DEPTH, quantize_rows};
use crate::error::Result;
use crate::simd::bytes::{Bytes, PANEL, STEP};
use crate::simd::{Buffer, Float};
use crate::{bail, ensure, threads};

/// A matrix (O, K) in int8, for each row a scale. For products: for each panel of outputs, for each four of the depth, the bytes
/// of all outputs.
#[derive(Debug)]
pub struct Int8Rhs {
    pub(super) bytes: Bytes,
    /// Row after row instead.
    is_table: bool,
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
    /// Zeros in the order in which products read them, for values that come from elsewhere.
    pub fn zeros(outputs: usize, depth: usize) -> Result<Self> {
        Self::by(Bytes::best(), outputs, depth)
    }

    /// The same, row after row, for a table whose rows are looked up; products take [`Int8Rhs::packed`] of it.
    pub fn table(outputs: usize, depth: usize) -> Result<Self> {
        Ok(Int8Rhs { is_table: true, ..Self::zeros(outputs, depth)? })
    }

    /// Whether it is made for looking up rows.
    pub fn is_table(&self) -> bool {
        self.is_table
    }

    /// A copy for products.
    pub fn packed(&self) -> Result<Self> {
        let mut new = Self::zeros(self.outputs, self.depth)?;
        new.scales.copy_from_slice(&self.scales);
        new.fill(|output| self.row(output))?;
        Ok(new)
    }

    pub(super) fn by(bytes: Bytes, outputs: usize, depth: usize) -> Result<Self> {
        ensure!(depth <= MAX_DEPTH, Unsupported, "int8: sums of {depth} products are longer than {MAX_DEPTH}");
        let (count, panel_len) = (outputs.div_ceil(PANEL), bytes.depth(depth) * PANEL);
        let mut panels = Buffer::zeroed(count * panel_len / 4)?;
        bytes_of_mut(&mut panels).fill(bytes.offset());
        Ok(Int8Rhs { bytes, is_table: false, panels, panel_len, scales: vec![0.0; count * PANEL], outputs, depth })
    }

    /// The nearest bytes of a weight (O, K), by the largest magnitude of each row.
    pub fn quantize<T: Float>(w: &[T], outputs: usize, depth: usize) -> Result<Self> {
        let mut new = Self::zeros(outputs, depth)?;
        new.round(w)?;
        Ok(new)
    }

    /// Takes the nearest bytes of the numbers (O, K), by the largest magnitude of each row.
    pub fn round<T: Float>(&mut self, w: &[T]) -> Result<()> {
        let (outputs, depth) = (self.outputs, self.depth);
        let (mut values, mut sums) = (Vec::new(), vec![0; outputs]);
        if values.try_reserve_exact(outputs * depth).is_err() {
            bail!(OutOfMemory, "int8: cannot allocate {outputs} x {depth} bytes for a weight");
        }
        values.resize(outputs * depth, 0);
        quantize_rows(&mut values, self.scales_mut(), &mut sums, w, depth, depth, threads::num_threads())?;
        if let Some(o) = self.scales.iter().position(|scale| scale.is_nan()) {
            bail!(NonFinite, "int8: row {o} of a weight has numbers that are not finite");
        }
        self.set(&values)
    }

    /// Takes the bytes (O, K), none of them −128.
    pub fn set(&mut self, values: &[i8]) -> Result<()> {
        debug_assert_eq!(values.len(), self.outputs * self.depth);
        let depth = self.depth;
        self.fill(|output| values[output * depth..][..depth].iter().copied())
    }

    /// Takes the bytes that `row` gives for each output.
    fn fill<I: Iterator<Item = i8>>(&mut self, row: impl Fn(usize) -> I + Sync) -> Result<()> {
        let (offset, outputs, (between, apart)) = (self.bytes.offset(), self.outputs, self.strides());
        let panels = bytes_of_mut(&mut self.panels).chunks_mut(self.panel_len.max(1));
        threads::for_each(panels.enumerate(), |(i, panel)| {
            for output in i * PANEL..outputs.min((i + 1) * PANEL) {
                let steps = panel[output % PANEL * between..].chunks_mut(apart);
                let places = steps.flat_map(|step| step.iter_mut().take(STEP));
                places.zip(row(output)).for_each(|(place, byte)| *place = byte.cast_unsigned().wrapping_add(offset));
            }
        })
    }

    /// The bytes of one output, (K,).
    pub fn row(&self, output: usize) -> impl Iterator<Item = i8> + '_ {
        let (offset, (between, apart)) = (self.bytes.offset(), self.strides());
        let steps = self.panel(output / PANEL)[output % PANEL * between..].chunks(apart);
        let bytes = steps.flat_map(|step| step.iter().take(STEP)).take(self.depth);
        bytes.map(move |byte| byte.wrapping_sub(offset).cast_signed())
    }

    /// The numbers that the bytes of one output stand for, (K,).
    pub fn numbers<T: Float>(&self, output: usize, to: &mut [T]) {
        debug_assert_eq!(to.len(), self.depth);
        let (offset, scale) = (self.bytes.offset(), T::from_f64(f64::from(self.scales[output])));
        let number = |byte: i8| T::from_f64(f64::from(byte)) * scale;
        if self.is_table {
            let row = &bytes_of(&self.panels)[output * self.panel_len / PANEL..];
            to.iter_mut().zip(row).for_each(|(to, byte)| *to = number(byte.wrapping_sub(offset).cast_signed()));
        } else {
            to.iter_mut().zip(self.row(output)).for_each(|(to, byte)| *to = number(byte));
        }
    }

    /// From one output of a panel to the next, and from one step along the depth of an output to the next.
    fn strides(&self) -> (usize, usize) {
        if self.is_table { (self.panel_len / PANEL, STEP) } else { (STEP, STEP * PANEL) }
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

    /// The bytes of a panel.
    pub(super) fn panel(&self, panel: usize) -> &[u8] {
        &bytes_of(&self.panels)[panel * self.panel_len..][..self.panel_len]
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
