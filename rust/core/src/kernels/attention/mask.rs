//! Which keys a query may see.

use super::Sequence;
use crate::rng::Dropout;

/// An array of shape (B, H, L, M), where an axis of length 1 stands for any length.
#[derive(Clone, Copy, Debug)]
pub struct Grid<'a, E> {
    /// The elements, row-major.
    pub data: &'a [E],
    /// The lengths of the axes.
    pub shape: [usize; 4],
}

impl<'a, E> Grid<'a, E> {
    /// Strides of the axes, 0 where the axis is broadcast.
    fn strides(&self) -> [usize; 4] {
        let [_, h, l, m] = self.shape;
        let whole = [h * l * m, l * m, m, 1];
        std::array::from_fn(|axis| if self.shape[axis] == 1 { 0 } else { whole[axis] })
    }

    /// Where the element of (b, h, l, m) is.
    pub(super) fn index(&self, at: [usize; 4]) -> usize {
        self.strides().iter().zip(at).map(|(stride, i)| stride * i).sum()
    }

    /// The elements of a block from query `l` and key `m` on.
    pub(super) fn block(&self, b: usize, h: usize, l: usize, m: usize) -> Plane<'a, E> {
        let [_, _, row, col] = self.strides();
        Plane { data: &self.data[self.index([b, h, l, m])..], row, col }
    }
}

/// One head's block of a [`Grid`].
#[derive(Clone, Copy)]
pub(super) struct Plane<'a, E> {
    pub data: &'a [E],
    pub row: usize,
    pub col: usize,
}

/// Which keys a query may see, what is added to its scores, which weights are dropped. All of it combines.
#[derive(Clone, Copy)]
pub struct Masks<'a, T> {
    /// Keys up to the query's own position.
    pub causal: bool,
    /// True: may attend.
    pub keep: Option<Grid<'a, bool>>,
    /// Added to the scaled scores.
    pub bias: Option<Grid<'a, T>>,
    /// Keyed by (row · H + head, key).
    pub dropout: Option<Dropout>,
}

impl<T> Masks<'_, T> {
    /// How many keys, from key 0 on, query `l` may see as far as lengths and causality go.
    pub(super) fn visible(&self, sequence: &Sequence, l: usize) -> usize {
        if self.causal {
            (l as isize + 1 + sequence.shift).clamp(0, sequence.keys as isize) as usize
        } else {
            sequence.keys
        }
    }

    /// The first query of the sequence that may see key `m`.
    pub(super) fn first_query(&self, sequence: &Sequence, m: usize) -> usize {
        if self.causal { (m as isize - sequence.shift).clamp(0, sequence.queries as isize) as usize } else { 0 }
    }
}
