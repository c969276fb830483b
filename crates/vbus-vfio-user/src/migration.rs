// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The migration of a device: its state as a stream (spec/vfio-user.md, "Migration").

use std::time::{Duration, Instant};

use rustix::io::Errno;
use vbus_core::memory::{Charge, LogError};
use vbus_core::state::Document;
use vbus_core::{Endpoint, NotSaved};
use vbus_pci::{FunctionState, PciFunction, Peer};
use vfio_user_protocol::message::MigrationFlags;
use vfio_user_protocol::migration::{ArcFailure, MigrationArc};

/// The most bytes of a stream. The text that it holds costs some ten times as much while it is
/// read.
pub(crate) const STREAM_MAX: usize = 8 << 20;
/// How many bytes the stream of a client is charged with at a time.
const CHARGE: usize = 1 << 20;

/// How long a device that shall stop may wait for the end of a call. Clients wait for an answer for
/// 5 seconds.
const CALL_WAIT: Duration = Duration::from_secs(3);

/// The bytes before each part of a stream: magic, version, kind, length.
const HEAD: usize = 24;
const MAGIC: [u8; 8] = *b"vbusmig\0";
const VERSION: u32 = 1;
/// A part of 8 bytes: how long the state was when the stream began.
const ESTIMATE: u32 = 1;
/// The state: a document of the kind `function` (spec/state-format.md).
const STATE: u32 = 2;

/// What a server keeps of the migration of its device.
#[derive(Default)]
pub(crate) struct Migration {
    /// Whether the device can be saved, as far as this client has asked.
    can: Option<bool>,
    /// The client has stopped the device.
    stopped: bool,
    /// The bytes of the state when it was last saved.
    estimate: u64,
    /// The rest of the stream that the client reads.
    outgoing: Vec<u8>,
    /// How much of it the client has read.
    read: usize,
    /// The stream that the client writes, and what that costs it.
    incoming: Vec<u8>,
    charges: Vec<Charge>,
}

impl Migration {
    /// Which states the device has. It finds out whether the device can be saved by saving it. For
    /// that the device stands still for a moment.
    pub(crate) fn flags(
        &mut self,
        function: &mut PciFunction,
        endpoint: &Endpoint,
    ) -> Option<MigrationFlags> {
        let can = match self.can {
            Some(can) => can,
            None => {
                if let Err(why) = stop(endpoint) {
                    // The call may have ended when the client asks again.
                    tracing::warn!(device = endpoint.name(), "no migration now: {why}");
                    return None;
                }
                let saved = self.text(function, endpoint);
                if !self.stopped {
                    endpoint.resume();
                }
                if let Err(why) = &saved {
                    tracing::warn!(device = endpoint.name(), "no migration: {why}");
                }
                *self.can.insert(saved.is_ok())
            }
        };
        can.then_some(MigrationFlags { stop_copy: true, p2p: false, pre_copy: true })
    }

    /// The state as text. The device is quiesced afterwards.
    fn text(&mut self, function: &mut PciFunction, endpoint: &Endpoint) -> Result<String, String> {
        stop(endpoint).map_err(|error| error.to_string())?;
        let state = function.save().map_err(|error| error.to_string())?;
        let text = state.to_text().map_err(|error| error.to_string())?;
        if text.len() > STREAM_MAX - HEAD {
            return Err(format!(
                "the state of device {:?} has {} bytes; at most {} can be moved",
                endpoint.name(),
                text.len(),
                STREAM_MAX - HEAD
            ));
        }
        self.estimate = text.len() as u64;
        Ok(text)
    }

    /// Takes the device along an arc.
    pub(crate) fn go(
        &mut self,
        arc: MigrationArc,
        function: &mut PciFunction,
        endpoint: &Endpoint,
    ) -> Result<(), ArcFailure> {
        let device = endpoint.name();
        match arc {
            MigrationArc::Stop => {
                stop(endpoint).map_err(|error| {
                    tracing::warn!(device, "the device cannot be stopped: {error}");
                    ArcFailure::Unchanged(Errno::BUSY)
                })?;
                self.stopped = true;
            }
            MigrationArc::Start => self.resume(endpoint),
            MigrationArc::BeginPreCopy => {
                self.clear();
                let estimate = self.estimate.to_le_bytes();
                self.send(ESTIMATE, &estimate);
            }
            MigrationArc::EndPreCopy | MigrationArc::EndSaving => self.clear(),
            MigrationArc::StopInPreCopy => {
                if let Err(failure) = self.save(function, endpoint) {
                    endpoint.resume();
                    return Err(failure);
                }
                self.stopped = true;
            }
            MigrationArc::BeginSaving => {
                self.clear();
                self.save(function, endpoint)?;
            }
            MigrationArc::BeginRestoring => self.clear(),
            MigrationArc::EndRestoring => {
                let stream = std::mem::take(&mut self.incoming);
                self.clear();
                restore(&stream, function, endpoint).map_err(|why| {
                    tracing::warn!(device, "the device cannot take its state: {why}");
                    ArcFailure::Failed(Errno::INVAL)
                })?;
            }
        }
        Ok(())
    }

    /// Puts the device's state into the stream. The device is quiesced afterwards.
    fn save(&mut self, function: &mut PciFunction, endpoint: &Endpoint) -> Result<(), ArcFailure> {
        match self.text(function, endpoint) {
            Ok(text) => {
                tracing::info!(device = endpoint.name(), bytes = text.len(), "state is read");
                self.send(STATE, text.as_bytes());
                Ok(())
            }
            Err(why) => {
                tracing::warn!(device = endpoint.name(), "the device cannot be saved: {why}");
                Err(ArcFailure::Unchanged(Errno::BUSY))
            }
        }
    }

    /// Appends a part to the stream that the client reads.
    fn send(&mut self, kind: u32, bytes: &[u8]) {
        self.outgoing.extend_from_slice(&MAGIC);
        self.outgoing.extend_from_slice(&VERSION.to_le_bytes());
        self.outgoing.extend_from_slice(&kind.to_le_bytes());
        self.outgoing.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.outgoing.extend_from_slice(bytes);
    }

    /// The client reads the next bytes of the stream. Returns their number.
    pub(crate) fn read(&mut self, data: &mut [u8]) -> usize {
        let rest = &self.outgoing[self.read..];
        let count = rest.len().min(data.len());
        data[..count].copy_from_slice(&rest[..count]);
        self.read += count;
        count
    }

    /// The client writes the next bytes of a stream.
    pub(crate) fn write(&mut self, data: &[u8], endpoint: &Endpoint) -> Result<(), Errno> {
        let len = self.incoming.len() + data.len();
        if len > STREAM_MAX {
            return Err(Errno::FBIG);
        }
        while self.charges.len() * CHARGE < len {
            let charge = endpoint.memory().charge(CHARGE as u64).map_err(|exceeded| {
                let device = endpoint.name();
                tracing::warn!(
                    device,
                    "the state of the device is too long: it exceeds {exceeded}"
                );
                Errno::NOSPC
            })?;
            self.charges.push(charge);
        }
        self.incoming.extend_from_slice(data);
        Ok(())
    }

    /// Drops both streams.
    fn clear(&mut self) {
        let Migration { can, stopped, estimate, .. } = *self;
        *self = Migration { can, stopped, estimate, ..Migration::default() };
    }

    /// Lets the device go on if the client has stopped it.
    fn resume(&mut self, endpoint: &Endpoint) {
        if std::mem::take(&mut self.stopped) {
            endpoint.resume();
        }
    }

    /// The client has gone, or has reset the device: it runs, and both streams are dropped.
    pub(crate) fn end(&mut self, endpoint: &Endpoint) {
        self.resume(endpoint);
        *self = Migration::default();
    }
}

/// Quiesces the device.
fn stop(endpoint: &Endpoint) -> Result<(), NotSaved> {
    endpoint.quiesce_by(Instant::now() + CALL_WAIT)
}

/// Lets the device go on from the state in a stream. It is quiesced.
fn restore(stream: &[u8], function: &mut PciFunction, endpoint: &Endpoint) -> Result<(), String> {
    let text = state_of(stream)?;
    let state = FunctionState::from_text(text).map_err(|error| error.to_string())?;
    // The driver that this device had is none of the state's.
    function.reset();
    function.restore(&state, Peer::Other).map_err(|error| error.to_string())?;
    tracing::info!(device = endpoint.name(), bytes = text.len(), "state is written");
    Ok(())
}

/// The text of the state in a stream.
fn state_of(mut stream: &[u8]) -> Result<&str, String> {
    let mut state = None;
    while !stream.is_empty() {
        let head = stream.get(..HEAD).ok_or("the stream ends within the head of a part")?;
        let word = |at: usize| head[at..].first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
        if head[..8] != MAGIC {
            return Err("it is no stream of a device of vbus".into());
        }
        if word(8) != VERSION {
            return Err(format!("the stream has version {}; this one reads {VERSION}", word(8)));
        }
        let (kind, rest) = (word(12), &stream[HEAD..]);
        let len = head[16..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        let len = usize::try_from(len).ok().filter(|len| *len <= rest.len());
        let len = len.ok_or("the stream ends within a part")?;
        let (part, after) = rest.split_at(len);
        match kind {
            ESTIMATE => {}
            STATE if state.is_none() => {
                let text = std::str::from_utf8(part).map_err(|error| error.to_string())?;
                state = Some(text);
            }
            STATE => return Err("the stream has a second state".into()),
            other => return Err(format!("the stream has a part of the unknown kind {other}")),
        }
        stream = after;
    }
    state.ok_or_else(|| "the stream has no state".into())
}

/// The errno for a client whose log cannot be started or reported.
pub(crate) fn log_errno(error: &LogError, device: &str) -> Errno {
    tracing::warn!(device, "the log of written pages: {error}");
    match error {
        LogError::Lost(_) => Errno::NOSPC,
        LogError::NoFence => Errno::OPNOTSUPP,
        LogError::On => Errno::BUSY,
        _ => Errno::INVAL,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_has_one_state_and_is_read_in_any_pieces() {
        let mut migration = Migration { estimate: 7, ..Migration::default() };
        migration.send(ESTIMATE, &7u64.to_le_bytes());
        migration.send(STATE, b"text");
        let whole = migration.outgoing.clone();
        assert_eq!(whole.len(), 2 * HEAD + 8 + 4);
        // The head by the document: magic at 0, version at 8, kind at 12, length at 16.
        assert_eq!(whole[..8], *b"vbusmig\0");
        assert_eq!(whole[8..HEAD], [1, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
        let (mut read, mut piece) = (Vec::new(), [0; 5]);
        loop {
            match migration.read(&mut piece) {
                0 => break,
                count => read.extend_from_slice(&piece[..count]),
            }
        }
        assert_eq!(read, whole);
        assert_eq!(state_of(&whole), Ok("text"));
        assert_eq!(state_of(&whole[HEAD + 8..]), Ok("text"), "without the estimate");

        for cut in (1..whole.len()).filter(|cut| *cut != HEAD + 8) {
            let error = state_of(&whole[..cut]).unwrap_err();
            assert!(error.contains("ends within"), "{cut}: {error}");
        }
        assert_eq!(state_of(&[]), Err("the stream has no state".into()));
        assert_eq!(state_of(&whole[..HEAD + 8]), Err("the stream has no state".into()));
        let twice = [&whole[..], &whole[HEAD + 8..]].concat();
        assert_eq!(state_of(&twice), Err("the stream has a second state".into()));
        for (at, error) in [(3, "no stream"), (8, "version 255"), (12, "kind 255")] {
            let mut wrong = whole.clone();
            wrong[at] = 0xff;
            assert!(state_of(&wrong).unwrap_err().contains(error), "{error}");
        }
        let mut long = whole.clone();
        long[16..HEAD].fill(0xff);
        assert_eq!(state_of(&long), Err("the stream ends within a part".into()));
    }
}
