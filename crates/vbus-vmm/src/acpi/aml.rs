// SPDX-License-Identifier: Apache-2.0 OR MIT
//! AML, the byte code of ACPI: the few terms and resource descriptors that the DSDT uses.
//!
//! Each function returns one encoded term (ACPI specification 6.5, chapter 20 for the terms,
//! section 6.4 for the resource descriptors). A list of terms is the terms one after another.

/// An encoded term, or a list of them.
pub type Term = Vec<u8>;

/// The package length covers itself. Above this, its bytes no longer suffice for a `Term`.
const PACKAGE_MAX: usize = (1 << 28) - 1;

/// Concatenates parts of a term.
fn join(parts: &[&[u8]]) -> Term {
    parts.concat()
}

/// `opcode`, the length of what follows (the length field included), and `body`.
fn package_of(opcode: &[u8], body: &[u8]) -> Term {
    let field_bytes = match body.len() {
        0..=0x3e => 1,
        0x3f..=0xffd => 2,
        0xffe..=0xf_fffc => 3,
        _ => 4,
    };
    let length = body.len() + field_bytes;
    assert!(length <= PACKAGE_MAX, "an AML package of {length} bytes");
    let mut term = opcode.to_vec();
    if field_bytes == 1 {
        term.push(low_byte(length));
    } else {
        // The first byte has the lowest 4 bits, and in its upper two the count of bytes that
        // follow.
        term.push(low_byte(field_bytes - 1) << 6 | low_byte(length & 0xf));
        term.extend((0..field_bytes - 1).map(|byte| low_byte(length >> (4 + 8 * byte))));
    }
    term.extend_from_slice(body);
    term
}

#[allow(clippy::cast_possible_truncation, reason = "the lowest byte is asked for")]
fn low_byte(value: usize) -> u8 {
    value as u8
}

/// An integer constant, in its shortest form.
pub fn integer(value: u32) -> Term {
    let bytes = value.to_le_bytes();
    match value {
        0 | 1 => vec![bytes[0]],
        2..=0xff => join(&[&[0x0a], &bytes[..1]]),
        0x100..=0xffff => join(&[&[0x0b], &bytes[..2]]),
        _ => join(&[&[0x0c], &bytes]),
    }
}

/// A string constant. `text` is ASCII.
pub fn string(text: &str) -> Term {
    join(&[&[0x0d], text.as_bytes(), &[0]])
}

/// A buffer with these bytes.
pub fn buffer(bytes: &[u8]) -> Term {
    let size = integer(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    package_of(&[0x11], &join(&[&size, bytes]))
}

/// A package (an array) of at most 255 elements.
pub fn package(elements: &[Term]) -> Term {
    let count = u8::try_from(elements.len()).unwrap_or(u8::MAX);
    package_of(&[0x12], &join(&[&[count], &elements.concat()]))
}

/// The integer by which ACPI names a device of this EISA id: three letters, four hexadecimal
/// digits.
pub fn eisa_id(id: &[u8; 7]) -> Term {
    let letter = |at: usize| u32::from(id[at] - b'@');
    let digit = |at: usize| char::from(id[at]).to_digit(16).unwrap_or(0);
    let digits = (3..7).fold(0, |value, at| value << 4 | digit(at));
    integer((letter(0) << 26 | letter(1) << 21 | letter(2) << 16 | digits).swap_bytes())
}

/// The object `name` with this value. A name has four characters.
pub fn name(name: &str, value: &[u8]) -> Term {
    join(&[&[0x08], name.as_bytes(), value])
}

/// A device that is a child of the system bus.
pub fn device(name: &str, children: &[Term]) -> Term {
    let device = package_of(&[0x5b, 0x82], &join(&[name.as_bytes(), &children.concat()]));
    package_of(&[0x10], &join(&[b"\\_SB_", &device]))
}

/// The method `name` with so many arguments (at most 7). Several CPUs may be in it at a time.
pub fn method(name: &str, arguments: u8, body: &[Term]) -> Term {
    package_of(&[0x14], &join(&[name.as_bytes(), &[arguments], &body.concat()]))
}

/// Argument `number` of the method, from 0 to 6.
pub fn argument(number: u8) -> Term {
    vec![0x68 + number]
}

/// Local variable `number` of the method, from 0 to 7.
pub fn local(number: u8) -> Term {
    vec![0x60 + number]
}

/// Whether two values are equal.
pub fn equal(left: &[u8], right: &[u8]) -> Term {
    join(&[&[0x93], left, right])
}

/// Whether two values differ.
pub fn not_equal(left: &[u8], right: &[u8]) -> Term {
    join(&[&[0x92, 0x93], left, right])
}

/// Writes the bitwise AND of two values to `target`.
pub fn and(left: &[u8], right: &[u8], target: &[u8]) -> Term {
    join(&[&[0x7b], left, right, target])
}

/// Writes the bitwise OR of two values to `target`.
pub fn or(left: &[u8], right: &[u8], target: &[u8]) -> Term {
    join(&[&[0x7d], left, right, target])
}

/// Writes `value` to `target`.
pub fn store(value: &[u8], target: &[u8]) -> Term {
    join(&[&[0x70], value, target])
}

/// Runs `body` if `condition` holds.
pub fn when(condition: &[u8], body: &[Term]) -> Term {
    package_of(&[0xa0], &join(&[condition, &body.concat()]))
}

/// Runs `body` if the condition of the [`when`] just before does not hold.
pub fn otherwise(body: &[Term]) -> Term {
    package_of(&[0xa1], &body.concat())
}

/// Returns `value` from the method.
pub fn give_back(value: &[u8]) -> Term {
    join(&[&[0xa4], value])
}

/// Makes `name` the 32-bit field at byte `offset` of a buffer.
pub fn dword_field(buffer: &[u8], offset: u32, name: &str) -> Term {
    join(&[&[0x8a], buffer, &integer(offset), name.as_bytes()])
}

/// Resource descriptors as a device's `_CRS`.
pub fn resources(descriptors: &[Term]) -> Term {
    // The end tag, with a checksum of 0: "treat as correct".
    buffer(&join(&[&descriptors.concat(), &[0x79, 0]]))
}

/// `count` ports from `first` on, of which a device decodes all 16 address bits.
pub fn ports(first: u16, count: u8) -> Term {
    let first = first.to_le_bytes();
    join(&[&[0x47, 1], &first, &first, &[1, count]])
}

/// `bytes` bytes of memory from `first` on, readable and writable.
pub fn memory(first: u32, bytes: u32) -> Term {
    join(&[&[0x86, 9, 0, 1], &first.to_le_bytes(), &bytes.to_le_bytes()])
}

/// An edge-triggered interrupt, active high, not shared, at a pin of the I/O APIC.
pub fn edge_interrupt(pin: u32) -> Term {
    join(&[&[0x89, 6, 0, 0b11, 1], &pin.to_le_bytes()])
}

/// Minimum and maximum of what a bridge passes on are fixed, and it decodes positively.
const BRIDGE_RANGE: u8 = 0b1100;

/// The bus numbers from 0 to `last` below a host bridge.
pub fn bus_numbers(last: u8) -> Term {
    let words = [0, 0, u16::from(last), 0, u16::from(last) + 1];
    let words = words.map(u16::to_le_bytes).concat();
    join(&[&[0x88, 13, 0, 2, BRIDGE_RANGE, 0], &words])
}

/// The memory from `first` to `last`, not cacheable, that a host bridge passes on.
pub fn memory_window(first: u32, last: u32) -> Term {
    /// Read and write.
    const WRITABLE: u8 = 1;
    let words = [0, first, last, 0, last - first + 1].map(u32::to_le_bytes).concat();
    join(&[&[0x87, 23, 0, 0, BRIDGE_RANGE, WRITABLE], &words])
}

/// A UUID, given as text, as the buffer that `_OSC` takes: its first three groups are
/// little-endian.
pub fn uuid(text: &str) -> Term {
    let mut bytes: Vec<u8> = Vec::with_capacity(16);
    for (at, group) in text.split('-').enumerate() {
        let mut group: Vec<u8> = (0..group.len() / 2)
            .map(|byte| u8::from_str_radix(&group[2 * byte..2 * byte + 2], 16).unwrap_or(0))
            .collect();
        if at < 3 {
            group.reverse();
        }
        bytes.extend(group);
    }
    buffer(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_as_short_as_they_can_be() {
        assert_eq!(integer(0), [0]);
        assert_eq!(integer(1), [1]);
        assert_eq!(integer(0xff), [0x0a, 0xff]);
        assert_eq!(integer(0x100), [0x0b, 0, 1]);
        assert_eq!(integer(0x1_0000), [0x0c, 0, 0, 1, 0]);
    }

    #[test]
    fn a_package_length_covers_itself_in_one_to_four_bytes() {
        let head = |bytes: usize, field: usize| package_of(&[], &vec![9; bytes])[..field].to_vec();
        assert_eq!(head(0x3e, 1), [0x3f]);
        assert_eq!(head(0x3f, 2), [0x41, 0x04]);
        assert_eq!(head(0xffd, 2), [0x4f, 0xff]);
        assert_eq!(head(0xffe, 3), [0x81, 0x00, 0x01]);
        assert_eq!(head(0xf_fffc, 3), [0x8f, 0xff, 0xff]);
        assert_eq!(head(0xf_fffd, 4), [0xc1, 0x00, 0x00, 0x01]);
    }

    #[test]
    fn ids_are_those_of_the_specification() {
        assert_eq!(eisa_id(b"PNP0A08"), [0x0c, 0x41, 0xd0, 0x0a, 0x08]);
        assert_eq!(
            uuid("33db4d5b-1ff7-401c-9657-7441c03dd766")[4..],
            [
                0x5b, 0x4d, 0xdb, 0x33, 0xf7, 0x1f, 0x1c, 0x40, 0x96, 0x57, 0x74, 0x41, 0xc0, 0x3d,
                0xd7, 0x66
            ]
        );
    }
}
