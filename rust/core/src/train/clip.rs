//! The global norm of a gradient, and what it is clipped by.

use crate::error::Result;
use crate::kernels::reduce::sum_of_squares;
use crate::profile::{self, Work};
use crate::tape::Grads;

/// The Euclidean norm over all parameters of `mean` times their gradients, which must all be there. Partial sums stand over
/// blocks of a fixed size.
pub fn global_norm(grads: &Grads<f32>, mean: f64) -> Result<f64> {
    let _timed = profile::span("gradient norm", [0, 0], || Work::passes::<f32>(1, 1, grads.len()));
    Ok(sum_of_squares(grads.iter(), mean as f32)?.sqrt())
}

/// What a gradient of this norm is multiplied with, so that its norm is at most `clip` (Pascanu et al. 2013).
pub fn clip_scale(norm: f64, clip: Option<f64>) -> f64 {
    clip.map_or(1.0, |clip| (clip / (norm + 1e-6)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tape::{Builder, Init, Params, Pool};
    use std::sync::Arc;

    #[test]
    fn the_norm_is_over_all_parameters_and_gaps_count_nothing() {
        let mut b = Builder::new();
        let ids = [b.param("a", &[2], Init::Constant(0.0)), b.param("b", &[3], Init::Constant(0.0))];
        let params = Params::<f32>::init(Arc::new(b.finish()), 0).unwrap();
        let (mut grads, mut pool) = (Grads::new(&params).unwrap(), Pool::default());
        grads.set(ids[0], &[1.0, -4.0], &mut pool).unwrap();
        grads.set(ids[1], &[2.0, 2.0, 0.0], &mut pool).unwrap();
        assert_eq!(global_norm(&grads, 2.0).unwrap(), 10.0);
    }

    #[test]
    fn clipping_shrinks_and_never_grows() {
        assert_eq!(clip_scale(5.0, None), 1.0);
        assert_eq!(clip_scale(0.5, Some(1.0)), 1.0);
        assert_eq!(clip_scale(5.0, Some(1.0)), 1.0 / 5.000001);
        assert_eq!(clip_scale(0.0, Some(1.0)), 1.0);
    }
}
