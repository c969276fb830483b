//! The classes of this crate from end to end, against drivers in this process.

mod driver;
mod hostile;
mod offloads;
mod page;
mod state;
mod stream;
mod switch;
mod tap;
