// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits of the process.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit of descriptors as far as the system allows. Each doorbell and each interrupt
/// vector of a device takes a descriptor. The usual limit exists for programs that use `select`.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::debug!(%error, "the limit of descriptors stays as it is");
    }
}
