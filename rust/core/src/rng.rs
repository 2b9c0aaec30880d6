//! Counter-based random numbers: a value is a pure function of a key and a counter, never of who asks first.
//!
//! Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

/// A key of the generator. Keys are derived by folding in what tells two uses apart:
/// `Key::new(seed).fold(step).fold(site)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

impl Key {
    /// The root key of a seed.
    pub fn new(seed: u64) -> Self {
        Key(seed)
    }

    /// A key independent of this one and of every other `data`.
    pub fn fold(self, data: u64) -> Self {
        // The last counter word keeps derivation apart from drawing.
        let [a, b, ..] = self.philox([data as u32, (data >> 32) as u32, 0, 1]);
        Key(u64::from(a) | u64::from(b) << 32)
    }

    /// A key for a name, as parameters have.
    pub fn fold_name(self, name: &str) -> Self {
        // FNV-1a, 64 bits.
        self.fold(name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)))
    }

    /// Four random words for a counter.
    pub fn block(self, counter: u64) -> [u32; 4] {
        self.philox([counter as u32, (counter >> 32) as u32, 0, 0])
    }

    /// 64 random bits for a counter.
    pub fn bits(self, counter: u64) -> u64 {
        let [a, b, ..] = self.block(counter);
        u64::from(a) | u64::from(b) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(self, counter: u64) -> f64 {
        (self.bits(counter) >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Standard normal, by Box and Muller.
    pub fn normal(self, counter: u64) -> f64 {
        let [a, b, c, d] = self.block(counter).map(f64::from);
        let two32 = f64::from(2.0f32).powi(32);
        let u = (a + (b + 0.5) / two32) / two32; // in (0, 1]
        let angle = std::f64::consts::TAU * (c + d / two32) / two32;
        (-2.0 * libm::log(u)).sqrt() * libm::cos(angle)
    }

    /// Uniform in 0..n; the bias is below n / 2^64.
    pub fn below(self, counter: u64, n: u64) -> u64 {
        ((u128::from(self.bits(counter)) * u128::from(n)) >> 64) as u64
    }

    /// A random order of 0..n (Fisher and Yates).
    pub fn permutation(self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for i in (1..n).rev() {
            order.swap(i, self.below(i as u64, i as u64 + 1) as usize);
        }
        order
    }

    fn philox(self, mut c: [u32; 4]) -> [u32; 4] {
        let (mut k0, mut k1) = (self.0 as u32, (self.0 >> 32) as u32);
        for _ in 0..10 {
            let p0 = u64::from(c[0]) * 0xD251_1F53;
            let p1 = u64::from(c[2]) * 0xCD9E_8D57;
            c = [(p1 >> 32) as u32 ^ c[1] ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k1, p0 as u32];
            k0 = k0.wrapping_add(0x9E37_79B9);
            k1 = k1.wrapping_add(0xBB67_AE85);
        }
        c
    }
}

/// Which elements of one use of dropout survive. The mask is never stored: it is drawn again in the backward pass.
#[derive(Clone, Copy, Debug)]
pub struct Dropout {
    key: Key,
    /// An element is dropped where its 32-bit hash is below this.
    pub threshold: u32,
    /// What survivors are multiplied with: 1 / (1 - p).
    pub scale: f64,
}

impl Dropout {
    /// Drops each element with probability `p` in [0, 1).
    pub fn new(key: Key, p: f64) -> Self {
        let threshold = (p * f64::from(u32::MAX)) as u32;
        Dropout { key, threshold, scale: 1.0 / (1.0 - p) }
    }

    /// The two key words of a row; with the column they decide an element (`Simd::keep`).
    #[inline(always)]
    pub fn row(&self, row: usize) -> [u32; 2] {
        // SplitMix64 (Steele, Lea and Flood 2014): a row has few columns, ten rounds of Philox would cost as much as they.
        let mut z = self.key.0.wrapping_add((row as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        [z as u32, (z >> 32) as u32]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_matches_the_known_answers() {
        // Random123's kat_vectors for philox4x32 10.
        assert_eq!(Key(0).philox([0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(Key(u64::MAX).philox([u32::MAX; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn uniform_and_normal_have_their_moments() {
        let key = Key::new(7).fold_name("moments");
        let n = 100_000;
        let mean = |f: &dyn Fn(u64) -> f64| (0..n).map(f).sum::<f64>() / n as f64;
        assert!((mean(&|i| key.uniform(i)) - 0.5).abs() < 0.005);
        assert!(mean(&|i| key.normal(i)).abs() < 0.01);
        assert!((mean(&|i| key.normal(i) * key.normal(i)) - 1.0).abs() < 0.02);
    }

    #[test]
    fn permutation_holds_every_index_once_and_depends_on_the_key() {
        let p = Key::new(1).permutation(1000);
        let mut sorted = p.clone();
        sorted.sort_unstable();
        assert!(sorted.into_iter().eq(0..1000));
        assert_ne!(p, Key::new(2).permutation(1000));
    }
}
