//! What the benches multiply and add.

use transformer_core::rng::Key;

/// Numbers between −0.5 and 0.5.
pub fn numbers(len: usize, seed: u64) -> Vec<f32> {
    let key = Key::new(seed);
    (0..len).map(|i| key.uniform(i as u64) as f32 - 0.5).collect()
}
