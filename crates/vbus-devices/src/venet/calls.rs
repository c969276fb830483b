//! The buffers of calls, parsed.

use vbus_core::ErrorCode;
use vbus_core::shm::abi::venet::{FILTER_ALL_MULTICAST, FILTER_MAX, FILTER_PROMISCUOUS};
use vbus_net::{Addresses, Mac};

/// Takes a little-endian u32 from the front.
fn u32_from(buffer: &mut &[u8]) -> Result<u32, ErrorCode> {
    let (front, rest) = buffer.split_first_chunk::<4>().ok_or(ErrorCode::BAD_LENGTH)?;
    *buffer = rest;
    Ok(u32::from_le_bytes(*front))
}

/// FILTER.
pub fn filter(mut buffer: &[u8]) -> Result<Addresses, ErrorCode> {
    let flags = u32_from(&mut buffer)?;
    let count = u32_from(&mut buffer)?;
    if flags & !(FILTER_PROMISCUOUS | FILTER_ALL_MULTICAST) != 0 {
        return Err(ErrorCode::BAD_ARGUMENT);
    }
    if count > FILTER_MAX {
        return Err(ErrorCode::LIMIT);
    }
    let bytes = buffer.get(..count as usize * 6).ok_or(ErrorCode::BAD_LENGTH)?;
    let mac = |chunk: &[u8]| {
        let mut mac = Mac::default();
        mac.copy_from_slice(chunk);
        mac
    };
    Ok(Addresses {
        promiscuous: flags & FILTER_PROMISCUOUS != 0,
        all_multicast: flags & FILTER_ALL_MULTICAST != 0,
        listed: bytes.chunks_exact(6).map(mac).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: Mac = [0x33, 0x33, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 9];

    fn filter_buffer(flags: u32, count: u32, addresses: &[Mac]) -> Vec<u8> {
        [&flags.to_le_bytes()[..], &count.to_le_bytes(), addresses.as_flattened()].concat()
    }

    #[test]
    fn filters_are_parsed() {
        let parse = |flags, addresses: &[Mac]| {
            let count = u32::try_from(addresses.len()).unwrap();
            filter(&filter_buffer(flags, count, addresses)).unwrap()
        };
        let listed = parse(0, &[OTHER, GROUP]);
        assert_eq!(listed, Addresses { listed: vec![OTHER, GROUP], ..Addresses::default() });
        assert!(parse(FILTER_ALL_MULTICAST, &[]).all_multicast);
        assert!(parse(FILTER_PROMISCUOUS, &[]).promiscuous);
        assert_eq!(parse(0, &[]), Addresses::default());
    }

    #[test]
    fn bad_filters_are_refused() {
        assert_eq!(filter(&[0; 7]), Err(ErrorCode::BAD_LENGTH));
        assert_eq!(filter(&filter_buffer(4, 0, &[])), Err(ErrorCode::BAD_ARGUMENT));
        assert_eq!(filter(&filter_buffer(0, 2, &[OTHER])), Err(ErrorCode::BAD_LENGTH));
        let many = filter_buffer(0, FILTER_MAX + 1, &[OTHER; 65]);
        assert_eq!(filter(&many), Err(ErrorCode::LIMIT));
        assert_eq!(filter(&filter_buffer(0, u32::MAX, &[])), Err(ErrorCode::LIMIT));
    }
}
