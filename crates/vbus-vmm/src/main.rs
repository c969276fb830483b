//! A small virtual machine monitor on KVM, whose devices are those of vbus: for reading, and for measuring what doorbells and interrupts cost.
#![allow(dead_code, reason = "under construction")]

mod bus;
mod layout;
mod memory;

fn main() {}
