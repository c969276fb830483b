// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks descriptors of the peer.

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// Whether a descriptor is an eventfd. A write to an eventfd has a bounded effect.
///
/// # Errors
/// `/proc` cannot be read.
pub fn is_eventfd(fd: impl AsFd) -> Result<bool, Errno> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(rustix::fs::readlink(link, Vec::new())?.as_bytes() == b"anon_inode:[eventfd]")
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn an_eventfd_is_told_from_other_descriptors() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        assert_eq!(is_eventfd(&fd), Ok(true));
        let (pipe, _end) = rustix::pipe::pipe().expect("a pipe");
        assert_eq!(is_eventfd(&pipe), Ok(false));
    }
}
