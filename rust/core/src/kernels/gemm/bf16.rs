//! Matrices kept in bf16, half the bytes of f32. They are widened when they are read, which is exact: everything else is f32.

use half::bf16;
use std::sync::Arc;

use super::form::Widened;
use super::pack::panel_len;
use super::{Beta, Epilogue, Mat, MatMut, Rhs, product, spread};
use crate::error::Result;
use crate::simd::{Buffer, Float, Simd};
use crate::{ensure, kernel, threads};

/// The transpose of a matrix (O, K), its numbers rounded to bf16.
#[derive(Debug)]
pub struct Bf16Rhs<T> {
    /// Panels of `width` columns as in [`PackedRhs`](super::PackedRhs), in memory for T. For products their rows are as
    /// [`Simd::load_bf16_ptr`] takes them.
    panels: Buffer<T>,
    /// 1 in a table.
    width: usize,
    pub(super) outputs: usize,
    pub(super) depth: usize,
}

kernel! {
    /// Numbers in a vector and vectors in a row of a panel.
    fn row_shape<T>(s: S;) -> (usize, usize) {
        let _ = s;
        (S::LANES, S::TILE_VECTORS)
    }
}

impl<T: Float> Bf16Rhs<T> {
    /// Zeros in the order in which products read them, for values that come from elsewhere.
    pub fn zeros(outputs: usize, depth: usize) -> Result<Self> {
        let (lanes, vectors) = row_shape::<T>();
        Self::of_width(lanes * vectors, outputs, depth)
    }

    /// The same, row after row, for a table whose rows are looked up; products take [`Bf16Rhs::packed`] of it.
    pub fn table(outputs: usize, depth: usize) -> Result<Self> {
        Self::of_width(1, outputs, depth)
    }

    fn of_width(width: usize, outputs: usize, depth: usize) -> Result<Self> {
        let numbers = outputs.div_ceil(width).saturating_mul(panel_len(depth, width));
        let panels = Buffer::zeroed(numbers.div_ceil(size_of::<T>() / size_of::<u16>()))?;
        Ok(Bf16Rhs { panels, width, outputs, depth })
    }

    /// Whether it is made for looking up rows.
    pub fn is_table(&self) -> bool {
        self.width == 1
    }

    /// A copy for products.
    pub fn packed(&self) -> Result<Self> {
        let mut new = Self::zeros(self.outputs, self.depth)?;
        new.fill(|output| self.bits(output))?;
        Ok(new)
    }

    /// A copy.
    pub fn copy(&self) -> Result<Self> {
        let mut new = Self::of_width(self.width, self.outputs, self.depth)?;
        new.panels.copy_from_slice(&self.panels);
        Ok(new)
    }

    /// Takes the numbers of a matrix, row by row, each rounded to the nearest that bf16 has, ties to even.
    pub fn set(&mut self, matrix: &[T]) -> Result<()> {
        let depth = self.depth;
        ensure!(
            matrix.len() == self.outputs * depth,
            Shape,
            "bf16: {} numbers for a matrix of {} x {depth}",
            matrix.len(),
            self.outputs
        );
        let round = |x: &T| bf16::from_f32(x.to_f64() as f32).to_bits();
        self.fill(|output| matrix[output * depth..][..depth].iter().map(round))
    }

    /// Takes the bits that `row` gives for each output.
    fn fill<I: Iterator<Item = u16>>(&mut self, row: impl Fn(usize) -> I + Sync) -> Result<()> {
        let (width, depth, outputs) = (self.width, self.depth, self.outputs);
        let group = (threads::GRAIN / (width * depth.max(1))).max(1);
        let parts = bits_mut(&mut self.panels).chunks_mut(group * panel_len(depth, width));
        threads::for_each(parts.take(outputs.div_ceil(group * width)).enumerate(), |(i, part)| {
            for output in i * group * width..outputs.min((i + 1) * group * width) {
                let panel = &mut part[(output / width - i * group) * panel_len(depth, width)..];
                let place = place::<T>(width, output);
                row(output).enumerate().for_each(|(k, bits)| panel[k * width + place] = bits);
            }
        })
    }

    /// The bits of the numbers of one output, K of them.
    pub fn bits(&self, output: usize) -> impl Iterator<Item = u16> + '_ {
        let (width, len) = (self.width, panel_len(self.depth, self.width));
        let panel = &bits(&self.panels)[output / width * len..][..len];
        let place = place::<T>(width, output);
        (0..self.depth).map(move |k| panel[k * width + place])
    }

    /// The numbers of one output, (K,).
    pub fn row(&self, output: usize, to: &mut [T]) {
        debug_assert_eq!(to.len(), self.depth);
        let wide = |bits: u16| T::from_f64(f64::from(f32::from_bits(u32::from(bits) << 16)));
        match self.is_table() {
            true => {
                let row = &bits(&self.panels)[output * panel_len(self.depth, 1)..];
                to.iter_mut().zip(row).for_each(|(to, &bits)| *to = wide(bits));
            }
            false => to.iter_mut().zip(self.bits(output)).for_each(|(to, bits)| *to = wide(bits)),
        }
    }

    /// All numbers, as they were given but for the rounding.
    pub fn values(&self, to: &mut [T]) -> Result<()> {
        ensure!(to.len() == self.outputs * self.depth, Shape, "bf16: {} places for all numbers", to.len());
        let (depth, rows) = (self.depth.max(1), threads::rows_per_task(self.depth.max(1)));
        threads::for_each(to.chunks_mut(rows * depth).enumerate(), |(i, to)| {
            to.chunks_mut(depth).enumerate().for_each(|(row, to)| self.row(i * rows + row, to));
        })
    }

    /// The first of these numbers that bf16 does not hold as it is.
    pub fn foreign(numbers: &[T]) -> Option<T> {
        numbers.iter().copied().find(|x| (x.to_f64() as f32).to_bits() & 0xffff != 0)
    }

    /// The panels, and a row of one of them, counted in T.
    pub(super) fn panels(&self) -> (&[T], usize) {
        (&self.panels, self.width * size_of::<u16>() / size_of::<T>())
    }
}

/// Where the column of an output stands in the row of a panel.
fn place<T: Float>(width: usize, output: usize) -> usize {
    let ((lanes, vectors), column) = (row_shape::<T>(), output % width);
    column % lanes * vectors + column / lanes
}

fn bits<T: Float>(numbers: &[T]) -> &[u16] {
    // SAFETY: the bytes of the slice, aligned for T; any bits are a u16.
    unsafe { std::slice::from_raw_parts(numbers.as_ptr().cast(), size_of_val(numbers) / size_of::<u16>()) }
}

fn bits_mut<T: Float>(numbers: &mut [T]) -> &mut [u16] {
    // SAFETY: the bytes of the slice, aligned for T; any bits are a u16 and any bits are a T.
    unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), size_of_val(numbers) / size_of::<u16>()) }
}

/// y (R, ΣO) = epilogue(x Wᵀ) with x (R, K): the results of several weights side by side.
pub fn product_bf16<T: Float, E: Epilogue<T>>(
    y: &mut [T],
    x: &[T],
    weights: &[Arc<Bf16Rhs<T>>],
    epilogue: &E,
) -> Result<()> {
    let outputs = weights.iter().map(|w| w.outputs).sum();
    let rows = y.len().checked_div(outputs).unwrap_or(0);
    epilogue.check(outputs)?;
    if rows == 0 {
        return Ok(());
    }
    let mut first = 0;
    for w in weights {
        ensure!(!w.is_table(), Internal, "bf16: a table was not packed for a product");
        let part = MatMut::with_stride(&mut y[first..], rows, w.outputs, outputs)?;
        let (x, epilogue) = (Mat::new(x, rows, w.depth)?, Part { epilogue, first });
        spread((rows, w.outputs, w.depth), |workers| {
            product::<T, _, Widened>(part, x, Rhs::Bf16(w), Beta::Assign, &epilogue, workers)
        })?;
        first += w.outputs;
    }
    Ok(())
}

/// The epilogue of some columns of a result.
struct Part<'a, E> {
    epilogue: &'a E,
    first: usize,
}

impl<T: Float, E: Epilogue<T>> Epilogue<T> for Part<'_, E> {
    const ACTIVE: bool = E::ACTIVE;

    fn check(&self, _: usize) -> Result<()> {
        Ok(()) // the whole was checked
    }

    #[inline(always)]
    fn finish_from<S: Simd<T>>(
        &self,
        s: S,
        row: usize,
        column: usize,
        c: &mut [T],
        number: impl Fn(usize, &[T]) -> S::V,
    ) {
        self.epilogue.finish_from(s, row, self.first + column, c, number);
    }
}
