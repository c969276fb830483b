// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state of a device as plain data (spec/state-format.md): what another process, or another
//! machine, needs to go on where this device stopped.
//!
//! A connector stops the device ([`Endpoint::quiesce`](crate::Endpoint::quiesce)), takes its state
//! ([`Endpoint::save`](crate::Endpoint::save)), and gives it to a fresh device of the same class
//! with the same settings ([`Endpoint::restore`](crate::Endpoint::restore)). The driver's memory is
//! no part of the state: the other device maps the same memory, or a copy of it.
//!
//! A state travels as a [`Document`]: text in JSON that says its format. A class writes and reads
//! its own part with [`part`] and [`read_part`].
//!
//! A state may be forged, so whoever reads one checks it like a message of a hostile peer.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_shm::ErrorCode;

pub use crate::counter::{COUNT_MAX, Counts, add_counts, check_count, counts};

/// The format of the documents that this version writes, and the only one that it reads.
pub const FORMAT: u32 = 1;

/// The most bytes of a document.
pub const DOCUMENT_MAX: usize = 256 << 20;

/// Why a device cannot be saved. It goes on as if nobody had asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device:?} of class {class:?} cannot be saved: {why}")]
pub struct NotSaved {
    /// The device's name on its bus.
    pub device: String,
    /// The name of its class.
    pub class: String,
    /// The reason, for people.
    pub why: String,
}

/// Why a device cannot go on from a state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("device {device:?} of class {class:?} cannot be restored: {why}")]
pub struct NotRestored {
    /// The device's name on its bus.
    pub device: String,
    /// The name of its class.
    pub class: String,
    /// The reason, for people.
    pub why: String,
}

/// Why a text is no state that can be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BadDocument {
    /// It has more than [`DOCUMENT_MAX`] bytes.
    #[error("the state has {0} bytes; at most {DOCUMENT_MAX}")]
    TooLong(usize),
    /// It would take much more memory than its length; see [`check_weight`].
    #[error("the state has more objects, arrays and values than its {0} bytes may have")]
    TooHeavy(usize),
    /// It has another format.
    #[error("the state has format {0}; this version reads format {FORMAT}")]
    Format(u64),
    /// It is the state of something else.
    #[error("the state is of a {found:?}; expected that of a {expected:?}")]
    Kind {
        /// The kind that the text names.
        found: String,
        /// The kind that was asked for.
        expected: &'static str,
    },
    /// It is no JSON, or a field is missing, unknown or wrong.
    #[error("the state cannot be read: {0}")]
    Content(#[from] serde_json::Error),
}

/// What an object, an array and a further value of either weigh: about the bytes of memory that a
/// reader takes for one. A hostile text has many of them that say nothing: `{"":0},` takes 66 times
/// its length.
const OBJECT: usize = 512;
const ARRAY: usize = 160;
const FURTHER: usize = 32;
/// The weight that any text may have.
const WEIGHT_FREE: usize = 16 << 20;
/// The weight that it may have beside, for each of its bytes. A long list of maps, the heaviest
/// part of an honest state, has 12.
const WEIGHT_EACH: usize = 16;

/// Checks a text before it is read as JSON: whether it would take much more memory than its length
/// (spec/state-format.md, "Documents"). It need not be JSON.
///
/// # Errors
/// [`BadDocument::TooHeavy`].
pub fn check_weight(text: &[u8]) -> Result<(), BadDocument> {
    let most = WEIGHT_FREE.saturating_add(text.len().saturating_mul(WEIGHT_EACH));
    let (mut weight, mut in_string, mut escaped) = (0_usize, false, false);
    for &byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' => weight = weight.saturating_add(OBJECT),
            b'[' => weight = weight.saturating_add(ARRAY),
            b',' => weight = weight.saturating_add(FURTHER),
            _ => {}
        }
    }
    if weight > most { Err(BadDocument::TooHeavy(text.len())) } else { Ok(()) }
}

/// A state that travels by itself: `{"format": 1, "kind": KIND, "state": {...}}`.
pub trait Document: Serialize + DeserializeOwned {
    /// The value of `kind`.
    const KIND: &'static str;

    /// The document as text.
    ///
    /// # Errors
    /// [`BadDocument::TooLong`].
    fn to_text(&self) -> Result<String, BadDocument> {
        let text =
            serde_json::to_string(&Envelope { format: FORMAT, kind: Self::KIND, state: self })?;
        if text.len() > DOCUMENT_MAX {
            return Err(BadDocument::TooLong(text.len()));
        }
        Ok(text)
    }

    /// Reads a document. This checks its form alone; a restore checks the content.
    ///
    /// # Errors
    /// As [`BadDocument`] says.
    fn from_text(text: &str) -> Result<Self, BadDocument> {
        if text.len() > DOCUMENT_MAX {
            return Err(BadDocument::TooLong(text.len()));
        }
        check_weight(text.as_bytes())?;
        let value: Value = serde_json::from_str(text)?;
        // First: another format may have other fields.
        if let Some(format) = value["format"].as_u64().filter(|format| *format != u64::from(FORMAT))
        {
            return Err(BadDocument::Format(format));
        }
        let Received { format: _, kind, state } = Received::deserialize(value)?;
        if kind != Self::KIND {
            return Err(BadDocument::Kind { found: kind, expected: Self::KIND });
        }
        Ok(Self::deserialize(state)?)
    }
}

#[derive(Serialize)]
struct Envelope<'a, T> {
    format: u32,
    kind: &'static str,
    state: &'a T,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Received {
    #[expect(dead_code, reason = "it has been compared, and must be there")]
    format: u32,
    kind: String,
    state: Value,
}

/// A class's own part of a state. `T` should refuse unknown fields (`deny_unknown_fields`).
///
/// # Errors
/// `T` is none that JSON can hold: the text is for the author of the class.
pub fn part<T: Serialize>(state: &T) -> Result<Value, String> {
    serde_json::to_value(state).map_err(|error| error.to_string())
}

/// Reads what [`part`] made.
///
/// # Errors
/// A field is missing, unknown or wrong. The text says which one.
pub fn read_part<T: DeserializeOwned>(value: &Value) -> Result<T, String> {
    T::deserialize(value).map_err(|error| error.to_string())
}

/// What a device needs to go on in another process, with its driver's connection. Only
/// [`Endpoint::save`](crate::Endpoint::save) makes one, and its content is for
/// [`Endpoint::restore`](crate::Endpoint::restore) alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    pub(crate) class: String,
    pub(crate) regions: u32,
    pub(crate) vectors: u16,
    pub(crate) incarnation: u64,
    pub(crate) config: ConfigPart,
    pub(crate) events: EventsPart,
    pub(crate) counters: Counts,
    pub(crate) connection: ConnectionPart,
    /// The class's own part ([`Device::save`](crate::Device::save)).
    pub(crate) device: Value,
}

impl Document for DeviceState {
    const KIND: &'static str = "device";
}

impl DeviceState {
    /// The name of the class.
    pub fn class(&self) -> &str {
        &self.class
    }
}

/// The config area.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ConfigPart {
    pub generation: u32,
    #[serde(with = "hex::serde")]
    pub bytes: Vec<u8>,
}

/// The events of the function.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventsPart {
    pub pending: u32,
    pub vector: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub(crate) enum ConnectionPart {
    Closed,
    Broken { code: u32 },
    Open(OpenPart),
}

/// The open connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct OpenPart {
    pub version: u16,
    pub features: u64,
    pub regions: Vec<RegionPart>,
    /// The class's own part ([`Connection::save`](crate::Connection::save)).
    pub state: Value,
}

/// A region.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RegionPart {
    pub handle: u32,
    pub id: u32,
    pub vector: u16,
    pub len: u64,
    pub signal: Option<u64>,
    pub place: Place,
}

/// Where a region lies in the driver's addresses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "lowercase")]
pub(crate) enum Place {
    /// Contiguous, from this address on.
    At(u64),
    /// In pages of `1 << shift` bytes.
    Pages { shift: u8, pages: Vec<u64> },
}

impl Place {
    /// The ranges of addresses, each from its first address to the one after its last.
    pub fn ranges(&self, len: u64) -> Vec<(u64, u64)> {
        match self {
            Place::At(addr) => vec![(*addr, addr.saturating_add(len))],
            Place::Pages { shift, pages } => {
                let page = 1u64.checked_shl((*shift).into()).unwrap_or(u64::MAX);
                pages.iter().map(|&addr| (addr, addr.saturating_add(page))).collect()
            }
        }
    }
}

/// Checks that a code in a state is one that a connection may have ended with.
pub(crate) fn error_code(code: u32) -> Result<ErrorCode, String> {
    match code {
        0 => Err("a broken connection needs an error code that is not 0".into()),
        code => Ok(ErrorCode(code)),
    }
}

/// The part of a class that keeps nothing: an empty object.
pub fn nothing() -> Value {
    json!({})
}

/// Checks that a part is that of a class that keeps nothing.
///
/// # Errors
/// It has fields.
pub fn is_nothing(value: &Value) -> Result<(), String> {
    match value.as_object() {
        Some(fields) if fields.is_empty() => Ok(()),
        _ => Err("this class keeps no state; expected an empty object".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_many_empty_things_is_refused_before_it_is_read() {
        let of = |item: &str| format!("[{}0]", format!("{item},").repeat((2 << 20) / item.len()));
        for item in ["{\"\":0}", "[0]", "{}", "[]"] {
            let text = of(item);
            assert!(
                matches!(check_weight(text.as_bytes()), Err(BadDocument::TooHeavy(_))),
                "{item}"
            );
            assert!(matches!(DeviceState::from_text(&text), Err(BadDocument::TooHeavy(_))));
        }
        let map = r#"{"start":4294967296,"len":2097152,"read":true,"write":true,"file":[0,4096]}"#;
        for item in [map, "0", "4294967296", r#""a string, with [{,,,}] and \" [[[[[ in it""#] {
            check_weight(of(item).as_bytes()).unwrap();
        }
        // Short texts may be anything.
        check_weight("{},".repeat(10_000).as_bytes()).unwrap();
    }
}
