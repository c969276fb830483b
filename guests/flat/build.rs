// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Links the guest: without a C library, at fixed addresses, with its own linker script.

fn main() {
    let here = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    println!("cargo:rerun-if-changed=flat.ld");
    for arg in [
        "-nostartfiles",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
    ] {
        println!("cargo:rustc-link-arg-bin=flat={arg}");
    }
    println!("cargo:rustc-link-arg-bin=flat=-Wl,-T,{here}/flat.ld");
}
