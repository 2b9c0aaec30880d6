//! What tasks write different parts of.

use crate::ensure;
use crate::error::Result;
use crate::simd::Float;
use std::marker::PhantomData;
use std::ops::Range;

/// A writable matrix, rows `stride` apart. Parts that do not overlap may be written by different tasks.
#[derive(Debug)]
pub struct Out<'a, T> {
    at: *mut T,
    pub(super) rows: usize,
    pub(super) cols: usize,
    stride: usize,
    life: PhantomData<&'a mut T>,
}

// SAFETY: an `Out` is the only way to its elements, like the `&mut [T]` it was made from.
unsafe impl<T: Send> Send for Out<'_, T> {}
// SAFETY: through `&Out` elements are reached by `part` alone, whose caller vouches for them.
unsafe impl<T: Send> Sync for Out<'_, T> {}

impl<'a, T> Out<'a, T> {
    /// The matrix of `cols` columns whose rows fill `data`.
    pub fn new(data: &'a mut [T], cols: usize) -> Self {
        let rows = data.len().checked_div(cols).unwrap_or(0);
        Out { at: data.as_mut_ptr(), rows, cols, stride: cols, life: PhantomData }
    }

    /// Ranges of columns of that matrix, which must not overlap.
    pub fn columns(data: &'a mut [T], cols: usize, ranges: &[Range<usize>]) -> Result<Vec<Self>> {
        let whole = Out::new(data, cols);
        for (i, a) in ranges.iter().enumerate() {
            ensure!(a.end <= cols, Internal, "columns {a:?} of {cols}");
            let overlap = |b: &Range<usize>| a.start < b.end && b.start < a.end;
            ensure!(!ranges[..i].iter().any(overlap), Internal, "columns {a:?} are given twice");
        }
        // SAFETY: the ranges share no column.
        Ok(ranges.iter().map(|range| unsafe { whole.part(0..whole.rows, range.clone()) }).collect())
    }

    /// A part of the matrix.
    ///
    /// # Safety
    /// No two parts that live at the same time overlap.
    pub(super) unsafe fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Out<'a, T> {
        assert!(rows.start <= rows.end && rows.end <= self.rows && cols.start <= cols.end && cols.end <= self.cols);
        // SAFETY: inside the matrix; wrapping, because an empty part may begin behind the last element.
        let at = self.at.wrapping_add(rows.start * self.stride + cols.start);
        Out { at, rows: rows.len(), cols: cols.len(), stride: self.stride, life: PhantomData }
    }

    /// Where an element is, or would be, to be asked for ahead of time.
    pub(super) fn address(&self, row: usize, col: usize) -> *const T {
        self.at.wrapping_add(row * self.stride + col)
    }

    /// One row.
    pub(super) fn row(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.rows);
        // SAFETY: row i has `cols` elements, and `self` is borrowed for as long as they are.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(i * self.stride), self.cols) }
    }

    pub(super) fn clear(&mut self)
    where
        T: Float,
    {
        (0..self.rows).for_each(|i| self.row(i).fill(T::ZERO));
    }
}
