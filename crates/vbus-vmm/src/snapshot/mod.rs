// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Saved machines (`spec/vmm-snapshot.md`): a machine as bytes, in a file or on its way to another
//! process.
//!
//! ```text
//!  save.rs ─▸ frame.rs ◂─ load.rs       what is in the frame: description.rs, state.rs
//!     └▸ dirty.rs                        which pages have changed since they were sent
//! ```

mod answer;
pub(crate) mod description;
mod dirty;
mod frame;
mod load;
pub(crate) mod save;
mod state;

pub use load::{Clock, SavedMachine};
pub use save::{DOWN_TIME_MS, ROUNDS};
