// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The register block of BAR0: its registers and the mailbox.

use serde::{Deserialize, Serialize};
use vbus_core::shm::abi::{command, reg};
use vbus_core::{
    Called, ConnectionState, Endpoint, ErrorCode, OpenRequest, PendingCall, REGION_BYTES_MAX,
    RegionRequest,
};

use crate::interrupts::Interrupts;

/// The values that the driver wrote, and the last answer.
#[derive(Default)]
pub(super) struct Registers {
    arguments: [u64; 4],
    result: u32,
    value: u64,
    /// The command that is in progress.
    pending: Option<PendingCall>,
}

/// The registers as plain data (spec/state-format.md, "Register block").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedRegisters {
    arguments: [u64; 4],
    result: u32,
    value: u64,
}

/// The sources of the registers' values.
pub(super) struct Context<'a> {
    pub endpoint: &'a Endpoint,
    pub interrupts: &'a Interrupts,
}

/// The half of a 64-bit register that is at `offset`, the offset of one of its words.
fn half(value: u64, offset: u64) -> u32 {
    let bytes = value.to_le_bytes();
    let at = if offset % 8 == 0 { 0 } else { 4 };
    word(&bytes, at)
}

/// Four bytes from `at` on. Bytes beyond the end are zero.
fn word(bytes: &[u8], at: usize) -> u32 {
    let mut out = [0; 4];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = at.checked_add(i).and_then(|at| bytes.get(at)).copied().unwrap_or(0);
    }
    u32::from_le_bytes(out)
}

fn inside(offset: u64, start: u64, len: u64) -> Option<usize> {
    offset.checked_sub(start).filter(|at| *at < len).and_then(|at| usize::try_from(at).ok())
}

impl Registers {
    /// Sets the registers to their values after power-on.
    pub(super) fn reset(&mut self) {
        *self = Registers::default();
    }

    /// The registers as plain data.
    ///
    /// # Errors
    /// A command is in progress.
    pub(super) fn save(&mut self) -> Result<SavedRegisters, String> {
        self.look_at_pending();
        if self.pending.is_some() {
            return Err("a command is in progress".into());
        }
        let Registers { arguments, result, value, .. } = *self;
        Ok(SavedRegisters { arguments, result, value })
    }

    /// Registers with these values.
    ///
    /// # Errors
    /// They say that a command is in progress.
    pub(super) fn restored(saved: &SavedRegisters) -> Result<Registers, String> {
        let SavedRegisters { arguments, result, value } = *saved;
        if result == ErrorCode::IN_PROGRESS.0 {
            return Err("result says that a command is in progress".into());
        }
        Ok(Registers { arguments, result, value, pending: None })
    }

    /// Sets the answer of the command in progress, if the command has ended.
    fn look_at_pending(&mut self) {
        if let Some(done) = self.pending.as_ref().and_then(PendingCall::result) {
            self.answer(done.map(Called::Now));
        }
    }

    /// Sets RESULT and VALUE.
    fn answer(&mut self, done: Result<Called, ErrorCode>) {
        (self.result, self.value, self.pending) = match done {
            Ok(Called::Now(value)) => (0, value, None),
            Ok(Called::Later(call)) => (ErrorCode::IN_PROGRESS.0, 0, Some(call)),
            Err(error) => (error.0, 0, None),
        };
    }

    /// Reads the word at `offset`, a multiple of 4 in the register page.
    pub(super) fn read(&mut self, offset: u64, context: &Context<'_>) -> u32 {
        let identity = context.endpoint.identity();
        match offset {
            reg::MAGIC => reg::MAGIC_VALUE,
            reg::ABI => context.endpoint.versions().register(),
            reg::CLASS => u32::from(identity.class),
            reg::CONNECTION => match context.endpoint.state() {
                ConnectionState::Open => reg::CONNECTION_OPEN,
                ConnectionState::Broken(error) => {
                    reg::CONNECTION_BROKEN | error.0.min(0xffff) << 16
                }
                // A driver cannot do anything with another state.
                _ => reg::CONNECTION_CLOSED,
            },
            reg::MAX_REGIONS => identity.regions,
            reg::VECTORS => context.interrupts.vectors(),
            reg::CONFIG_GENERATION => context.endpoint.config().1,
            reg::CONFIG_BYTES => u32::try_from(context.endpoint.config().0.len()).unwrap_or(0),
            reg::EVENTS => context.endpoint.events_pending(),
            reg::RESULT => {
                self.look_at_pending();
                self.result
            }
            reg::INTERRUPT_PENDING => u32::from(context.interrupts.pending()),
            _ => {
                if let Some(at) = inside(offset, reg::CLASS_NAME, 16) {
                    let name = identity.class_name.as_bytes();
                    word(&name[..name.len().min(16)], at)
                } else if let Some(at) = inside(offset, reg::NAME, 32) {
                    let name = context.endpoint.name().as_bytes();
                    word(&name[..name.len().min(32)], at)
                } else if inside(offset, reg::FEATURES, 8).is_some() {
                    half(identity.features, offset)
                } else if inside(offset, reg::FEATURES_ACCEPTED, 8).is_some() {
                    half(context.endpoint.features_accepted(), offset)
                } else if inside(offset, reg::MAX_REGION_BYTES, 8).is_some() {
                    half(REGION_BYTES_MAX, offset)
                } else if let Some(at) = inside(offset, reg::ARGUMENT, 32) {
                    half(self.arguments[at / 8], offset)
                } else if inside(offset, reg::VALUE, 8).is_some() {
                    self.look_at_pending();
                    half(self.value, offset)
                } else if let Some(at) = inside(offset, reg::CONFIG, reg::CONFIG_MAX as u64) {
                    word(&context.endpoint.config().0, at)
                } else if inside(offset, reg::INCARNATION, 8).is_some() {
                    half(context.endpoint.incarnation(), offset)
                } else {
                    0
                }
            }
        }
    }

    /// Writes the word at `offset`, a multiple of 4 in the register page. A write of
    /// [`reg::COMMAND`] returns when the command has ended or is in progress. While a command is in
    /// progress, this method ignores all other commands except CLOSE.
    pub(super) fn write(&mut self, offset: u64, value: u32, context: &Context<'_>) {
        match offset {
            reg::COMMAND => {
                self.look_at_pending();
                let [a0, a1, a2, a3] = self.arguments;
                let ignored = self.pending.is_some() && value != command::CLOSE;
                if !ignored {
                    let done = self.run(value, context);
                    self.answer(done);
                }
                tracing::debug!(
                    device = context.endpoint.name(),
                    command = value,
                    ignored,
                    result = %ErrorCode(self.result),
                    "{a0:#x} {a1:#x} {a2:#x} {a3:#x}"
                );
            }
            reg::EVENTS_ACK => context.endpoint.acknowledge_events(value),
            reg::INTERRUPT_ACK => context.interrupts.acknowledge(),
            _ => {
                if let Some(at) = inside(offset, reg::ARGUMENT, 32) {
                    let argument = &mut self.arguments[at / 8];
                    let shift = if at % 8 == 0 { 0 } else { 32 };
                    *argument = *argument & !(0xffff_ffff << shift) | u64::from(value) << shift;
                }
            }
        }
    }

    fn run(&mut self, number: u32, context: &Context<'_>) -> Result<Called, ErrorCode> {
        let endpoint = context.endpoint;
        let [a0, a1, a2, a3] = self.arguments;
        match number {
            command::OPEN => {
                let bytes = a0.to_le_bytes();
                if bytes[2..4] != [0; 2] || bytes[6..] != [0; 2] {
                    return Err(ErrorCode::BAD_ARGUMENT);
                }
                let request = OpenRequest::new((a2, a3))
                    .with_version(u16::from_le_bytes([bytes[0], bytes[1]]))
                    .with_vector(u16::from_le_bytes([bytes[4], bytes[5]]))
                    .with_features(a1);
                endpoint.open(request).map(|()| Called::Now(0))
            }
            command::CLOSE => {
                endpoint.close();
                context.interrupts.clear();
                Ok(Called::Now(0))
            }
            command::REGION_ADD => {
                let bytes = a0.to_le_bytes();
                if bytes[7] != 0 {
                    return Err(ErrorCode::BAD_ARGUMENT);
                }
                let request = RegionRequest::new(half(a0, 0), a1, a2)
                    .with_vector(u16::from_le_bytes([bytes[4], bytes[5]]))
                    .with_page_shift(bytes[6])
                    .with_signal((a3 != command::NO_SIGNAL).then_some(a3));
                endpoint.region_add(request).map(|handle| Called::Now(handle.into()))
            }
            command::REGION_DROP => endpoint.region_drop(a0).map(|()| Called::Now(0)),
            command::CALL => endpoint.call(half(a0, 0), half(a0, 4), a1, a2),
            _ => Err(ErrorCode::BAD_COMMAND),
        }
    }
}
