//! Differentiable operations, one per file: shape checks, forward, what is saved, the derivative and its proof.
//!
//! Arguments are variables of a tape and parameters by id; the result is a new variable. Where no gradient is wanted
//! nothing is saved.

pub mod activation;
pub mod attention;
pub mod batch_norm;
pub mod cross_entropy;
pub mod embedding;
pub mod layer_norm;
pub mod likeliest;
pub mod linear;
pub mod pooling;
pub mod positions;
pub mod residual;
pub mod rms_norm;
pub mod softmax;

pub use activation::{Activation, Gate, activation, gated};
pub use attention::{Bias, Cache, Columns, DenseMask, Heads, KeysValues, Masks, Page, attention};
pub use batch_norm::{Running, batch_norm};
pub use cross_entropy::{CrossEntropy, IGNORE, cross_entropy, linear_cross_entropy, token_logprobs, token_losses};
pub use embedding::embedding;
pub use layer_norm::layer_norm;
pub use likeliest::likeliest;
pub use linear::{linear, linear_activation};
pub use pooling::{Pooling, pool};
pub use positions::add_rows;
pub use residual::{add, dropout, residual};
pub use rms_norm::rms_norm;
pub use softmax::{log_probabilities, softmax};

use crate::ensure;
use crate::error::{Result, Shape};
use crate::simd::Float;
use crate::tape::{ParamId, Params, Pool, Tensor};

/// Refuses a vector of another length than the operation needs, which is that of what it must `fit`.
fn expect_len<T: Float>(
    params: &Params<T>,
    op: &str,
    argument: &str,
    id: ParamId,
    len: usize,
    fit: &str,
) -> Result<()> {
    let entry = params.layout().entry(id);
    ensure!(
        entry.shape == [len],
        Shape,
        "{op}: argument `{argument}`: expected shape {}, got {}; it must fit {fit}",
        Shape(&[len]),
        Shape(&entry.shape)
    );
    Ok(())
}

/// What a norm multiplies with and adds, one number a column.
type GainAndBias = (Option<ParamId>, Option<ParamId>);

/// Refuses a gain or a bias that is not one number a column.
fn check_gain_and_bias<T: Float>(params: &Params<T>, op: &str, (gain, bias): GainAndBias, cols: usize) -> Result<()> {
    for (argument, id) in [("weight", gain), ("bias", bias)] {
        id.map_or(Ok(()), |id| expect_len(params, op, argument, id, cols, "the last axis of `x`"))?;
    }
    Ok(())
}

/// A row of ones and one of zeros, in the place of an absent gain and an absent bias.
fn neutral<T: Float>(pool: &mut Pool<T>, cols: usize) -> Result<[Tensor<T>; 2]> {
    let [mut ones, mut zeros] = [pool.tensor(1, cols)?, pool.tensor(1, cols)?];
    ones.fill(T::ONE);
    zeros.fill(T::ZERO);
    Ok([ones, zeros])
}

/// The values of gain and bias.
fn gain_and_bias<'a, T: Float>(
    params: &'a Params<T>,
    (gain, bias): GainAndBias,
    [ones, zeros]: &'a [Tensor<T>; 2],
) -> [&'a [T]; 2] {
    [gain.map_or(ones, |id| params.get(id)), bias.map_or(zeros, |id| params.get(id))]
}

#[cfg(test)]
mod accuracy;
#[cfg(test)]
mod testing;
