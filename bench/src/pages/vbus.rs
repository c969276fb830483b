// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vbus.

use vbus_shm::signal::end;
use vbus_shm::state::{self, DEFAULT_SLOTS, Layout, Reader, Writer};
use vbus_shm::sync::Word;

use crate::region::Region;

pub struct Page(&'static [Word]);

impl<const N: usize> super::Page<N> for Page {
    fn new() -> Page {
        let layout = Layout::new((N * 8) as u32, DEFAULT_SLOTS).expect("a valid layout");
        let memory = Region::new(layout.bytes()).words();
        layout.format(&memory, 0).expect("it fits");
        Page(memory)
    }

    fn writer(&self) -> impl FnMut(&[u64; N]) {
        let mut writer = Writer::attach(self.0, end::Device).expect("it is formatted");
        move |value| assert!(!writer.write(bytes(value)).is_wanted(), "nobody waits")
    }

    fn reader(&self) -> impl FnMut(&mut [u64; N]) -> bool {
        let reader = Reader::attach(self.0, end::Driver).expect("it is formatted");
        move |out| reader.read(bytes_mut(out)).is_ok()
    }
}

/// The same page with a reader that keeps the newest value, of `BYTES` bytes, for itself, as that
/// of `triple_buffer` does.
pub struct Latest<const BYTES: usize>(Page);

impl<const N: usize, const BYTES: usize> super::Page<N> for Latest<BYTES> {
    fn new() -> Self {
        assert_eq!(BYTES, N * 8);
        Latest(<Page as super::Page<N>>::new())
    }

    fn writer(&self) -> impl FnMut(&[u64; N]) {
        super::Page::<N>::writer(&self.0)
    }

    fn reader(&self) -> impl FnMut(&mut [u64; N]) -> bool {
        let reader = Reader::attach(self.0.0, end::Driver).expect("it is formatted");
        let mut latest = state::Latest::<_, _, BYTES>::new(reader).expect("nobody writes yet");
        move |out| latest.read().map(|value| bytes_mut(out).copy_from_slice(value)).is_ok()
    }
}

fn bytes<const N: usize>(words: &[u64; N]) -> &[u8] {
    // SAFETY: a u64 is 8 bytes that are all initialised.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), N * 8) }
}

fn bytes_mut<const N: usize>(words: &mut [u64; N]) -> &mut [u8] {
    // SAFETY: as above, and any bytes are a u64.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), N * 8) }
}
