//! Transformers on CPUs: kernels, a tape of fused operations, layers, training and decoding.
//!
//! The floors, each knowing only those below it: `models`, `generate`, `train`, `checkpoint` · `nn` · `ops` · `tape` ·
//! `kernels` · `simd`, `threads`, `rows`, `rng`, `profile`, `error`.

pub mod checkpoint;
pub mod error;
pub mod generate;
pub mod kernels;
pub mod models;
pub mod nn;
pub mod ops;
pub mod profile;
pub mod rng;
pub mod rows;
pub mod simd;
pub mod tape;
pub mod threads;
pub mod train;
