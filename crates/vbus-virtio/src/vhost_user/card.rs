// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What vhost-user has for network cards alone.

/// What vhost-user asks of a network card, beside what every transport asks of a device.
pub trait NetworkCard: Send + Sync {
    /// The MTU.
    fn mtu(&self) -> u16;

    /// Sends a request of RARP with the address `mac`, as a broadcast: the network learns where the
    /// driver is now, whose machine was moved. It does nothing while no driver has started.
    fn send_rarp(&self, mac: [u8; 6]);
}
