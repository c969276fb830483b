// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Offloads as feature bits, and back.

use vbus_net::Offloads;

use super::abi::feature;

/// Each offload: its bit from the driver, and its bits to the driver.
const OFFLOADS: [(Offloads, u64, u64); 5] = [
    (Offloads::CSUM, feature::CSUM, feature::GUEST_CSUM),
    (Offloads::TSO4, feature::HOST_TSO4, feature::GUEST_TSO4),
    (Offloads::TSO6, feature::HOST_TSO6, feature::GUEST_TSO6),
    (Offloads::ECN, feature::HOST_ECN, feature::GUEST_ECN),
    (Offloads::USO, feature::HOST_USO, feature::GUEST_USO4 | feature::GUEST_USO6),
];

/// The bits of the offloads to the driver, which it can change while it runs.
pub const GUEST: u64 = feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6;

/// The feature bits of `tx`, the offloads from the driver, and `rx`, those to the driver.
pub fn bits(tx: Offloads, rx: Offloads) -> u64 {
    let of = |(offload, host, guest): (Offloads, u64, u64)| {
        let bit = |set: Offloads, bits: u64| if set.contains(offload) { bits } else { 0 };
        bit(tx, host) | bit(rx, guest)
    };
    OFFLOADS.into_iter().map(of).fold(0, |bits, more| bits | more)
}

/// The offloads from the driver in these feature bits.
pub fn from_driver(features: u64) -> Offloads {
    collect(features, |(_, host, _)| host)
}

/// The offloads to the driver in these feature bits. UDP segments need the bits of both versions of
/// IP.
pub fn to_driver(features: u64) -> Offloads {
    collect(features, |(_, _, guest)| guest)
}

fn collect(features: u64, bits: impl Fn((Offloads, u64, u64)) -> u64) -> Offloads {
    let has = OFFLOADS.into_iter().filter(|row| features & bits(*row) == bits(*row));
    has.fold(Offloads::NONE, |set, (offload, ..)| set | offload)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_offload_has_its_bits() {
        assert_eq!(bits(Offloads::NONE, Offloads::ALL), GUEST);
        let tx = Offloads::CSUM | Offloads::USO;
        let all = bits(tx, Offloads::ALL);
        assert_eq!((from_driver(all), to_driver(all)), (tx, Offloads::ALL));
        assert_eq!(from_driver(GUEST), Offloads::NONE);
        assert!(!to_driver(GUEST & !feature::GUEST_USO6).contains(Offloads::USO));
    }
}
