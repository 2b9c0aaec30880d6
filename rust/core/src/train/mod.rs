//! Training: optimisers, schedules, clipping, and batches of tokens.

mod batches;
mod clip;
mod optimizer;
mod pattern;
mod schedule;

pub use batches::batches;
pub use clip::{clip_scale, global_norm};
pub use optimizer::{NO_DECAY, Optimizer, OptimizerState};
pub use pattern::matches;
pub use schedule::{Schedule, paper_lr};
