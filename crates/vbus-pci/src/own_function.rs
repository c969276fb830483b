// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device whose PCI function is its own, and not that of a device of vbus.

use std::sync::Arc;

use vbus_core::Endpoint;

use crate::Options;
use crate::function::PciFunction;

type Make = dyn Fn(Arc<Endpoint>, Options) -> PciFunction + Send + Sync;

/// Makes the PCI function of a device whose driver does not speak the ABI of vbus. The device
/// returns it as its [`front`](vbus_core::Device::front). The endpoint then lends the function the
/// driver's memory, doorbells and counters ([`Endpoint::host`]), and no driver opens it.
pub struct OwnFunction(Box<Make>);

impl OwnFunction {
    /// A device whose function `make` makes, each time that a connector begins to serve the device.
    pub fn new(
        make: impl Fn(Arc<Endpoint>, Options) -> PciFunction + Send + Sync + 'static,
    ) -> OwnFunction {
        OwnFunction(Box::new(make))
    }

    pub(crate) fn make(&self, endpoint: Arc<Endpoint>, options: Options) -> PciFunction {
        (self.0)(endpoint, options)
    }
}
