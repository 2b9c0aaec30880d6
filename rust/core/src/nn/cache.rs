//! Keys and values of sequences that grow while decoding.

use crate::ensure;
use crate::error::Result;
use crate::ops::{Cache, KeysValues, Page};
use crate::profile::{self, Work};
use crate::rows::Rows;
use crate::simd::{Buffer, Float};
use crate::threads::for_each;
use std::mem::take;

/// The keys and values of every sequence of a batch, in pages of a few keys. Sequences with the same beginning share its
/// pages, as beams do: one that grows copies the page it writes to if another has it too, and no more.
#[derive(Debug)]
pub struct KeyValueCache<T> {
    page: Page,
    pages: Vec<Buffer<T>>,
    /// In how many tables each page stands.
    readers: Vec<usize>,
    /// Pages in no table.
    free: Vec<usize>,
    /// The pages of each slot, in the order of its keys.
    tables: Vec<Vec<usize>>,
    /// The slot of each sequence: its own, unless it no longer grows.
    slots: Vec<usize>,
    lengths: Vec<usize>,
    /// No value was ever infinite or NaN.
    finite: bool,
}

impl<T: Float> KeyValueCache<T> {
    /// Empty caches for `sequences` sequences with this many heads of this width. Nothing is allocated before they grow.
    pub fn new(sequences: usize, n_kv_heads: usize, head_dim: usize) -> Self {
        KeyValueCache {
            page: Page::new(n_kv_heads, head_dim),
            pages: Vec::new(),
            readers: Vec::new(),
            free: Vec::new(),
            tables: vec![Vec::new(); sequences],
            slots: (0..sequences).collect(),
            lengths: vec![0; sequences],
            finite: true,
        }
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.slots.len()
    }

    /// Appends to each sequence the keys and values of its rows: columns `k_start..` and `v_start..` of the matrix
    /// `kv`, whose rows are `stride` apart. No two sequences share a slot.
    pub fn append(&mut self, kv: &[T], stride: usize, k_start: usize, v_start: usize, rows: &Rows) -> Result<()> {
        ensure!(
            rows.sequences() == self.sequences(),
            Shape,
            "key/value cache: expected {} sequences, got {}",
            self.sequences(),
            rows.sequences()
        );
        let (page, width) = (self.page, self.page.key_width());
        let _timed = profile::span("key/value cache", [width, 0], || Work::passes::<T>(4, rows.total(), width));
        self.part(rows)?;
        // What is written, page by page: the page, where in it the rows go, and the rows.
        let mut written = Vec::with_capacity(self.sequences());
        for (i, &slot) in self.slots.iter().enumerate() {
            let (rows, mut at) = (rows.range(i), self.lengths[i]);
            let mut row = rows.start;
            while row < rows.end {
                let end = rows.end.min(row + Page::KEYS - at % Page::KEYS);
                let number = self.tables[slot][at / Page::KEYS];
                written.push((number, take(&mut self.pages[number]), at % Page::KEYS, row..end, Ok(true)));
                (row, at) = (end, at + end - row);
            }
            self.lengths[i] = at;
        }
        let mut done = for_each(written.iter_mut(), |(_, to, at, rows, finite)| {
            *finite = ready(to, page).map(|to| {
                let put = |(at, row): (usize, usize)| {
                    let from = &kv[row * stride..];
                    page.put(to, at, &from[k_start..][..width], &from[v_start..][..width])
                };
                (*at..).zip(rows.clone()).map(put).fold(true, |all, one| all & one)
            });
        });
        for (number, page, .., finite) in written {
            self.pages[number] = page;
            match finite {
                Ok(finite) => self.finite &= finite,
                Err(error) => done = Err(error),
            }
        }
        done
    }

    /// Gives every sequence that grows the pages for it: new ones, and a copy of the one that others go on from as well.
    fn part(&mut self, rows: &Rows) -> Result<()> {
        let mut copies = Vec::new();
        for i in (0..self.sequences()).filter(|&i| rows.length(i) > 0) {
            let (slot, length) = (self.slots[i], self.lengths[i]);
            if let Some(&shared) = self.tables[slot].get(length / Page::KEYS)
                && self.readers[shared] > 1
            {
                let number = self.claim();
                self.readers[shared] -= 1;
                self.tables[slot][length / Page::KEYS] = number;
                copies.push((number, shared, length % Page::KEYS));
            }
            while self.tables[slot].len() * Page::KEYS < length + rows.length(i) {
                let number = self.claim();
                self.tables[slot].push(number);
            }
        }
        // No page is both: what is read stays with a sequence that was there before.
        let mut to: Vec<_> = copies.iter().map(|&(number, ..)| (take(&mut self.pages[number]), Ok(()))).collect();
        let (page, pages) = (self.page, &self.pages);
        let mut done = for_each(to.iter_mut().zip(&copies), |((to, copied), &(_, from, n))| {
            *copied = ready(to, page).map(|to| page.copy(to, &pages[from], n));
        });
        for ((page, copied), &(number, ..)) in to.into_iter().zip(&copies) {
            self.pages[number] = page;
            done = done.and(copied);
        }
        done
    }

    /// A page for one table; whoever writes to it first sees to its memory.
    fn claim(&mut self) -> usize {
        let number = self.free.pop().unwrap_or_else(|| {
            self.pages.push(Buffer::default());
            self.readers.push(0);
            self.pages.len() - 1
        });
        self.readers[number] = 1;
        number
    }

    /// Sequence `i` goes on from what was sequence `parents[i]`; what no one goes on from is dropped. Nothing is copied
    /// before a sequence grows.
    pub fn reorder(&mut self, parents: &[usize]) {
        let tables = parents.iter().map(|&p| self.tables[self.slots[p]].clone()).collect();
        self.lengths = parents.iter().map(|&p| self.lengths[p]).collect();
        self.slots = (0..parents.len()).collect();
        self.set(tables);
    }

    /// Sequence `i` forgets all but its first `lengths[i]` keys. No two sequences share a slot.
    pub fn keep(&mut self, lengths: &[usize]) -> Result<()> {
        for (i, &n) in lengths.iter().enumerate() {
            let (slot, had, pages) = (self.slots[i], self.lengths[i], n.div_ceil(Page::KEYS));
            if n >= had {
                continue;
            }
            self.lengths[i] = n;
            for number in self.tables[slot].split_off(pages) {
                self.release(number);
            }
            // What is now its last page was full, and others may read it.
            if n % Page::KEYS > 0 && had >= pages * Page::KEYS {
                let (full, open) = (self.tables[slot][pages - 1], self.claim());
                let mut memory = take(&mut self.pages[open]);
                self.page.copy(ready(&mut memory, self.page)?, &self.pages[full], Page::KEYS);
                self.page.reopen(&mut memory);
                (self.pages[open], self.tables[slot][pages - 1]) = (memory, open);
                self.release(full);
            }
        }
        Ok(())
    }

    /// Sequence `i` reads what was sequence `parents[i]`, in the same slot: for caches that no longer grow.
    pub fn share(&mut self, parents: &[usize]) {
        self.lengths = parents.iter().map(|&p| self.lengths[p]).collect();
        let (mut places, mut tables) = (vec![None; self.tables.len()], Vec::new());
        let slots = parents.iter().map(|&p| {
            let slot = self.slots[p];
            *places[slot].get_or_insert_with(|| {
                tables.push(self.tables[slot].clone());
                tables.len() - 1
            })
        });
        self.slots = slots.collect();
        self.set(tables);
    }

    /// Replaces the tables; pages that are in none of the new ones are free.
    fn set(&mut self, tables: Vec<Vec<usize>>) {
        tables.iter().flatten().for_each(|&number| self.readers[number] += 1);
        for number in std::mem::replace(&mut self.tables, tables).into_iter().flatten() {
            self.release(number);
        }
    }

    /// A page is in one table less.
    fn release(&mut self, number: usize) {
        self.readers[number] -= 1;
        if self.readers[number] == 0 {
            self.free.push(number);
        }
    }

    /// Puts the sequences of another cache behind these; its pages take the places of those that are free.
    pub fn join(&mut self, other: Self) {
        let mut numbers = vec![0; other.pages.len()];
        for ((page, readers), number) in other.pages.into_iter().zip(other.readers).zip(&mut numbers) {
            if readers == 0 {
                continue;
            }
            *number = self.free.pop().unwrap_or(self.pages.len());
            if *number == self.pages.len() {
                self.pages.push(page);
                self.readers.push(readers);
            } else {
                (self.pages[*number], self.readers[*number]) = (page, readers);
            }
        }
        let slots = self.tables.len();
        self.slots.extend(other.slots.iter().map(|slot| slots + slot));
        let table = |table: &Vec<usize>| table.iter().map(|&number| numbers[number]).collect();
        self.tables.extend(other.tables.iter().map(table));
        self.lengths.extend(other.lengths);
        self.finite &= other.finite;
    }

    /// What attention reads.
    pub fn view(&self) -> KeysValues<'_, T> {
        let cache = Cache { pages: &self.pages, tables: &self.tables, page: self.page, finite: self.finite };
        KeysValues::Cached { cache, slots: &self.slots, lengths: &self.lengths }
    }
}

/// The memory of a page, allocated if it is new. In the task that fills it: fresh memory costs more than what is written there.
fn ready<T: Float>(memory: &mut Buffer<T>, page: Page) -> Result<&mut Buffer<T>> {
    if memory.is_empty() {
        *memory = Buffer::zeroed(page.size())?;
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of each sequence, one head of width 1.
    fn keys(cache: &KeyValueCache<f32>) -> Vec<Vec<f32>> {
        // Keys come first, and those of a full page are transposed.
        let key = |i: usize, at: usize| {
            let full = at / Page::KEYS < cache.lengths[i] / Page::KEYS;
            let page = &cache.pages[cache.tables[cache.slots[i]][at / Page::KEYS]];
            page[at % Page::KEYS * if full { 1 } else { Page::KEYS }]
        };
        (0..cache.sequences()).map(|i| (0..cache.lengths[i]).map(|at| key(i, at)).collect()).collect()
    }

    /// That every page is counted once for each table it is in, and the others are free.
    fn check(cache: &KeyValueCache<f32>) {
        for (number, &readers) in cache.readers.iter().enumerate() {
            assert_eq!(cache.tables.iter().flatten().filter(|&&n| n == number).count(), readers);
            assert_eq!(cache.free.contains(&number), readers == 0);
        }
    }

    #[test]
    fn beams_part_grow_and_drop_like_vectors() {
        let mut cache = KeyValueCache::<f32>::new(3, 1, 1);
        let mut plain: Vec<Vec<f32>> = vec![Vec::new(); 3];
        let orders: [&[usize]; 5] = [&[0, 1, 2], &[2, 2, 0], &[1, 1, 1], &[0, 2], &[1, 0, 1]];
        for (step, parents) in orders.iter().cycle().take(60).enumerate() {
            let new: Vec<f32> = (0..plain.len()).map(|i| (step * 10 + i) as f32).collect();
            cache.append(&new, 1, 0, 0, &Rows::from_lengths(&vec![1; new.len()])).unwrap();
            plain.iter_mut().zip(&new).for_each(|(p, &x)| p.push(x));
            let parents: Vec<usize> = parents.iter().map(|&p| p.min(plain.len() - 1)).collect();
            cache.reorder(&parents);
            plain = parents.iter().map(|&p| plain[p].clone()).collect();
            assert_eq!(keys(&cache), plain, "step {step}");
            check(&cache);
        }
    }

    #[test]
    fn what_is_forgotten_is_written_anew() {
        for had in [1, 15, 16, 17, 32, 40] {
            for n in 0..=had {
                let beginning: Vec<f32> = (0..had).map(|i| i as f32).collect();
                let mut cache = KeyValueCache::<f32>::new(1, 1, 1);
                cache.append(&beginning, 1, 0, 0, &Rows::from_lengths(&[had])).unwrap();
                cache.reorder(&[0, 0]);
                cache.keep(&[n, had + 1]).unwrap();
                check(&cache);
                let more: Vec<f32> = (0..20).map(|i| (100 + i) as f32).collect();
                cache.append(&more, 1, 0, 0, &Rows::from_lengths(&[20, 0])).unwrap();
                assert_eq!(keys(&cache), [[&beginning[..n], &more].concat(), beginning], "{n} of {had}");
                check(&cache);
            }
        }
    }

    #[test]
    fn what_sequences_have_in_common_is_stored_once() {
        let mut cache = KeyValueCache::<f32>::new(1, 1, 1);
        let beginning: Vec<f32> = (0..40).map(|i| i as f32).collect();
        cache.append(&beginning, 1, 0, 0, &Rows::from_lengths(&[40])).unwrap();
        cache.reorder(&[0, 0, 0, 0]);
        assert_eq!(cache.pages.len(), 3);
        cache.append(&[1.0, 2.0, 3.0, 4.0], 1, 0, 0, &Rows::from_lengths(&[1, 1, 1, 1])).unwrap();
        assert_eq!((cache.pages.len(), cache.free.len()), (6, 0)); // three of them were copied
        cache.reorder(&[2]);
        assert_eq!((cache.pages.len(), cache.free.len()), (6, 3));
        assert_eq!(keys(&cache), [[beginning, vec![3.0]].concat()]);
        check(&cache);
    }

    #[test]
    fn caches_are_joined_into_free_slots_and_shared_ones_stay_shared() {
        let cache = |sequences: &[&[f32]]| {
            let mut cache = KeyValueCache::<f32>::new(sequences.len(), 1, 1);
            let rows = Rows::from_lengths(&sequences.iter().map(|s| s.len()).collect::<Vec<_>>());
            cache.append(&sequences.concat(), 1, 0, 0, &rows).unwrap();
            cache
        };
        let long: Vec<f32> = (0..40).map(|i| i as f32).collect();
        let mut all = cache(&[&[1.0], &[2.0, 3.0], &[4.0]]);
        all.share(&[2, 2, 0]);
        all.join(cache(&[&[5.0]])); // a page is free
        assert_eq!(keys(&all), [vec![4.0], vec![4.0], vec![1.0], vec![5.0]]);
        assert_eq!((all.pages.len(), all.slots[0]), (3, all.slots[1]));
        all.join(cache(&[&long, &[]]));
        assert_eq!(keys(&all), [vec![4.0], vec![4.0], vec![1.0], vec![5.0], long, vec![]]);
        assert_eq!((all.pages.len(), all.slots[0]), (6, all.slots[1]));
        check(&all);
        let mut none = KeyValueCache::<f32>::new(0, 1, 1);
        none.join(cache(&[&[6.0]]));
        none.join(KeyValueCache::new(2, 1, 1));
        none.append(&[7.0, 8.0, 9.0], 1, 0, 0, &Rows::from_lengths(&[1, 1, 1])).unwrap();
        assert_eq!(keys(&none), [vec![6.0, 7.0], vec![8.0], vec![9.0]]);
        // Before anything is allocated.
        let mut fresh = KeyValueCache::<f32>::new(2, 1, 1);
        fresh.reorder(&[1, 0, 0]);
        fresh.join(KeyValueCache::new(1, 1, 1));
        fresh.append(&[1.0, 2.0, 3.0, 4.0], 1, 0, 0, &Rows::from_lengths(&[1, 1, 1, 1])).unwrap();
        assert_eq!(keys(&fresh), [vec![1.0], vec![2.0], vec![3.0], vec![4.0]]);
    }

    #[test]
    fn sharing_copies_nothing() {
        let mut cache = KeyValueCache::<f32>::new(2, 1, 1);
        cache.append(&[1.0, 2.0, 3.0], 1, 0, 0, &Rows::from_lengths(&[1, 2])).unwrap();
        cache.share(&[1, 1, 0]);
        assert_eq!(keys(&cache), [vec![2.0, 3.0], vec![2.0, 3.0], vec![1.0]]);
        assert!(cache.append(&[0.0], 1, 0, 0, &Rows::from_lengths(&[1])).is_err());
    }
}
