//! Buffers that wait between calls.

use std::sync::{Arc, LazyLock, Mutex};
use transformer_core::error::Result;
use transformer_core::simd::Float;
use transformer_core::tape::{Grads, Params, Pool};

/// Pools kept in one place: as many calls at once find their buffers again.
const POOLS: usize = 4;
/// Bytes of a pool that functions keep. A layer keeps all of its own.
const KEPT: usize = 128 << 20;

/// Where the buffers of a layer, or of all functions, stay.
#[derive(Clone)]
pub struct Home<T> {
    pools: Arc<Mutex<Vec<Pool<T>>>>,
    most: usize,
    /// Of a layer: the memory of gradients that nobody has any more.
    grads: Arc<Mutex<Option<Grads<T>>>>,
}

impl<T: Float> Home<T> {
    /// A home that keeps pools of at most so many bytes.
    fn new(most: usize) -> Self {
        Home { pools: Arc::default(), most, grads: Arc::default() }
    }

    /// A layer's.
    pub fn of_layer() -> Self {
        Self::new(usize::MAX)
    }

    /// A pool, an empty one if none waits. The lock is never waited for: a process may fork while it is held.
    pub fn take(&self) -> Pool<T> {
        self.pools.try_lock().ok().and_then(|mut pools| pools.pop()).unwrap_or_default()
    }

    /// Gives a pool back. Of more than may be kept the largest buffers go to the allocator.
    pub fn give(&self, mut pool: Pool<T>) {
        pool.shrink(self.most);
        if let Ok(mut pools) = self.pools.try_lock()
            && pools.len() < POOLS
        {
            pools.push(pool);
        }
    }

    /// Room for the gradients of a layer's weights.
    pub fn take_grads(&self, params: &Params<T>) -> Result<Grads<T>> {
        let kept = self.grads.try_lock().ok().and_then(|mut grads| grads.take());
        kept.filter(|grads| grads.fit(params)).map_or_else(|| Grads::new(params), Ok)
    }

    /// Gives it back.
    pub fn give_grads(&self, mut grads: Grads<T>) {
        grads.reset();
        if let Ok(mut waits) = self.grads.try_lock() {
            *waits = Some(grads);
        }
    }
}

/// The home of functions in f32.
pub fn of_f32() -> Home<f32> {
    static HOME: LazyLock<Home<f32>> = LazyLock::new(|| Home::new(KEPT));
    HOME.clone()
}

/// The home of functions in f64.
pub fn of_f64() -> Home<f64> {
    static HOME: LazyLock<Home<f64>> = LazyLock::new(|| Home::new(KEPT));
    HOME.clone()
}
