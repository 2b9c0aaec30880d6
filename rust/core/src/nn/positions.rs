//! Where a token stands: sinusoidal (section 3.5 of the paper) or learned.

use super::Embedding;
use crate::ensure;
use crate::error::Result;
use crate::ops;
use crate::rows::Rows;
use crate::simd::Float;
use crate::tape::{Builder, ParamId, Params, Tape, Var};
use crate::threads::briefly;
use std::sync::{Arc, Mutex};

/// Adds positions to embeddings.
#[derive(Clone, Debug)]
pub enum Positions {
    /// No positions.
    None,
    /// PE(pos, 2i) = sin(pos / 10000^(2i/D)), PE(pos, 2i+1) = cos(the same).
    Sinusoidal(SinusoidTable),
    /// A learned table of `max_positions` vectors.
    Learned {
        /// The table.
        table: Embedding,
        /// Its number of rows.
        max_positions: usize,
    },
}

impl Positions {
    /// Sinusoidal positions of any length.
    pub fn sinusoidal(d_model: usize) -> Self {
        Positions::Sinusoidal(SinusoidTable { d_model, table: Arc::default() })
    }

    /// Declares `name.weight` (max_positions, D).
    pub fn learned(b: &mut Builder, name: &str, max_positions: usize, d_model: usize) -> Self {
        let std = (d_model as f64).sqrt().recip();
        Positions::Learned { table: Embedding::new(b, name, max_positions, d_model, 1.0, std), max_positions }
    }

    /// The table, if it is learned.
    pub fn weight(&self) -> Option<ParamId> {
        match self {
            Positions::Learned { table, .. } => Some(table.weight),
            Positions::None | Positions::Sinusoidal(_) => None,
        }
    }

    /// x (R, D) + positions of `rows`
    pub fn forward<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, x: Var, rows: &Rows) -> Result<Var> {
        match self {
            Positions::None => Ok(x),
            Positions::Sinusoidal(table) => {
                let (start, end) = (rows.positions().min().unwrap_or(0), rows.end_position());
                let d = table.d_model;
                let values: Vec<T> = table.up_to(end)[start * d..end * d].iter().map(|&p| T::from_f64(p)).collect();
                let index: Vec<usize> = rows.positions().map(|p| p - start).collect();
                ops::add_rows(tape, x, &values, &index)
            }
            Positions::Learned { table, max_positions } => {
                ensure!(
                    rows.end_position() <= *max_positions,
                    Shape,
                    "a sequence reaches position {}, the learned table has {max_positions}; shorten it or raise max_positions",
                    rows.end_position()
                );
                let ids: Vec<u32> = rows.positions().map(|p| p as u32).collect();
                let positions = table.forward(tape, params, &ids)?;
                ops::add(tape, x, positions)
            }
        }
    }
}

/// The sinusoids computed so far; grown when a longer sequence comes, shared by clones of the layer.
#[derive(Clone, Debug)]
pub struct SinusoidTable {
    d_model: usize,
    table: Arc<Mutex<Arc<Vec<f64>>>>,
}

impl SinusoidTable {
    fn up_to(&self, positions: usize) -> Arc<Vec<f64>> {
        let mut table = briefly(|| self.table.try_lock()).map(|table| table.clone()).unwrap_or_default();
        let d = self.d_model;
        if table.len() < positions * d {
            let known = table.len() / d.max(1);
            let grown = Arc::make_mut(&mut table);
            for position in known..positions.next_power_of_two() {
                grown.extend((0..d).map(|j| {
                    let angle = position as f64 / libm::pow(10_000.0, (j - j % 2) as f64 / d as f64);
                    if j % 2 == 0 { libm::sin(angle) } else { libm::cos(angle) }
                }));
            }
            if let Some(mut kept) = briefly(|| self.table.try_lock()).filter(|kept| kept.len() < table.len()) {
                *kept = table.clone();
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_table_that_stays_taken_is_computed_anew() {
        let table = SinusoidTable { d_model: 4, table: Arc::default() };
        let (expected, other) = (table.up_to(3), table.clone());
        let taken = table.table.lock().unwrap(); // as in a child that was forked meanwhile
        let (say, hear) = mpsc::channel();
        std::thread::spawn(move || say.send(other.up_to(3)));
        assert_eq!(hear.recv_timeout(Duration::from_secs(60)).expect("it hangs"), expected);
        drop(taken);
    }
}
