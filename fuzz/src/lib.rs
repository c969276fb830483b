// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What several fuzz targets need.

pub mod virtqueue;

use std::time::{Duration, Instant};

/// How long descriptors may take to close. A thread of the client or of the server closes what a
/// peer has sent. libFuzzer may end the run before, as a hang in [`OpenFiles::check`].
const BOUND: Duration = Duration::from_secs(60);

/// How many descriptors of this process were open before an input.
pub struct OpenFiles(usize);

impl OpenFiles {
    /// Counts them.
    pub fn count() -> Self {
        // The descriptor of the folder itself counts each time.
        Self(std::fs::read_dir("/proc/self/fd").expect("/proc").count())
    }

    /// Waits until no more are open than then. Panics if that does not come.
    pub fn check(&self) {
        let began = Instant::now();
        loop {
            let now = Self::count();
            if now.0 <= self.0 {
                return;
            }
            assert!(began.elapsed() < BOUND, "{} descriptors leak", now.0 - self.0);
            std::thread::sleep(Duration::from_micros(100));
        }
    }
}
