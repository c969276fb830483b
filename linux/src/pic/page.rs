// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The page of one processor: who takes its lines, and how many at a time.

use vbus_driver::pic::{Controller, Wanted};
use vbus_shm::pic::LINES_MAX;

use crate::hal::KernelHal;
use crate::kernel::alloc::NoMemory;
use crate::kernel::lock::SpinLock;

/// Lines that are handled at a time, beside those of an honest device. It raises each line once in
/// that time, or twice: the line's handler has to run outside of interrupts before the next.
const MORE: u32 = 16;
/// So many messages may bring no line,
const EMPTY_MAX: u32 = 100_000;
/// and each that brings one makes up for so many others.
const EMPTY_EACH: u32 = 100;

/// The lines of a page that the kernel wants.
pub type Unmasked = [u64; LINES_MAX as usize / 64];

/// Whether a line is in a set of lines.
fn has(set: &Unmasked, line: u16) -> bool {
    set.get(usize::from(line / 64)).is_some_and(|word| word >> (line % 64) & 1 != 0)
}

/// The page of a processor. It may be used on every processor: the administrator may turn the own
/// one off.
pub struct Page {
    state: SpinLock<State>,
}

struct State {
    /// None while there is no connection.
    controller: Option<Controller<KernelHal>>,
    unmasked: Unmasked,
    /// Lines came without end. Nobody takes any until the pause is over.
    pauses: bool,
    /// Messages that brought no line, less what others made up for.
    empty: u32,
}

/// What came of looking at a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drained {
    /// All lines were taken, at least one. The next line sends a message.
    All,
    /// There was none. The next line sends a message.
    Nothing,
    /// The same, and far too many messages bring no line.
    Futile,
    /// Lines come without end. Nobody takes any, and none sends a message, until
    /// [`Page::resume`].
    TooMany,
}

impl Page {
    /// A page without a connection. The caller may sleep.
    pub fn new() -> Result<Self, NoMemory> {
        let unmasked = Unmasked::default();
        let state = State { controller: None, unmasked, pauses: false, empty: 0 };
        Ok(Self { state: SpinLock::new(state)? })
    }

    /// Takes lines from this controller from now on. Only lines that the kernel wants are unmasked:
    /// `unmasked` tells them, with the page's lock. Pending: there are lines already.
    pub fn install(
        &self,
        mut controller: Controller<KernelHal>,
        unmasked: impl FnOnce() -> Unmasked,
    ) -> Wanted {
        let mut state = self.state.lock();
        let unmasked = unmasked();
        (0..LINES_MAX).filter(|line| !has(&unmasked, *line)).for_each(|line| controller.mask(line));
        let wanted = controller.arm();
        state.controller = Some(controller);
        state.unmasked = unmasked;
        state.pauses = false;
        wanted
    }

    /// Takes no lines any more. What this returns is not to be dropped in an interrupt.
    pub fn uninstall(&self) -> Option<Controller<KernelHal>> {
        self.state.lock().controller.take()
    }

    /// Masks a line, or unmasks it. Returns whether it is pending, and somebody has to look.
    pub fn set_masked(&self, line: u16, masked: bool) -> bool {
        let State { controller, unmasked, pauses, .. } = &mut *self.state.lock();
        let (Some(controller), Some(word)) = (controller, unmasked.get_mut(usize::from(line / 64)))
        else {
            return false;
        };
        let bit = 1 << (line % 64);
        if masked {
            *word &= !bit;
            controller.mask(line);
            return false;
        }
        *word |= bit;
        controller.unmask(line) == Wanted::Pending && !*pauses
    }

    /// Takes lines, and calls `handle` with each, without the page's lock. `by_message`: a message
    /// is the reason.
    pub fn drain(&self, by_message: bool, handle: impl Fn(u16)) -> Drained {
        let mut taken = 0;
        let mut served = None;
        loop {
            let mut state = self.state.lock();
            let State { controller, unmasked, pauses, empty } = &mut *state;
            let Some(controller) = controller else { return judge(empty, by_message, taken) };
            if let Some(line) = served.take() {
                // The connection may be another one than that of the line. The page then knows
                // nothing of the line.
                controller.end(line);
            }
            if *pauses {
                // Another processor takes lines of this page too, and has had too many.
                return judge(empty, by_message, taken);
            }
            if taken >= 2 * unmasked.iter().map(|word| word.count_ones()).sum::<u32>() + MORE {
                // The level is that of a page whose lines are being handled: no line sends a
                // message.
                *pauses = true;
                return Drained::TooMany;
            }
            let Some(line) = controller.take() else { return judge(empty, by_message, taken) };
            drop(state);
            handle(line);
            served = Some(line);
            taken += 1;
        }
    }

    /// The pause after [`Drained::TooMany`] is over.
    pub fn resume(&self) {
        self.state.lock().pauses = false;
    }
}

/// What comes of a look that has taken so many lines.
fn judge(empty: &mut u32, by_message: bool, taken: u32) -> Drained {
    if taken > 0 {
        *empty = empty.saturating_sub(EMPTY_EACH);
        return Drained::All;
    }
    *empty += u32::from(by_message);
    if *empty < EMPTY_MAX {
        return Drained::Nothing;
    }
    *empty = 0;
    Drained::Futile
}
