//! Rows of a table, and the sums of gradients that go back into them.

use super::elementwise::{multiple_of_row, scale_row};
use super::lanes::map;
use super::{Beta, task_len};
use crate::error::Result;
use crate::kernel;
use crate::simd::Float;
use crate::threads::{for_each, rows_per_task};

/// Rows of the table that one task of the backward pass owns: few, because frequent ids stand close together.
const IDS_PER_TASK: usize = 8;

/// y[r] = scale · table[ids[r]]; every id is below the number of rows of the table.
pub fn embedding_forward<T: Float>(y: &mut [T], table: &[T], ids: &[u32], cols: usize, scale: f64) -> Result<()> {
    let scale = T::from_f64(scale);
    for_each(y.chunks_mut(task_len(cols)).zip(ids.chunks(rows_per_task(cols))), |(y, ids)| {
        for (y, &id) in y.chunks_mut(cols).zip(ids) {
            multiple_of_row(y, Beta::Assign, scale, &table[id as usize * cols..][..cols]);
        }
    })
}

/// The same with a table that is not kept in numbers of T: `row` gives one of its rows.
pub fn embedding_forward_from<T: Float>(
    y: &mut [T],
    row: impl Fn(usize, &mut [T]) + Sync,
    ids: &[u32],
    cols: usize,
    scale: f64,
) -> Result<()> {
    let scale = T::from_f64(scale);
    for_each(y.chunks_mut(task_len(cols)).zip(ids.chunks(rows_per_task(cols))), |(y, ids)| {
        for (y, &id) in y.chunks_mut(cols).zip(ids) {
            row(id as usize, y);
            scale_row(y, scale);
        }
    })
}

/// y[r] = x[r] + table[index[r]]
pub fn add_table_rows<T: Float>(y: &mut [T], x: &[T], table: &[T], index: &[usize], cols: usize) -> Result<()> {
    kernel! {
        fn rows<'a, T>(s: S; y: &'a mut [T], x: &'a [T], table: &'a [T], index: &'a [usize], cols: usize) {
            for ((y, x), &i) in y.chunks_mut(cols).zip(x.chunks(cols)).zip(index) {
                map(s, [y], [x, &table[i * cols..][..cols]], #[inline(always)] |_, [x, t]| [s.add(x, t)]);
            }
        }
    }
    let n = task_len(cols);
    for_each(y.chunks_mut(n).zip(x.chunks(n)).zip(index.chunks(rows_per_task(cols))), |((y, x), index)| {
        rows(y, x, table, index, cols)
    })
}

/// The rows of a batch ordered by id, then by row: for [`embedding_backward`].
pub fn rows_by_id(ids: &[u32]) -> Vec<(u32, u32)> {
    let mut sorted: Vec<(u32, u32)> = ids.iter().zip(0..).map(|(&id, row)| (id, row)).collect();
    sorted.sort_unstable();
    sorted
}

/// dtable[id] (+)= scale · Σ dy[r] over the rows r of that id, in the order of the rows. Assigning clears the table.
pub fn embedding_backward<T: Float>(
    dtable: &mut [T],
    beta: Beta,
    dy: &[T],
    sorted: &[(u32, u32)],
    cols: usize,
    scale: f64,
) -> Result<()> {
    let scale = T::from_f64(scale);
    for_each(dtable.chunks_mut(IDS_PER_TASK * cols.max(1)).enumerate(), |(task, dtable)| {
        if beta == Beta::Assign {
            dtable.fill(T::ZERO);
        }
        let first_id = task * IDS_PER_TASK;
        let start = sorted.partition_point(|&(id, _)| (id as usize) < first_id);
        for &(id, row) in &sorted[start..] {
            let Some(dtable) = dtable.get_mut((id as usize - first_id) * cols..).filter(|rest| !rest.is_empty()) else {
                break; // another task's id
            };
            multiple_of_row(&mut dtable[..cols], Beta::Add, scale, &dy[row as usize * cols..][..cols]);
        }
    })
}

/// [`embedding_backward`] in plain words, assigning.
pub fn embedding_backward_reference<T: Float>(dtable: &mut [T], dy: &[T], ids: &[u32], cols: usize, scale: f64) {
    dtable.fill(T::ZERO);
    for (r, &id) in ids.iter().enumerate() {
        for c in 0..cols {
            dtable[id as usize * cols + c] += dy[r * cols + c] * T::from_f64(scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::testing::{assert_close, normal};
    use crate::rng::Key;

    #[test]
    fn gradients_equal_the_reference() {
        for (rows, vocabulary, cols) in [(0, 3, 4), (1, 1, 1), (40, 5, 3), (300, 50, 17), (1000, 9, 40)] {
            let ids: Vec<u32> = (0..rows).map(|r| Key::new(4).below(r, vocabulary) as u32).collect();
            let dy: Vec<f32> = normal(rows as usize * cols, 1);
            let mut expected = vec![f32::NAN; vocabulary as usize * cols];
            embedding_backward_reference(&mut expected, &dy, &ids, cols, 3.0);
            let mut dtable = vec![f32::NAN; expected.len()];
            let sorted = rows_by_id(&ids);
            embedding_backward(&mut dtable, Beta::Assign, &dy, &sorted, cols, 3.0).unwrap();
            assert_close(&dtable, &expected, 1e-5);
            embedding_backward(&mut dtable, Beta::Add, &dy, &sorted, cols, -3.0).unwrap();
            assert_close(&dtable, &vec![0.0; dtable.len()], 1e-4);
        }
    }
}
