//! The position-wise feed-forward network (section 3.3), plain or gated.

use super::Linear;
use crate::error::Result;
use crate::ops::{self, Activation, Gate};
use crate::simd::Float;
use crate::tape::{Builder, Params, Tape, Var};
use serde::{Deserialize, Serialize};

/// What stands between the two linear maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeedForwardActivation {
    /// max(x, 0)
    Relu,
    /// x Φ(x), with erf
    Gelu,
    /// GELU's tanh form
    GeluTanh,
    /// x σ(x)
    Silu,
    /// σ(gate) · up (Dauphin et al. 2017)
    Glu,
    /// silu(gate) · up (Shazeer 2020)
    Swiglu,
}

#[derive(Clone, Copy, Debug)]
enum Middle {
    Plain(Activation),
    Gated(Gate),
}

/// down(dropout(activation(up(x)))), or with a gate down(dropout(act(gate(x)) · up(x))).
#[derive(Clone, Debug)]
pub struct FeedForward {
    /// `up`, or the group `gate`, `up`.
    up: Linear,
    down: Linear,
    middle: Middle,
    dropout: (u32, f64),
}

impl FeedForward {
    /// Declares `up`, `down` and, where the activation is gated, `gate`.
    pub fn new(
        b: &mut Builder,
        d_model: usize,
        d_ff: usize,
        activation: FeedForwardActivation,
        bias: bool,
        dropout: f64,
    ) -> Self {
        use FeedForwardActivation as A;
        let middle = match activation {
            A::Relu => Middle::Plain(Activation::Relu),
            A::Gelu => Middle::Plain(Activation::Gelu),
            A::GeluTanh => Middle::Plain(Activation::GeluTanh),
            A::Silu => Middle::Plain(Activation::Silu),
            A::Glu => Middle::Gated(Gate::Glu),
            A::Swiglu => Middle::Gated(Gate::Swiglu),
        };
        let up = match middle {
            Middle::Plain(_) => Linear::new(b, "up", d_model, d_ff, bias),
            Middle::Gated(_) => Linear::group(b, &[("gate", d_ff), ("up", d_ff)], d_model, bias),
        };
        FeedForward { up, down: Linear::new(b, "down", d_ff, d_model, bias), middle, dropout: (b.site(), dropout) }
    }

    /// x (R, D) -> (R, D)
    pub fn forward<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, x: Var) -> Result<Var> {
        tape.scope(|tape| {
            let h = match self.middle {
                Middle::Plain(activation) => self.up.forward_activated(tape, params, x, activation, self.dropout)?,
                Middle::Gated(gate) => {
                    let h = self.up.forward(tape, params, x)?;
                    let h = ops::gated(tape, h, gate)?;
                    ops::dropout(tape, h, self.dropout.0, self.dropout.1)?
                }
            };
            self.down.forward(tape, params, h)
        })
    }
}
