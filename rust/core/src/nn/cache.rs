//! Keys and values of sequences that grow while decoding.

use crate::ensure;
use crate::error::Result;
use crate::ops::{Cache, KeysValues, Slot};
use crate::profile::{self, Work};
use crate::rows::Rows;
use crate::simd::{Buffer, Float};
use crate::threads::for_each;
use std::collections::{HashMap, HashSet};

/// The keys and values of every sequence of a batch. A sequence has a slot with room for some keys; appending grows it in
/// place, and only beams that part from their parent are copied. Sequences that no longer grow may share a slot.
#[derive(Debug)]
pub struct KeyValueCache<T> {
    keys: Buffer<T>,
    values: Buffer<T>,
    slot: Slot,
    /// The slot of each sequence.
    slots: Vec<usize>,
    lengths: Vec<usize>,
    /// No value was ever infinite or NaN.
    finite: bool,
}

impl<T: Float> KeyValueCache<T> {
    /// Empty caches for `sequences` sequences with this many heads of this width. Nothing is allocated before they grow.
    pub fn new(sequences: usize, n_kv_heads: usize, head_dim: usize) -> Self {
        KeyValueCache {
            keys: Buffer::default(),
            values: Buffer::default(),
            slot: Slot::new::<T>(n_kv_heads, head_dim, Slot::LEAST),
            slots: (0..sequences).collect(),
            lengths: vec![0; sequences],
            finite: true,
        }
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.slots.len()
    }

    /// Number of keys of sequence `i`.
    pub fn length(&self, i: usize) -> usize {
        self.lengths[i]
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
        let longest = (0..self.sequences()).map(|i| self.lengths[i] + rows.length(i)).max().unwrap_or(0);
        let width = self.slot.key_width();
        let _timed = profile::span("key/value cache", [width, 0], || Work::passes::<T>(4, rows.total(), width));
        if longest == 0 {
            return Ok(()); // before anything is allocated
        }
        if longest > self.slot.capacity || self.allocated() == 0 {
            self.lay_out(self.sequences(), longest.max(self.slot.capacity))?;
        }
        let slot = self.slot;
        let mut sequence = vec![None; self.allocated()];
        self.slots.iter().enumerate().for_each(|(i, &slot)| sequence[slot] = Some(i));
        let mut finite = vec![true; sequence.len()];
        let (keys, values) = (self.keys.chunks_mut(slot.keys_len()), self.values.chunks_mut(slot.values_len()));
        let lengths = &self.lengths;
        for_each(keys.zip(values).zip(sequence.iter().zip(&mut finite)), |((keys, values), (&sequence, finite))| {
            let Some(i) = sequence else { return };
            for (at, row) in (lengths[i]..).zip(rows.range(i)) {
                let from = &kv[row * stride..];
                *finite &= slot.put(keys, values, at, &from[k_start..][..width], &from[v_start..][..width]);
            }
        })?;
        self.finite &= !finite.contains(&false);
        (0..self.sequences()).for_each(|i| self.lengths[i] += rows.length(i));
        Ok(())
    }

    /// Sequence `i` goes on from what was sequence `parents[i]`; sequences that no one continues are dropped. The first
    /// child takes over its parent's slot, later ones get a copy in a slot that fell free.
    pub fn reorder(&mut self, parents: &[usize]) -> Result<()> {
        self.share(parents);
        if self.allocated() == 0 {
            // Nothing to copy yet: places of their own are enough.
            self.slots = (0..parents.len()).collect();
            return Ok(());
        }
        if self.allocated() < parents.len() {
            self.lay_out(parents.len(), self.slot.capacity)?;
        }
        let mut taken = vec![false; self.allocated()];
        let later: Vec<usize> =
            (0..self.sequences()).filter(|&i| std::mem::replace(&mut taken[self.slots[i]], true)).collect();
        let mut free = (0..self.allocated()).filter(|&slot| !taken[slot]);
        let slot = self.slot;
        let mut to: HashMap<usize, usize> = HashMap::new();
        for i in later {
            let new = free.next().expect("there are as many slots as sequences");
            to.insert(new, i);
        }
        // Slots are read by many and written by one.
        let (mut read, mut written) = (vec![None; taken.len()], Vec::with_capacity(to.len()));
        let (keys, values) = (self.keys.chunks_mut(slot.keys_len()), self.values.chunks_mut(slot.values_len()));
        for (number, (keys, values)) in keys.zip(values).enumerate() {
            match to.get(&number) {
                Some(&i) => written.push((i, number, keys, values)),
                None => read[number] = Some((&*keys, &*values)),
            }
        }
        let (slots, lengths) = (&self.slots, &self.lengths);
        for_each(written.iter_mut(), |(i, _, keys, values)| {
            if let Some(from) = read[slots[*i]] {
                slot.copy((keys, values), &slot, from, lengths[*i]);
            }
        })?;
        let moved: Vec<_> = written.iter().map(|&(i, number, ..)| (i, number)).collect();
        moved.into_iter().for_each(|(i, number)| self.slots[i] = number);
        Ok(())
    }

    /// Puts the sequences of another cache, each with a slot of its own, behind these.
    pub fn join(&mut self, other: Self) -> Result<()> {
        if self.slots.is_empty() {
            *self = other;
            return Ok(());
        }
        let longest = other.lengths.iter().copied().max().unwrap_or(0);
        let needed = self.slots.iter().collect::<HashSet<_>>().len() + other.sequences();
        if self.allocated() < needed || longest > self.slot.capacity {
            self.lay_out(needed, longest.max(self.slot.capacity))?;
        }
        self.finite &= other.finite;
        let mut used = vec![false; self.allocated()];
        self.slots.iter().for_each(|&slot| used[slot] = true);
        let free = (0..used.len()).filter(|&slot| !used[slot]);
        for (i, number) in (0..other.sequences()).zip(free) {
            if other.lengths[i] > 0 {
                let (slot, from) = (self.slot, other.memory(other.slots[i]));
                slot.copy(slot.of_mut(&mut self.keys, &mut self.values, number), &other.slot, from, other.lengths[i]);
            }
            self.slots.push(number);
            self.lengths.push(other.lengths[i]);
        }
        Ok(())
    }

    /// Sequence `i` reads what was sequence `parents[i]`, without a copy: for caches that no longer grow.
    pub fn share(&mut self, parents: &[usize]) {
        self.slots = parents.iter().map(|&p| self.slots[p]).collect();
        self.lengths = parents.iter().map(|&p| self.lengths[p]).collect();
    }

    /// What attention reads.
    pub fn view(&self) -> KeysValues<'_, T> {
        let cache = Cache { keys: &self.keys, values: &self.values, slot: self.slot, finite: self.finite };
        KeysValues::Cached { cache, slots: &self.slots, lengths: &self.lengths }
    }

    /// Slots that are allocated.
    fn allocated(&self) -> usize {
        self.keys.len() / self.slot.keys_len().max(1)
    }

    fn memory(&self, slot: usize) -> (&[T], &[T]) {
        self.slot.of(&self.keys, &self.values, slot)
    }

    /// Moves everything to new buffers of so many slots for so many keys. What shares a slot goes on sharing it.
    fn lay_out(&mut self, slots: usize, keys: usize) -> Result<()> {
        let slot = self.slot.for_keys(keys);
        let mut new = (Buffer::zeroed(slots * slot.keys_len())?, Buffer::zeroed(slots * slot.values_len())?);
        let mut moved = HashMap::new();
        for i in 0..self.sequences() {
            let (number, next) = (self.slots[i], moved.len());
            self.slots[i] = *moved.entry(number).or_insert(next);
            if moved.len() > next && self.lengths[i] > 0 {
                let to = slot.of_mut(&mut new.0, &mut new.1, next);
                slot.copy(to, &self.slot, self.memory(number), self.lengths[i]);
            }
        }
        (self.keys, self.values, self.slot) = (new.0, new.1, slot);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The keys of each sequence.
    fn keys(cache: &KeyValueCache<f32>) -> Vec<Vec<f32>> {
        (0..cache.sequences())
            .map(|i| cache.keys[cache.slots[i] * cache.slot.keys_len()..][..cache.lengths[i]].to_vec())
            .collect()
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
            cache.reorder(&parents).unwrap();
            plain = parents.iter().map(|&p| plain[p].clone()).collect();
            assert_eq!(keys(&cache), plain, "step {step}");
        }
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
        all.join(cache(&[&[5.0]])).unwrap(); // slot 1 is free
        assert_eq!(keys(&all), [vec![4.0], vec![4.0], vec![1.0], vec![5.0]]);
        assert_eq!((all.allocated(), all.slots[0]), (3, all.slots[1]));
        all.join(cache(&[&long, &[]])).unwrap();
        assert_eq!(keys(&all), [vec![4.0], vec![4.0], vec![1.0], vec![5.0], long, vec![]]);
        assert_eq!((all.allocated(), all.slots[0]), (5, all.slots[1]));
        let mut none = KeyValueCache::<f32>::new(0, 1, 1);
        none.join(cache(&[&[6.0]])).unwrap();
        none.join(KeyValueCache::new(2, 1, 1)).unwrap();
        none.append(&[7.0, 8.0, 9.0], 1, 0, 0, &Rows::from_lengths(&[1, 1, 1])).unwrap();
        assert_eq!(keys(&none), [vec![6.0, 7.0], vec![8.0], vec![9.0]]);
        // Before anything is allocated.
        let mut fresh = KeyValueCache::<f32>::new(2, 1, 1);
        fresh.reorder(&[1, 0, 0]).unwrap();
        fresh.join(KeyValueCache::new(1, 1, 1)).unwrap();
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
