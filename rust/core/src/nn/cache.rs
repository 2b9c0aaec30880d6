//! Keys and values of sequences that grow while decoding.

use crate::ensure;
use crate::error::Result;
use crate::ops::KeysValues;
use crate::rows::Rows;
use crate::simd::{Buffer, Float};
use std::collections::{HashMap, HashSet};

/// Rows of a slot before it grows.
const FIRST_CAPACITY: usize = 16;

/// The keys and values of every sequence of a batch. A sequence has a slot of `capacity` rows; appending grows it in
/// place, and only beams that part from their parent are copied. Sequences that no longer grow may share a slot.
#[derive(Debug)]
pub struct KeyValueCache<T> {
    k: Buffer<T>,
    v: Buffer<T>,
    width: usize,
    capacity: usize,
    /// The first row of each sequence: a multiple of the capacity.
    starts: Vec<usize>,
    lengths: Vec<usize>,
}

impl<T: Float> KeyValueCache<T> {
    /// Empty caches for `sequences` sequences, keys and values `width` wide. Nothing is allocated before they grow.
    pub fn new(sequences: usize, width: usize) -> Self {
        KeyValueCache {
            k: Buffer::default(),
            v: Buffer::default(),
            width,
            capacity: FIRST_CAPACITY,
            starts: (0..sequences).map(|slot| slot * FIRST_CAPACITY).collect(),
            lengths: vec![0; sequences],
        }
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.starts.len()
    }

    /// Number of keys of sequence `i`.
    pub fn length(&self, i: usize) -> usize {
        self.lengths[i]
    }

    /// Appends to each sequence the keys and values of its rows: columns `k_start..` and `v_start..` of the matrix
    /// `kv`, whose rows are `stride` apart.
    pub fn append(&mut self, kv: &[T], stride: usize, k_start: usize, v_start: usize, rows: &Rows) -> Result<()> {
        ensure!(
            rows.sequences() == self.sequences(),
            Shape,
            "key/value cache: expected {} sequences, got {}",
            self.sequences(),
            rows.sequences()
        );
        let longest = (0..self.sequences()).map(|i| self.lengths[i] + rows.length(i)).max().unwrap_or(0);
        if longest > self.capacity || (self.slots() == 0 && longest > 0) {
            self.lay_out(self.sequences(), longest.next_power_of_two().max(self.capacity))?;
        }
        for i in 0..self.sequences() {
            for row in rows.range(i) {
                let at = (self.starts[i] + self.lengths[i]) * self.width;
                let from = &kv[row * stride..];
                self.k[at..][..self.width].copy_from_slice(&from[k_start..][..self.width]);
                self.v[at..][..self.width].copy_from_slice(&from[v_start..][..self.width]);
                self.lengths[i] += 1;
            }
        }
        Ok(())
    }

    /// Sequence `i` goes on from what was sequence `parents[i]`; sequences that no one continues are dropped. The first
    /// child takes over its parent's slot, later ones get a copy in a slot that fell free.
    pub fn reorder(&mut self, parents: &[usize]) -> Result<()> {
        self.share(parents);
        if self.slots() == 0 {
            // Nothing to copy yet: places of their own are enough.
            self.starts = (0..parents.len()).map(|slot| slot * self.capacity).collect();
            return Ok(());
        }
        if self.slots() < parents.len() {
            self.lay_out(parents.len(), self.capacity)?;
        }
        let mut taken = vec![false; self.slots()];
        let later: Vec<usize> = (0..self.sequences())
            .filter(|&i| std::mem::replace(&mut taken[self.starts[i] / self.capacity], true))
            .collect();
        let mut free = (0..self.slots()).filter(|&slot| !taken[slot]);
        for i in later {
            let to = free.next().expect("there are as many slots as sequences") * self.capacity;
            let source = self.starts[i] * self.width..(self.starts[i] + self.lengths[i]) * self.width;
            self.k.copy_within(source.clone(), to * self.width);
            self.v.copy_within(source, to * self.width);
            self.starts[i] = to;
        }
        Ok(())
    }

    /// Puts the sequences of another cache, each with a slot of its own, behind these.
    pub fn join(&mut self, other: Self) -> Result<()> {
        if self.starts.is_empty() {
            *self = other;
            return Ok(());
        }
        let longest = other.lengths.iter().copied().max().unwrap_or(0);
        let needed = self.starts.iter().collect::<HashSet<_>>().len() + other.sequences();
        if self.slots() < needed || longest > self.capacity {
            self.lay_out(needed, longest.next_power_of_two().max(self.capacity))?;
        }
        let mut used = vec![false; self.slots()];
        self.starts.iter().for_each(|start| used[start / self.capacity] = true);
        let free = (0..self.slots()).filter(|&slot| !used[slot]);
        for (i, slot) in (0..other.sequences()).zip(free) {
            let (to, from) = (slot * self.capacity, other.starts[i]);
            let n = other.lengths[i] * self.width;
            if n > 0 {
                self.k[to * self.width..][..n].copy_from_slice(&other.k[from * self.width..][..n]);
                self.v[to * self.width..][..n].copy_from_slice(&other.v[from * self.width..][..n]);
            }
            self.starts.push(to);
            self.lengths.push(other.lengths[i]);
        }
        Ok(())
    }

    /// Sequence `i` reads what was sequence `parents[i]`, without a copy: for caches that no longer grow.
    pub fn share(&mut self, parents: &[usize]) {
        self.starts = parents.iter().map(|&p| self.starts[p]).collect();
        self.lengths = parents.iter().map(|&p| self.lengths[p]).collect();
    }

    /// What attention reads.
    pub fn view(&self) -> KeysValues<'_, T> {
        KeysValues::Cached {
            k: &self.k,
            v: &self.v,
            row_stride: self.width,
            starts: &self.starts,
            lengths: &self.lengths,
        }
    }

    /// Slots that are allocated.
    fn slots(&self) -> usize {
        (self.k.len() / self.width.max(1)) / self.capacity
    }

    /// Moves everything to new buffers of so many slots. What shares a slot goes on sharing it.
    fn lay_out(&mut self, slots: usize, capacity: usize) -> Result<()> {
        let mut k = Buffer::zeroed(slots * capacity * self.width)?;
        let mut v = Buffer::zeroed(slots * capacity * self.width)?;
        let mut moved = HashMap::new();
        for (start, &length) in self.starts.iter_mut().zip(&self.lengths) {
            let from = *start * self.width;
            let slot = moved.len();
            *start = *moved.entry(*start).or_insert_with(|| {
                let (to, n) = (slot * capacity * self.width, length * self.width);
                if n > 0 {
                    k[to..][..n].copy_from_slice(&self.k[from..][..n]);
                    v[to..][..n].copy_from_slice(&self.v[from..][..n]);
                }
                slot * capacity
            });
        }
        (self.k, self.v, self.capacity) = (k, v, capacity);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of each sequence.
    fn keys(cache: &KeyValueCache<f32>) -> Vec<Vec<f32>> {
        (0..cache.sequences()).map(|i| cache.k[cache.starts[i]..][..cache.lengths[i]].to_vec()).collect()
    }

    #[test]
    fn beams_part_grow_and_drop_like_vectors() {
        let mut cache = KeyValueCache::<f32>::new(3, 1);
        let mut plain: Vec<Vec<f32>> = vec![Vec::new(); 3];
        let orders: [&[usize]; 5] = [&[0, 1, 2], &[2, 2, 0], &[1, 1, 1], &[0, 2], &[1, 0, 1]];
        for (step, parents) in orders.iter().cycle().take(60).enumerate() {
            let new: Vec<f32> = (0..plain.len()).map(|i| (step * 10 + i) as f32).collect();
            cache.append(&new, 1, 0, 0, &Rows::from_lengths(&vec![1; new.len()])).unwrap();
            plain.iter_mut().zip(&new).for_each(|(p, &x)| p.push(x));
            let parents: Vec<usize> = parents.iter().map(|&p| p.min(plain.len() - 1)).collect();
            cache.reorder(&parents).unwrap();
            plain = parents.iter().map(|&p| plain[p].clone()).collect();
            assert_eq!(keys(&cache), plain, "step {step}");
        }
    }

    #[test]
    fn caches_are_joined_into_free_slots_and_shared_ones_stay_shared() {
        let cache = |sequences: &[&[f32]]| {
            let mut cache = KeyValueCache::<f32>::new(sequences.len(), 1);
            let rows = Rows::from_lengths(&sequences.iter().map(|s| s.len()).collect::<Vec<_>>());
            cache.append(&sequences.concat(), 1, 0, 0, &rows).unwrap();
            cache
        };
        let long: Vec<f32> = (0..40).map(|i| i as f32).collect();
        let mut all = cache(&[&[1.0], &[2.0, 3.0], &[4.0]]);
        all.share(&[2, 2, 0]);
        all.join(cache(&[&[5.0]])).unwrap(); // slot 1 is free
        assert_eq!(keys(&all), [vec![4.0], vec![4.0], vec![1.0], vec![5.0]]);
        assert_eq!((all.slots(), all.starts[0]), (3, all.starts[1]));
        all.join(cache(&[&long, &[]])).unwrap();
        assert_eq!(keys(&all), [vec![4.0], vec![4.0], vec![1.0], vec![5.0], long, vec![]]);
        assert_eq!((all.slots(), all.starts[0]), (5, all.starts[1]));
        let mut none = KeyValueCache::<f32>::new(0, 1);
        none.join(cache(&[&[6.0]])).unwrap();
        none.join(KeyValueCache::new(2, 1)).unwrap();
        none.append(&[7.0, 8.0, 9.0], 1, 0, 0, &Rows::from_lengths(&[1, 1, 1])).unwrap();
        assert_eq!(keys(&none), [vec![6.0, 7.0], vec![8.0], vec![9.0]]);
        // Before anything is allocated.
        let mut fresh = KeyValueCache::<f32>::new(2, 1);
        fresh.reorder(&[1, 0, 0]).unwrap();
        fresh.join(KeyValueCache::new(1, 1)).unwrap();
        fresh.append(&[1.0, 2.0, 3.0, 4.0], 1, 0, 0, &Rows::from_lengths(&[1, 1, 1, 1])).unwrap();
        assert_eq!(keys(&fresh), [vec![1.0], vec![2.0], vec![3.0], vec![4.0]]);
    }

    #[test]
    fn sharing_copies_nothing() {
        let mut cache = KeyValueCache::<f32>::new(2, 1);
        cache.append(&[1.0, 2.0, 3.0], 1, 0, 0, &Rows::from_lengths(&[1, 2])).unwrap();
        cache.share(&[1, 1, 0]);
        assert_eq!(keys(&cache), [vec![2.0, 3.0], vec![2.0, 3.0], vec![1.0]]);
        assert!(cache.append(&[0.0], 1, 0, 0, &Rows::from_lengths(&[1])).is_err());
    }
}
