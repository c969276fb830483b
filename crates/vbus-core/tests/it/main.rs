//! The core from outside: endpoints with small devices, the event loop, memory, and the model of
//! the event loop's wake-up.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod endpoint;
mod wake_model;
