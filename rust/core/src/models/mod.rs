//! Models: compositions of layers, from ids to logits. No derivative is written here.

mod config;
mod encoder;
mod transformer;

#[cfg(test)]
mod tests;

pub use config::{PositionKind, Tie, TransformerConfig};
pub use encoder::{Encoder, EncoderConfig, Pooled};
pub use transformer::{Batch, DecoderState, Transformer};
