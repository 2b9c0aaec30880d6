//! Keys and values as a cache keeps them: in pages of a few keys, which sequences with the same beginning share.

use super::product::{Packed, pack_transposed_pieces};
use crate::kernel;
use crate::simd::{Buffer, Float, MAX_LANES, prefetch};

/// Pages that are asked for before they are needed; of more the CPU sees the pattern.
const PAGES_AHEAD: usize = 4;

/// How a page lies in memory: head by head, its keys, then its values, each in whole vectors.
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
    pub fn new<T: Float>(n_kv_heads: usize, head_dim: usize) -> Self {
        kernel! {
            fn lanes<T>(s: S;) -> usize {
                let _ = s;
                S::LANES
            }
        }
        Page { n_kv_heads, head_dim, width: head_dim.next_multiple_of(lanes::<T>()) }
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

    /// Writes key and value number `at` of a page, heads side by side; whether the value is finite.
    pub fn put<T: Float>(&self, page: &mut [T], at: usize, key: &[T], value: &[T]) -> bool {
        let d = self.head_dim;
        let places = page.chunks_mut(2 * self.half());
        for (to, (key, value)) in places.zip(key.chunks(d).zip(value.chunks(d))) {
            let (keys, values) = to.split_at_mut(self.half());
            keys[at * self.width..][..d].copy_from_slice(key);
            values[at * self.width..][..d].copy_from_slice(value);
        }
        value.iter().all(|x| x.is_finite())
    }

    /// Copies the first `n` keys and values of another page.
    pub fn copy<T: Float>(&self, to: &mut [T], from: &[T], n: usize) {
        for (to, from) in to.chunks_mut(self.half()).zip(from.chunks(self.half())) {
            to[..n * self.width].copy_from_slice(&from[..n * self.width]);
        }
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
        let table = self.tables[slot][first / Page::KEYS..].iter();
        table.map(move |&number| pages[number][2 * head * half..][..2 * half].split_at(half))
    }

    /// Asks for the first of a slot's `n` keys and values of a head, which will be needed soon: what decoding reads lies in
    /// many places, each too short to be foreseen.
    pub(super) fn prefetch(&self, slot: usize, head: usize, n: usize) {
        let lines = |x: &'a [T], keys: usize| x[..keys * self.page.width].chunks((64 / size_of::<T>()).max(1));
        let pages = self.pages(slot, head, 0).zip((0..n).step_by(Page::KEYS)).take(PAGES_AHEAD);
        for ((keys, values), at) in pages {
            let here = Page::KEYS.min(n - at);
            lines(keys, here).chain(lines(values, here)).for_each(|line| prefetch(line.as_ptr()));
        }
    }

    /// `n` keys of a slot from key `first` on, which begins a page, transposed into `to`. Columns behind them hold anything.
    pub(super) fn keys<'b>(&self, to: &'b mut [T], slot: usize, head: usize, first: usize, n: usize) -> Packed<'b, T> {
        let keys = self.pages(slot, head, first).map(|(keys, _)| keys);
        pack_transposed_pieces(to, keys, Page::KEYS, self.page.width, n, self.page.head_dim)
    }

    /// The same values where they lie, page by page, each with the number of its first one and how many there are.
    pub(super) fn values(
        &self,
        slot: usize,
        head: usize,
        first: usize,
        n: usize,
    ) -> impl Iterator<Item = (usize, usize, Packed<'a, T>)> + use<'a, T> {
        let (page, finite) = (self.page, self.finite);
        self.pages(slot, head, first).zip((0..n).step_by(Page::KEYS)).map(move |((_, values), at)| {
            let keys = Page::KEYS.min(n - at);
            (at, keys, Packed::new(values, keys, page.head_dim, page.width, finite))
        })
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
        let page = Page::new::<f32>(2, 5);
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
