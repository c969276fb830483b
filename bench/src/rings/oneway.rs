// SPDX-License-Identifier: Apache-2.0 OR MIT
//! For orientation: rtrb, one way.

use super::ENTRIES;
use crate::duel::{Wait, duel};

type Entry = [u64; 2];

/// Nanoseconds per entry in batches of `batch`, without a way back.
pub fn rtrb(batch: usize, total: usize, wait: Wait) -> f64 {
    let (mut producer, mut consumer) = rtrb::RingBuffer::<Entry>::new(ENTRIES);
    let near = move || {
        let mut sent = 0_u64;
        while sent < total as u64 {
            match producer.write_chunk_uninit(batch) {
                Ok(chunk) => {
                    let n = chunk.fill_from_iter((sent..).map(|n| [n, 64]));
                    sent += n as u64;
                }
                Err(_) => wait.relax(),
            }
        }
    };
    let far = move || {
        let (mut received, mut sum) = (0, 0_u64);
        while received < total {
            let n = consumer.slots().min(batch);
            if n == 0 {
                wait.relax();
                continue;
            }
            for [number, _] in consumer.read_chunk(n).expect("as many are there") {
                sum += number;
            }
            received += n;
        }
        assert_eq!(sum, (total as u64) * (total as u64 - 1) / 2);
    };
    duel(near, far) / total as f64
}
