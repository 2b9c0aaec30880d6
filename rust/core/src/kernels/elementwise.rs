//! Sums and multiples, element by element.

use super::Beta;
use super::lanes::map;
use crate::error::Result;
use crate::kernel;
use crate::simd::{Float, room};
use crate::threads::{GRAIN, for_each};

/// y = x
pub fn copy<T: Float>(y: &mut [T], x: &[T]) -> Result<()> {
    debug_assert_eq!(y.len(), x.len());
    for_each(y.chunks_mut(GRAIN).zip(x.chunks(GRAIN)), |(y, x)| y.copy_from_slice(x))
}

/// A copy, in memory that nobody zeroes first.
pub fn copied<T: Float>(x: &[T]) -> Result<Vec<T>> {
    let mut y = room(x.len())?;
    let parts = y.spare_capacity_mut()[..x.len()].chunks_mut(GRAIN).zip(x.chunks(GRAIN));
    // SAFETY: both parts are as long, and `y` is this task's alone.
    for_each(parts, |(y, x)| unsafe { y.as_mut_ptr().cast::<T>().copy_from_nonoverlapping(x.as_ptr(), y.len()) })?;
    // SAFETY: no task was left out, so all of them are written.
    unsafe { y.set_len(x.len()) };
    Ok(y)
}

/// y += x
pub fn add_assign<T: Float>(y: &mut [T], x: &[T]) -> Result<()> {
    multiple(y, Beta::Add, T::ONE, x)
}

/// y (+)= a · x
pub fn multiple<T: Float>(y: &mut [T], beta: Beta, a: T, x: &[T]) -> Result<()> {
    debug_assert_eq!(y.len(), x.len());
    for_each(y.chunks_mut(GRAIN).zip(x.chunks(GRAIN)), |(y, x)| multiple_of_row(y, beta, a, x))
}

kernel! {
    /// y (+)= a · x, on the calling thread.
    pub(crate) fn multiple_of_row<'a, T>(s: S; y: &'a mut [T], beta: Beta, a: T, x: &'a [T]) {
        let a = s.splat(a);
        match beta {
            Beta::Assign => map(s, [y], [x], #[inline(always)] |_, [x]| [s.mul(a, x)]),
            Beta::Add => map(s, [y], [x], #[inline(always)] |[y], [x]| [s.mul_add(a, x, y)]),
        }
    }
}

/// y *= a
pub fn scale_assign<T: Float>(y: &mut [T], a: T) -> Result<()> {
    for_each(y.chunks_mut(GRAIN), |y| scale_row(y, a))
}

kernel! {
    /// y *= a, on the calling thread.
    pub(crate) fn scale_row<'a, T>(s: S; y: &'a mut [T], a: T) {
        let a = s.splat(a);
        map(s, [y], [], #[inline(always)] |[y], []| [s.mul(a, y)]);
    }
}

/// z = x + y
pub fn add_into<T: Float>(z: &mut [T], x: &[T], y: &[T]) -> Result<()> {
    kernel! {
        fn block<'a, T>(s: S; z: &'a mut [T], x: &'a [T], y: &'a [T]) {
            map(s, [z], [x, y], #[inline(always)] |_, [x, y]| [s.add(x, y)]);
        }
    }
    debug_assert!(z.len() == x.len() && z.len() == y.len());
    for_each(z.chunks_mut(GRAIN).zip(x.chunks(GRAIN)).zip(y.chunks(GRAIN)), |((z, x), y)| block(z, x, y))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_of_every_tail_is_exact() {
        for n in [0, 1, 7, 8, 9, 31, 32, 33, 100, GRAIN - 1, GRAIN, GRAIN + 1, 3 * GRAIN + 5] {
            let x: Vec<f32> = (0..n).map(|i| (i % 97) as f32).collect();
            let start: Vec<f32> = (0..n).map(|i| (i % 13) as f32 - 6.0).collect();
            let [mut sum, mut more, mut multiples, mut scaled, mut both] = std::array::from_fn(|_| start.clone());
            add_assign(&mut sum, &x).unwrap();
            multiple(&mut more, Beta::Add, 0.5, &x).unwrap();
            multiple(&mut multiples, Beta::Assign, -2.0, &x).unwrap();
            scale_assign(&mut scaled, 3.0).unwrap();
            add_into(&mut both, &x, &start).unwrap();
            for i in 0..n {
                let (x, y) = (x[i], start[i]);
                let expected = [y + x, y + 0.5 * x, -2.0 * x, 3.0 * y, x + y];
                assert_eq!([sum[i], more[i], multiples[i], scaled[i], both[i]], expected, "{i} of {n}");
            }
        }
    }
}
