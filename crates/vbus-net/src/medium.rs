// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kinds of back ends that settings can choose.

use std::path::PathBuf;
use std::sync::Arc;

use vbus_core::CreateError;

use crate::backend::Backend;
use crate::link::Link;
use crate::null::Null;
use crate::stream::Stream;
use crate::switch::{SwitchBackend, Switches};
use crate::tap::Tap;

/// A kind of back end with its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// The switch with this name.
    Switch(String),
    /// The TAP interface with this name. The kernel replaces a `%d` in it by a number.
    Tap(String),
    /// The stream socket at this path, as the end that connects.
    Connect(PathBuf),
    /// The stream socket at this path, as the end that listens.
    Listen(PathBuf),
    /// No network. The value is the size of the frames (14 bytes or more) that the back end
    /// generates without end; 0: none.
    Null(u16),
}

impl Medium {
    /// Makes the back end for a device with `queues` queue pairs and this MTU. The back end sets
    /// the carrier of `link`. The error's text begins with the setting at fault.
    pub fn open(
        &self,
        switches: &Switches,
        queues: u16,
        mtu: u16,
        link: Arc<Link>,
    ) -> Result<Box<dyn Backend>, CreateError> {
        Ok(match self {
            Medium::Switch(name) => Box::new(SwitchBackend::new(switches.get(name), link)),
            Medium::Tap(name) => Box::new(Tap::new(name, queues, mtu, link)?),
            Medium::Connect(path) => Box::new(Stream::connecting(path, link)?),
            Medium::Listen(path) => Box::new(Stream::listening(path, link)?),
            Medium::Null(source_bytes) => Box::new(Null::new(*source_bytes, link)),
        })
    }
}
