// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why a device was not plugged or unplugged.

use std::path::Path;
use std::time::Duration;

use vfio_user_protocol::ClientError;

use super::description::BadFunction;

/// Why a device was not plugged.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Another device has the name.
    #[error("there is a device {0} already")]
    Exists(String),
    /// The name is not valid.
    #[error("a device's name has 1 to 64 printable characters and no blanks")]
    Name,
    /// The machine is being saved.
    #[error("the machine is being saved or moved; its devices stay the same until that is done")]
    Frozen,
    /// No slot is free.
    #[error("all {0} slots are taken")]
    Full(u8),
    /// The server cannot be reached, or its function cannot be plugged.
    #[error("{socket}: {why}")]
    Server {
        /// The path of the server's socket.
        socket: String,
        /// The reason.
        why: BadFunction,
    },
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] vbus_kvm::Error),
    /// The process has no more descriptors.
    #[error("eventfd: {0}")]
    Eventfd(#[from] std::io::Error),
}

impl From<ClientError> for PlugError {
    fn from(e: ClientError) -> Self {
        BadFunction::from(e).into()
    }
}

impl From<BadFunction> for PlugError {
    fn from(why: BadFunction) -> Self {
        PlugError::Server { socket: String::new(), why }
    }
}

impl PlugError {
    /// Adds the path of the server's socket.
    pub(super) fn of(self, path: &Path) -> PlugError {
        match self {
            PlugError::Server { why, .. } => {
                PlugError::Server { socket: path.display().to_string(), why }
            }
            other => other,
        }
    }
}

/// Why a device was not unplugged.
#[derive(Debug, thiserror::Error)]
pub enum UnplugError {
    /// The machine is being saved.
    #[error("the machine is being saved or moved; its devices stay the same until that is done")]
    Frozen,
    /// There is no such device.
    #[error("there is no device {0}")]
    Unknown(String),
    /// The guest did not release the device in time. The device still leaves if the guest releases
    /// it later.
    #[error(
        "the guest did not release {name} within {timeout:?}; the device leaves when the guest \
         switches its slot off"
    )]
    Kept {
        /// The name of the device.
        name: String,
        /// How long the guest had.
        timeout: Duration,
    },
}
