//! Differentiable operations, one per file: shape checks, forward, what is saved, the derivative and its proof.

pub mod attention;

pub use attention::{Bias, Columns, DenseMask, Heads, KeysValues, Masks, attention};
