//! Positions from a constant table.

use crate::ensure;
use crate::error::Result;
use crate::kernels::embedding::add_table_rows;
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, Tape, Tensor, Var};

/// y[r] = x[r] + table[index[r]], for a table of as many columns as x.
pub fn add_rows<T: Float>(tape: &mut Tape<T>, x: Var, table: &[T], index: &[usize]) -> Result<Var> {
    let (rows, cols) = (tape.value(x)?.rows(), tape.value(x)?.cols());
    ensure!(cols > 0, Shape, "add_rows: argument `x`: expected at least one column, got none");
    ensure!(
        table.len().is_multiple_of(cols),
        Shape,
        "add_rows: argument `table`: expected rows of {cols} columns, got {} numbers",
        table.len()
    );
    ensure!(
        index.len() == rows,
        Shape,
        "add_rows: argument `index`: expected one for each of {rows} rows, got {}",
        index.len()
    );
    let positions = table.len() / cols;
    if let Some(&i) = index.iter().find(|&&i| i >= positions) {
        crate::bail!(
            Shape,
            "add_rows: argument `index`: expected positions below {positions}, got {i}; use a longer table"
        );
    }
    let _timed = profile::forward("add_rows", [cols, 0], || Work::passes::<T>(2, rows, cols));
    let mut y = tape.pool.tensor(rows, cols)?;
    add_table_rows(&mut y, tape.value(x)?, table, index, cols)?;
    let wanted = tape.wants_any(&[x]);
    let y = tape.push(y, wanted);
    if wanted {
        tape.record(y, &[], Node { x });
    }
    Ok(y)
}

struct Node {
    x: Var,
}

impl<T: Float> Operation<T> for Node {
    fn name(&self) -> &'static str {
        "add_rows"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let _timed = profile::backward("add_rows", [dy.cols(), 0], || Work::of_parts(dy.rows()));
        cx.give(self.x, dy)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::tape::{Pool, gradcheck};

    #[test]
    fn rows_are_added_and_gradients_pass_through() {
        let (params, _) = testing::params(&[]);
        let table: Vec<f64> = (0..12).map(f64::from).collect();
        let x = [testing::normal(4, 3, 1)];
        let index = [3, 0, 1, 0];
        gradcheck(&params, &x, None, |tape, _, x| add_rows(tape, x[0], &table, &index)).unwrap();
        let y = testing::run(&params, &x, None, |tape, _, x| add_rows(tape, x[0], &table, &index)).unwrap().y;
        for (r, &i) in index.iter().enumerate() {
            assert!((0..3).all(|c| y[r * 3 + c] == x[0][r * 3 + c] + table[i * 3 + c]));
        }
        let (params, _) = testing::params::<f32>(&[]);
        testing::no_rows(&params, &[testing::normal(0, 3, 1)], None, |tape, _, x| add_rows(tape, x[0], &[0.0; 3], &[]));
    }

    #[test]
    fn wrong_arguments_are_named() {
        let mut tape = Tape::<f32>::evaluation(Pool::default());
        let x = tape.constant(testing::normal(2, 3, 1));
        let mut error = |table: &[f32], index: &[usize]| add_rows(&mut tape, x, table, index).unwrap_err().to_string();
        assert!(error(&[0.0; 7], &[0, 0]).contains("`table`: expected rows of 3 columns"));
        assert!(error(&[0.0; 6], &[0]).contains("`index`: expected one for each of 2 rows"));
        assert!(error(&[0.0; 6], &[0, 2]).contains("expected positions below 2, got 2"));
    }
}
