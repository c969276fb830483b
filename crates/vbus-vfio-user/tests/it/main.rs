// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices of a bus behind their sockets.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

#[path = "../../examples/fairness/attacks.rs"]
mod attacks;
mod device;
#[path = "../../examples/fairness/echo.rs"]
mod echo;
mod fairness;
mod fresh;
mod migration;
mod migration_all;
mod migration_net;
mod pic;
mod saved;
#[path = "../../examples/fairness/stage.rs"]
mod stage;
mod storm;
