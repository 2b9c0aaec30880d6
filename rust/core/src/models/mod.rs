//! Models: compositions of layers, from ids to logits. No derivative is written here.

mod config;
mod transformer;

#[cfg(test)]
mod tests;

pub use config::{PositionKind, Tie, TransformerConfig};
pub use transformer::{Batch, DecoderState, Transformer};
