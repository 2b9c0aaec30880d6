//! Token embeddings.

use crate::error::Result;
use crate::ops;
use crate::simd::Float;
use crate::tape::{Builder, Init, ParamId, Params, Tape, Var};

/// A table of vectors, one per id.
#[derive(Clone, Debug)]
pub struct Embedding {
    /// `name.weight` (V, D)
    pub weight: ParamId,
    /// What each vector is multiplied with: √D in the paper (section 3.4), 1 otherwise.
    pub scale: f64,
}

impl Embedding {
    /// Declares `name.weight` (V, D), normal with the given standard deviation.
    pub fn new(b: &mut Builder, name: &str, vocabulary: usize, d_model: usize, scale: f64, std: f64) -> Self {
        let weight = b.param(&format!("{name}.weight"), &[vocabulary, d_model], Init::Normal { std });
        Embedding { weight, scale }
    }

    /// ids (R,) -> (R, D)
    pub fn forward<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, ids: &[u32]) -> Result<Var> {
        ops::embedding(tape, params, self.weight, ids, self.scale)
    }
}
