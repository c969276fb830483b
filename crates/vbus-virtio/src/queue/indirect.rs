// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Indirect tables of both formats.

use super::chain::Chain;
use super::layout::{DESCRIPTOR_BYTES, Format, PARTS_MAX};
use super::memory::{Descriptor, Table, Tables};
use super::violation::Violation;

/// The most bytes of a table: a chain cannot have more parts.
#[expect(clippy::cast_possible_truncation, reason = "it is 16 KiB")]
const TABLE_MAX: u32 = (PARTS_MAX * DESCRIPTOR_BYTES) as u32;

/// Appends to `chain` what the table has that `descriptor`, of a queue of `format`, refers to.
///
/// Device requirements of VIRTIO 1.3, 2.7.5.3 and 2.8.7: the flag WRITE of the referring descriptor
/// has no meaning. The descriptors of a packed queue's table follow one another, and have no flag
/// but WRITE.
pub(super) fn append(
    chain: &mut Chain,
    descriptor: Descriptor,
    format: Format,
    negotiated: bool,
    tables: &impl Tables,
) -> Result<(), Violation> {
    let Descriptor { addr, len, .. } = descriptor;
    if !negotiated {
        return Err(Violation::IndirectNotNegotiated);
    }
    if descriptor.has(Descriptor::NEXT) {
        return Err(Violation::IndirectNext);
    }
    if len == 0 || len as usize % DESCRIPTOR_BYTES != 0 || len > TABLE_MAX {
        return Err(Violation::IndirectLength(len));
    }
    if addr.checked_add(len.into()).is_none() {
        return Err(Violation::Range { addr, len });
    }
    let table = tables.table(addr, len).ok_or(Violation::IndirectUnmapped)?;
    let count = len as usize / DESCRIPTOR_BYTES;
    let size = len / 16;
    let mut number = 0;
    for left in (0..count).rev() {
        let descriptor = table.descriptor(number);
        let Descriptor { addr, len, next, .. } = descriptor;
        if descriptor.has(Descriptor::INDIRECT) {
            return Err(Violation::IndirectInIndirect);
        }
        chain.push(addr, len, descriptor.has(Descriptor::WRITE))?;
        match format {
            Format::Packed => number += 1,
            Format::Split if !descriptor.has(Descriptor::NEXT) => break,
            Format::Split if usize::from(next) >= count => {
                return Err(Violation::Descriptor { number: next, size });
            }
            Format::Split if left == 0 => return Err(Violation::Loop(size)),
            Format::Split => number = next.into(),
        }
    }
    Ok(())
}
