//! y = x Wᵀ + b

use crate::error::Result;
use crate::ops::{self, Activation};
use crate::simd::Float;
use crate::tape::{Builder, Init, ParamId, Params, Tape, Var};

/// A linear map. Several maps of one input may be declared as a group: one GEMM then computes all of them.
#[derive(Clone, Debug)]
pub struct Linear {
    weights: Vec<ParamId>,
    biases: Vec<ParamId>,
}

impl Linear {
    /// Declares `name.weight` (out, in) and, with `bias`, `name.bias` (out,).
    pub fn new(b: &mut Builder, name: &str, inputs: usize, outputs: usize, bias: bool) -> Self {
        Self::group(b, &[(name, outputs)], inputs, bias)
    }

    /// Declares maps of the same input, stored without gaps; their outputs stand side by side.
    pub fn group(b: &mut Builder, members: &[(&str, usize)], inputs: usize, bias: bool) -> Self {
        let mut declare = |kind: &str, init: Init, shape: &dyn Fn(usize) -> Vec<usize>| {
            let names: Vec<String> = members.iter().map(|(name, _)| format!("{name}.{kind}")).collect();
            let shapes: Vec<Vec<usize>> = members.iter().map(|&(_, outputs)| shape(outputs)).collect();
            let entries: Vec<_> = names.iter().zip(&shapes).map(|(n, s)| (n.as_str(), s.as_slice(), init)).collect();
            b.group(&entries)
        };
        let weights = declare("weight", Init::Xavier, &|outputs| vec![outputs, inputs]);
        let biases = if bias { declare("bias", Init::Constant(0.0), &|outputs| vec![outputs]) } else { Vec::new() };
        Linear { weights, biases }
    }

    /// The members `range` of a group as a map of their own.
    pub fn members(&self, range: std::ops::Range<usize>) -> Self {
        let biases = if self.biases.is_empty() { Vec::new() } else { self.biases[range.clone()].to_vec() };
        Linear { weights: self.weights[range].to_vec(), biases }
    }

    /// A map that shares the weight of another layer, as a tied head does.
    pub fn tied(b: &mut Builder, name: &str, weight: ParamId, outputs: usize, bias: bool) -> Self {
        let biases =
            if bias { vec![b.param(&format!("{name}.bias"), &[outputs], Init::Constant(0.0))] } else { Vec::new() };
        Linear { weights: vec![weight], biases }
    }

    /// x (R, in) -> (R, out)
    pub fn forward<T: Float>(&self, tape: &mut Tape<T>, params: &Params<T>, x: Var) -> Result<Var> {
        ops::linear(tape, params, x, &self.weights, &self.biases)
    }

    /// x (R, in) -> dropout(activation(x Wᵀ + b)) (R, out), in one pass. `dropout` is its site and probability.
    pub fn forward_activated<T: Float>(
        &self,
        tape: &mut Tape<T>,
        params: &Params<T>,
        x: Var,
        activation: Activation,
        dropout: (u32, f64),
    ) -> Result<Var> {
        ops::linear_activation(tape, params, x, &self.weights, &self.biases, activation, dropout)
    }

    /// The weight of a map that is no group.
    pub fn weight(&self) -> ParamId {
        self.weights[0]
    }

    /// The bias of a map that is no group.
    pub fn bias(&self) -> Option<ParamId> {
        self.biases.first().copied()
    }
}
