//! Rows are tokens: a batch of sequences without padding.

use crate::ensure;
use crate::error::Result;
use std::ops::Range;
use std::sync::Arc;

/// Where each sequence of a batch lies among the rows of a `(rows, features)` matrix, and the absolute position of
/// its first row: the only source of positions. Immutable and cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    offsets: Arc<[usize]>,
    first: Arc<[usize]>,
}

impl Rows {
    /// Sequences of these lengths, one after the other, each starting at position 0.
    pub fn from_lengths(lengths: &[usize]) -> Self {
        let mut offsets = Vec::with_capacity(lengths.len() + 1);
        offsets.push(0);
        offsets.extend(lengths.iter().scan(0, |end, n| {
            *end += n;
            Some(*end)
        }));
        Rows { offsets: offsets.into(), first: vec![0; lengths.len()].into() }
    }

    /// The same rows, each sequence starting at the given absolute position.
    pub fn starting_at(&self, first: &[usize]) -> Result<Self> {
        ensure!(
            first.len() == self.sequences(),
            Shape,
            "rows: expected one first position for each of {} sequences, got {}",
            self.sequences(),
            first.len()
        );
        Ok(Rows { offsets: self.offsets.clone(), first: first.into() })
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.first.len()
    }

    /// Number of rows of all sequences together.
    pub fn total(&self) -> usize {
        self.offsets[self.sequences()]
    }

    /// The rows of sequence `i`.
    pub fn range(&self, i: usize) -> Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }

    /// The rows of several sequences that follow each other.
    pub fn span(&self, sequences: &Range<usize>) -> Range<usize> {
        self.offsets[sequences.start]..self.offsets[sequences.end]
    }

    /// These sequences alone.
    pub fn part(&self, sequences: Range<usize>) -> Self {
        let start = self.offsets[sequences.start];
        let offsets = self.offsets[sequences.start..=sequences.end].iter().map(|offset| offset - start).collect();
        Rows { offsets, first: self.first[sequences].into() }
    }

    /// The length of sequence `i`.
    pub fn length(&self, i: usize) -> usize {
        self.offsets[i + 1] - self.offsets[i]
    }

    /// The length of every sequence.
    pub fn lengths(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.sequences()).map(|i| self.length(i))
    }

    /// The absolute position of the first row of sequence `i`.
    pub fn first_position(&self, i: usize) -> usize {
        self.first[i]
    }

    /// The absolute position of every row.
    pub fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.sequences()).flat_map(move |i| (0..self.length(i)).map(move |t| self.first[i] + t))
    }

    /// The highest absolute position plus one; 0 without rows.
    pub fn end_position(&self) -> usize {
        (0..self.sequences()).filter(|&i| self.length(i) > 0).map(|i| self.first[i] + self.length(i)).max().unwrap_or(0)
    }
}

/// Cuts sequences of these lengths into runs of at most `most` rows; a longer sequence is a run of its own.
pub fn runs(lengths: impl Iterator<Item = usize>, most: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    let mut total = 0;
    for (i, length) in lengths.enumerate() {
        match runs.last_mut() {
            Some(run) if total + length <= most => (run.end, total) = (i + 1, total + length),
            _ => {
                runs.push(i..i + 1);
                total = length;
            }
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_positions_follow_the_lengths() {
        let rows = Rows::from_lengths(&[2, 0, 3]);
        assert_eq!((rows.sequences(), rows.total(), rows.range(2)), (3, 5, 2..5));
        assert!(rows.positions().eq([0, 1, 0, 1, 2]));
        let later = rows.starting_at(&[4, 9, 1]).unwrap();
        assert!(later.positions().eq([4, 5, 1, 2, 3]));
        assert_eq!((rows.end_position(), later.end_position()), (3, 6));
        assert!(rows.starting_at(&[1]).is_err());
    }

    #[test]
    fn runs_hold_whole_sequences() {
        let lengths = [3, 4, 0, 9, 1, 5, 2];
        assert_eq!(runs(lengths.into_iter(), 7), [0..3, 3..4, 4..6, 6..7]);
        let rows = Rows::from_lengths(&lengths).starting_at(&[0, 5, 0, 0, 2, 0, 0]).unwrap();
        let part = rows.part(1..5);
        assert_eq!((rows.span(&(1..5)), part.total(), part.range(2)), (3..17, 14, 4..13));
        assert!(part.positions().eq(rows.positions().skip(3).take(14)));
    }

    #[test]
    fn an_empty_batch_has_no_rows() {
        let rows = Rows::from_lengths(&[]);
        assert_eq!((rows.sequences(), rows.total(), rows.end_position()), (0, 0, 0));
    }
}
