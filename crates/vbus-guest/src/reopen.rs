// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Opens a function again whose connection was lost.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbus_driver::Error;
use vbus_process::Patience;
use vbus_shm::ErrorCode;

use crate::source::{Claimed, Source};

/// The time between two attempts to open a function.
const AGAIN: Duration = Duration::from_secs(1);
/// A device that does not answer for this long is told to the log.
const STALL: Duration = Duration::from_secs(2);

/// Runs `session` with a claimed function. When the session ends because its connection was lost,
/// this function claims the function `id` of `source` again and runs `session` again. It returns
/// the value of the first session that succeeds, or `None` once `stop` has become readable.
///
/// A connection is lost when the device has another incarnation, when it revoked the connection
/// because memory was unmapped, and when something else closed the connection. A function that has
/// gone is a lost connection only where it can come back under its id
/// ([`Source::comes_back`]): then this function tries to claim it each second, without a bound.
///
/// A device that does not answer, but whose connection is open, is waited for.
///
/// `session` must drop everything that belongs to the claimed function before it returns.
///
/// # Errors
/// The session failed for another reason, or the function cannot be claimed again and does not come
/// back.
pub fn keep_open<S: Source, T>(
    source: &S,
    id: &str,
    claimed: Claimed<S::Hal>,
    stop: Option<BorrowedFd<'_>>,
    mut session: impl FnMut(Claimed<S::Hal>) -> Result<T>,
) -> Result<Option<T>> {
    let mut claimed = claimed;
    loop {
        claimed.1.set_patience(patience(id, stop)?);
        let began = Instant::now();
        let error = match session(claimed) {
            Ok(value) => return Ok(Some(value)),
            Err(error) if is_lost(&error, source.comes_back()) => error,
            Err(error) => return Err(error),
        };
        tracing::warn!("{id}: {error:#}; opening the device again as soon as it is there");
        // A device that loses each connection at once is tried once a second.
        let mut wait = AGAIN.saturating_sub(began.elapsed());
        claimed = loop {
            if is_stopped(stop, wait)? {
                return Ok(None);
            }
            match source.claim(id) {
                Ok(claimed) => break claimed,
                Err(error) if source.comes_back() => tracing::debug!("{id}: {error:#}"),
                Err(error) => return Err(error),
            }
            wait = AGAIN;
        };
    }
}

/// Waits for a device that does not answer as long as its connection is open, or until `stop` is
/// readable.
fn patience(id: &str, stop: Option<BorrowedFd<'_>>) -> Result<Patience> {
    let patience = match stop {
        Some(stop) => Patience::until(stop.try_clone_to_owned()?),
        None => Patience::endless(),
    };
    let id = id.to_owned();
    Ok(patience.on_stall(STALL, move |stalls| match stalls {
        true => tracing::warn!("{id}: the bus does not answer; waiting for it"),
        false => tracing::info!("{id}: the bus answers again"),
    }))
}

/// Whether `error` means that the connection was lost, and can be opened again. `comes_back` says
/// whether a function that has gone can come back.
fn is_lost(error: &anyhow::Error, comes_back: bool) -> bool {
    error.chain().any(|cause| match cause.downcast_ref() {
        Some(Error::Reincarnated) => true,
        Some(Error::Broken(code) | Error::Refused { code, .. })
            if [ErrorCode::NOT_OPEN, ErrorCode::REVOKED].contains(code) =>
        {
            true
        }
        Some(Error::Gone | Error::Broken(ErrorCode::REMOVED)) => comes_back,
        _ => false,
    })
}

/// Waits for `time`. Returns true at once when `stop` is or becomes readable.
fn is_stopped(stop: Option<BorrowedFd<'_>>, time: Duration) -> Result<bool> {
    let end = Instant::now() + time;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let mut fds: Vec<_> =
            stop.iter().map(|stop| PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN)).collect();
        match poll(&mut fds, Some(&Timespec::try_from(left)?)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_connection_is_told_from_a_device_that_failed() {
        let lost = |error: Error, comes_back| {
            is_lost(&anyhow::Error::from(error).context("page"), comes_back)
        };
        for error in [
            Error::Reincarnated,
            Error::Broken(ErrorCode::REVOKED),
            Error::Broken(ErrorCode::NOT_OPEN),
        ] {
            assert!(lost(error, false) && lost(error, true), "{error}");
        }
        for error in [Error::Gone, Error::Broken(ErrorCode::REMOVED)] {
            assert!(!lost(error, false) && lost(error, true), "{error}");
        }
        for error in [
            Error::WrongClass(2),
            Error::Broken(ErrorCode::CORRUPT),
            Error::Corrupt("a ring"),
            Error::NoMemory,
        ] {
            assert!(!lost(error, true), "{error}");
        }
        assert!(!is_lost(&anyhow::anyhow!("the device has gone"), true));
    }

    #[test]
    fn stop_ends_the_wait() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        assert!(!is_stopped(Some(reader.as_fd()), Duration::ZERO).unwrap());
        rustix::io::write(&writer, b"x").unwrap();
        assert!(is_stopped(Some(reader.as_fd()), Duration::from_secs(3600)).unwrap());
    }
}
