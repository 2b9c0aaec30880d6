//! Training: optimisers, schedules, clipping, batches of tokens, and the trainer that puts them together.

mod batches;
mod clip;
mod optimizer;
mod pattern;
mod save;
mod schedule;
mod trainer;

#[cfg(test)]
mod tests;

pub use batches::batches;
pub use clip::{clip_scale, global_norm};
pub use optimizer::{NO_DECAY, Optimizer, OptimizerState};
pub use pattern::matches;
pub use save::Snapshot;
pub use schedule::{Schedule, paper_lr};
pub use trainer::{
    Compute, Evaluation, Gradients, Loss, Statistics, StepResult, Trainer, TrainerConfig, check_norm, freeze,
    set_gradients,
};
