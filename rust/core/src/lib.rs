//! Transformers on CPUs: kernels, a tape of fused operations, layers, training and decoding.
//!
//! The floors, each knowing only those below it: `models`, `generate`, `train` · `nn` · `ops` · `tape` ·
//! `kernels` · `simd`, `threads`, `rows`, `rng`, `error`.

pub mod error;
pub mod simd;
pub mod threads;
