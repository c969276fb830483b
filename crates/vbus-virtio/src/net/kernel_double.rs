// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A double of the kernel's vhost-net for tests, in this process. It takes the requests in the
//! order that the kernel wants, and works only when the test says so ([`Kernel::run`]): at each
//! ring whose kick was written since. As in the kernel, a kick that is seen while the ring has no
//! back end is gone. A back end by itself starts no ring here: that is an interface whose queue is
//! full just then.
#![allow(unsafe_code)] // The trait's methods are unsafe; these keep nothing but numbers.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use vbus_core::{MemoryContext, lock};
use vbus_tap::{RingPlace, VhostRegion, VhostRing};

use super::abi::feature;
use super::vhost::End;
use crate::device::feature as common;

/// The kernel's ends of some queue pairs.
#[derive(Clone)]
pub struct Kernel(Vec<Arc<Mutex<Pair>>>);

#[derive(Default)]
struct Pair {
    owned: bool,
    features: Option<u64>,
    regions: Vec<VhostRegion>,
    rings: [Ring; 2],
}

#[derive(Default)]
struct Ring {
    place: Option<RingPlace>,
    next: u16,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    has_backend: bool,
    carried: u32,
}

impl Kernel {
    /// The ends of so many pairs.
    pub fn new(pairs: u16) -> Kernel {
        Kernel((0..pairs).map(|_| Arc::default()).collect())
    }

    /// The ends, for a device.
    pub fn ends(&self) -> Vec<Box<dyn End>> {
        self.0.iter().map(|pair| Box::new(pair.clone()) as Box<dyn End>).collect()
    }

    /// How many of the pairs' rings have a back end.
    pub fn served(&self) -> usize {
        let of =
            |pair: &Arc<Mutex<Pair>>| lock(pair).rings.iter().filter(|r| r.has_backend).count();
        self.0.iter().map(of).sum()
    }

    /// Does what the kicks ask for: sends the frames of the transmit rings. `memory` is the
    /// driver's. Returns how many frames it has sent by each pair so far.
    pub fn run(&self, memory: &MemoryContext) -> Vec<u32> {
        let run = |pair: &Arc<Mutex<Pair>>| {
            let Pair { regions, rings: [_, tx], .. } = &mut *lock(pair);
            let is_kicked = tx.kick.as_ref().is_some_and(taken);
            if is_kicked && tx.has_backend {
                tx.send(regions, memory);
            }
            tx.carried
        };
        self.0.iter().map(run).collect()
    }
}

/// Whether an eventfd was written since the last look.
fn taken(eventfd: &OwnedFd) -> bool {
    rustix::io::read(eventfd, &mut [0; 8]).is_ok()
}

impl Ring {
    /// Takes all that is available, and returns it.
    fn send(&mut self, regions: &[VhostRegion], memory: &MemoryContext) {
        let place = self.place.unwrap();
        let addr = |host: u64| {
            let inside =
                |region: &&VhostRegion| (region.host..region.host + region.len).contains(&host);
            let region = regions.iter().find(inside).expect("the ring is in the memory");
            region.start + (host - region.host)
        };
        let [available, used] = [place.available, place.used].map(addr);
        let view = memory.view();
        let half = |at: u64| {
            let mut bytes = [0; 2];
            view.read(at, &mut bytes).unwrap();
            u16::from_le_bytes(bytes)
        };
        assert_eq!(half(used + 2), self.next, "nothing is in flight, so both indexes are one");
        while half(available + 2) != self.next {
            let slot = u64::from(self.next % place.size);
            let id = u32::from(half(available + 4 + 2 * slot));
            view.write(used + 4 + 8 * slot, &[id, 0].map(u32::to_le_bytes).concat()).unwrap();
            self.next = self.next.wrapping_add(1);
            view.write(used + 2, &self.next.to_le_bytes()).unwrap();
            self.carried += 1;
        }
        rustix::io::write(self.call.as_ref().unwrap(), &1_u64.to_ne_bytes()).unwrap();
    }
}

fn file(fd: Option<BorrowedFd<'_>>) -> Option<OwnedFd> {
    fd.map(|fd| fd.try_clone_to_owned().unwrap())
}

impl End for Arc<Mutex<Pair>> {
    fn features(&self) -> Result<u64, Errno> {
        let rings = common::VERSION_1 | common::EVENT_IDX | common::INDIRECT_DESC;
        Ok(rings | feature::MRG_RXBUF)
    }

    fn set_owner(&self) -> Result<(), Errno> {
        let mut pair = lock(self);
        if std::mem::replace(&mut pair.owned, true) { Err(Errno::BUSY) } else { Ok(()) }
    }

    fn reset_owner(&self) -> Result<(), Errno> {
        let mut pair = lock(self);
        if !pair.owned {
            return Err(Errno::PERM);
        }
        let carried = pair.rings.each_ref().map(|ring| ring.carried);
        *pair = Pair::default();
        for (ring, carried) in pair.rings.iter_mut().zip(carried) {
            ring.carried = carried;
        }
        Ok(())
    }

    fn set_features(&self, features: u64) -> Result<(), Errno> {
        let known = End::features(self)?;
        if features & !known != 0 {
            return Err(Errno::OPNOTSUPP);
        }
        lock(self).features = Some(features);
        Ok(())
    }

    unsafe fn set_memory(&self, regions: &[VhostRegion]) -> Result<(), Errno> {
        let mut pair = lock(self);
        assert!(pair.owned);
        pair.regions = regions.to_vec();
        Ok(())
    }

    unsafe fn set_ring(&self, ring: VhostRing, place: &RingPlace, next: u16) -> Result<(), Errno> {
        let mut pair = lock(self);
        assert!(pair.owned && pair.features.is_some() && !pair.regions.is_empty());
        let ring = &mut pair.rings[ring as usize];
        if ring.has_backend {
            return Err(Errno::BUSY);
        }
        (ring.place, ring.next) = (Some(*place), next);
        Ok(())
    }

    fn position(&self, ring: VhostRing) -> Result<u16, Errno> {
        Ok(lock(self).rings[ring as usize].next)
    }

    fn set_kick(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let ring = &mut lock(self).rings[ring as usize];
        ring.kick = file(eventfd);
        // The kernel looks at the eventfd at once.
        let is_kicked = ring.kick.as_ref().is_some_and(taken);
        assert!(!(is_kicked && ring.has_backend), "the back end comes last");
        Ok(())
    }

    fn set_call(&self, ring: VhostRing, eventfd: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        lock(self).rings[ring as usize].call = file(eventfd);
        Ok(())
    }

    fn set_error(&self, _: VhostRing, _: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        Ok(())
    }

    fn set_backend(&self, ring: VhostRing, tap: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
        let ring = &mut lock(self).rings[ring as usize];
        assert!(tap.is_none() || ring.place.is_some(), "the back end comes last");
        ring.has_backend = tap.is_some();
        Ok(())
    }
}
