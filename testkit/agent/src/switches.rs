// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Measures what a switch from one task to another costs on one CPU.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Instant;

use crate::latency::become_fifo;
use crate::stream::number;

/// Two tasks of this program pass a byte to and fro `count` times. Prints the nanoseconds of a
/// switch. Run it on one CPU (`taskset`): each pass is then a switch there. With a priority above
/// 0, one of the two is a real-time task, so that each switch is one between classes.
pub fn switches(count: &str, priority: &str) -> io::Result<()> {
    let (count, priority) = (number(count)?.max(1), number(priority)?);
    let (mut own, mut others) = UnixStream::pair()?;
    let other = thread::spawn(move || {
        if priority > 0 {
            become_fifo(priority)?;
        }
        let mut byte = [0];
        while others.read_exact(&mut byte).is_ok() && others.write_all(&byte).is_ok() {}
        Ok(())
    });
    let mut byte = [0];
    let mut pass = |times: u64| -> io::Result<()> {
        for _ in 0..times {
            own.write_all(&byte)?;
            own.read_exact(&mut byte)?;
        }
        Ok(())
    };
    pass(count / 10)?;
    let began = Instant::now();
    pass(count)?;
    println!("{}", began.elapsed().as_nanos() / u128::from(2 * count));
    drop(own);
    other.join().unwrap_or_else(|_| Err(io::Error::other("a panic")))
}
