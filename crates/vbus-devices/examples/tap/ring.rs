// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The same loops in batches by io_uring. It is set up as the sandbox of a bus would need it: one
//! registered descriptor, no other operation than reads and writes of vectors on it.
#![allow(unsafe_code)] // Gives pointers to the kernel.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use vbus_core::io_vec::{IoVec, IoVecMut};
use vbus_tap::Queue;

use crate::loops::{BUFFER, HEAD};

/// A ring for batches of at most `batch` frames, on one queue of an interface.
pub struct Ring {
    ring: IoUring,
    batch: usize,
}

impl Ring {
    /// A ring for `queue`.
    ///
    /// # Errors
    /// The kernel has no io_uring, or forbids it.
    pub fn new(queue: &Queue, batch: usize) -> io::Result<Ring> {
        let entries = u32::try_from(batch).unwrap_or(u32::MAX);
        let mut builder = IoUring::builder();
        builder.setup_single_issuer().setup_defer_taskrun().setup_r_disabled();
        let ring: IoUring = builder.build(entries)?;
        let submitter = ring.submitter();
        submitter.register_files(&[queue.as_fd().as_raw_fd()])?;
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Ring { ring, batch })
    }

    /// Writes the frame of `len` bytes (with its header) in each of the buffers. Returns how many
    /// were written.
    pub fn write(&mut self, buffers: &[u8], len: usize) -> io::Result<usize> {
        let mut count = 0;
        for buffers in buffers.chunks(self.batch * BUFFER) {
            let vectors: Vec<_> =
                buffers.chunks_exact(BUFFER).map(|buffer| IoVec::new(&buffer[..len])).collect();
            let entries = vectors.iter().map(|vector| {
                let vector = std::ptr::from_ref(vector).cast();
                opcode::Writev::new(types::Fixed(0), vector, 1).build()
            });
            // SAFETY: the vectors and the buffers live until the call has ended, and `perform`
            // returns when all operations have.
            let done = unsafe { self.perform(entries)? };
            count += done;
            if done < vectors.len() {
                break;
            }
        }
        Ok(count)
    }

    /// Reads frames until there is none, each into a buffer of its own. Returns how many.
    pub fn read(&mut self, buffers: &mut [u8]) -> io::Result<usize> {
        let mut count = 0;
        for buffers in buffers.chunks_mut(self.batch * BUFFER) {
            let mut vectors: Vec<_> = buffers
                .chunks_exact_mut(BUFFER)
                .map(|buffer| {
                    let (head, body) = buffer.split_at_mut(HEAD);
                    [IoVecMut::new(head), IoVecMut::new(body)]
                })
                .collect();
            let batch = vectors.len();
            let entries = vectors.iter_mut().map(|vectors| {
                let count = vectors.len() as u32;
                opcode::Readv::new(types::Fixed(0), vectors.as_mut_ptr().cast(), count).build()
            });
            // SAFETY: the vectors and the buffers live until the call has ended, and `perform`
            // returns when all operations have.
            let done = unsafe { self.perform(entries)? };
            count += done;
            if done < batch {
                break;
            }
        }
        Ok(count)
    }

    /// Performs a batch, and returns when all of it has ended. Returns how many operations have
    /// succeeded.
    ///
    /// # Safety
    /// The memory of the operations lives until the call has ended.
    unsafe fn perform(&mut self, entries: impl Iterator<Item = Entry>) -> io::Result<usize> {
        let mut count = 0;
        {
            let mut queue = self.ring.submission();
            for entry in entries {
                // SAFETY: by the caller.
                let pushed = unsafe { queue.push(&entry) };
                pushed.map_err(io::Error::other)?;
                count += 1;
            }
        }
        self.ring.submit_and_wait(count)?;
        Ok(self.ring.completion().filter(|completion| completion.result() > 0).count())
    }
}
