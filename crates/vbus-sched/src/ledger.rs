//! The ledger: notes what threads were before they were changed. Another process reads it if this
//! one is killed.
//!
//! The ledger is a file in memory, with an entry for each thread that is changed at the moment. An
//! entry is written before its thread is changed, and cleared when the thread is put back. A
//! guardian process holds the same file. It reads the file only after this process has ended, so
//! nobody has to tell it anything. A slot lies within one page of the file. So a process that is
//! killed has written a slot as a whole or not at all.

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

/// Bytes of a slot: an entry in JSON, filled up with spaces; zeros, if there is none.
const SLOT: usize = 1024;
const _: () = assert!(4096 % SLOT == 0);

/// Keeps a process that outlives this one.
pub trait Guardian: Send + Sync {
    /// Called before a thread's first change. From now on another process holds `ledger`, and calls
    /// [`put_back`] on it when this process has ended in any way. May be called again at any time,
    /// also from several threads. It may start that process, and must not wait for it.
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
    /// The most slots that have been in use at a time.
    count: u64,
    free: Vec<u64>,
    /// Why there is no guardian.
    error: Option<String>,
}

/// What the ledger notes of a change that is about to be made.
#[derive(Clone, Copy)]
pub struct Entry {
    /// What the thread was at first.
    pub own: Attributes,
    /// Its nice value, also if it has no effect in its own class.
    pub own_nice: i32,
    /// What it is now ...
    pub from: Attributes,
    /// ... and will be.
    pub to: Attributes,
}

/// An entry as it stands in the file.
#[derive(Serialize, Deserialize)]
struct Line {
    tid: i32,
    start: u64,
    own: Attributes,
    own_nice: i32,
    from: Attributes,
    to: Attributes,
}

impl Ledger {
    /// An empty one, which `guardian` is to look after.
    pub fn new(guardian: Arc<dyn Guardian>) -> io::Result<Arc<Ledger>> {
        let file = File::from(memfd_create("vbus-sched", MemfdFlags::CLOEXEC)?);
        Ok(Arc::new(Ledger { file, guardian, slots: Mutex::default() }))
    }

    /// Why nobody would put threads back if this process were killed now.
    pub fn error(&self) -> Option<String> {
        lock(&self.slots).error.clone()
    }

    /// A slot for thread `tid`, which is about to be changed for the first time. `None`: there is
    /// no guardian, which the log says once.
    pub(super) fn begin(self: &Arc<Self>, tid: i32) -> Option<Note> {
        let start =
            match self.guardian.attend(self.file.as_fd()).and_then(|()| Ok(start_time(tid)?)) {
                Ok(start) => start,
                // The thread has just ended; its change will fail.
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
                "no guardian: if this process is killed, threads keep the class that they have then"
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
    /// Notes the change that is about to be made. False: the note failed, and the former entry may
    /// be lost.
    pub fn write(&self, entry: &Entry) -> bool {
        let Entry { own, own_nice, from, to } = *entry;
        let line = Line { tid: self.tid, start: self.start, own, own_nice, from, to };
        let mut bytes = [b' '; SLOT];
        let written = serde_json::to_writer(&mut bytes[..], &line).map_err(io::Error::from);
        match written.and_then(|()| self.ledger.write(self.slot, &bytes)) {
            Ok(()) => true,
            Err(error) => self.ledger.fail::<()>(error.to_string()).is_some(),
        }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        // Room that has been written before can be written again.
        if let Err(error) = self.ledger.write(self.slot, &[0; SLOT]) {
            tracing::warn!(%error, "cannot clear a thread's entry");
        }
        lock(&self.ledger.slots).free.push(self.slot);
    }
}

/// When thread `tid` began, in ticks since the machine's start. No two threads have the same id and
/// the same time.
fn start_time(tid: i32) -> Result<u64, Errno> {
    let stat = std::fs::read_to_string(format!("/proc/{tid}/stat"));
    let stat = stat.map_err(|error| match Errno::from_io_error(&error) {
        None | Some(Errno::NOENT) => Errno::SRCH,
        Some(errno) => errno,
    })?;
    // Behind the name, which may hold anything; the first field there is the third of all.
    let field = stat
        .rsplit_once(") ")
        .and_then(|(_, fields)| fields.split_ascii_whitespace().nth(22 - 3)?.parse().ok());
    field.ok_or(Errno::SRCH)
}

/// What [`put_back`] has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Threads that have their own class again.
    pub restored: u32,
    /// Threads that had ended, or that somebody else had changed.
    pub left: u32,
    /// Threads that the kernel would not change.
    pub failed: u32,
}

/// Gives every thread in `ledger` its own class back, unless it has ended or somebody else has
/// given it another one. For the guardian, once the process that wrote it has ended.
pub fn put_back(ledger: &File) -> io::Result<Outcome> {
    let mut outcome = Outcome::default();
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
        let line = serde_json::from_slice::<Line>(&bytes).map_err(|_| Errno::INVAL);
        match line.and_then(|line| put_back_one(&line)) {
            Ok(true) => outcome.restored += 1,
            Ok(false) | Err(Errno::SRCH) => outcome.left += 1,
            Err(_) => outcome.failed += 1,
        }
    }
    Ok(outcome)
}

fn put_back_one(line: &Line) -> Result<bool, Errno> {
    let now = attributes::get(line.tid)?;
    // After the reading, so that the values are this thread's for sure.
    if start_time(line.tid)? != line.start || !(line.from.is_still(now) || line.to.is_still(now)) {
        return Ok(false);
    }
    attributes::put_back(line.tid, line.own, line.own_nice)?;
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

    /// On a thread of its own, for it changes that: lowers its priority, which everybody may, and
    /// hands over its ledger, its note, and what it was.
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
    fn what_was_noted_is_put_back_once_and_only_once() {
        changed(|ledger, note, entry| {
            let outcome = put_back(&ledger.file).unwrap();
            assert_eq!(outcome, Outcome { restored: 1, ..Outcome::default() });
            assert!(entry.own.is_still(attributes::get(note.tid).unwrap()));
            drop(note);
            assert_eq!(put_back(&ledger.file).unwrap(), Outcome::default());
        });
    }

    #[test]
    fn other_threads_and_other_settings_are_left_alone() {
        changed(|ledger, mut note, entry| {
            // The id belongs to another thread.
            note.start += 1;
            assert!(note.write(&entry));
            let left = Outcome { left: 1, ..Outcome::default() };
            assert_eq!(put_back(&ledger.file).unwrap(), left);
            assert!(entry.to.is_still(attributes::get(note.tid).unwrap()));
            // Somebody else has changed it.
            note.start -= 1;
            assert!(note.write(&entry));
            let other = entry.own.with(Setting { class: abi::CLASS_BATCH, priority: 9 });
            attributes::set(note.tid, other).unwrap();
            assert_eq!(put_back(&ledger.file).unwrap(), left);
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
