//! What can go wrong.

use std::io;

/// Why something failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM, or the system, refused.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The reason.
        source: io::Error,
    },
    /// This virtual machine, as it was set up, has no such thing.
    #[error("this virtual machine has no {0}")]
    Missing(&'static str),
    /// All routes that KVM has room for are in use.
    #[error("all {0} interrupt routes are in use")]
    Routes(u32),
    /// No interrupt can come of this address and data, or on this pin. A guest can cause it.
    #[error("not an interrupt: {0}")]
    NoInterrupt(String),
    /// These doorbells have no place there: numbers or addresses out of range, or the same twice. A
    /// guest or a device can cause it.
    #[error("no place for doorbells: {0}")]
    NoPlace(String),
}

impl Error {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
        move |error| Error::System { what, source: io::Error::from_raw_os_error(error.errno()) }
    }

    pub(crate) fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> Error {
        move |error| Error::System { what, source: error.into() }
    }

    /// The errno, if the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
