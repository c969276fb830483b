// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The errors of this crate.

use std::io;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM or the operating system refused a call.
    #[error("{what}: {source}")]
    System {
        /// The call.
        what: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// The virtual machine was set up without a part that this needs.
    #[error("this virtual machine has no {0}")]
    Missing(&'static str),
    /// All interrupt routes that KVM has room for are in use.
    #[error("all {0} interrupt routes are in use")]
    Routes(u32),
    /// The address and data, the route, or the pin is not that of an interrupt. A guest can cause
    /// this.
    #[error("not an interrupt: {0}")]
    NoInterrupt(String),
    /// The doorbells cannot be there: a number or an address is out of range, or occurs twice. A
    /// guest or a device can cause this.
    #[error("doorbells cannot have these addresses: {0}")]
    BadRange(String),
}

impl Error {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |error| Error::System { what, source: io::Error::from_raw_os_error(error.errno()) }
    }

    pub(crate) fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        move |error| Error::System { what, source: error.into() }
    }

    /// The errno, if the error came from the kernel.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
