//! Layers with named parameters. Layers are plain data: parameter ids and sizes, no numbers, no derivative.
//!
//! Dimension keys: B batch, L queries, M keys, D model, H heads, K head size, F feed-forward, V vocabulary, R rows.

mod cache;
mod embedding;
mod feed_forward;
mod linear;
mod multi_head_attention;
mod norm;
mod positions;
mod stack;
mod transformer_layer;

pub use cache::KeyValueCache;
pub use embedding::Embedding;
pub use feed_forward::{FeedForward, FeedForwardActivation};
pub use linear::Linear;
pub use multi_head_attention::{AttentionConfig, MultiHeadAttention, Source};
pub use norm::{Norm, NormKind};
pub use positions::Positions;
pub use stack::{LayerState, Stack};
pub use transformer_layer::{Cross, LayerConfig, TransformerLayer};
