//! Notes for `build_info()`: the compiler, the target and the versions that were locked.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=../../Cargo.lock");
    let variable = |name| std::env::var(name).unwrap_or_default();
    let rustc = Command::new(variable("RUSTC")).arg("--version").output().map(|output| output.stdout);
    let rustc = String::from_utf8(rustc.unwrap_or_default()).unwrap_or_default();
    println!("cargo::rustc-env=BUILD_RUSTC={}", rustc.trim());
    println!("cargo::rustc-env=BUILD_TARGET={}", variable("TARGET"));
    println!("cargo::rustc-env=BUILD_PROFILE={}", variable("PROFILE"));
    let lock = std::fs::read_to_string("../../Cargo.lock").unwrap_or_default();
    for name in ["pyo3", "numpy", "ndarray", "rayon", "safetensors"] {
        let version = lock.split("[[package]]").find_map(|package| {
            let rest = package.trim_start().strip_prefix(&format!("name = \"{name}\"\nversion = \""))?;
            rest.split('"').next()
        });
        println!("cargo::rustc-env=BUILD_{}={}", name.to_uppercase(), version.unwrap_or("unknown"));
    }
}
