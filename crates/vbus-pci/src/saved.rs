// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A function as plain data (spec/state-format.md, "Function").

use serde::{Deserialize, Serialize};
use serde_json::Value;
use vbus_core::state::Document;

use crate::interrupts::InterruptsState;

/// What a PCI function and its device need to go on in another process. Only
/// [`PciFunction::save`](crate::PciFunction::save) makes one, and its content is for
/// [`PciFunction::restore`](crate::PciFunction::restore) alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    /// The configuration space.
    #[serde(with = "hex::serde")]
    pub(crate) config: Vec<u8>,
    /// The table of MSI-X. `None`: the function has no MSI-X.
    #[serde(with = "optional_hex")]
    pub(crate) msix_table: Option<Vec<u8>>,
    pub(crate) interrupts: InterruptsState,
    /// The BARs that have handlers, by number.
    pub(crate) bars: Vec<BarState>,
}

impl FunctionState {
    /// Takes out what the peer changes without a message: that INTx is masked, because it has
    /// fired. Without that it fires once more.
    pub fn unmask(&mut self) {
        self.interrupts.unmask();
    }
}

impl Document for FunctionState {
    const KIND: &'static str = "function";
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct BarState {
    pub number: u8,
    /// The handler's own part ([`BarHandler::save`](crate::BarHandler::save)).
    pub state: Value,
}

/// Who is at the other end of a function that is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The peer that the saved function had, which knows nothing of the change.
    Same,
    /// Another one, which begins with interrupts that are not masked.
    Other,
}

/// Bytes in hexadecimal, or null.
mod optional_hex {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    struct Bytes(#[serde(with = "hex::serde")] Vec<u8>);

    pub fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, to: S) -> Result<S::Ok, S::Error> {
        bytes.as_ref().map(|bytes| Bytes(bytes.clone())).serialize(to)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<u8>>, D::Error> {
        Ok(Option::<Bytes>::deserialize(from)?.map(|Bytes(bytes)| bytes))
    }
}
