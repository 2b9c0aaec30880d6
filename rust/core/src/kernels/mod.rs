//! Slices in, slices out: no tape, no allocation of anything large. Each kernel has a readable `*_reference` beside its
//! tests.

pub mod gemm;

/// Whether a result replaces what was there or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beta {
    /// y = result
    Assign,
    /// y += result
    Add,
}
