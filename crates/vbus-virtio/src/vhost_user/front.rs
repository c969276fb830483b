// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How the bus finds out that a device is one for vhost-user.

use std::sync::Arc;

use vbus_core::Endpoint;

use super::backend::Backend;
use super::card::NetworkCard;
use crate::device::VirtioDevice;

/// What a device has as its [`front`](vbus_core::Device::front) if front ends of vhost-user reach
/// it.
pub struct Front {
    device: Arc<dyn VirtioDevice>,
    card: Arc<dyn NetworkCard>,
}

impl Front {
    /// The front of a network card.
    pub fn new<D: VirtioDevice + NetworkCard + 'static>(device: Arc<D>) -> Front {
        Front { device: device.clone(), card: device }
    }

    /// The back end of the device behind `endpoint`, without a front end.
    pub(super) fn backend(&self, endpoint: Arc<Endpoint>) -> Backend {
        Backend::new(self.device.clone(), self.card.clone(), endpoint)
    }
}

/// Whether front ends of vhost-user reach the device behind `endpoint`.
pub fn has_front(endpoint: &Endpoint) -> bool {
    front(endpoint).is_some()
}

/// The front of the device behind `endpoint`, if it is one for vhost-user.
pub(super) fn front(endpoint: &Endpoint) -> Option<&Front> {
    endpoint.device().front().and_then(|front| front.downcast_ref())
}
