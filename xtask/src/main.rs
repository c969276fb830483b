//! Kits, images, demo, tests and benchmarks of vbus.
fn main() {}
