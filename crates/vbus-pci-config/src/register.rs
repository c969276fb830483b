// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers of a type 0 header: offsets, and the bits that have a meaning.

/// Vendor id, 2 bytes.
pub const VENDOR: usize = 0x00;
/// Device id, 2 bytes.
pub const DEVICE: usize = 0x02;
/// Command, 2 bytes.
pub const COMMAND: usize = 0x04;
/// Status, 2 bytes.
pub const STATUS: usize = 0x06;
/// Revision, 1 byte; the three bytes of the class code follow.
pub const REVISION: usize = 0x08;
/// Cache line size, 1 byte; the latency timer follows.
pub const CACHE_LINE: usize = 0x0c;
/// Header type, 1 byte.
pub const HEADER_TYPE: usize = 0x0e;
/// The first of six BARs, 4 bytes each.
pub const BAR0: usize = 0x10;
/// Vendor id of the subsystem, 2 bytes; its own id follows.
pub const SUBSYSTEM: usize = 0x2c;
/// Offset of the first capability, 1 byte.
pub const CAPABILITIES: usize = 0x34;
/// Interrupt line, 1 byte, for the software's own use.
pub const INTERRUPT_LINE: usize = 0x3c;
/// Interrupt pin, 1 byte: 1 to 4 for INTA to INTD, 0 for none.
pub const INTERRUPT_PIN: usize = 0x3d;

/// Command: the function answers to its BARs' addresses.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: the function may access memory (Bus Master).
pub const COMMAND_MASTER: u16 = 1 << 2;
/// Command: the function must not assert INTx.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Status: INTx is pending.
pub const STATUS_INTERRUPT: u16 = 1 << 3;
/// Status: there is a list of capabilities.
pub const STATUS_CAPABILITIES: u16 = 1 << 4;
