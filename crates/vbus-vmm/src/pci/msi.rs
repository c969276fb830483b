//! Interrupts of a function that are messages, MSI or MSI-X: eventfds, which the server writes and
//! KVM reads, made and routed as the guest wants it.

use std::sync::Arc;

use vbus_kvm::{Error, MsiIrqfd, Route, Routes, Sints};
use vbus_pci_config::MsiMessage;
use vfio_user_protocol::{Client, ClientError};

use super::Shared;

/// Calls the server; false: it is gone, or has refused.
pub(super) type Call<'a> =
    &'a dyn Fn(&mut dyn FnMut(&mut Client) -> Result<(), ClientError>) -> bool;

const MASKED: MsiMessage = MsiMessage { address: 0, data: 0, masked: true };

/// The messages of one kind. There are some while the guest has that kind enabled.
pub(super) struct MsiVectors {
    /// VFIO's number of the kind.
    index: u32,
    routes: Arc<Routes>,
    sints: Option<Sints>,
    list: Vec<(MsiIrqfd, MsiMessage)>,
    /// The guest wants them and they cannot be had: tried once.
    failed: bool,
}

impl MsiVectors {
    pub(super) fn new(index: u32, shared: &Shared) -> MsiVectors {
        let (routes, sints) = (shared.routes.clone(), shared.backing.sints);
        MsiVectors { index, routes, sints, list: Vec::new(), failed: false }
    }

    /// Makes them these: none, when the guest has the kind disabled.
    pub(super) fn follow(&mut self, vectors: &[MsiMessage], name: &str, call: Call<'_>) {
        if !self.list.is_empty() && self.list.len() != vectors.len() {
            call(&mut |client| client.disable_irqs(self.index));
            self.list.clear();
        }
        if vectors.is_empty() {
            self.failed = false;
        } else if self.list.is_empty() && !self.failed {
            self.failed = !self.make(vectors.len(), name, call);
        }
        let changed =
            self.list.iter_mut().zip(vectors).filter(|((_, have), vector)| have != *vector);
        for ((message, have), vector) in changed {
            *have = *vector;
            if let Err(e) = apply(message, vector, self.sints.as_ref()) {
                tracing::debug!("{name}: an interrupt is held back: {e}");
            }
        }
    }

    /// Makes `count` of them, masked, and tells the server of all. False: there are none.
    fn make(&mut self, count: usize, name: &str, call: Call<'_>) -> bool {
        let make = || Ok((MsiIrqfd::new(self.routes.clone())?, MASKED));
        match std::iter::repeat_with(make).take(count).collect::<Result<_, Error>>() {
            Ok(list) => self.list = list,
            Err(e) => {
                tracing::warn!("{name}: no interrupts: {e}");
                return false;
            }
        }
        let eventfds: Vec<_> = self.list.iter().map(|(message, _)| message.eventfd()).collect();
        if !call(&mut |client| client.connect_irqs(self.index, 0, &eventfds)) {
            tracing::warn!("{name}: no interrupts: its server does not take them");
            self.list.clear();
            return false;
        }
        true
    }

    /// Takes them all away, without a word to the server.
    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    /// Whether vector `index` waits for being unmasked.
    pub(super) fn is_pending(&self, index: usize) -> bool {
        self.list.get(index).is_some_and(|(message, _)| message.is_pending())
    }
}

/// Lets a message be what the guest says.
fn apply(message: &mut MsiIrqfd, vector: &MsiMessage, sints: Option<&Sints>) -> Result<(), Error> {
    if vector.masked {
        return message.mask();
    }
    match Route::of_message(vector.address, vector.data, sints) {
        Ok(route) => {
            message.set(route)?;
            message.unmask()
        }
        Err(e) => message.mask().and(Err(e)),
    }
}
