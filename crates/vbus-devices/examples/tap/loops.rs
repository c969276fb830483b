// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The floor: loops of bare system calls, with the vectors that the back end uses. It writes a
//! small frame in one piece, and reads each frame in two.

use std::time::Instant;

use rustix::io::Errno;
use vbus_core::io_vec::{IoVec, IoVecMut, readv, writev};
use vbus_tap::Queue;

/// The bytes that the back end reads into a piece of their own: the header and the Ethernet header.
pub const HEAD: usize = 12 + 14;
/// Bytes of a receive buffer.
pub const BUFFER: usize = 2048;

/// The time of a read that finds no frame, in nanoseconds: the entry into the kernel, and the way
/// to the interface and back.
pub fn entry_ns(queue: &Queue) -> f64 {
    const CALLS: u32 = 100_000;
    let mut byte = [0];
    let start = Instant::now();
    for _ in 0..CALLS {
        let _ = std::hint::black_box(readv(queue, &mut [IoVecMut::new(&mut byte)]));
    }
    start.elapsed().as_nanos() as f64 / f64::from(CALLS)
}

/// Writes the frame of `len` bytes (with its header) in each of the buffers.
pub fn write(queue: &Queue, buffers: &[u8], len: usize) -> Result<(), Errno> {
    for buffer in buffers.chunks_exact(BUFFER) {
        writev(queue, &[IoVec::new(&buffer[..len])])?;
    }
    Ok(())
}

/// Reads frames until there is none, each into a buffer of its own. Returns how many.
pub fn read(queue: &Queue, buffers: &mut [u8]) -> usize {
    let mut count = 0;
    for buffer in buffers.chunks_exact_mut(BUFFER) {
        let (head, body) = buffer.split_at_mut(HEAD);
        if readv(queue, &mut [IoVecMut::new(head), IoVecMut::new(body)]).is_err() {
            break;
        }
        count += 1;
    }
    count
}
