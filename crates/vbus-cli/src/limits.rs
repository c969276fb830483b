// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Limits of the process.

use std::os::fd::{AsFd, RawFd};

use rustix::io::{Errno, fcntl_dupfd_cloexec};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit of descriptors as far as the system allows. Each doorbell and each interrupt
/// vector of a device takes a descriptor. The usual limit exists for programs that use `select`.
pub fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) =
        setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
    {
        tracing::debug!(%error, "the limit of descriptors stays as it is");
    }
}

/// Makes room for `count` descriptors in the kernel's table of this process, so that no later one
/// has to. Where the process has threads, the kernel lets all processors pass through it before it
/// puts a larger table in place (`synchronize_rcu`), and the call that needs the room waits for
/// that: some milliseconds, or tens of them. `any` is any open descriptor.
///
/// It does what the limit of descriptors permits, and is no error.
pub fn make_room_for_descriptors(any: impl AsFd, count: RawFd) {
    let mut last = count.saturating_sub(1).max(0);
    // A number that the limit does not permit is an invalid argument.
    while let Err(Errno::INVAL) = fcntl_dupfd_cloexec(any.as_fd(), last) {
        last /= 2;
        if last == 0 {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table's size in `/proc/self/status`.
    fn room() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        line.trim().parse().unwrap()
    }

    #[test]
    fn the_table_has_room_and_no_descriptor_stays_open() {
        make_room_for_descriptors(std::io::stderr(), 700);
        assert!(room() >= 700, "{}", room());
        // Beyond every limit: as far as the limit goes.
        make_room_for_descriptors(std::io::stderr(), RawFd::MAX);
        make_room_for_descriptors(std::io::stderr(), 0);
        // Other tests of this process open some with low numbers meanwhile.
        for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(name.parse::<RawFd>().unwrap() < 600, "{name} is open");
        }
    }
}
