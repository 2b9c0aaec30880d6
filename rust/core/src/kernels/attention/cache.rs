//! Keys and values as a cache keeps them: in pages of a few keys, which sequences with the same beginning share.

use super::product::{Packed, copy_columns};
use super::scores::Piece;
use crate::simd::{Buffer, Float, MAX_LANES, prefetch};

/// Numbers of a square.
const SQUARE: usize = Page::KEYS * Page::KEYS;

/// How a page lies in memory: head by head, its keys, then its values. Values lie row by row; keys in squares of as many
/// numbers of each, row by row while the page grows, and transposed, as scores are made of them, once it is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    n_kv_heads: usize,
    head_dim: usize,
    /// Numbers of a head in memory.
    width: usize,
}

impl Page {
    /// Keys of a page: whole vectors, and few, because a hypothesis that parts from another copies half a page.
    pub const KEYS: usize = MAX_LANES;

    /// Pages for heads of these sizes.
    pub fn new(n_kv_heads: usize, head_dim: usize) -> Self {
        Page { n_kv_heads, head_dim, width: head_dim.next_multiple_of(Self::KEYS) }
    }

    /// Numbers of a key, all heads together.
    pub fn key_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    /// Numbers of a head's keys, and of its values.
    fn half(&self) -> usize {
        Self::KEYS * self.width
    }

    /// Numbers of a page.
    pub fn size(&self) -> usize {
        2 * self.n_kv_heads * self.half()
    }

    /// Writes key and value number `at` of a page, heads side by side, after those before it; whether the value is finite.
    pub fn put<T: Float>(&self, page: &mut [T], at: usize, key: &[T], value: &[T]) -> bool {
        let d = self.head_dim;
        let places = page.chunks_mut(2 * self.half());
        for (to, (key, value)) in places.zip(key.chunks(d).zip(value.chunks(d))) {
            let (keys, values) = to.split_at_mut(self.half());
            for (square, key) in keys.chunks_mut(SQUARE).zip(key.chunks(Self::KEYS)) {
                square[at * Self::KEYS..][..key.len()].copy_from_slice(key);
            }
            values[at * self.width..][..d].copy_from_slice(value);
            if at + 1 == Self::KEYS {
                transpose(keys);
            }
        }
        value.iter().all(|x| x.is_finite())
    }

    /// Lays the keys of a full page as one has them that grows, for others to be written over the last of them.
    pub fn reopen<T: Float>(&self, page: &mut [T]) {
        page.chunks_mut(2 * self.half()).for_each(|head| transpose(&mut head[..self.half()]));
    }

    /// Copies the first `n` keys and values of another page; all of them, or of one that is not full.
    pub fn copy<T: Float>(&self, to: &mut [T], from: &[T], n: usize) {
        for (to, from) in to.chunks_mut(2 * self.half()).zip(from.chunks(2 * self.half())) {
            let (to_keys, to_values) = to.split_at_mut(self.half());
            let (keys, values) = from.split_at(self.half());
            for (to, from) in to_keys.chunks_mut(SQUARE).zip(keys.chunks(SQUARE)) {
                to[..n * Self::KEYS].copy_from_slice(&from[..n * Self::KEYS]);
            }
            to_values[..n * self.width].copy_from_slice(&values[..n * self.width]);
        }
    }
}

/// Rows of the squares of a head's keys become columns, and columns rows.
fn transpose<T: Float>(keys: &mut [T]) {
    for square in keys.chunks_mut(SQUARE) {
        let mut rows = [T::ZERO; SQUARE];
        rows.copy_from_slice(square);
        copy_columns(square, Page::KEYS, &rows, Page::KEYS, Page::KEYS, Page::KEYS);
    }
}

/// The pages of a cache.
#[derive(Clone, Copy, Debug)]
pub struct Cache<'a, T> {
    /// All of them.
    pub pages: &'a [Buffer<T>],
    /// For each slot the numbers of its pages, in the order of its keys.
    pub tables: &'a [Vec<usize>],
    /// How a page is laid out.
    pub page: Page,
    /// No value is infinite or NaN.
    pub finite: bool,
}

impl<'a, T: Float> Cache<'a, T> {
    /// Keys and values of a head in the pages of a slot from key `first` on, which begins one.
    fn pages(&self, slot: usize, head: usize, first: usize) -> impl Iterator<Item = (&'a [T], &'a [T])> + use<'a, T> {
        let (pages, half) = (self.pages, self.page.half());
        let table = self.tables[slot].iter().skip(first / Page::KEYS);
        table.map(move |&number| pages[number][2 * head * half..][..2 * half].split_at(half))
    }

    /// Asks for the keys of a head that stand in a page which is not full, of a slot with `n` keys, for they will be needed soon.
    pub(super) fn prefetch(&self, slot: usize, head: usize, n: usize) {
        let begun = n % Page::KEYS;
        if let Some((keys, _)) = self.pages(slot, head, n - begun).next().filter(|_| begun > 0) {
            for square in keys.chunks(SQUARE) {
                let lines = square[..begun * Page::KEYS].chunks((64 / size_of::<T>()).max(1));
                lines.for_each(|line| prefetch(line.as_ptr()));
            }
        }
    }

    /// `n` keys and values of a head from key `first` on, which begins a page, of a slot that has `all`: page by page where they
    /// lie, but for the keys of a page that is not full, which are transposed into `to`. `next` are the slot and head whose
    /// turn it is then.
    pub(super) fn pieces<'b>(
        &self,
        to: &'b mut [T],
        (slot, all): (usize, usize),
        head: usize,
        first: usize,
        n: usize,
        next: Option<(usize, usize)>,
    ) -> impl Iterator<Item = Piece<'b, T>>
    where
        'a: 'b,
    {
        let Page { head_dim: d, width, .. } = self.page;
        let (full, finite) = ((all - first) / Page::KEYS, self.finite);
        if let Some((keys, _)) = self.pages(slot, head, first).nth(full).filter(|_| full * Page::KEYS < n) {
            let here = n - full * Page::KEYS;
            for ((to, square), at) in to.chunks_mut(SQUARE).zip(keys.chunks(SQUARE)).zip((0..d).step_by(Page::KEYS)) {
                copy_columns(to, Page::KEYS, square, Page::KEYS, here, Page::KEYS.min(d - at));
            }
        }
        let to = &*to;
        let mut next = next.into_iter().flat_map({
            let cache = *self;
            move |(slot, head)| cache.pages(slot, head, first)
        });
        self.pages(slot, head, first).zip((0..n).step_by(Page::KEYS)).enumerate().map(
            move |(i, ((keys, values), at))| {
                let here = Page::KEYS.min(n - at);
                let (next_keys, next_values) = next.next().unzip();
                let kt = Packed::new(if i < full { keys } else { to }, d, here, Page::KEYS, true);
                let v = Packed::new(values, here, d, width, finite);
                Piece { at, keys: here, kt: kt.before(next_keys.filter(|_| i < full)), v: v.before(next_values) }
            },
        )
    }

    /// Whether a slot has so many keys.
    pub fn has(&self, slot: usize, keys: usize) -> bool {
        let whole = |&number: &usize| self.pages.get(number).is_some_and(|page| page.len() == self.page.size());
        self.tables.get(slot).is_some_and(|table| keys <= table.len() * Page::KEYS && table.iter().all(whole))
    }

    /// Whether it is for heads of these sizes.
    pub fn is_for(&self, n_kv_heads: usize, head_dim: usize) -> bool {
        (self.page.n_kv_heads, self.page.head_dim) == (n_kv_heads, head_dim)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Heads, Inputs, Masks, Operand, Sequence, attention_forward};
    use super::*;
    use crate::kernels::testing::normal;

    /// What a query makes of the first `n` keys of some pages.
    fn read(page: Page, pages: &[Buffer<f32>], table: &[usize], n: usize) -> Vec<u32> {
        let heads = Heads { n_heads: 2, n_kv_heads: 2, head_dim: 5, scale: 0.4 };
        let (q, mut y) = (normal::<f32>(10, 1), [f32::NAN; 10]);
        let nothing = Operand { data: &[][..], stride: 0 };
        let cache = Some(Cache { pages, tables: &[table.to_vec()], page, finite: true });
        let sequences = &[Sequence { query: 0, queries: 1, key: 0, keys: n, shift: 0 }];
        let masks = Masks { causal: false, keep: None, bias: None, dropout: None };
        let q = Operand { data: &q, stride: 10 };
        attention_forward(&mut y, None, &Inputs { heads, q, k: nothing, v: nothing, cache, sequences, masks }).unwrap();
        y.iter().map(|y| y.to_bits()).collect()
    }

    #[test]
    fn a_copy_reads_as_the_original_wherever_its_pages_are() {
        let rows = normal::<f32>(300 * 10, 2);
        let page = Page::new(2, 5);
        // What no key was written to must not be seen.
        let empty = || {
            let mut page = Buffer::zeroed(page.size()).unwrap();
            page.fill(f32::NAN);
            page
        };
        for n in [1, 15, 16, 17, 33, 127, 128, 130, 300] {
            let table: Vec<usize> = (0..usize::div_ceil(n, Page::KEYS)).collect();
            let mut pages: Vec<_> = table.iter().map(|_| empty()).collect();
            for (at, row) in rows.chunks(10).take(n).enumerate() {
                assert!(page.put(&mut pages[at / Page::KEYS], at % Page::KEYS, row, row));
            }
            let expected = read(page, &pages, &table, n);
            let copies: Vec<_> = pages
                .iter()
                .enumerate()
                .map(|(i, from)| {
                    let mut copy = empty();
                    page.copy(&mut copy, from, Page::KEYS.min(n - i * Page::KEYS));
                    copy
                })
                .rev()
                .collect();
            let backwards: Vec<usize> = table.iter().copied().rev().collect();
            assert_eq!(read(page, &copies, &backwards, n), expected, "{n} keys");
        }
    }
}
