//! The path of any CPU: arrays the compiler may vectorise, `a * b + c` in two roundings.

use super::{Float, Simd, keep_scalar};

/// The token of any CPU: 8 lanes of f32 or 4 of f64.
#[derive(Debug, Clone, Copy)]
pub struct Portable;

macro_rules! portable {
    ($T:ident, $lanes:literal, bits: $Bits:ident, mantissa: $mantissa:literal) => {
        impl Simd<$T> for Portable {
            const LANES: usize = $lanes;
        const TILE_ROWS: usize = 4;
        const TILE_VECTORS: usize = 1;
            type V = [$T; $lanes];
            type M = [bool; $lanes];

            portable! { @each
                add(a, b) = a + b;
                sub(a, b) = a - b;
                mul(a, b) = a * b;
                div(a, b) = a / b;
                mul_add(a, b, c) = a * b + c;
                neg_mul_add(a, b, c) = c - a * b;
                min(a, b) = if a < b { a } else { b };
                max(a, b) = if a > b { a } else { b };
                sqrt(a) = Float::sqrt(a);
                abs(a) = Float::abs(a);
                neg(a) = -a;
                // Adding 2^mantissa, away from zero, rounds to an integer, ties to even; larger numbers are integers already.
                round(a) = {
                    let whole = $T::from_bits(WHOLE.to_bits() | (a.to_bits() & SIGN));
                    if Float::abs(a) < WHOLE { (a + whole) - whole } else { a }
                };
                // The low bits of n + MAGIC are n: shifted to the exponent they add to it.
                scale2(a, n) = if Float::is_nan(a) {
                    a
                } else {
                    $T::from_bits(a.to_bits().wrapping_add((n + MAGIC).to_bits() << $mantissa))
                };
            }
            portable! { @compare lt(a, b) = a < b; le(a, b) = a <= b; eq(a, b) = a == b; }

            #[inline(always)]
            fn splat(self, x: $T) -> Self::V {
                [x; $lanes]
            }
            #[inline(always)]
            fn add_squares(self, v: Self::V, sums: &mut [f64]) {
                for (sum, x) in sums[..$lanes].iter_mut().zip(v) {
                    let x = x.to_f64();
                    *sum += x * x;
                }
            }
            #[inline(always)]
            unsafe fn load_ptr(self, p: *const $T) -> Self::V {
                // SAFETY: the caller's promise; reading does not ask for alignment.
                unsafe { p.cast::<Self::V>().read_unaligned() }
            }
            #[inline(always)]
            unsafe fn store_ptr(self, v: Self::V, p: *mut $T) {
                // SAFETY: the caller's promise; writing does not ask for alignment.
                unsafe { p.cast::<Self::V>().write_unaligned(v) }
            }
            #[inline(always)]
            unsafe fn load_ptr_first(self, p: *const $T, n: usize, fill: $T) -> Self::V {
                // SAFETY: only the first n are read, which the caller vouches for.
                std::array::from_fn(|i| if i < n { unsafe { *p.add(i) } } else { fill })
            }
            #[inline(always)]
            unsafe fn store_ptr_first(self, v: Self::V, p: *mut $T, n: usize) {
                for (i, v) in v.into_iter().enumerate().take(n) {
                    // SAFETY: only the first n are written, which the caller vouches for.
                    unsafe { *p.add(i) = v };
                }
            }
            #[inline(always)]
            unsafe fn load_bf16_ptr<const V: usize>(self, p: *const u16) -> [Self::V; V] {
                // SAFETY: the caller's promise; reading does not ask for alignment.
                let number = |v, i| unsafe { p.add(i * V + v).read_unaligned() };
                std::array::from_fn(|v| std::array::from_fn(|i| f32::from_bits(u32::from(number(v, i)) << 16) as $T))
            }
            #[inline(always)]
            unsafe fn transpose_ptr(self, src: *const $T, src_stride: usize, rows: usize, dst: *mut $T, dst_stride: usize) {
                for i in 0..$lanes {
                    for j in 0..$lanes {
                        // SAFETY: inside the two squares, which the caller vouches for.
                        unsafe { *dst.add(j * dst_stride + i) = *src.add(i.min(rows - 1) * src_stride + j) };
                    }
                }
            }
            #[inline(always)]
            fn not(self, a: Self::M) -> Self::M {
                a.map(|a| !a)
            }
            #[inline(always)]
            fn any(self, m: Self::M) -> bool {
                m.into_iter().any(|m| m)
            }
            #[inline(always)]
            fn first(self, n: usize) -> Self::M {
                std::array::from_fn(|i| i < n)
            }
            #[inline(always)]
            fn select(self, m: Self::M, yes: Self::V, no: Self::V) -> Self::V {
                std::array::from_fn(|i| if m[i] { yes[i] } else { no[i] })
            }
            #[inline(always)]
            fn reduce_sum(self, v: Self::V) -> $T {
                halve(v, |a, b| a + b)
            }
            #[inline(always)]
            fn reduce_max(self, v: Self::V) -> $T {
                halve(v, |a, b| if a > b { a } else { b })
            }
            #[inline(always)]
            fn keep(self, row_key: [u32; 2], first_column: u32, threshold: u32) -> Self::M {
                std::array::from_fn(|i| keep_scalar(row_key, first_column.wrapping_add(i as u32), threshold))
            }
        }

        const SIGN: $Bits = 1 << ($Bits::BITS - 1);
        const WHOLE: $T = (1u64 << $mantissa) as $T;
        const MAGIC: $T = 1.5 * WHOLE;
    };
    (@each $($name:ident($a:ident $(, $b:ident)*) = $lane:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $a: Self::V $(, $b: Self::V)*) -> Self::V {
            std::array::from_fn(|i| { let $a = $a[i]; $(let $b = $b[i];)* $lane })
        }
    )*};
    (@compare $($name:ident($a:ident, $b:ident) = $lane:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $a: Self::V, $b: Self::V) -> Self::M {
            std::array::from_fn(|i| { let ($a, $b) = ($a[i], $b[i]); $lane })
        }
    )*};
}

mod single {
    use super::*;
    portable!(f32, 8, bits: u32, mantissa: 23);
}
mod double {
    use super::*;
    portable!(f64, 4, bits: u64, mantissa: 52);
}

/// Combines the upper half with the lower half until one is left.
#[inline(always)]
fn halve<T: Copy, const N: usize>(mut v: [T; N], combine: impl Fn(T, T) -> T) -> T {
    let mut n = N / 2;
    while n > 0 {
        for i in 0..n {
            v[i] = combine(v[i], v[i + n]);
        }
        n /= 2;
    }
    v[0]
}
