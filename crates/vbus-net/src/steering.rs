// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Steering: chooses which of a driver's receive queues a frame goes to.

use std::sync::RwLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::frame::{Hash, Packet};
use crate::rss::{Rss, flow};

/// A flag in the word of the count: there is a key.
const BY_HASH: u32 = 1 << 16;

/// Spreads frames over the receive queues of a driver. Senders may use it while the driver changes
/// it.
#[derive(Debug)]
pub struct Steering {
    /// The number of queues in use, and the flag [`BY_HASH`]. The word depends on no other memory,
    /// so all accesses are relaxed.
    queues: AtomicU32,
    rss: RwLock<Option<Rss>>,
}

impl Steering {
    /// Steers over `queues` queues (at least 1), without hashes.
    pub fn new(queues: u16) -> Steering {
        Steering { queues: AtomicU32::new(u32::from(queues.max(1))), rss: RwLock::default() }
    }

    /// The number of queues in use.
    pub fn queues(&self) -> u16 {
        u16::try_from(self.queues.load(Ordering::Relaxed) & !BY_HASH).unwrap_or(1)
    }

    /// Uses queues 0 to `queues - 1` from now on. Returns false and changes nothing if `queues` is
    /// 0 or the indirection table names other queues.
    pub fn set_queues(&self, queues: u16) -> bool {
        let rss = self.rss.write().unwrap_or_else(|e| e.into_inner());
        let fits = rss.as_ref().and_then(Rss::highest_queue).is_none_or(|highest| highest < queues);
        if queues == 0 || !fits {
            return false;
        }
        self.set(queues, rss.is_some());
        true
    }

    /// Sets the key and the table; `None`: no hashes. Returns false and changes nothing if the
    /// table names queues that are not in use.
    pub fn set_rss(&self, rss: Option<Rss>) -> bool {
        let mut current = self.rss.write().unwrap_or_else(|e| e.into_inner());
        self.put(&mut current, self.queues(), rss)
    }

    /// The number of queues in use, and the key and the table.
    pub fn state(&self) -> (u16, Option<Rss>) {
        let rss = self.rss.read().unwrap_or_else(|e| e.into_inner());
        (self.queues(), rss.clone())
    }

    /// Uses queues 0 to `queues - 1` from now on, with this key and table, at once. Returns false
    /// and changes nothing if `queues` is 0 or the table names other queues.
    pub fn replace(&self, queues: u16, rss: Option<Rss>) -> bool {
        let mut current = self.rss.write().unwrap_or_else(|e| e.into_inner());
        self.put(&mut current, queues, rss)
    }

    fn put(&self, current: &mut Option<Rss>, queues: u16, rss: Option<Rss>) -> bool {
        let highest = rss.as_ref().and_then(Rss::highest_queue);
        if queues == 0 || highest.is_some_and(|highest| highest >= queues) {
            return false;
        }
        *current = rss;
        self.set(queues, current.is_some());
        true
    }

    /// The caller holds the lock of the key, so that count and flag stay consistent.
    fn set(&self, queues: u16, by_hash: bool) {
        let flag = if by_hash { BY_HASH } else { 0 };
        self.queues.store(u32::from(queues) | flag, Ordering::Relaxed);
    }

    /// The hash of a frame; kind 0 without a key.
    pub fn hash(&self, packet: &Packet<'_>) -> Hash {
        if self.queues.load(Ordering::Relaxed) & BY_HASH == 0 {
            return Hash::default();
        }
        let rss = self.rss.read().unwrap_or_else(|e| e.into_inner());
        rss.as_ref().map_or_else(Hash::default, |rss| rss.hash(packet))
    }

    /// Chooses the queue for a frame. Returns the hash too if there is a key. All frames of a flow
    /// go to one queue. Without an indirection table, a hash of the back end's own chooses it.
    pub fn choose(&self, packet: &Packet<'_>) -> (usize, Option<Hash>) {
        let word = self.queues.load(Ordering::Relaxed);
        let by_flow = || match (word & !BY_HASH).max(1) {
            1 => 0,
            queues => (flow(packet) % queues) as usize,
        };
        if word & BY_HASH == 0 {
            return (by_flow(), None);
        }
        let rss = self.rss.read().unwrap_or_else(|e| e.into_inner());
        let Some(rss) = rss.as_ref() else { return (by_flow(), None) };
        let hash = rss.hash(packet);
        (rss.queue(hash).map_or_else(by_flow, usize::from), Some(hash))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rss::{KEY_BYTES, kinds};

    fn rss(table: &[u16]) -> Option<Rss> {
        Rss::new(kinds::ALL, [1; KEY_BYTES], table.to_vec())
    }

    #[test]
    fn without_a_table_the_flow_decides() {
        let steering = Steering::new(2);
        let chosen = |n: u8| {
            let frame = [n; 60];
            let (queue, hash) = steering.choose(&Packet::plain(&frame).unwrap());
            (queue, hash.is_some())
        };
        let queues: Vec<_> = (0..100).map(chosen).collect();
        assert!(queues.contains(&(0, false)) && queues.contains(&(1, false)));
        // With a key but no table, frames are hashed but steered as before.
        assert!(steering.set_rss(rss(&[])));
        assert!((0..100).map(chosen).eq(queues.into_iter().map(|(queue, _)| (queue, true))));
    }

    #[test]
    fn the_table_names_only_queues_in_use() {
        let steering = Steering::new(2);
        assert!(!steering.set_rss(rss(&[0, 2])));
        assert!(steering.set_rss(rss(&[1, 0])));
        assert!(!steering.set_queues(1), "the table names queue 1");
        assert!(!steering.set_queues(0));
        assert!(steering.set_queues(4));
        assert_eq!(steering.queues(), 4);
        let packet = [0; 60];
        let packet = Packet::plain(&packet).unwrap();
        assert_eq!(steering.choose(&packet).0, 1, "a frame that is not hashed: entry 0");
        assert!(steering.set_rss(None));
        assert!(steering.set_queues(1));
        assert!(steering.replace(2, rss(&[1, 0])));
        for (queues, table) in [(1, rss(&[1, 0])), (0, None), (2, rss(&[u16::MAX]))] {
            assert!(!steering.replace(queues, table));
            assert_eq!(steering.state(), (2, rss(&[1, 0])));
        }
    }
}
