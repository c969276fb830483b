// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What takes the place of Rust's `compiler_builtins` in the kernel: nothing. The kernel itself has
//! the functions that copy, fill and compare memory. A use of any other (wide division, floating
//! point) is a symbol that no kernel has, and the build of the module fails.
#![no_std]
#![no_builtins]
#![feature(compiler_builtins)]
#![compiler_builtins]
#![allow(internal_features)]
