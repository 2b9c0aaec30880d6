//! Weights kept in bf16, half the bytes of f32. They are widened when they are read, which is exact: everything else is f32.

use half::bf16;

use super::pack::panel_len;
use super::{Beta, Epilogue, Mat, MatMut, Rhs, gemm};
use crate::error::Result;
use crate::simd::{Buffer, Float, Simd};
use crate::{ensure, kernel, threads};

/// The transpose of a weight (O, K), its numbers rounded to bf16 and kept in the order in which products read them, there
/// alone.
#[derive(Debug)]
pub struct Bf16Rhs<T> {
    /// Panels as in [`PackedRhs`](super::PackedRhs), of rows as [`Simd::load_bf16_ptr`] takes them, in memory for T.
    panels: Buffer<T>,
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
    /// Zeros, for values that come from elsewhere.
    pub fn zeros(outputs: usize, depth: usize) -> Result<Self> {
        let panels = outputs.div_ceil(Self::width()).saturating_mul(panel_len(depth, Self::row_len()));
        Ok(Bf16Rhs { panels: Buffer::zeroed(panels)?, outputs, depth })
    }

    /// A weight, row by row, each number rounded to the nearest that bf16 has, ties to even.
    pub fn new(weight: &[T], outputs: usize, depth: usize) -> Result<Self> {
        let mut new = Self::zeros(outputs, depth)?;
        new.set(weight)?;
        Ok(new)
    }

    /// A copy.
    pub fn copy(&self) -> Result<Self> {
        let mut new = Self::zeros(self.outputs, self.depth)?;
        new.panels.copy_from_slice(&self.panels);
        Ok(new)
    }

    /// Takes other numbers, rounded as by [`Bf16Rhs::new`].
    pub fn set(&mut self, weight: &[T]) -> Result<()> {
        let (width, depth) = (Self::width(), self.depth);
        ensure!(
            weight.len() == self.outputs * depth,
            Shape,
            "bf16: {} numbers for a weight of {} x {depth}",
            weight.len(),
            self.outputs
        );
        if weight.is_empty() {
            return Ok(());
        }
        let panels = self.panels.chunks_mut(panel_len(depth, Self::row_len())).zip(weight.chunks(width * depth));
        threads::for_each(panels, |(panel, weight)| {
            let panel = bits_mut(panel);
            for (column, numbers) in weight.chunks(depth).enumerate() {
                let place = Self::place(column);
                for (k, &x) in numbers.iter().enumerate() {
                    panel[k * width + place] = bf16::from_f32(x.to_f64() as f32).to_bits();
                }
            }
        })
    }

    /// The bits of the numbers of one output, K of them.
    pub fn bits(&self, output: usize) -> impl Iterator<Item = u16> + '_ {
        let (width, len) = (Self::width(), panel_len(self.depth, Self::row_len()));
        let panel = bits(&self.panels[output / width * len..][..len]);
        let place = Self::place(output % width);
        (0..self.depth).map(move |k| panel[k * width + place])
    }

    /// The numbers of one output, (K,).
    pub fn row(&self, output: usize, to: &mut [T]) {
        debug_assert_eq!(to.len(), self.depth);
        to.iter_mut().zip(self.bits(output)).for_each(|(to, bits)| *to = T::from_f64(bf16::from_bits(bits).to_f64()));
    }

    /// All numbers, as they were given but for the rounding.
    pub fn values(&self, to: &mut [T]) -> Result<()> {
        ensure!(to.len() == self.outputs * self.depth, Shape, "bf16: {} places for all numbers", to.len());
        let (width, depth) = (Self::width(), self.depth.max(1));
        threads::for_each(to.chunks_mut(width * depth).enumerate(), |(panel, to)| {
            to.chunks_mut(depth).enumerate().for_each(|(i, to)| self.row(panel * width + i, to));
        })
    }

    /// The first of these numbers that bf16 does not hold as it is.
    pub fn foreign(numbers: &[T]) -> Option<T> {
        numbers.iter().copied().find(|x| (x.to_f64() as f32).to_bits() & 0xffff != 0)
    }

    pub(super) fn panels(&self) -> &[T] {
        &self.panels
    }

    /// A row of a panel, counted in T.
    pub(super) fn row_len() -> usize {
        Self::width() * size_of::<u16>() / size_of::<T>()
    }

    /// Columns of a panel.
    fn width() -> usize {
        let (lanes, vectors) = row_shape::<T>();
        lanes * vectors
    }

    /// Where a column stands in a row of a panel.
    fn place(column: usize) -> usize {
        let (lanes, vectors) = row_shape::<T>();
        column % lanes * vectors + column / lanes
    }
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
    weights: &[&Bf16Rhs<T>],
    epilogue: &E,
) -> Result<()> {
    let outputs = weights.iter().map(|w| w.outputs).sum();
    let rows = y.len().checked_div(outputs).unwrap_or(0);
    epilogue.check(rows, outputs)?;
    if rows == 0 {
        return Ok(());
    }
    let mut first = 0;
    for &w in weights {
        let part = MatMut::with_stride(&mut y[first..], rows, w.outputs, outputs)?;
        gemm(part, Mat::new(x, rows, w.depth)?, Rhs::Bf16(w), Beta::Assign, &Part { epilogue, first })?;
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

    fn check(&self, _: usize, _: usize) -> Result<()> {
        Ok(()) // the whole was checked
    }

    #[inline(always)]
    fn finish<S: Simd<T>>(&self, s: S, row: usize, column: usize, c: &mut [T]) {
        self.epilogue.finish(s, row, self.first + column, c);
    }
}
