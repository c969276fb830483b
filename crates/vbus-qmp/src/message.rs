// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of QEMU.

use serde_json::Value;

/// A message of QEMU.
#[derive(Debug)]
pub enum Message {
    /// The first message of a connection. The client answers with the command `qmp_capabilities`.
    Greeting,
    /// A command succeeded. QEMU answers commands in order.
    Return(Value),
    /// A command failed.
    Error(QemuError),
    /// Something happened. The whole message, with the keys `event` and `data`.
    Event(Value),
    /// The message has none of these forms. The other end may not be QEMU.
    Unknown,
}

impl From<Value> for Message {
    fn from(mut message: Value) -> Message {
        if let Some(error) = message.get("error") {
            let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            return Message::Error(QemuError { class: text("class"), description: text("desc") });
        }
        if let Some(value) = message.get_mut("return") {
            return Message::Return(value.take());
        }
        match (message.get("event"), message.get("QMP")) {
            (Some(_), _) => Message::Event(message),
            (None, Some(_)) => Message::Greeting,
            (None, None) => Message::Unknown,
        }
    }
}

/// A failure that QEMU itself reported.
#[derive(Debug, thiserror::Error)]
#[error("QEMU: {description}")]
pub struct QemuError {
    /// QEMU's class of the error: `DeviceNotFound`, `GenericError`, ...
    pub class: String,
    /// QEMU's description of the error.
    pub description: String,
}
