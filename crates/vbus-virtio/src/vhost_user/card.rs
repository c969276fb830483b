// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What vhost-user has for network cards alone.

/// What vhost-user asks of a network card, beside what every transport asks of a device.
pub trait NetworkCard: Send + Sync {
    /// The MTU.
    fn mtu(&self) -> u16;
}
