// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a function keeps in memory that outlives this process, for a bus that has a keeper
//! (spec/keeper.md, "Memory of a virtio function"): the buffers in flight of each queue, and what
//! the driver has chosen by commands. Neither changes by a message, so neither is in a state that
//! the keeper has.
//!
//! The next process copies the memory before it reads it: whoever had the former process may still
//! write there.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use rustix::fs::{
    MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create,
};
use serde_json::Value;
use vbus_core::memory::PAGE;
use vbus_core::{Access, MemoryContext, View, lock};

use crate::device::Kind;
use crate::queue::{
    BadState, Chain, Format, InFlightRegion, Layout, Position, Queue, RingFeatures,
};

/// The word that says where the choices are: bit 0 is the place, and the others are their bytes.
/// 0: there are none.
const WORD: u64 = 0;
/// Two places for the choices, and the bytes of each.
const PLACES: u64 = PAGE;
const PLACE_BYTES: u64 = 64 << 10;
/// The regions of the queues.
const REGIONS: u64 = PLACES + 2 * PLACE_BYTES;

/// The memory of a function.
pub struct Kept {
    file: OwnedFd,
    memory: Arc<MemoryContext>,
    /// Bytes from the region of a queue to the next one.
    stride: u64,
    /// What this process has written to the word. It does not read it there.
    word: Mutex<u64>,
}

impl Kept {
    /// Fresh memory for a function of this kind. `context` has no memory yet.
    ///
    /// # Errors
    /// The system has none. The text is for people.
    pub fn new(kind: &Kind, context: MemoryContext) -> Result<Kept, String> {
        let stride = stride(kind);
        let bytes = bytes(kind);
        let make = || {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = memfd_create("vbus-virtio", flags)?;
            ftruncate(&file, bytes)?;
            fcntl_add_seals(&file, seals_of_memory())?;
            Ok(file)
        };
        let text = |error: rustix::io::Errno| format!("the memory of its queues: {error}");
        let file = make().map_err(text)?;
        map(&context, bytes, &file)?;
        Ok(Kept { file, memory: Arc::new(context), stride, word: Mutex::new(0) })
    }

    /// Fresh memory with what a process that has ended left in `file`, which may be any file.
    ///
    /// # Errors
    /// It is none of a function of this kind. The text is for people.
    pub fn of_former(kind: &Kind, file: impl AsFd, of: &MemoryContext) -> Result<Kept, String> {
        let bytes = bytes(kind);
        let is_there = fstat(&file).is_ok_and(|stat| u64::try_from(stat.st_size) == Ok(bytes));
        if !is_there {
            return Err("the memory of its queues has another size".into());
        }
        // Only memory has seals, so reading it waits for nobody.
        if !fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(seals_of_memory())) {
            return Err("the memory of its queues lacks its seals".into());
        }
        let kept = Kept::new(kind, of.beside())?;
        let text = |error: &dyn std::fmt::Display| format!("the memory of its queues: {error}");
        let former = file.as_fd().try_clone_to_owned().map_err(|error| text(&error))?;
        // It is not mapped: that would count twice for the client, and could be refused.
        let (former, to) = (File::from(former), kept.memory.view());
        let mut chunk = [0; 4096];
        for at in (0..bytes).step_by(chunk.len()) {
            former.read_exact_at(&mut chunk, at).map_err(|error| text(&error))?;
            to.write(at, &chunk).map_err(|error| text(&error))?;
        }
        drop(to);
        *lock(&kept.word) = kept.load_word();
        Ok(kept)
    }

    /// The file, for whoever outlives this process.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Pairs with the store in `set_word`: the text that the word names is whole.
    fn load_word(&self) -> u64 {
        let view = self.memory.view();
        let slice = view.slice(WORD, 8, false);
        slice.ok().and_then(|slice| slice.load(0, Ordering::Acquire)).unwrap_or(0)
    }

    /// The driver has chosen this from now on. A process that is killed here leaves what was chosen
    /// before, or this.
    pub fn choose(&self, choices: &Value) {
        let Ok(text) = serde_json::to_vec(choices) else { return };
        let len = text.len() as u64;
        if !(1..=PLACE_BYTES).contains(&len) {
            tracing::error!(bytes = len, "what a driver has chosen does not outlast this process");
            return;
        }
        let mut word = lock(&self.word);
        let place = (*word & 1) ^ 1;
        if self.memory.view().write(PLACES + place * PLACE_BYTES, &text).is_ok() {
            *word = place | len << 1;
            self.set_word(*word);
        }
    }

    fn set_word(&self, word: u64) {
        let view = self.memory.view();
        if let Ok(slice) = view.slice(WORD, 8, true) {
            // After the text, whenever this process dies. Pairs with the load in `load_word`, in
            // the next process.
            let _ = slice.store(0, word, Ordering::Release);
        }
    }

    /// What the driver of the former process had chosen last. `None`: nothing. It may be forged.
    ///
    /// # Errors
    /// It is no JSON. The text is for people.
    pub fn choices(&self) -> Result<Option<Value>, String> {
        let word = *lock(&self.word);
        let (place, len) = (word & 1, word >> 1);
        if len == 0 {
            return Ok(None);
        }
        let wrong = || "what the driver has chosen is no text of this kind".to_owned();
        let fits = usize::try_from(len).ok().filter(|_| len <= PLACE_BYTES);
        let mut text = vec![0; fits.ok_or_else(wrong)?];
        let read = self.memory.view().read(PLACES + place * PLACE_BYTES, &mut text);
        read.map_err(|error| error.to_string())?;
        serde_json::from_slice(&text).map(Some).map_err(|_| wrong())
    }

    fn region(&self, index: u16, format: Format, size: u16) -> InFlightRegion {
        let base = REGIONS + u64::from(index) * self.stride;
        InFlightRegion::new(self.memory.clone(), base, format, size)
    }

    /// Takes up queue `index` where the last process left it, or at `base` if its region is not in
    /// use. Returns it with the chains that are in flight.
    ///
    /// # Errors
    /// Region or queue make no sense.
    pub fn take_up(
        &self,
        index: u16,
        layout: Layout,
        features: RingFeatures,
        base: Position,
        view: &View<'_>,
    ) -> Result<(Queue, Vec<Chain>), BadState> {
        let region = self.region(index, layout.format, layout.size);
        Queue::recover(layout, features, region, base, view)
    }

    /// Whether somebody has taken up queue `index`, and not left it.
    pub fn is_in_use(&self, index: u16) -> bool {
        self.region(index, Format::Split, 1).is_in_use()
    }

    /// The driver has stopped queue `index`, or has not enabled it yet.
    pub fn settle(&self, index: u16) {
        self.region(index, Format::Split, 1).settle();
    }

    /// The driver begins anew, with `queues` queues.
    pub fn settle_all(&self, queues: u16) {
        (0..queues).for_each(|index| self.settle(index));
        *lock(&self.word) = 0;
        self.set_word(0);
    }
}

fn seals_of_memory() -> SealFlags {
    SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL
}

/// Bytes of the region of a queue.
fn stride(kind: &Kind) -> u64 {
    InFlightRegion::bytes(Format::Packed, kind.queue_size)
}

fn bytes(kind: &Kind) -> u64 {
    (REGIONS + u64::from(kind.queues) * stride(kind)).next_multiple_of(PAGE)
}

fn map(context: &MemoryContext, bytes: u64, file: impl AsFd) -> Result<(), String> {
    let mapped = context.map(0, bytes, Some((file, 0)), Access::BOTH);
    mapped.map(drop).map_err(|error| format!("the memory of its queues: {error}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const KIND: Kind = Kind { id: 1, pci_class: 0, queues: 3, queue_size: 1024, features: 0 };

    #[test]
    fn the_next_process_has_the_last_choices_in_memory_of_its_own() {
        let context = MemoryContext::new();
        let kept = Kept::new(&KIND, context.beside()).unwrap();
        assert_eq!(kept.choices(), Ok(None));
        for number in 0..3 {
            kept.choose(&json!({ "number": number }));
        }
        kept.choose(&"x".repeat(64 << 10).into());
        let next = Kept::of_former(&KIND, kept.file(), &context).unwrap();
        assert_eq!(
            next.choices(),
            Ok(Some(json!({ "number": 2 }))),
            "one too long changes nothing"
        );
        kept.choose(&json!("of the former process"));
        next.choose(&json!({ "number": 3 }));
        let third = Kept::of_former(&KIND, next.file(), &context).unwrap();
        assert_eq!(third.choices(), Ok(Some(json!({ "number": 3 }))));
        third.settle_all(3);
        let fourth = Kept::of_former(&KIND, third.file(), &context).unwrap();
        assert_eq!(fourth.choices(), Ok(None));
    }

    /// A mapping would count twice for the client.
    #[test]
    fn the_memory_of_the_former_process_is_read_and_not_mapped() {
        use std::os::fd::AsRawFd as _;
        let context = MemoryContext::new();
        let kept = Kept::new(&KIND, context.beside()).unwrap();
        kept.choose(&json!(7));
        // Nobody can map this one to write there, as a device maps memory.
        let path = format!("/proc/self/fd/{}", kept.file().as_raw_fd());
        let next = Kept::of_former(&KIND, File::open(path).unwrap(), &context).unwrap();
        assert_eq!(next.choices(), Ok(Some(json!(7))));
    }

    #[test]
    fn forged_memory_is_an_error_or_another_choice() {
        let context = MemoryContext::new();
        let kept = Kept::new(&KIND, context.beside()).unwrap();
        let file = memfd_create("forged", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, bytes(&KIND)).unwrap();
        let Err(why) = Kept::of_former(&KIND, &file, &context) else { panic!("it can shrink") };
        assert!(why.contains("seals"), "{why}");
        let others = Kind { queues: 5, ..KIND };
        assert!(Kept::of_former(&others, kept.file(), &context).is_err(), "of another kind");
        kept.choose(&json!(7));
        for word in [u64::MAX, 5, 2, (PLACE_BYTES + 1) << 1] {
            kept.set_word(word);
            let next = Kept::of_former(&KIND, kept.file(), &context).unwrap();
            assert!(next.choices().is_err(), "{word:#x}");
        }
    }
}
