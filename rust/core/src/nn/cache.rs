//! Keys and values of sequences that grow while decoding.

use crate::ensure;
use crate::error::Result;
use crate::ops::KeysValues;
use crate::rows::Rows;
use crate::simd::{Buffer, Float};

/// The keys and values of every sequence of a batch. A sequence owns a slot of `capacity` rows; appending grows it in
/// place, and only beams that part from their parent are copied.
#[derive(Debug)]
pub struct KeyValueCache<T> {
    k: Buffer<T>,
    v: Buffer<T>,
    width: usize,
    capacity: usize,
    starts: Vec<usize>,
    lengths: Vec<usize>,
}

impl<T: Float> KeyValueCache<T> {
    /// Empty caches for `sequences` sequences, keys and values `width` wide.
    pub fn new(sequences: usize, width: usize) -> Self {
        KeyValueCache {
            k: Buffer::default(),
            v: Buffer::default(),
            width,
            capacity: 0,
            starts: vec![0; sequences],
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
        if longest > self.capacity {
            self.lay_out(&(0..self.sequences()).collect::<Vec<_>>(), longest.next_power_of_two().max(16))?;
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
        if parents.len() > self.sequences() {
            return self.lay_out(parents, self.capacity);
        }
        let mut taken = vec![false; self.sequences()];
        parents.iter().for_each(|&p| taken[p] = true);
        let mut free: Vec<usize> = (0..self.sequences()).filter(|&i| !taken[i]).map(|i| self.starts[i]).collect();
        let lengths = parents.iter().map(|&p| self.lengths[p]).collect();
        let starts = parents
            .iter()
            .map(|&p| {
                let from = self.starts[p];
                if std::mem::replace(&mut taken[p], false) {
                    return from;
                }
                let to = free.pop().expect("a child beyond the first leaves a slot of another sequence free");
                let source = from * self.width..(from + self.lengths[p]) * self.width;
                self.k.copy_within(source.clone(), to * self.width);
                self.v.copy_within(source, to * self.width);
                to
            })
            .collect();
        (self.starts, self.lengths) = (starts, lengths);
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

    /// Moves sequence `parents[i]` to slot `i` of new buffers with room for `capacity` rows each.
    fn lay_out(&mut self, parents: &[usize], capacity: usize) -> Result<()> {
        let mut k = Buffer::zeroed(parents.len() * capacity * self.width)?;
        let mut v = Buffer::zeroed(parents.len() * capacity * self.width)?;
        for (slot, &p) in parents.iter().enumerate() {
            let n = self.lengths[p] * self.width;
            let (to, from) = (slot * capacity * self.width, self.starts[p] * self.width);
            k[to..][..n].copy_from_slice(&self.k[from..][..n]);
            v[to..][..n].copy_from_slice(&self.v[from..][..n]);
        }
        self.lengths = parents.iter().map(|&p| self.lengths[p]).collect();
        self.starts = (0..parents.len()).map(|slot| slot * capacity).collect();
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
    fn sharing_copies_nothing() {
        let mut cache = KeyValueCache::<f32>::new(2, 1);
        cache.append(&[1.0, 2.0, 3.0], 1, 0, 0, &Rows::from_lengths(&[1, 2])).unwrap();
        cache.share(&[1, 1, 0]);
        assert_eq!(keys(&cache), [vec![2.0, 3.0], vec![2.0, 3.0], vec![1.0]]);
        assert!(cache.append(&[0.0], 1, 0, 0, &Rows::from_lengths(&[1])).is_err());
    }
}
