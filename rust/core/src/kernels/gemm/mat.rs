//! Views of matrices: any strides to read from, row-major to write to.

use std::ops::Range;

use crate::error::Result;
use crate::{bail, ensure};

/// A matrix to read: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, T> {
    pub(super) data: &'a [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

impl<'a, T> Mat<'a, T> {
    /// Row-major, without gaps.
    pub fn new(data: &'a [T], rows: usize, cols: usize) -> Result<Self> {
        Self::with_strides(data, rows, cols, cols, 1)
    }

    /// Row-major; a row starts `row_stride` after the one before.
    pub fn with_stride(data: &'a [T], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        Self::with_strides(data, rows, cols, row_stride, 1)
    }

    /// Any strides, 0 included.
    pub fn with_strides(data: &'a [T], rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Result<Self> {
        check(data.len(), rows, cols, row_stride, col_stride)?;
        Ok(Mat { data, rows, cols, row_stride, col_stride })
    }

    /// The transpose, by exchanging the strides.
    pub fn t(self) -> Self {
        Mat {
            data: self.data,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }

    /// Some of the rows.
    pub fn rows(self, range: Range<usize>) -> Result<Self> {
        ensure!(range.start <= range.end && range.end <= self.rows, Shape, "gemm: rows {range:?} of {}", self.rows);
        let from = (range.start * self.row_stride).min(self.data.len());
        Ok(Mat { data: &self.data[from..], rows: range.len(), ..self })
    }

    /// Some of the columns.
    pub fn columns(self, range: Range<usize>) -> Result<Self> {
        self.t().rows(range).map(Self::t)
    }

    /// Some of the rows and columns, which are inside.
    pub(super) fn block(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        let from = (rows.start * self.row_stride + cols.start * self.col_stride).min(self.data.len());
        Mat { data: &self.data[from..], rows: rows.len(), cols: cols.len(), ..self }
    }

    /// (rows, columns)
    pub fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }
}

impl<T: Copy> Mat<'_, T> {
    /// Element (i, j).
    pub fn at(&self, i: usize, j: usize) -> T {
        self.data[i * self.row_stride + j * self.col_stride]
    }
}

/// A row-major matrix to write.
#[derive(Debug)]
pub struct MatMut<'a, T> {
    pub(super) data: &'a mut [T],
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
}

impl<'a, T> MatMut<'a, T> {
    /// Without gaps.
    pub fn new(data: &'a mut [T], rows: usize, cols: usize) -> Result<Self> {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A row starts `row_stride` ≥ cols after the one before.
    pub fn with_stride(data: &'a mut [T], rows: usize, cols: usize, row_stride: usize) -> Result<Self> {
        check(data.len(), rows, cols, row_stride, 1)?;
        ensure!(
            row_stride >= cols || rows <= 1,
            Shape,
            "gemm: the result's rows overlap: row stride {row_stride}, {cols} columns"
        );
        Ok(MatMut { data, rows, cols, row_stride })
    }
}

/// The last element lies inside the data.
fn check(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> Result<()> {
    if rows == 0 || cols == 0 {
        return Ok(());
    }
    let last = (rows - 1).checked_mul(row_stride).zip((cols - 1).checked_mul(col_stride));
    match last.and_then(|(row, col)| row.checked_add(col)) {
        Some(last) if last < len => Ok(()),
        _ => bail!(
            Shape,
            "gemm: a matrix of {rows} x {cols} with strides ({row_stride}, {col_stride}) does not fit {len} elements"
        ),
    }
}
