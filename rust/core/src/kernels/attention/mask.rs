//! Which keys a query may see.

use super::Sequence;
use crate::rng::Dropout;
use std::ops::Range;

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

    /// Pairs of one of these queries and one of these keys that it may see, as far as causality goes.
    pub fn pairs(&self, sequence: &Sequence, queries: Range<usize>, keys: Range<usize>) -> usize {
        if !self.causal {
            return queries.len() * keys.len();
        }
        // Query after query sees one key more, from none to all of them.
        let before = |query: usize| {
            let seen = (query as isize + sequence.shift - keys.start as isize).max(0) as usize;
            let some = seen.min(keys.len());
            some * (some + 1) / 2 + (seen - some) * keys.len()
        };
        before(queries.end) - before(queries.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted_as_queries_see_them() {
        for (causal, shift, queries, keys) in [(false, 0, 9, 7), (true, 0, 9, 9), (true, 4, 5, 9), (true, -3, 9, 6)] {
            let masks = Masks::<f32> { causal, keep: None, bias: None, dropout: None };
            let sequence = Sequence { query: 0, queries, key: 0, keys, shift };
            for (q, k) in
                [(0..queries, 0..keys), (2..4, 0..3), (3..5, 2..6), (0..2, 5..6), (4..4, 0..keys), (1..5, 3..3)]
            {
                let seen = |l: usize| k.clone().filter(|&m| m < masks.visible(&sequence, l)).count();
                assert_eq!(
                    masks.pairs(&sequence, q.clone(), k.clone()),
                    q.clone().map(seen).sum::<usize>(),
                    "{shift} {q:?} {k:?}"
                );
            }
        }
    }
}
