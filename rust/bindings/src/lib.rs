//! NumPy in, NumPy out: the Python border of `transformer_core`.

pub mod arrays;
mod batching;
pub mod call;
pub mod door;
pub mod errors;
pub mod form;
pub mod functional;
pub mod generate;
pub mod layer;
pub mod model;
pub mod optimizer;
pub mod pools;
pub mod profile;
pub mod shared;
pub mod threads;
pub mod trainer;
pub mod transformer;

use pyo3::prelude::*;
use transformer_core::simd::Keeping;

/// The memory of arrays that Python has dropped is used again.
#[global_allocator]
static ALLOCATOR: Keeping = Keeping;

/// The compiled part of `transformer_rs`.
#[pymodule(gil_used = true)]
mod _core {
    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");

    #[pymodule_export]
    use crate::call::{Gradients, Pullback};
    #[pymodule_export]
    use crate::functional::{
        activation, attention, batch_norm, cross_entropy, dropout, embedding, gated, layer_norm, linear, rms_norm,
    };
    #[pymodule_export]
    use crate::generate::Decoder;
    #[pymodule_export]
    use crate::layer::{Layer, check_encoder_config, read_safetensors};
    #[pymodule_export]
    use crate::optimizer::{OptimizerState, check_optimizer, check_schedule, paper_lr, schedule_factor};
    #[pymodule_export]
    use crate::profile::{Profile, machine_peak};
    #[pymodule_export]
    use crate::threads::{build_info, get_num_threads, set_num_threads};
    #[pymodule_export]
    use crate::trainer::{Snapshot, Trainer, batches};
    #[pymodule_export]
    use crate::transformer::{Transformer, check_config};
}
