//! Sixteen lanes of AVX-512 with mask registers.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx2::intrinsics;
use super::{KEEP_MULTIPLIERS, Kernel, Simd, keep_bound};

/// Proof of AVX-512 F, BW, VL and DQ.
#[derive(Debug, Clone, Copy)]
pub struct Avx512(());

/// Runs a kernel compiled for AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub(super) fn run<K: Kernel<f32>>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

impl Simd<f32> for Avx512 {
    const LANES: usize = 16;
    const TILE_ROWS: usize = 12;
    const TILE_VECTORS: usize = 2;
    type V = __m512;
    type M = __mmask16;

    intrinsics! {
        splat(x: f32) -> __m512 = _mm512_set1_ps(x);
        add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps(a, b);
        sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps(a, b);
        mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps(a, b);
        div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps(a, b);
        mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps(a, b, c);
        neg_mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fnmadd_ps(a, b, c);
        min(a: __m512, b: __m512) -> __m512 = _mm512_min_ps(a, b);
        max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps(a, b);
        sqrt(a: __m512) -> __m512 = _mm512_sqrt_ps(a);
        abs(a: __m512) -> __m512 = _mm512_andnot_ps(_mm512_set1_ps(-0.0), a);
        neg(a: __m512) -> __m512 = _mm512_xor_ps(_mm512_set1_ps(-0.0), a);
        round(a: __m512) -> __m512 = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        scale2(a: __m512, n: __m512) -> __m512 = _mm512_scalef_ps(a, n);
        lt(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b);
        le(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_LE_OQ>(a, b);
        eq(a: __m512, b: __m512) -> __mmask16 = _mm512_cmp_ps_mask::<_CMP_EQ_OQ>(a, b);
        select(m: __mmask16, yes: __m512, no: __m512) -> __m512 = _mm512_mask_blend_ps(m, no, yes);
        reduce_sum(v: __m512) -> f32 = {
            let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
        };
        reduce_max(v: __m512) -> f32 = {
            let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
            let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
            _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
        };
        add_squares(v: __m512, sums: &mut [f64]) -> () = {
            let halves = [_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v)];
            for (sums, half) in sums[..16].chunks_exact_mut(8).zip(halves) {
                let x = _mm512_cvtps_pd(half);
                let sum = _mm512_add_pd(_mm512_loadu_pd(sums.as_ptr()), _mm512_mul_pd(x, x));
                _mm512_storeu_pd(sums.as_mut_ptr(), sum);
            }
        };
        keep(row_key: [u32; 2], first_column: u32, threshold: u32) -> __mmask16 = {
            let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            let column = _mm512_add_epi32(_mm512_set1_epi32(first_column as i32), lane);
            let h = _mm512_xor_si512(column, _mm512_set1_epi32(row_key[0] as i32));
            let h = _mm512_xor_si512(h, _mm512_srli_epi32::<16>(h));
            let h = _mm512_mullo_epi32(h, _mm512_set1_epi32(KEEP_MULTIPLIERS[0] as i32));
            let h = _mm512_add_epi32(h, _mm512_set1_epi32(row_key[1] as i32));
            let h = _mm512_xor_si512(h, _mm512_srli_epi32::<15>(h));
            let h = _mm512_mullo_epi32(h, _mm512_set1_epi32(KEEP_MULTIPLIERS[1] as i32));
            let h = _mm512_xor_si512(h, _mm512_srli_epi32::<16>(h));
            _mm512_cmpge_epi32_mask(h, _mm512_set1_epi32(keep_bound(threshold)))
        };
    }

    const PAIRS: bool = true;
    #[inline(always)]
    unsafe fn pairs(self, first: __m512, second: __m512) -> __m512 {
        // SAFETY: the token vouches for AVX-512 BW, the caller for BF16.
        unsafe {
            let rounded = self.adjacent_pairs(first, second);
            let order = _mm512_set_epi16(
                31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
                17, 1, 16, 0,
            );
            _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, _mm512_castps_si512(rounded)))
        }
    }
    #[inline(always)]
    unsafe fn adjacent_pairs(self, low: __m512, high: __m512) -> __m512 {
        // SAFETY: the token vouches for AVX-512, the caller for BF16.
        unsafe { adjacent_pairs(low, high) }
    }
    #[inline(always)]
    unsafe fn dot_pairs(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: as above.
        unsafe { dot_pairs(a, b, c) }
    }

    #[inline(always)]
    fn not(self, a: __mmask16) -> __mmask16 {
        !a
    }
    #[inline(always)]
    fn any(self, m: __mmask16) -> bool {
        m != 0
    }
    #[inline(always)]
    fn first(self, n: usize) -> __mmask16 {
        ((1u32 << n.min(16)) - 1) as __mmask16
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's promise; the token vouches for AVX-512.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, v: __m512, p: *mut f32) {
        // SAFETY: the caller's promise; the token vouches for AVX-512.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_ptr_first(self, p: *const f32, n: usize, fill: f32) -> __m512 {
        // SAFETY: masked lanes are not read, the others are the caller's promise.
        unsafe { _mm512_mask_loadu_ps(_mm512_set1_ps(fill), self.first(n), p) }
    }
    #[inline(always)]
    unsafe fn store_ptr_first(self, v: __m512, p: *mut f32, n: usize) {
        // SAFETY: masked lanes are not written, the others are the caller's promise.
        unsafe { _mm512_mask_storeu_ps(p, self.first(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16_ptr<const V: usize>(self, p: *const u16) -> [__m512; V] {
        debug_assert!(V == 2);
        // SAFETY: the caller's promise; the token vouches for AVX-512.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let mut numbers = [_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)); V];
            numbers[V - 1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(!0xffff)));
            numbers
        }
    }
    #[inline(always)]
    unsafe fn transpose_ptr(self, src: *const f32, src_stride: usize, rows: usize, dst: *mut f32, dst_stride: usize) {
        // Pairs of rows, fours of rows, and then the lanes of 128 bits to their places.
        // SAFETY: the caller's promise; the token vouches for AVX-512.
        unsafe {
            let mut lanes = [_mm512_setzero_ps(); 16];
            for (i, row) in lanes.iter_mut().enumerate() {
                *row = _mm512_loadu_ps(src.add(i.min(rows - 1) * src_stride));
            }
            for i in (0..16).step_by(4) {
                let (a, b) = (_mm512_unpacklo_ps(lanes[i], lanes[i + 1]), _mm512_unpackhi_ps(lanes[i], lanes[i + 1]));
                let (c, d) =
                    (_mm512_unpacklo_ps(lanes[i + 2], lanes[i + 3]), _mm512_unpackhi_ps(lanes[i + 2], lanes[i + 3]));
                let [a, b, c, d] = [_mm512_castps_pd(a), _mm512_castps_pd(b), _mm512_castps_pd(c), _mm512_castps_pd(d)];
                lanes[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
                lanes[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
                lanes[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
                lanes[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
            }
            for j in 0..4 {
                let even = _mm512_shuffle_f32x4::<0x88>(lanes[j], lanes[4 + j]);
                let odd = _mm512_shuffle_f32x4::<0xdd>(lanes[j], lanes[4 + j]);
                let even_below = _mm512_shuffle_f32x4::<0x88>(lanes[8 + j], lanes[12 + j]);
                let odd_below = _mm512_shuffle_f32x4::<0xdd>(lanes[8 + j], lanes[12 + j]);
                let dst = dst.add(j * dst_stride);
                _mm512_storeu_ps(dst, _mm512_shuffle_f32x4::<0x88>(even, even_below));
                _mm512_storeu_ps(dst.add(4 * dst_stride), _mm512_shuffle_f32x4::<0x88>(odd, odd_below));
                _mm512_storeu_ps(dst.add(8 * dst_stride), _mm512_shuffle_f32x4::<0xdd>(even, even_below));
                _mm512_storeu_ps(dst.add(12 * dst_stride), _mm512_shuffle_f32x4::<0xdd>(odd, odd_below));
            }
        }
    }
}

// The instructions of BF16 are written out, because the token does not vouch for them and intrinsics would not be inlined:
// whoever calls these has asked `features`.

#[inline]
#[target_feature(enable = "avx512f")]
fn adjacent_pairs(low: __m512, high: __m512) -> __m512 {
    let pairs: __m512;
    // SAFETY: an instruction on registers alone.
    unsafe {
        asm!("vcvtne2ps2bf16 {0}, {1}, {2}", out(zmm_reg) pairs, in(zmm_reg) high, in(zmm_reg) low,
            options(pure, nomem, nostack, preserves_flags));
    }
    pairs
}

#[inline]
#[target_feature(enable = "avx512f")]
fn dot_pairs(a: __m512, b: __m512, mut c: __m512) -> __m512 {
    // SAFETY: an instruction on registers alone.
    unsafe {
        asm!("vdpbf16ps {0}, {1}, {2}", inout(zmm_reg) c, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    c
}
