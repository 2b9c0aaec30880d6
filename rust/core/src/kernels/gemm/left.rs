//! The left factor: read where it lies or packed, and how tiles find its rows.

use super::Mat;
use super::form::Form;
use super::pack::panel_len;
use crate::simd::{Float, l1_ways};

/// Rows of A further apart than this (half a page of f32) fall on few sets of the caches: many of them are packed, unless
/// a set of the L1 cache holds a tile's.
const FAR_APART: usize = 512;
const MANY_ROWS: usize = 64;
/// A factor, either of the two, of which every number is used so few times is read where it lies, if its steps along K are so near
/// each other that a block of them does not fall on few sets of the caches.
pub(super) const FEW: usize = 512;
pub(super) const NEAR: usize = 512;
/// Between packed rows, so that they do not fall on the same sets.
pub(super) const GAP: usize = 16;

/// How tiles get A.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Left {
    /// Where it lies.
    InPlace,
    /// Packed as rows that are contiguous along K.
    Rows,
    /// Packed as panels as high as the tallest tile: of a transposed A the rows lie side by side, steps along K are copied as they are.
    Panels,
}

/// In elements.
#[derive(Clone, Copy)]
pub(super) struct Strides {
    pub row: usize,
    pub k: usize,
    /// From one tile's first row to the next's.
    pub tile: usize,
}

impl Left {
    /// For a product with so many columns.
    pub fn of<T: Float, F: Form>(a: &Mat<T>, cols: usize, tile_rows: usize) -> Self {
        let transposed = a.row_stride == 1 && a.col_stride != 1;
        let readable = if transposed {
            cols <= FEW && a.col_stride <= NEAR
        } else {
            a.col_stride == 1 && (a.row_stride <= FAR_APART || a.rows < MANY_ROWS || tile_rows <= l1_ways())
        };
        match () {
            () if F::IN_PLACE && readable => Left::InPlace,
            () if transposed => Left::Panels,
            () => Left::Rows,
        }
    }

    /// Where tiles find the rows of `a`, so many units along K of them.
    pub fn strides<T: Float>(self, a: &Mat<T>, units: usize, tile_rows: usize) -> Strides {
        match self {
            Left::InPlace => Strides { row: a.row_stride, k: a.col_stride, tile: tile_rows * a.row_stride },
            Left::Rows => Strides { row: units + GAP, k: 1, tile: tile_rows * (units + GAP) },
            Left::Panels => Strides { row: 1, k: tile_rows, tile: panel_len(units, tile_rows) },
        }
    }
}
