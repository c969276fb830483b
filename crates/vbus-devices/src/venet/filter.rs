//! Which frames a driver wants.

use vbus_core::ErrorCode;
use vbus_core::shm::abi::venet::{FILTER_ALL_MULTICAST, FILTER_MAX, FILTER_PROMISCUOUS};

use super::frame::{BROADCAST, Mac, is_group};

/// The receive filter beside the device's own address.
#[derive(Debug, Default)]
pub struct Filter {
    flags: u32,
    addresses: Vec<Mac>,
}

impl Filter {
    /// From the buffer of CALL_FILTER.
    pub fn parse(buffer: &[u8]) -> Result<Filter, ErrorCode> {
        let (flags, rest) = buffer.split_first_chunk::<4>().ok_or(ErrorCode::BAD_LENGTH)?;
        let (count, rest) = rest.split_first_chunk::<4>().ok_or(ErrorCode::BAD_LENGTH)?;
        let (flags, count) = (u32::from_le_bytes(*flags), u32::from_le_bytes(*count));
        if flags & !(FILTER_PROMISCUOUS | FILTER_ALL_MULTICAST) != 0 {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        if count > FILTER_MAX {
            return Err(ErrorCode::LIMIT);
        }
        let bytes = rest.get(..count as usize * 6).ok_or(ErrorCode::BAD_LENGTH)?;
        let mut addresses = Vec::with_capacity(count as usize);
        for chunk in bytes.chunks_exact(6) {
            let mut mac = Mac::default();
            mac.copy_from_slice(chunk);
            addresses.push(mac);
        }
        Ok(Filter { flags, addresses })
    }

    /// Whether frames to `mac` pass.
    pub fn accepts(&self, mac: Mac) -> bool {
        mac == BROADCAST
            || self.flags & FILTER_PROMISCUOUS != 0
            || self.flags & FILTER_ALL_MULTICAST != 0 && is_group(mac)
            || self.addresses.contains(&mac)
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // Small numbers.
mod tests {
    use super::*;

    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 9];

    fn buffer(flags: u32, count: u32, addresses: &[Mac]) -> Vec<u8> {
        [&flags.to_le_bytes()[..], &count.to_le_bytes(), addresses.as_flattened()].concat()
    }

    #[test]
    fn passes_what_was_asked_for() {
        let passes = |filter: &Filter| [BROADCAST, GROUP, OTHER].map(|mac| filter.accepts(mac));
        assert_eq!(passes(&Filter::default()), [true, false, false]);
        let parse = |flags, addresses: &[Mac]| {
            Filter::parse(&buffer(flags, addresses.len() as u32, addresses)).unwrap()
        };
        assert_eq!(passes(&parse(0, &[OTHER])), [true, false, true]);
        assert_eq!(passes(&parse(0, &[GROUP])), [true, true, false]);
        assert_eq!(passes(&parse(FILTER_ALL_MULTICAST, &[])), [true, true, false]);
        assert_eq!(passes(&parse(FILTER_PROMISCUOUS, &[])), [true, true, true]);
    }

    #[test]
    fn bad_buffers_are_refused() {
        let parse = |buffer: &[u8]| Filter::parse(buffer).map(|_| ());
        assert_eq!(parse(&[0; 7]), Err(ErrorCode::BAD_LENGTH));
        assert_eq!(parse(&buffer(4, 0, &[])), Err(ErrorCode::BAD_ARGUMENT));
        assert_eq!(parse(&buffer(0, 2, &[OTHER])), Err(ErrorCode::BAD_LENGTH));
        assert_eq!(parse(&buffer(0, FILTER_MAX + 1, &[OTHER; 65])), Err(ErrorCode::LIMIT));
        assert_eq!(parse(&buffer(0, u32::MAX, &[])), Err(ErrorCode::LIMIT));
    }
}
