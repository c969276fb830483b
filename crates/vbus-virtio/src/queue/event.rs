// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a notification of a split queue is due (VIRTIO 1.3, 2.7.7.1 and 2.7.10).

/// Whether `event` is one of the `count` indexes before `new`. All are modulo 2^16. A `count` of
/// 2^16 - 1 means that many or more: then the event may be of any lap, and a notification is due.
pub(super) fn need_event(event: u16, new: u16, count: u16) -> bool {
    count == u16::MAX || new.wrapping_sub(event).wrapping_sub(1) < count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_due_if_the_index_passes_it() {
        for old in [0_u16, 1, 100, u16::MAX - 1, u16::MAX] {
            for count in [1_u16, 2, 7, 32_768] {
                let new = old.wrapping_add(count);
                for distance in [0, 1, 2, 6, 7, 8, 32_767, 32_768, 40_000, u16::MAX] {
                    let due = need_event(old.wrapping_add(distance), new, count);
                    assert_eq!(due, distance < count, "{old} {count} {distance}");
                }
            }
            assert!(!need_event(old, old, 0), "nothing happened");
            assert!(need_event(old, old, u16::MAX), "nobody has counted");
        }
    }
}
