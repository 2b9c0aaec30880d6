//! Rows of a table, chosen by token ids.

use super::linear::refuse_gradients;
use crate::error::{Result, Shape};
use crate::kernels::embedding::{embedding_backward, embedding_forward, embedding_forward_from, rows_by_id};
use crate::profile::{self, Work};
use crate::simd::Float;
use crate::tape::{Backward, Operation, ParamId, Params, Stored, Tape, Tensor, Var};
use crate::{bail, ensure};

/// y[r] = scale · table[ids[r]], for a table of shape (V, D). Vaswani and others (2017) scale by √D.
pub fn embedding<T: Float>(
    tape: &mut Tape<T>,
    params: &Params<T>,
    table: ParamId,
    ids: &[u32],
    scale: f64,
) -> Result<Var> {
    let &[vocabulary, cols] = &params.layout().entry(table).shape[..] else {
        bail!(
            Shape,
            "embedding: argument `table`: expected a matrix, got shape {}",
            Shape(&params.layout().entry(table).shape)
        )
    };
    check_ids("embedding", "ids", ids.iter().copied(), vocabulary)?;
    ensure!(cols > 0, Shape, "embedding: argument `table`: expected at least one column, got none");
    if params.layout().entry(table).stored != Stored::F32 {
        refuse_gradients(tape, params, "embedding")?;
    }
    let wanted = tape.wants(params, &[], &[table]);
    let _timed = profile::forward("embedding", [vocabulary, cols], || Work::passes::<T>(2, ids.len(), cols));
    let mut y = tape.pool.tensor(ids.len(), cols)?;
    match params.layout().entry(table).stored {
        Stored::F32 => embedding_forward(&mut y, params.get(table), ids, cols, scale)?,
        _ => embedding_forward_from(&mut y, |id, row| params.row(table, id, row), ids, cols, scale)?,
    }
    let y = tape.push(y, wanted);
    if wanted {
        tape.record(y, &[], Node { table, sorted: rows_by_id(ids), scale });
    }
    Ok(y)
}

/// Refuses ids that are not below the size of the vocabulary.
pub(super) fn check_ids(op: &str, argument: &str, ids: impl Iterator<Item = u32>, vocabulary: usize) -> Result<()> {
    if let Some((row, id)) = ids.enumerate().find(|&(_, id)| id as usize >= vocabulary) {
        bail!(
            TokenOutOfRange,
            "{op}: argument `{argument}`: expected ids from 0 to below the vocabulary's {vocabulary}, got {id} in row {row}"
        );
    }
    Ok(())
}

struct Node {
    table: ParamId,
    sorted: Vec<(u32, u32)>,
    scale: f64,
}

impl<T: Float> Operation<T> for Node {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()> {
        let vocabulary = cx.params.layout().entry(self.table).shape[0];
        let _timed = profile::backward("embedding", [vocabulary, dy.cols()], || {
            Work::passes::<T>(1, dy.rows() + vocabulary, dy.cols())
        });
        cx.accumulate_param(self.table, |dtable, beta| {
            embedding_backward(dtable, beta, &dy, &self.sorted, dy.cols(), self.scale)
        })?;
        cx.pool.recycle(dy);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing;
    use super::*;
    use crate::error::Error;
    use crate::rng::Key;
    use crate::tape::{Pool, gradcheck};

    #[test]
    fn gradients_equal_differences() {
        let (params, ids) = testing::params(&[&[11, 3]]);
        gradcheck(&params, &[], None, |tape, params, _| embedding(tape, params, ids[0], &[4, 0, 10, 4, 4, 9], 1.7))
            .unwrap();
        // Twice in one tape: the second gradient is added to the first.
        gradcheck(&params, &[], None, |tape, params, _| {
            let (a, b) =
                (embedding(tape, params, ids[0], &[4, 0], 1.0)?, embedding(tape, params, ids[0], &[4, 7], 2.0)?);
            super::super::add(tape, a, b)
        })
        .unwrap();
    }

    #[test]
    fn threads_do_not_show_and_no_rows_clear_the_gradient() {
        let (params, ids) = testing::params::<f32>(&[&[100, 20]]);
        let tokens: Vec<u32> = (0..3000).map(|i| (Key::new(1).uniform(i).powi(3) * 100.0) as u32).collect();
        testing::same_bits(&params, &[], None, |tape, params, _| embedding(tape, params, ids[0], &tokens, 0.5));
        testing::no_rows(&params, &[], None, |tape, params, _| embedding(tape, params, ids[0], &[], 0.5));
    }

    #[test]
    fn rows_of_a_table_in_bf16_are_those_of_the_rounded_one() {
        let (params, ids) = testing::params::<f32>(&[&[70, 20]]);
        let bf16 = params.convert(params.layout().stored_in(Stored::Bf16, &[])).unwrap();
        let rounded = bf16.convert(params.layout().clone()).unwrap();
        let tokens: Vec<u32> = (0..2000).map(|i| i * 31 % 70).collect();
        let rows = |params: &Params<f32>| {
            let mut tape = Tape::evaluation(Pool::default());
            let y = embedding(&mut tape, params, ids[0], &tokens, 1.7).unwrap();
            tape.value(y).unwrap().to_vec()
        };
        assert!(rows(&bf16) == rows(&rounded) && rows(&rounded) != rows(&params));
        let error = embedding(&mut Tape::recording(Pool::default()), &bf16, ids[0], &[3], 1.0).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("embedding: weights in bf16")), "{error}");
    }

    #[test]
    fn rows_of_a_table_in_int8_are_its_bytes_times_their_scales() {
        let (params, ids) = testing::params::<f32>(&[&[70, 21]]);
        let int8 = params.convert(params.layout().stored_in(Stored::Int8, &[])).unwrap();
        let table = int8.int8(ids[0]).unwrap();
        let (values, scales) = (table.values(), table.scales());
        let tokens: Vec<u32> = (0..2000).map(|i| i * 31 % 70).collect();
        let mut tape = Tape::evaluation(Pool::default());
        let y = embedding(&mut tape, &int8, ids[0], &tokens, 1.7).unwrap();
        for (y, &id) in tape.value(y).unwrap().chunks(21).zip(&tokens) {
            let bytes = &values[id as usize * 21..][..21];
            let number = |&q: &i8| f32::from(q) * scales[id as usize] * 1.7;
            assert!(y.iter().copied().eq(bytes.iter().map(number)));
        }
        let error = embedding(&mut Tape::recording(Pool::default()), &int8, ids[0], &[3], 1.0).unwrap_err();
        assert!(matches!(&error, Error::Unsupported(text) if text.contains("embedding: weights in int8")), "{error}");
    }

    #[test]
    fn ids_beyond_the_table_are_named() {
        let (params, ids) = testing::params::<f32>(&[&[11, 3], &[5]]);
        let mut tape = Tape::evaluation(Pool::default());
        let error = embedding(&mut tape, &params, ids[0], &[3, 11], 1.0).unwrap_err();
        assert!(matches!(&error, Error::TokenOutOfRange(text) if text.contains("11 in row 1")), "{error}");
        assert!(embedding(&mut tape, &params, ids[1], &[3], 1.0).is_err());
    }
}
