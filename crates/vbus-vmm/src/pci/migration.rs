// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The part of a function that its server keeps: how it is stopped, saved and restored, by the
//! migration of VFIO over vfio-user.

use std::sync::atomic::{AtomicU64, Ordering};

use vfio_user_protocol::message::MigrationState;
use vfio_user_protocol::{Client, ClientError};

/// Bytes of a page of memory in a log, if the server wants no other size.
const PAGE: u64 = 4096;

/// Asks the server. The error says why it refuses.
pub(super) type Ask<'a> =
    &'a dyn Fn(&mut dyn FnMut(&mut Client) -> Result<(), ClientError>) -> Result<(), String>;

/// The state of a function's migration.
#[derive(Default)]
pub(super) struct Migration {
    /// The size of a page in the server's log of what the device writes. 0: there is no log.
    page: AtomicU64,
}

impl Migration {
    /// Checks that the server can save the device.
    ///
    /// # Errors
    /// It cannot.
    pub(super) fn check(&self, ask: Ask<'_>) -> Result<(), String> {
        let mut able = false;
        ask(&mut |client| {
            able = client.migration_flags()?.is_some_and(|flags| flags.stop_copy);
            Ok(())
        })?;
        if able { Ok(()) } else { Err("its server cannot save the device's state".into()) }
    }

    /// Lets the server log the pages that the device writes, if it can.
    ///
    /// # Errors
    /// The server refuses.
    pub(super) fn begin_log(&self, ask: Ask<'_>) -> Result<(), String> {
        let mut page = 0;
        ask(&mut |client| {
            if client.logs_dma()? {
                page = client.dma_logging_start(PAGE, &[])?;
            }
            Ok(())
        })?;
        // Smaller pages than were asked for would make the log larger.
        if page != 0 && !(page.is_power_of_two() && page >= PAGE) {
            return Err(format!("its server logs pages of {page} bytes"));
        }
        self.page.store(page, Ordering::Relaxed);
        Ok(())
    }

    /// Ends the log.
    pub(super) fn end_log(&self, ask: Ask<'_>) {
        if self.page.swap(0, Ordering::Relaxed) != 0 {
            // A server that refuses has said so in the log.
            let _ = ask(&mut Client::dma_logging_stop);
        }
    }

    /// Passes address and size of what the device has written to `written`, since the last call or
    /// since the log began. `parts` is the memory. Without a log this is all of it.
    ///
    /// # Errors
    /// The server refuses.
    pub(super) fn take_log(
        &self,
        parts: &[(u64, u64)],
        ask: Ask<'_>,
        written: &mut dyn FnMut(u64, u64),
    ) -> Result<(), String> {
        let page = self.page.load(Ordering::Relaxed);
        for &(base, bytes) in parts {
            if page == 0 {
                written(base, bytes);
                continue;
            }
            let mut words = None;
            ask(&mut |client| {
                match client.dma_logging_report(base, bytes, page) {
                    // The server has no room for its log.
                    Err(e) if !e.is_final() => tracing::debug!("no log: {e}"),
                    result => words = Some(result?),
                }
                Ok(())
            })?;
            let Some(words) = words else {
                written(base, bytes);
                continue;
            };
            for (number, word) in (0..).zip(words).filter(|(_, word)| *word != 0) {
                for bit in (0..64).filter(|bit| word & 1 << bit != 0) {
                    // Bits beyond the end stand for nothing.
                    let at = u64::checked_mul(number * 64 + bit, page).filter(|at| *at < bytes);
                    if let Some(at) = at {
                        written(base + at, page.min(bytes - at));
                    }
                }
            }
        }
        Ok(())
    }

    /// Stops the device. When this returns, it writes no memory and signals nothing.
    ///
    /// # Errors
    /// The server refuses.
    pub(super) fn stop(&self, ask: Ask<'_>) -> Result<(), String> {
        set(ask, MigrationState::Stop)
    }

    /// Lets the device run on.
    ///
    /// # Errors
    /// The server refuses.
    pub(super) fn run(&self, ask: Ask<'_>) -> Result<(), String> {
        set(ask, MigrationState::Running)
    }

    /// Passes the state of the device to `piece`, once after each [`stop`](Self::stop). The device
    /// stays in `STOP_COPY`: `stop` and [`run`](Self::run) lead from there, too, and a device that
    /// goes on elsewhere needs neither.
    ///
    /// # Errors
    /// The server refuses, or `piece` fails.
    pub(super) fn read(
        &self,
        ask: Ask<'_>,
        piece: &mut dyn FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), String> {
        set(ask, MigrationState::StopCopy)?;
        loop {
            let (mut data, mut more) = (Vec::new(), false);
            ask(&mut |client| {
                (data, more) = client.migration_read()?;
                Ok(())
            })?;
            if !data.is_empty() {
                piece(&data)?;
            }
            if !more {
                return Ok(());
            }
        }
    }

    /// Lets the device take a new state.
    ///
    /// # Errors
    /// The server refuses.
    pub(super) fn begin_restore(&self, ask: Ask<'_>) -> Result<(), String> {
        set(ask, MigrationState::Resuming)
    }

    /// Writes the next piece of a state.
    ///
    /// # Errors
    /// The server refuses.
    pub(super) fn write(&self, piece: &[u8], ask: Ask<'_>) -> Result<(), String> {
        ask(&mut |client| client.migration_write(piece))
    }
}

fn set(ask: Ask<'_>, state: MigrationState) -> Result<(), String> {
    ask(&mut |client| client.set_migration_state(state))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;
    use std::thread::JoinHandle;

    use rustix::event::{EventfdFlags, eventfd};
    use vfio_user_protocol::message::{DmaRange, LoggingReport, MigrationFlags};
    use vfio_user_protocol::migration::{ArcFailure, MigrationArc};
    use vfio_user_protocol::{Errno, IrqAction, IrqInfo, RegionInfo, Server, Target};

    use super::*;

    /// A device that has a state of some bytes, and writes page 3 and page 65 again and again.
    struct Device {
        state: Vec<u8>,
        read: usize,
        /// How often its state was read.
        reads: Arc<AtomicU32>,
        /// It can be saved.
        able: bool,
        /// It has a log, and room for it.
        logs: bool,
        room: bool,
        /// The size of a page in its log, if it is not that of the client.
        page: Option<u64>,
    }

    impl Target for Device {
        fn region_info(&self, _: u32) -> RegionInfo {
            RegionInfo::new(0, false, false)
        }

        fn irq_info(&self, _: u32) -> IrqInfo {
            IrqInfo::messages(0)
        }

        fn read(&mut self, _: u32, _: u64, _: &mut [u8]) -> Result<(), Errno> {
            Err(Errno::INVAL)
        }

        fn write(&mut self, _: u32, _: u64, _: &[u8]) -> Result<(), Errno> {
            Err(Errno::INVAL)
        }

        fn set_irqs(&mut self, _: u32, _: IrqAction) -> Result<(), Errno> {
            Err(Errno::INVAL)
        }

        fn migration(&mut self) -> Option<MigrationFlags> {
            let flags = MigrationFlags { stop_copy: true, ..MigrationFlags::default() };
            self.able.then_some(flags)
        }

        fn migrate(&mut self, arc: MigrationArc) -> Result<(), ArcFailure> {
            match arc {
                MigrationArc::BeginSaving => self.read = 0,
                MigrationArc::BeginRestoring => self.state.clear(),
                MigrationArc::EndRestoring if self.state != [7; 3000] => {
                    return Err(ArcFailure::Failed(Errno::INVAL));
                }
                _ => {}
            }
            Ok(())
        }

        fn migration_read(&mut self, data: &mut [u8]) -> Result<usize, Errno> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let rest = &self.state[self.read..];
            let count = rest.len().min(data.len());
            data[..count].copy_from_slice(&rest[..count]);
            self.read += count;
            Ok(count)
        }

        fn migration_write(&mut self, data: &[u8]) -> Result<(), Errno> {
            self.state.extend(data);
            Ok(())
        }

        fn logs_dma(&self) -> bool {
            self.logs
        }

        fn dma_logging_start(&mut self, page_size: u64, _: &[DmaRange]) -> Result<u64, Errno> {
            Ok(self.page.unwrap_or(page_size))
        }

        fn reset(&mut self) -> Result<(), Errno> {
            Ok(())
        }

        fn disconnected(&mut self) {}

        fn dma_logging_report(
            &mut self,
            report: LoggingReport,
            bitmap: &mut [u64],
        ) -> Result<(), Errno> {
            if !self.room {
                return Err(Errno::NOSPC);
            }
            if report.iova == 0 {
                bitmap[0] |= 1 << 3;
                if let Some(word) = bitmap.get_mut(1) {
                    *word |= 1 << 1;
                }
            }
            Ok(())
        }
    }

    /// A device, its server, and a client.
    struct Fixture {
        client: std::sync::Mutex<Client>,
        migration: Migration,
        stop: OwnedFd,
        thread: Option<JoinHandle<()>>,
    }

    impl Fixture {
        fn new(change: impl FnOnce(&mut Device)) -> Fixture {
            let mut device = Device {
                state: vec![7; 3000],
                read: 0,
                reads: Arc::default(),
                able: true,
                logs: true,
                room: true,
                page: None,
            };
            change(&mut device);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("device.sock");
            let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            let mut server = Server::bind(&path, "device", device).unwrap();
            let stopped = stop.try_clone().unwrap();
            let thread = std::thread::spawn(move || server.run_until(stopped.as_fd()).unwrap());
            let client = Client::connect(&path).unwrap().into();
            Fixture { client, migration: Migration::default(), stop, thread: Some(thread) }
        }

        fn act<R>(
            &self,
            act: impl FnOnce(&Migration, Ask<'_>) -> Result<R, String>,
        ) -> Result<R, String> {
            act(&self.migration, &|ask| {
                ask(&mut self.client.lock().unwrap()).map_err(|e| e.to_string())
            })
        }

        /// What the log tells of two parts of memory, in pages.
        fn log(&self) -> Vec<(u64, u64)> {
            let mut pages = Vec::new();
            let parts = [(0, 100 * PAGE), (1 << 32, PAGE)];
            let mut written = |at: u64, bytes: u64| pages.push((at / PAGE, bytes / PAGE));
            self.act(|migration, ask| migration.take_log(&parts, ask, &mut written)).unwrap();
            pages
        }
    }

    impl Drop for Fixture {
        fn drop(&mut self) {
            rustix::io::write(&self.stop, &1u64.to_ne_bytes()).unwrap();
            self.thread.take().map(JoinHandle::join);
        }
    }

    #[test]
    fn a_device_is_stopped_and_goes_on_in_another_one() {
        let (from, to) = (Fixture::new(|_| ()), Fixture::new(|device| device.state.clear()));
        from.act(|migration, ask| migration.check(ask)).unwrap();
        from.act(|migration, ask| migration.stop(ask)).unwrap();
        to.act(|migration, ask| migration.begin_restore(ask)).unwrap();
        let mut piece = |bytes: &[u8]| to.act(|migration, ask| migration.write(bytes, ask));
        from.act(|migration, ask| migration.read(ask, &mut piece)).unwrap();
        to.act(|migration, ask| migration.run(ask)).unwrap();
        // The source can go on as well, and be saved again.
        from.act(|migration, ask| migration.run(ask)).unwrap();
        let mut bytes = 0;
        let mut count = |piece: &[u8]| {
            bytes += piece.len();
            Ok(())
        };
        from.act(|migration, ask| migration.read(ask, &mut count)).unwrap();
        assert_eq!(bytes, 3000);
        from.act(|migration, ask| migration.stop(ask)).unwrap();
        let mut fail = |_: &[u8]| Err("no room".to_owned());
        let failed = from.act(|migration, ask| migration.read(ask, &mut fail));
        assert_eq!(failed, Err("no room".into()));
    }

    /// A reply that is not full is the last one, so that a small state is one round trip.
    #[test]
    fn a_state_is_read_until_a_reply_is_not_full() {
        const FULL: usize = 1 << 20;
        for (bytes, expected) in [(0, 1), (3000, 1), (FULL - 1, 1), (FULL, 2), (FULL + 1, 2)] {
            let reads = Arc::new(AtomicU32::new(0));
            let device = Fixture::new(|device| {
                device.state = vec![7; bytes];
                device.reads = Arc::clone(&reads);
            });
            let mut count = 0;
            let mut piece = |piece: &[u8]| {
                count += piece.len();
                Ok(())
            };
            device.act(|migration, ask| migration.stop(ask)).unwrap();
            device.act(|migration, ask| migration.read(ask, &mut piece)).unwrap();
            assert_eq!((count, reads.load(Ordering::Relaxed)), (bytes, expected));
            // It stays in the stream, from which both ways lead on.
            device.act(|migration, ask| migration.stop(ask)).unwrap();
            device.act(|migration, ask| migration.run(ask)).unwrap();
        }
    }

    #[test]
    fn a_state_that_is_none_is_refused() {
        let to = Fixture::new(|_| ());
        to.act(|migration, ask| migration.begin_restore(ask)).unwrap();
        to.act(|migration, ask| migration.write(&[1], ask)).unwrap();
        to.act(|migration, ask| migration.run(ask)).unwrap_err();
        let unable = Fixture::new(|device| device.able = false);
        let fault = unable.act(|migration, ask| migration.check(ask)).unwrap_err();
        assert!(fault.contains("cannot save"));
    }

    #[test]
    fn what_a_device_writes_is_told() {
        let device = Fixture::new(|_| ());
        device.act(|migration, ask| migration.begin_log(ask)).unwrap();
        assert_eq!(device.log(), [(3, 1), (65, 1)]);
        let all = [(0, 100), (1 << 20, 1)];
        // After the end of the log, without a log, and with one that has no room.
        let end = |migration: &Migration, ask: Ask<'_>| {
            migration.end_log(ask);
            Ok(())
        };
        device.act(end).unwrap();
        assert_eq!(device.log(), all);
        for (logs, room) in [(false, true), (true, false)] {
            let device = Fixture::new(|device| (device.logs, device.room) = (logs, room));
            device.act(|migration, ask| migration.begin_log(ask)).unwrap();
            assert_eq!(device.log(), all);
        }
    }

    #[test]
    fn the_server_may_choose_larger_pages() {
        let log = |page| {
            let device = Fixture::new(|device| device.page = Some(page));
            device.act(|migration, ask| migration.begin_log(ask)).map(|()| device.log())
        };
        assert_eq!(log(16 * PAGE), Ok(vec![(48, 16)]));
        // Its bits are all beyond the end of the memory, and of any number.
        assert_eq!(log(1 << 63), Ok(vec![]));
        for page in [1, PAGE / 2, PAGE + 1] {
            assert!(log(page).unwrap_err().contains("pages of"), "{page}");
        }
    }
}
