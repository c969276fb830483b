// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Watches memory that nobody but this program may write.

use std::io;
use std::time::Duration;

use crate::stream::number;

/// What the memory is filled with.
const PATTERN: u64 = 0x5a5a_5a5a_5a5a_5a5a;

/// Fills `mib` MiB of memory, waits for some seconds, and checks that it is as it was.
pub fn watch(mib: &str, seconds: &str) -> io::Result<()> {
    let words = usize::try_from(number(mib)?).unwrap_or(usize::MAX).saturating_mul(1 << 17);
    // A fill that is not zero touches every page.
    let memory = vec![PATTERN; words];
    println!("watching");
    std::thread::sleep(Duration::from_secs(number(seconds)?));
    // Nothing is known to write it, so the compiler would not look.
    let changed = std::hint::black_box(&memory).iter().filter(|word| **word != PATTERN).count();
    if changed == 0 {
        Ok(())
    } else {
        Err(io::Error::other(format!("{changed} words have changed by themselves")))
    }
}
