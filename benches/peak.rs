//! What this machine can do: multiply-adds from registers, reading from memory, and copying. One JSON line, for the shares
//! in `docs/benchmarks.md`: `cargo bench --bench peak -- THREADS`.

use std::time::Duration;
use transformer_core::profile::peak;

fn main() {
    let threads = std::env::args().find_map(|word| word.parse().ok()).unwrap_or(1);
    let measured = peak::measure(threads, Duration::from_millis(700)).expect("memory to read from");
    let [gflops, read, copy] = [measured.flops, measured.read, measured.copy].map(|rate| rate / 1e9);
    println!(
        r#"{{"threads": {threads}, "gflops": {gflops:.1}, "gigabytes_per_second": {read:.1}, "copied_gigabytes_per_second": {copy:.1}}}"#
    );
}
