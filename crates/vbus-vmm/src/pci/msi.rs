// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The message-signalled interrupts of a function, MSI or MSI-X. The server writes eventfds, and
//! KVM reads them. The VMM makes and routes the eventfds as the guest asks for it.

use std::sync::Arc;

use vbus_kvm::{Error, MsiIrqfd, Route, Routes, Sints};
use vbus_pci_config::MsiMessage;
use vfio_user_protocol::{Client, ClientError};

use super::resources::Resources;

/// Calls the server. Returns false if it is gone or has refused.
pub(super) type Call<'a> =
    &'a dyn Fn(&mut dyn FnMut(&mut Client) -> Result<(), ClientError>) -> bool;

const MASKED: MsiMessage = MsiMessage { address: 0, data: 0, masked: true };

/// The vectors of one kind, MSI or MSI-X. The list is empty while the guest has the kind disabled.
pub(super) struct MsiVectors {
    /// VFIO's number of the interrupt kind.
    index: u32,
    routes: Arc<Routes>,
    sints: Option<Sints>,
    list: Vec<(MsiIrqfd, MsiMessage)>,
    /// The guest has enabled the kind, but the eventfds could not be made. This is tried once.
    failed: bool,
}

impl MsiVectors {
    pub(super) fn new(index: u32, resources: &Resources) -> MsiVectors {
        let (routes, sints) = (resources.routes.clone(), resources.backing.sints);
        MsiVectors { index, routes, sints, list: Vec::new(), failed: false }
    }

    /// Updates the list to `vectors`, which is empty when the guest has the kind disabled.
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

    /// Makes `count` masked vectors and gives their eventfds to the server. Returns false if that
    /// fails; the list is then empty.
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

    /// Masks all vectors. When this returns, every interrupt that was signalled has arrived at the
    /// local APICs, or is [`pending`](Self::pending).
    pub(super) fn pause(&mut self) -> Result<(), Error> {
        self.list.iter_mut().try_for_each(|(message, _)| message.mask())
    }

    /// Ends a [`pause`](Self::pause): what is pending and not masked by the guest is sent.
    pub(super) fn go_on(&mut self, name: &str) {
        for (message, vector) in &mut self.list {
            if let Err(e) = apply(message, vector, self.sints.as_ref()) {
                tracing::debug!("{name}: an interrupt is held back: {e}");
            }
        }
    }

    /// The vectors that are masked and were signalled since.
    pub(super) fn pending(&self) -> Vec<u16> {
        let numbers = 0..u16::try_from(self.list.len()).unwrap_or(u16::MAX);
        numbers.filter(|number| self.is_pending(usize::from(*number))).collect()
    }

    /// Signals a vector, as its server would. Returns false if there is no such vector.
    pub(super) fn signal(&self, index: usize) -> bool {
        let Some((message, _)) = self.list.get(index) else { return false };
        // This fails only for something that is no eventfd.
        let _ = self.routes.signaller().signal(message.eventfd());
        true
    }

    /// Removes all vectors without telling the server.
    pub(super) fn clear(&mut self) {
        self.list.clear();
    }

    /// Whether vector `index` is masked and was signalled since.
    pub(super) fn is_pending(&self, index: usize) -> bool {
        self.list.get(index).is_some_and(|(message, _)| message.is_pending())
    }
}

/// Routes and masks a vector as the guest has set it up.
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
