// SPDX-License-Identifier: Apache-2.0 OR MIT
//! MAC addresses.

/// A MAC address, first byte first.
pub type Mac = [u8; 6];

/// The broadcast address.
pub const BROADCAST: Mac = [0xff; 6];

/// Whether the address is a group address: a multicast address or the broadcast address.
pub fn is_group(mac: Mac) -> bool {
    mac[0] & 1 != 0
}

/// The address as text, like `02:00:00:00:00:01`.
pub fn show_mac(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Parses an address: six pairs of hexadecimal digits with colons between them. `None` for other
/// text.
pub fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = Mac::default();
    let mut parts = text.split(':');
    for byte in &mut mac {
        let is_byte = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        *byte = u8::from_str_radix(parts.next().filter(is_byte)?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_address_are_the_same() {
        assert_eq!(parse_mac("02:00:00:00:00:0A"), Some([2, 0, 0, 0, 0, 10]));
        assert_eq!(show_mac([2, 0, 0, 0, 0, 10]), "02:00:00:00:00:0a");
        for wrong in
            ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "0x:00:00:00:00:01", "2:0:0:0:0:1"]
        {
            assert_eq!(parse_mac(wrong), None, "{wrong}");
        }
    }
}
