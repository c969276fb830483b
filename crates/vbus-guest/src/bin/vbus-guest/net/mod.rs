// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest net`: makes a TAP interface of this machine for each NIC of the bus.

mod control;
mod frames;
mod nic;
mod options;
mod priority;
mod queue;
mod tap;

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use vbus_shm::abi::class;

pub use options::Options;
use vbus_cli::{log, signals};
use vbus_guest::{Claimed, Source, claim};

/// The longest time between two scans of the source. A scan also finds threads that have ended.
const TICK: Duration = Duration::from_secs(1);
/// The shortest and the longest pause after a failure of a function. The first pause is short,
/// because a function that has just come may not be ready. Later pauses are longer.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// A failure that lasts longer than this is logged.
const TELL: Duration = Duration::from_secs(1);

/// The thread that serves a NIC.
struct Running {
    stop: OwnedFd,
    thread: JoinHandle<Result<()>>,
}

impl Running {
    fn start<S>(
        source: &Arc<S>,
        id: &str,
        claimed: Claimed<S::Hal>,
        options: &Options,
        done: &OwnedFd,
    ) -> Result<Running>
    where
        S: Source + Send + Sync + 'static,
    {
        let source = Arc::clone(source);
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (id, options, stopped, done) =
            (id.to_owned(), options.clone(), stop.try_clone()?, done.try_clone()?);
        let serve = move || {
            let result = nic::serve(&*source, &id, claimed, &options, &stopped);
            let _ = rustix::io::write(&done, &1u64.to_ne_bytes());
            result
        };
        let thread = std::thread::Builder::new().name("nic".into()).spawn(serve)?;
        Ok(Running { stop, thread })
    }

    fn stop(self) -> Result<()> {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        self.join()
    }

    fn join(self) -> Result<()> {
        self.thread.join().unwrap_or_else(|_| Err(anyhow!("the NIC's thread panicked")))
    }
}

/// Serves NICs of `source` until SIGINT or SIGTERM.
pub fn run<S>(source: &Arc<S>, options: &Options) -> Result<()>
where
    S: Source + Send + Sync + 'static,
{
    if let Some(command) = &options.command {
        return control::run(command);
    }
    log::start();
    let signals = signals::termination()?;
    let done = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    if options.all {
        run_all(source, options, &signals, &done)
    } else {
        run_one(source, options, &signals, &done)
    }
}

fn run_one<S>(source: &Arc<S>, options: &Options, signals: &OwnedFd, done: &OwnedFd) -> Result<()>
where
    S: Source + Send + Sync + 'static,
{
    let (found, claimed) = claim(&**source, class::VENET, "venet", options.device.as_deref())?;
    let running = Running::start(source, &found.id, claimed, options, done)?;
    wait(&[signals, done], None)?;
    let result = if running.thread.is_finished() { running.join() } else { running.stop() };
    result.with_context(|| found.id)
}

fn run_all<S>(source: &Arc<S>, options: &Options, signals: &OwnedFd, done: &OwnedFd) -> Result<()>
where
    S: Source + Send + Sync + 'static,
{
    let changes = source.changes();
    let mut running: BTreeMap<String, Running> = BTreeMap::new();
    let mut failed: BTreeMap<String, Failure> = BTreeMap::new();
    // Devices of other classes, and functions that are none of vbus. Some sources know what a
    // function is only once it was opened.
    let mut others: BTreeSet<String> = BTreeSet::new();
    let mut scanned = false;
    loop {
        let found = match source.scan() {
            // The source may come back.
            Err(error) if scanned => {
                tracing::debug!("{error:#}");
                Vec::new()
            }
            found => found?,
        };
        scanned = true;
        let there = |id: &String| found.iter().any(|found| found.id == *id);
        // A bus that is just starting may have made the NIC after the scan. A second scan, after
        // the bus has answered, finds it.
        let left = |id: &String| {
            source.has_left(id)
                && source.scan().is_ok_and(|found| found.iter().all(|found| found.id != *id))
        };
        let gone: Vec<String> = running
            .iter()
            // A NIC whose bus has died keeps its interface until the bus is there again.
            .filter(|(id, nic)| nic.thread.is_finished() || !there(id) && left(id))
            .map(|(id, _)| id.clone())
            .collect();
        failed.retain(|id, _| there(id));
        others.retain(&there);
        for id in gone {
            let Some(nic) = running.remove(&id) else { continue };
            match nic.stop() {
                Err(error) if error.chain().any(is_no_nic) => drop(others.insert(id)),
                Err(error) if there(&id) => {
                    failed.entry(id.clone()).or_default().happened(&id, &error)
                }
                // The thread ended because the device has gone. Its error does not matter.
                _ => tracing::info!("{id} has gone"),
            }
        }
        for found in found.iter().filter(|found| found.class.is_none_or(|c| c == class::VENET)) {
            let waits = failed.get(&found.id).is_some_and(|failure| !failure.wait().is_zero());
            if waits || running.contains_key(&found.id) || others.contains(&found.id) {
                continue;
            }
            let started = source
                .claim(&found.id)
                .and_then(|claimed| Running::start(source, &found.id, claimed, options, done));
            match started {
                Ok(nic) => {
                    running.insert(found.id.clone(), nic);
                }
                Err(error) => {
                    failed.entry(found.id.clone()).or_default().happened(&found.id, &error)
                }
            }
        }
        let mut fds = vec![signals, done];
        fds.extend(&changes);
        let again = failed.values().map(Failure::wait).min().unwrap_or(TICK);
        let ready = wait(&fds, Some(again.min(TICK)))?;
        if ready[0] {
            break;
        }
        if ready[1] {
            let _ = rustix::io::read(done, &mut [0; 8]);
        }
        if let (Some(changes), Some(true)) = (&changes, ready.get(2)) {
            // The messages do not matter: the next scan finds the changes.
            while rustix::io::read(changes, &mut [0; 4096]).is_ok_and(|n| n > 0) {}
        }
    }
    for (id, nic) in running {
        if let Err(error) = nic.stop() {
            tracing::warn!("{id}: {error:#}");
        }
    }
    Ok(())
}

fn is_no_nic(error: &(dyn std::error::Error + 'static)) -> bool {
    use vbus_driver::Error;
    matches!(error.downcast_ref(), Some(Error::WrongClass(_) | Error::NotVbus))
}

/// The failures of a function that cannot be driven.
#[derive(Default)]
struct Failure {
    /// The times of the first failure and of the last.
    times: Option<(Instant, Instant)>,
    /// The text that was logged last.
    told: String,
}

impl Failure {
    fn happened(&mut self, id: &str, error: &anyhow::Error) {
        let now = Instant::now();
        // After a time without failures, the count begins again.
        let first = self
            .times
            .filter(|(_, last)| now - *last < 2 * AGAIN.1)
            .map_or(now, |(first, _)| first);
        self.times = Some((first, now));
        let text = format!("{error:#}");
        if now - first >= TELL && self.told != text {
            tracing::warn!("{id}: {text}; trying again");
            self.told = text;
        }
    }

    /// The time until the next attempt.
    fn wait(&self) -> Duration {
        let Some((first, last)) = self.times else { return Duration::ZERO };
        (last - first).clamp(AGAIN.0, AGAIN.1).saturating_sub(last.elapsed())
    }
}

/// Waits until one of `fds` is readable, at most for `timeout`. Returns which are readable.
fn wait(fds: &[&OwnedFd], timeout: Option<Duration>) -> Result<Vec<bool>> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(*fd, PollFlags::IN)).collect();
    let end = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    loop {
        let left = end.map(|end| end.saturating_duration_since(Instant::now()));
        let left = left.map(Timespec::try_from).transpose()?;
        match poll(&mut polled, left.as_ref()) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
    Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_after_a_failure_grows() {
        let mut failure = Failure::default();
        assert_eq!(failure.wait(), Duration::ZERO);
        failure.happened("f", &anyhow!("no"));
        assert!(failure.wait() <= AGAIN.0);
        let back = |by: Duration| Instant::now().checked_sub(by).unwrap();
        // The failures began 3 s ago and have gone on.
        failure.times = Some((back(Duration::from_secs(3)), back(Duration::from_secs(1))));
        failure.happened("f", &anyhow!("no"));
        assert!(failure.wait() > Duration::from_millis(1500) && failure.wait() <= AGAIN.1);
        assert_eq!(failure.told, "no");
        // There was no failure for a minute in between.
        failure.times = Some((back(Duration::from_secs(90)), back(Duration::from_secs(60))));
        failure.happened("f", &anyhow!("no"));
        assert!(failure.wait() <= AGAIN.0);
    }

    #[test]
    fn a_device_of_another_class_is_told_from_other_errors() {
        use vbus_driver::Error;
        let is_other = |error: anyhow::Error| error.context("there").chain().any(is_no_nic);
        assert!(is_other(Error::WrongClass(2).into()) && is_other(Error::NotVbus.into()));
        assert!(!is_other(Error::Gone.into()) && !is_other(anyhow!("class 2")));
    }
}
