//! The norm of "Add & Norm": LayerNorm as in the paper, RMSNorm, or BatchNorm.

use crate::error::Result;
use crate::ops::{self, Running};
use crate::simd::Float;
use crate::tape::{Builder, Init, ParamId, Params, Tape, Var};
use serde::{Deserialize, Serialize};

/// Which norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// Ba, Kiros and Hinton 2016.
    Layer,
    /// Zhang and Sennrich 2019.
    Rms,
    /// Ioffe and Szegedy 2015; statistics over the real tokens of the batch.
    Batch,
}

/// A norm over the features of each row (BatchNorm: over the rows for each feature).
#[derive(Clone, Debug)]
pub struct Norm {
    weight: ParamId,
    bias: Option<ParamId>,
    eps: f64,
    running: Option<Running>,
    kind: NormKind,
}

impl Norm {
    /// Declares `name.weight`, with `bias` also `name.bias` (RMSNorm has none), and BatchNorm's running statistics.
    pub fn new(b: &mut Builder, name: &str, d_model: usize, kind: NormKind, eps: f64, bias: bool) -> Self {
        b.within(name, |b| {
            let weight = b.param("weight", &[d_model], Init::Constant(1.0));
            let bias = (bias && kind != NormKind::Rms).then(|| b.param("bias", &[d_model], Init::Constant(0.0)));
            let running = (kind == NormKind::Batch).then(|| Running {
                mean: b.stat("running_mean", d_model, 0.0),
                var: b.stat("running_var", d_model, 1.0),
                momentum: 0.1,
            });
            Norm { weight, bias, eps, running, kind }
        })
    }

    /// x (R, D) -> (R, D)
    pub fn forward<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, x: Var) -> Result<Var> {
        match self.kind {
            NormKind::Layer => ops::layer_norm(tape, params, x, Some(self.weight), self.bias, self.eps),
            NormKind::Rms => ops::rms_norm(tape, params, x, Some(self.weight), self.eps),
            NormKind::Batch => ops::batch_norm(tape, params, x, Some(self.weight), self.bias, self.running, self.eps),
        }
    }
}
