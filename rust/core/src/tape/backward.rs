//! The walk back over the nodes.

use super::{Grads, Node, ParamId, Params, Pool, Slot, Tape, Tensor, Var};
use crate::error::Result;
use crate::kernels::Beta;
use crate::kernels::elementwise::add_assign;
use crate::kernels::gemm::Precision;
use crate::simd::Float;
use crate::{bail, ensure};

/// A recorded operation: what it saved, and its derivative. There is no default: every operation has one.
pub trait Operation<T: Float>: Send + Sync {
    /// Its name in errors and profiles.
    fn name(&self) -> &'static str;

    /// Gives every input that wants one its gradient, from `dy`, the gradient of the output.
    fn backward(self: Box<Self>, cx: &mut Backward<'_, T>, dy: Tensor<T>) -> Result<()>;

    /// Computes the output again, the same bits. An operation that is cheap does so instead of having its output kept from the
    /// forward to the backward pass (Chen and others 2016), and is recorded by [`Tape::record_recomputed`].
    fn recompute(&self, _cx: &mut Backward<'_, T>) -> Result<Tensor<T>> {
        bail!(Internal, "{}: its output cannot be computed again", self.name())
    }
}

/// What a derivative works with.
pub struct Backward<'a, T: Float> {
    slots: &'a [Slot<T>],
    dvars: &'a mut [Option<Tensor<T>>],
    /// The parameters of the forward pass.
    pub params: &'a Params<T>,
    grads: &'a mut Grads<T>,
    /// How exactly the large products are computed.
    pub precision: Precision,
    /// Where buffers come from and go to.
    pub pool: &'a mut Pool<T>,
}

impl<'a, T: Float> Backward<'a, T> {
    /// A saved value. Its lifetime is the walk's, so that it can be read while gradients are written.
    pub fn value(&self, var: Var) -> Result<&'a Tensor<T>> {
        match &self.slots[var.index as usize].value {
            Some(value) => Ok(value),
            None => bail!(Internal, "backward: a value was read that the operation did not save"),
        }
    }

    /// Whether a gradient for this variable is of use.
    pub fn wants(&self, var: Var) -> bool {
        self.slots[var.index as usize].wants_grad
    }

    /// Whether a gradient for this parameter is of use.
    pub fn wants_param(&self, id: ParamId) -> bool {
        self.grads.wants(id)
    }

    /// Gives a variable its whole gradient: the first is moved in, later ones are added.
    pub fn give(&mut self, var: Var, dx: Tensor<T>) -> Result<()> {
        if !self.wants(var) {
            self.pool.recycle(dx);
            return Ok(());
        }
        match &mut self.dvars[var.index as usize] {
            Some(sum) => {
                add_assign(sum, &dx)?;
                self.pool.recycle(dx);
            }
            empty => *empty = Some(dx),
        }
        Ok(())
    }

    /// Lets `write` put a variable's gradient in place; it assigns or adds, as the flag says.
    pub fn accumulate(
        &mut self,
        var: Var,
        rows: usize,
        cols: usize,
        write: impl FnOnce(&mut Tensor<T>, Beta) -> Result<()>,
    ) -> Result<()> {
        if !self.wants(var) {
            return Ok(());
        }
        match &mut self.dvars[var.index as usize] {
            Some(sum) => write(sum, Beta::Add),
            empty => {
                let mut dx = self.pool.tensor(rows, cols)?;
                write(&mut dx, Beta::Assign)?;
                *empty = Some(dx);
                Ok(())
            }
        }
    }

    /// Lets `write` put a parameter's gradient in place; it assigns or adds, as the flag says. Frozen ones cost nothing.
    pub fn accumulate_param(&mut self, id: ParamId, write: impl FnOnce(&mut [T], Beta) -> Result<()>) -> Result<()> {
        match self.grads.slot(id, self.pool)? {
            Some((dw, beta)) => write(dw, beta),
            None => Ok(()),
        }
    }

    /// Gives a parameter its whole gradient: the first is moved in, later ones are added.
    pub fn give_param(&mut self, id: ParamId, dw: Tensor<T>) -> Result<()> {
        self.grads.give(id, dw, self.pool)
    }

    /// The same for a group at once. False, and nothing written, where its members have to be written one by one.
    pub fn accumulate_group(
        &mut self,
        ids: &[ParamId],
        write: impl FnOnce(&mut [T], Beta) -> Result<()>,
    ) -> Result<bool> {
        match self.grads.group_slot(ids, self.pool)? {
            Some((dw, beta)) => write(dw, beta).map(|()| true),
            None => Ok(false),
        }
    }
}

/// Gradients of the leaves of a tape.
#[derive(Debug)]
pub struct VarGrads<T> {
    dvars: Vec<Option<Tensor<T>>>,
}

impl<T> VarGrads<T> {
    /// The gradient of a leaf; `None` if nothing flowed there.
    pub fn take(&mut self, var: Var) -> Option<Tensor<T>> {
        self.dvars[var.index as usize].take()
    }
}

impl<T: Float> Tape<T> {
    /// Walks back from the given outputs with their gradients. Nodes are consumed, and what they saved goes back to the
    /// pool at once; parameter gradients land in `grads`.
    pub fn backward(
        &mut self,
        params: &Params<T>,
        grads: &mut Grads<T>,
        outputs: impl IntoIterator<Item = (Var, Tensor<T>)>,
    ) -> Result<VarGrads<T>> {
        let mut dvars: Vec<Option<Tensor<T>>> = Vec::new();
        dvars.resize_with(self.slots.len(), || None);
        for (var, dy) in outputs {
            ensure!(var.tape == self.number, Internal, "backward: a foreign variable was given");
            match &mut dvars[var.index as usize] {
                Some(sum) => add_assign(sum, &dy)?,
                empty => *empty = Some(dy),
            }
        }
        while let Some(Node { output, saved, operation }) = self.nodes.pop() {
            if let Some(dy) = dvars[output.index as usize].take() {
                for &var in &saved {
                    self.restore(var, params, grads, &mut dvars)?;
                }
                let (precision, pool) = (self.precision, &mut self.pool);
                let mut cx = Backward { slots: &self.slots, dvars: &mut dvars, params, grads, precision, pool };
                operation.backward(&mut cx, dy)?;
            }
            for var in saved {
                let slot = &mut self.slots[var.index as usize];
                slot.saved -= 1;
                if slot.saved == 0
                    && let Some(value) = slot.value.take()
                {
                    self.pool.recycle(value);
                }
            }
        }
        Ok(VarGrads { dvars })
    }

    /// Computes a value again that was not kept, and before it those that it is made of.
    fn restore(
        &mut self,
        var: Var,
        params: &Params<T>,
        grads: &mut Grads<T>,
        dvars: &mut [Option<Tensor<T>>],
    ) -> Result<()> {
        let Slot { value: None, recomputed_by: Some(node), .. } = self.slots[var.index as usize] else { return Ok(()) };
        for i in 0..self.nodes[node].saved.len() {
            self.restore(self.nodes[node].saved[i], params, grads, dvars)?;
        }
        let (precision, pool) = (self.precision, &mut self.pool);
        let mut cx = Backward { slots: &self.slots, dvars, params, grads, precision, pool };
        let value = self.nodes[node].operation.recompute(&mut cx)?;
        self.slots[var.index as usize].value = Some(value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use super::*;

    /// y = w · x², element by element.
    struct Square {
        x: Var,
        w: ParamId,
        wrong: bool,
    }

    fn square(tape: &mut Tape<f64>, params: &Params<f64>, x: Var, w: ParamId, wrong: bool) -> Result<Var> {
        let wanted = tape.wants(params, &[x], &[w]);
        let mut y = tape.pool.tensor(tape.value(x)?.rows(), tape.value(x)?.cols())?;
        y.iter_mut().zip(tape.value(x)?.iter()).zip(params.get(w)).for_each(|((y, x), w)| *y = w * x * x);
        let y = tape.push(y, wanted);
        if wanted {
            tape.record(y, &[x], Square { x, w, wrong });
        }
        Ok(y)
    }

    impl Operation<f64> for Square {
        fn name(&self) -> &'static str {
            "square"
        }

        fn backward(self: Box<Self>, cx: &mut Backward<'_, f64>, dy: Tensor<f64>) -> Result<()> {
            let x = cx.value(self.x)?;
            cx.accumulate_param(self.w, |dw, beta| {
                for (i, dw) in dw.iter_mut().enumerate() {
                    let share = dy[i] * x[i] * x[i];
                    *dw = if beta == Beta::Add { *dw + share } else { share };
                }
                Ok(())
            })?;
            let factor = if self.wrong { 1.9 } else { 2.0 };
            let w = cx.params.get(self.w);
            cx.accumulate(self.x, x.rows(), x.cols(), |dx, beta| {
                for (i, dx) in dx.iter_mut().enumerate() {
                    let share = dy[i] * w[i] * factor * x[i];
                    *dx = if beta == Beta::Add { *dx + share } else { share };
                }
                Ok(())
            })?;
            cx.pool.recycle(dy);
            Ok(())
        }
    }

    fn setup() -> (Params<f64>, ParamId, Tensor<f64>) {
        let mut b = Builder::new();
        let w = b.param("w", &[6], Init::Normal { std: 1.0 });
        let params = Params::init(std::sync::Arc::new(b.finish()), 5).unwrap();
        (params, w, Tensor::from_slice(2, 3, &[0.3, -1.0, 2.0, 0.1, 0.7, -0.4]).unwrap())
    }

    #[test]
    fn gradcheck_passes_the_right_and_names_the_wrong() {
        let (params, w, x) = setup();
        let twice = |wrong| {
            gradcheck(&params, std::slice::from_ref(&x), None, |tape, params, inputs| {
                tape.scope(|tape| {
                    let y = square(tape, params, inputs[0], w, wrong)?;
                    square(tape, params, y, w, false)
                })
            })
        };
        twice(false).unwrap();
        assert!(twice(true).unwrap_err().to_string().contains("input 0"));
    }

    #[test]
    fn frozen_parameters_and_constants_get_nothing_and_buffers_come_back() {
        let (mut params, w, x) = setup();
        params.set_trainable(w, false);
        let mut tape = Tape::recording(Pool::default());
        let x_again = Tensor::from_slice(2, 3, &x).unwrap();
        let (constant, leaf) = (tape.constant(x), tape.leaf(x_again));
        let mut grads = Grads::new(&params).unwrap();
        assert!(grads.is_empty());
        square(&mut tape, &params, constant, w, false).unwrap();
        assert!(tape.nodes.is_empty());
        let y = square(&mut tape, &params, leaf, w, false).unwrap();
        let dy = tape.pool.zeros(2, 3).unwrap();
        let mut dvars = tape.backward(&params, &mut grads, [(y, dy)]).unwrap();
        assert!(dvars.take(leaf).is_some() && dvars.take(constant).is_none());
        assert!(tape.value(leaf).is_err(), "a saved value goes back once its node is done");
    }

    #[test]
    fn missing_gradients_are_named_and_completed() {
        let (params, w, _) = setup();
        let (mut grads, mut pool) = (Grads::new(&params).unwrap(), Pool::default());
        pool.recycle(Tensor::from_slice(1, 64, &[7.0; 64]).unwrap());
        assert_eq!(grads.missing().collect::<Vec<_>>(), [w]);
        assert_eq!(grads.iter().count(), 0);
        grads.complete(&mut pool).unwrap();
        assert_eq!(grads.get(w), Some(&[0.0; 6][..]));
    }

    #[test]
    fn gradients_lie_where_they_arrived_and_come_in_the_order_of_the_parameters() {
        let mut b = Builder::new();
        let normal = Init::Normal { std: 1.0 };
        let [q, k] = b.group(&[("q", &[2], normal), ("k", &[3], normal)])[..] else { panic!() };
        let w = b.param("w", &[1], normal);
        let params = Params::<f64>::init(std::sync::Arc::new(b.finish()), 5).unwrap();
        let (mut grads, mut pool) = (Grads::new(&params).unwrap(), Pool::default());
        let mut step = |together: bool| -> Result<()> {
            grads.give(w, Tensor::from_slice(1, 1, &[6.0])?, &mut pool)?;
            for beta in [Beta::Assign, Beta::Add] {
                if together {
                    let (slot, found) = grads.group_slot(&[q, k], &mut pool)?.unwrap();
                    assert_eq!((slot.len(), found), (5, beta));
                    slot.copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0]);
                } else {
                    grads.set(k, &[3.0, 4.0, 5.0], &mut pool)?;
                    assert!(grads.group_slot(&[q, k], &mut pool)?.is_none());
                    grads.set(q, &[1.0, 2.0], &mut pool)?;
                }
            }
            assert!(grads.group_slot(&[q, k], &mut pool)?.is_some() == together);
            let expected = [&[1.0, 2.0][..], &[3.0, 4.0, 5.0], &[6.0]];
            assert!(grads.iter().eq(expected) && grads.iter_mut().eq(expected));
            assert_eq!((grads.get(k), grads.len()), (Some(&[3.0, 4.0, 5.0][..]), 33));
            grads.give(w, Tensor::from_slice(1, 1, &[6.0])?, &mut pool)?;
            assert_eq!(grads.get(w), Some(&[12.0][..]));
            grads.reset();
            assert!(grads.iter().next().is_none() && grads.iter_mut().next().is_none());
            Ok(())
        };
        [true, false, true, true].into_iter().for_each(|together| step(together).unwrap());
        let waits = pool.bytes();
        grads.release(&mut pool);
        assert!(pool.bytes() > waits);
    }
}
