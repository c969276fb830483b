// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ledger: records the attributes that threads had before the device changed them. Another
//! process reads the ledger if this one is killed.
//!
//! The ledger is a file in memory, with an entry for each thread whose class is changed at the
//! moment. The device writes an entry before it changes the thread, and clears the entry when it
//! has restored the thread. A guardian process holds the same file. It reads the file only after
//! this process has ended, so the two exchange no messages. A slot lies within one page of the
//! file. So a process that is killed has written a slot completely or not at all.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::attributes::{self, Attributes};
use vbus_core::lock;

/// Bytes of a slot. It holds an entry in JSON, filled up with spaces, or zeros.
const SLOT: usize = 1024;
const _: () = assert!(4096 % SLOT == 0);

/// Runs a process that outlives this one and restores the threads.
pub trait Guardian: Send + Sync {
    /// The ledger calls this before a thread's first change. After the call, another process holds
    /// `ledger`, and calls [`restore`] on it when this process has ended in any way. The ledger
    /// may call this again at any time, also from several threads. The call may start the other
    /// process, but must not wait for it.
    fn attend(&self, ledger: BorrowedFd<'_>) -> io::Result<()>;
}

/// See the module.
pub struct Ledger {
    file: File,
    guardian: Arc<dyn Guardian>,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    /// The highest number of slots that have been in use at the same time.
    count: u64,
    free: Vec<u64>,
    /// Why there is no guardian.
    error: Option<String>,
}

/// The record of a change that the device is about to make.
#[derive(Clone, Copy)]
pub struct Entry {
    /// The thread's own attributes.
    pub own: Attributes,
    /// The thread's own nice value, even if it has no effect in its class.
    pub own_nice: i32,
    /// The setting that the thread has now ...
    pub from: Attributes,
    /// ... and the one that it is about to get.
    pub to: Attributes,
}

/// An entry as the file holds it.
#[derive(Serialize, Deserialize)]
struct Record {
    tid: i32,
    start: u64,
    own: Attributes,
    own_nice: i32,
    from: Attributes,
    to: Attributes,
}

impl Ledger {
    /// Makes an empty ledger for `guardian`.
    pub fn new(guardian: Arc<dyn Guardian>) -> io::Result<Arc<Ledger>> {
        let file = File::from(memfd_create("vbus-sched", MemfdFlags::CLOEXEC)?);
        Ok(Arc::new(Ledger { file, guardian, slots: Mutex::default() }))
    }

    /// Why no guardian would restore threads if this process were killed now.
    pub fn error(&self) -> Option<String> {
        lock(&self.slots).error.clone()
    }

    /// Takes a slot for thread `tid` before its first change. `None`: there is no guardian; the log
    /// says so once.
    pub(super) fn begin(self: &Arc<Self>, tid: i32) -> Option<Note> {
        let start =
            match self.guardian.attend(self.file.as_fd()).and_then(|()| Ok(start_time(tid)?)) {
                Ok(start) => start,
                // The thread has just ended, so the change will fail.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => return None,
                Err(error) => return self.fail(error.to_string()),
            };
        let mut slots = lock(&self.slots);
        slots.error = None;
        let slot = slots.free.pop().unwrap_or_else(|| {
            slots.count += 1;
            slots.count - 1
        });
        drop(slots);
        Some(Note { ledger: self.clone(), slot, tid, start })
    }

    fn fail<T>(&self, error: String) -> Option<T> {
        let mut slots = lock(&self.slots);
        if slots.error.as_ref() != Some(&error) {
            tracing::warn!(
                error,
                "there is no guardian: if this process is killed, threads keep their present class"
            );
        }
        slots.error = Some(error);
        None
    }

    fn write(&self, slot: u64, bytes: &[u8; SLOT]) -> io::Result<()> {
        self.file.write_all_at(bytes, slot * SLOT as u64)
    }
}

/// The slot of a thread in the ledger. Dropping it clears the slot.
pub struct Note {
    ledger: Arc<Ledger>,
    slot: u64,
    tid: i32,
    start: u64,
}

impl Note {
    /// Records the change that is about to be made. Returns false if that failed; the former entry
    /// may then be lost.
    pub fn write(&self, entry: &Entry) -> bool {
        let Entry { own, own_nice, from, to } = *entry;
        let record = Record { tid: self.tid, start: self.start, own, own_nice, from, to };
        let mut bytes = [b' '; SLOT];
        let written = serde_json::to_writer(&mut bytes[..], &record).map_err(io::Error::from);
        match written.and_then(|()| self.ledger.write(self.slot, &bytes)) {
            Ok(()) => true,
            Err(error) => self.ledger.fail::<()>(error.to_string()).is_some(),
        }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        // Bytes of the file that were written before can be written again.
        if let Err(error) = self.ledger.write(self.slot, &[0; SLOT]) {
            tracing::warn!(%error, "cannot clear a thread's entry");
        }
        lock(&self.ledger.slots).free.push(self.slot);
    }
}

/// The start time of thread `tid`, in ticks since boot. No two threads have the same id and the
/// same start time.
fn start_time(tid: i32) -> Result<u64, Errno> {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat"));
    let stat = stat.map_err(|error| match Errno::from_io_error(&error) {
        None | Some(Errno::NOENT) => Errno::SRCH,
        Some(errno) => errno,
    })?;
    // Parse after the thread's name, which may contain anything. The first field there is field 3.
    let field = stat
        .rsplit_once(") ")
        .and_then(|(_, fields)| fields.split_ascii_whitespace().nth(22 - 3)?.parse().ok());
    field.ok_or(Errno::SRCH)
}

/// The result of [`restore`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreCounts {
    /// Threads whose own class was restored.
    pub restored: u32,
    /// Threads that had ended, or that another program had changed.
    pub left: u32,
    /// Threads that the kernel refused to change.
    pub failed: u32,
}

/// Restores the own class of every thread in `ledger`, unless the thread has ended or another
/// program has changed its class. The guardian calls this after the process that wrote the ledger
/// has ended.
pub fn restore(ledger: &File) -> io::Result<RestoreCounts> {
    let mut outcome = RestoreCounts::default();
    let mut bytes = [0; SLOT];
    for slot in 0.. {
        match ledger.read_exact_at(&mut bytes, slot * SLOT as u64) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
        if bytes[0] == 0 {
            continue;
        }
        let record = serde_json::from_slice::<Record>(&bytes).map_err(|_| Errno::INVAL);
        match record.and_then(|record| restore_one(&record)) {
            Ok(true) => outcome.restored += 1,
            Ok(false) | Err(Errno::SRCH) => outcome.left += 1,
            Err(_) => outcome.failed += 1,
        }
    }
    Ok(outcome)
}

fn restore_one(record: &Record) -> Result<bool, Errno> {
    let now = attributes::get(record.tid)?;
    // Check after the reads: the values are then certainly this thread's.
    if start_time(record.tid)? != record.start
        || !(record.from.is_still(now) || record.to.is_still(now))
    {
        return Ok(false);
    }
    attributes::restore(record.tid, record.own, record.own_nice)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Setting;
    use vbus_core::shm::abi::sched as abi;

    struct Nobody;

    impl Guardian for Nobody {
        fn attend(&self, _ledger: BorrowedFd<'_>) -> io::Result<()> {
            Ok(())
        }
    }

    /// Runs `test` on a thread of its own, because this changes the thread. Lowers the thread's
    /// priority, which needs no privileges, and passes its ledger, its note and its former
    /// attributes.
    fn changed(test: impl FnOnce(&Arc<Ledger>, Note, Entry) + Send + 'static) {
        let thread = std::thread::spawn(|| {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            let ledger = Ledger::new(Arc::new(Nobody)).unwrap();
            let note = ledger.begin(tid).unwrap();
            let own = attributes::get(tid).unwrap();
            let to = own.with(Setting { class: abi::CLASS_BATCH, priority: 0 });
            let entry = Entry { own, own_nice: 0, from: own, to };
            assert!(note.write(&entry));
            attributes::set(tid, to).unwrap();
            test(&ledger, note, entry);
        });
        thread.join().unwrap();
    }

    #[test]
    fn recorded_attributes_are_restored_exactly_once() {
        changed(|ledger, note, entry| {
            let outcome = restore(&ledger.file).unwrap();
            assert_eq!(outcome, RestoreCounts { restored: 1, ..RestoreCounts::default() });
            assert!(entry.own.is_still(attributes::get(note.tid).unwrap()));
            drop(note);
            assert_eq!(restore(&ledger.file).unwrap(), RestoreCounts::default());
        });
    }

    #[test]
    fn other_threads_and_other_settings_do_not_change() {
        changed(|ledger, mut note, entry| {
            // The id belongs to another thread.
            note.start += 1;
            assert!(note.write(&entry));
            let left = RestoreCounts { left: 1, ..RestoreCounts::default() };
            assert_eq!(restore(&ledger.file).unwrap(), left);
            assert!(entry.to.is_still(attributes::get(note.tid).unwrap()));
            // Another program has changed it.
            note.start -= 1;
            assert!(note.write(&entry));
            let other = entry.own.with(Setting { class: abi::CLASS_BATCH, priority: 9 });
            attributes::set(note.tid, other).unwrap();
            assert_eq!(restore(&ledger.file).unwrap(), left);
            assert!(other.is_still(attributes::get(note.tid).unwrap()));
        });
    }

    #[test]
    fn slots_are_used_again_and_hold_the_longest_entry() {
        let ledger = Ledger::new(Arc::new(Nobody)).unwrap();
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let own = attributes::get(tid).unwrap();
        for _ in 0..3 {
            let notes: Vec<_> = (0..5).map(|_| ledger.begin(tid).unwrap()).collect();
            assert!(notes.iter().all(|note| note.write(&Entry {
                own,
                own_nice: -20,
                from: own,
                to: own
            })));
        }
        assert_eq!(ledger.file.metadata().unwrap().len(), 5 * SLOT as u64);
        let longest = |attributes| {
            let mut value = serde_json::to_value::<Attributes>(attributes).unwrap();
            value
                .as_object_mut()
                .unwrap()
                .values_mut()
                .for_each(|number| *number = u64::MAX.into());
            value.to_string().len()
        };
        assert!(longest(own) * 3 + 200 <= SLOT, "{}", longest(own));
    }
}
