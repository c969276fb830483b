//! The program `vbus`.
fn main() {}
