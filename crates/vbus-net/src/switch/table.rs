// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of a switch: its ports, and behind which port an address is.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vbus_tap::{Mac, is_group};

use super::rules::PortRules;
use crate::backend::Port;
use crate::bucket::Bucket;

/// The most learned addresses. When the table is full, the switch learns no more. Frames to unknown
/// addresses go to every port whose filter passes them.
const LEARNED_MAX: usize = 4096;
/// The most addresses learned from one port, so that one driver cannot fill the table for all.
pub(super) const LEARNED_PER_PORT: usize = 512;
/// How long the switch remembers an address after its last frame.
const AGE: Duration = Duration::from_secs(300);
/// How often the switch looks for aged addresses, at most, when it has no room.
const PURGE: Duration = Duration::from_secs(1);
/// An address that moves to another port more often than this, within [`MOVES_IN`], is in a loop.
const MOVES_MAX: u32 = 5;
const MOVES_IN: Duration = Duration::from_secs(1);
/// How long an address that is in a loop stays where it is.
const HOLD: Duration = Duration::from_secs(10);
/// The share of a second's broadcasts that may come at once.
const BROADCAST_BURST: u32 = 10;

/// A port on the switch, with its rules.
pub struct Seat {
    pub port: Arc<Port>,
    /// The device's address by the settings.
    pub own: Option<Mac>,
    pub rules: PortRules,
    /// The frames to several ports that the port may still send.
    pub broadcasts: Option<Bucket>,
}

impl Seat {
    pub fn new(port: Arc<Port>, own: Option<Mac>, rules: PortRules) -> Seat {
        let (rate, now) = (rules.broadcast_rate, Instant::now());
        let burst = (rate / BROADCAST_BURST).max(1);
        let broadcasts = (rate != 0).then(|| Bucket::new(rate.into(), burst.into(), now));
        Seat { port, own, rules, broadcasts }
    }

    fn id(&self) -> u64 {
        self.port.id()
    }

    /// Whether the rules let the two ports exchange frames.
    fn may_reach(&self, other: &Seat) -> bool {
        let open = |a: &Seat, b: &Seat| !a.rules.isolated || b.rules.uplink;
        open(self, other) && open(other, self)
    }
}

/// Where a learned address is.
struct Learned {
    port: u64,
    at: Instant,
    /// The moves since `moves_since`.
    moves: u32,
    moves_since: Instant,
    held_until: Option<Instant>,
    /// Whether the log has told of the loop.
    told: bool,
}

/// What the table says of a source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The address is where it was, or the table has no room for it.
    Known,
    /// The address is new, or has moved: cached routes are wrong.
    Changed,
    /// The address belongs to another device.
    Owned,
    /// The address is in a loop, and stays at another port. `tell`: the log does not know it yet.
    Held { tell: bool },
}

/// The ports that a frame goes to.
#[derive(Default)]
pub struct Route {
    pub to: Vec<Arc<Seat>>,
    /// Whether the frame goes to every port that wants it, because it has a group address or
    /// nobody knows where its destination is.
    pub is_flood: bool,
    /// Whether the destination is known, but the rules forbid to send to it.
    pub is_denied: bool,
}

/// See the module.
#[derive(Default)]
pub struct Table {
    seats: Vec<Arc<Seat>>,
    /// By VLAN and address.
    learned: HashMap<(u16, Mac), Learned>,
    /// How many addresses are learned from each port.
    counts: HashMap<u64, usize>,
    purged: Option<Instant>,
    /// The addresses that devices have by their settings, whether or not a driver is there.
    reserved: Vec<Mac>,
}

impl Table {
    pub fn seats(&self) -> &[Arc<Seat>] {
        &self.seats
    }

    /// The learned addresses: VLAN, address and number of the port.
    pub fn learned(&self) -> impl Iterator<Item = (u16, Mac, u64)> + '_ {
        self.learned.iter().map(|((vlan, mac), learned)| (*vlan, *mac, learned.port))
    }

    /// The addresses that were learned from port `id` and are still valid: VLAN, address, and the
    /// time since their last frame.
    pub fn learned_from(&self, id: u64, now: Instant) -> Vec<(u16, Mac, Duration)> {
        let of_port = self.learned.iter().filter(|(_, one)| one.port == id && one.is_fresh(now));
        let mut all: Vec<_> = of_port
            .map(|((vlan, mac), one)| (*vlan, *mac, now.saturating_duration_since(one.at)))
            .collect();
        all.sort_unstable();
        all
    }

    /// The port whose own address is `mac`.
    pub fn owner(&self, mac: Mac) -> Option<&Arc<Seat>> {
        self.seats.iter().find(|seat| seat.port.filter.mac() == mac && !seat.rules.uplink)
    }

    /// Reserves the address of a device. While it was not reserved, another driver may have taken
    /// it: that driver's device gets its own address back, and is returned. No port keeps it as a
    /// learned address.
    pub fn reserve(&mut self, mac: Mac) -> Option<Arc<Seat>> {
        self.reserved.push(mac);
        self.forget(mac);
        let has_taken = |seat: &&Arc<Seat>| {
            !seat.rules.uplink && seat.port.filter.mac() == mac && seat.own != Some(mac)
        };
        let seat = self.seats.iter().find(has_taken)?;
        seat.port.filter.set_mac(seat.own?);
        Some(seat.clone())
    }

    /// Ends a reservation.
    pub fn release(&mut self, mac: Mac) {
        if let Some(at) = self.reserved.iter().position(|reserved| *reserved == mac) {
            self.reserved.swap_remove(at);
        }
    }

    pub fn add(&mut self, seat: Arc<Seat>) {
        if !seat.rules.uplink {
            self.forget(seat.port.filter.mac());
        }
        self.seats.push(seat);
    }

    pub fn remove(&mut self, id: u64) {
        self.seats.retain(|seat| seat.id() != id);
        self.learned.retain(|_, learned| learned.port != id);
        self.counts.remove(&id);
    }

    /// Gives a port the address `mac`. Returns false and changes nothing if another device has the
    /// address, or is to have it, or is behind another port. Its own address by the settings a port
    /// gets in any case, unless another device has that too.
    pub fn set_mac(&mut self, seat: &Seat, mac: Mac, now: Instant) -> bool {
        if self.owner(mac).is_some_and(|owner| owner.id() != seat.id()) {
            return false;
        }
        let is_behind_another = || {
            self.learned.iter().any(|((_, learned_mac), learned)| {
                *learned_mac == mac && learned.port != seat.id() && learned.is_fresh(now)
            })
        };
        if seat.own != Some(mac) && (self.reserved.contains(&mac) || is_behind_another()) {
            return false;
        }
        self.forget(mac);
        seat.port.filter.set_mac(mac);
        true
    }

    /// An address of a device is not learned from any port.
    fn forget(&mut self, mac: Mac) {
        let counts = &mut self.counts;
        self.learned.retain(|(_, learned_mac), learned| {
            if *learned_mac == mac {
                count_down(counts, learned.port);
            }
            *learned_mac != mac
        });
    }

    /// A frame of VLAN `vlan` with the source address `mac`, which is not the port's own, came from
    /// port `id`. `own` is that port's address by the settings.
    pub fn learn(
        &mut self,
        (vlan, mac): (u16, Mac),
        id: u64,
        own: Option<Mac>,
        now: Instant,
    ) -> Source {
        if self.owner(mac).is_some() || own != Some(mac) && self.reserved.contains(&mac) {
            return Source::Owned;
        }
        if let Some(learned) = self.learned.get_mut(&(vlan, mac)) {
            let from = learned.port;
            let source = learned.seen(id, now);
            if learned.port != from {
                count_down(&mut self.counts, from);
                *self.counts.entry(id).or_default() += 1;
            }
            return source;
        }
        if !self.has_room(id) {
            if self.purged.is_some_and(|at| now.saturating_duration_since(at) < PURGE) {
                return Source::Known;
            }
            self.purged = Some(now);
            let counts = &mut self.counts;
            self.learned.retain(|_, learned| {
                let is_fresh = learned.is_fresh(now);
                if !is_fresh {
                    count_down(counts, learned.port);
                }
                is_fresh
            });
            if !self.has_room(id) {
                return Source::Known;
            }
        }
        *self.counts.entry(id).or_default() += 1;
        let learned = Learned {
            port: id,
            at: now,
            moves: 0,
            moves_since: now,
            held_until: None,
            told: false,
        };
        self.learned.insert((vlan, mac), learned);
        Source::Changed
    }

    fn has_room(&self, id: u64) -> bool {
        let of_port = self.counts.get(&id).copied().unwrap_or(0);
        of_port < LEARNED_PER_PORT && self.learned.len() < LEARNED_MAX
    }

    /// The ports that a frame of VLAN `vlan` from `from` to `mac` goes to. Each of them carries the
    /// VLAN, may get frames from `from`, and has a filter that passes the address.
    pub fn route(&self, from: &Seat, (vlan, mac): (u16, Mac), now: Instant) -> Route {
        let in_vlan = |seat: &Arc<Seat>| seat.rules.vlan.carries(vlan);
        if !is_group(mac) {
            let learned = self.learned.get(&(vlan, mac)).filter(|learned| learned.is_fresh(now));
            let is_there = |seat: &&Arc<Seat>| {
                in_vlan(seat)
                    && (!seat.rules.uplink && seat.port.filter.mac() == mac
                        || learned.is_some_and(|learned| learned.port == seat.id()))
            };
            if let Some(seat) = self.seats.iter().find(is_there) {
                let is_other = seat.id() != from.id();
                let is_denied = is_other && !from.may_reach(seat);
                let wanted = is_other && !is_denied && seat.port.filter.accepts(mac);
                let to = wanted.then(|| seat.clone()).into_iter().collect();
                return Route { to, is_flood: false, is_denied };
            }
            // The address of a device without a driver is nobody else's.
            if self.reserved.contains(&mac) && self.owner(mac).is_none() {
                return Route::default();
            }
        }
        let wants = |seat: &&Arc<Seat>| {
            seat.id() != from.id()
                && in_vlan(seat)
                && from.may_reach(seat)
                && seat.port.filter.accepts(mac)
        };
        let to = self.seats.iter().filter(wants).cloned().collect();
        Route { to, is_flood: true, is_denied: false }
    }
}

impl Learned {
    fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < AGE
    }

    /// A frame from port `id` had the address.
    fn seen(&mut self, id: u64, now: Instant) -> Source {
        if self.port == id {
            self.at = now;
            return Source::Known;
        }
        if self.held_until.is_some_and(|until| now < until) {
            return Source::Held { tell: false };
        }
        if now.saturating_duration_since(self.moves_since) >= MOVES_IN {
            (self.moves, self.moves_since) = (0, now);
        }
        self.moves += 1;
        if self.moves > MOVES_MAX {
            self.held_until = Some(now + HOLD);
            return Source::Held { tell: !std::mem::replace(&mut self.told, true) };
        }
        (self.port, self.at) = (id, now);
        Source::Changed
    }
}

fn count_down(counts: &mut HashMap<u64, usize>, port: u64) {
    if let Some(count) = counts.get_mut(&port) {
        *count = count.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::{Addresses, Filter, Modes};
    use crate::steering::Steering;
    use crate::switch::vlan::Vlan;

    const A: Mac = [2, 0, 0, 0, 0, 1];
    const B: Mac = [2, 0, 0, 0, 0, 2];
    const OTHER: Mac = [2, 0, 0, 0, 0, 9];

    fn seat(mac: Mac, rules: PortRules) -> Arc<Seat> {
        let shared = (Arc::new(Filter::new(mac)), Arc::new(Steering::new(1)));
        let port = Arc::new(Port::new("port", 1500, 1, shared, Vec::new()));
        Arc::new(Seat::new(port, Some(mac).filter(|_| !rules.uplink), rules))
    }

    fn learning() -> PortRules {
        PortRules { learn: true, ..PortRules::default() }
    }

    fn uplink() -> Arc<Seat> {
        let seat = seat(Mac::default(), PortRules { uplink: true, ..learning() });
        let all = Addresses::from(Modes { promiscuous: true, ..Modes::default() });
        seat.port.filter.set_addresses(all);
        seat
    }

    fn table(seats: &[Arc<Seat>]) -> Table {
        let mut table = Table::default();
        seats.iter().for_each(|seat| table.add(seat.clone()));
        table
    }

    fn ids(route: &Route) -> Vec<u64> {
        route.to.iter().map(|seat| seat.id()).collect()
    }

    #[test]
    fn an_address_in_a_loop_stays_and_is_told_once() {
        let [a, b] = [A, B].map(|mac| seat(mac, learning()));
        let mut table = table(&[a.clone(), b.clone()]);
        let start = Instant::now();
        let (mut changed, mut told) = (0, 0);
        // A loop for a minute: the address comes from both ports by turns.
        for n in 0..60_000 {
            let id = if n % 2 == 0 { a.id() } else { b.id() };
            match table.learn((0, OTHER), id, None, start + Duration::from_millis(n)) {
                Source::Changed => changed += 1,
                Source::Held { tell } => told += u32::from(tell),
                Source::Known => {}
                Source::Owned => panic!("nobody owns it"),
            }
        }
        assert_eq!(told, 1);
        assert!((1..=7 * (MOVES_MAX + 1)).contains(&changed), "{changed} moves in a minute");
        // A guest that moves once is followed at once.
        let mut table = Table::default();
        [a.clone(), b.clone()].into_iter().for_each(|seat| table.add(seat));
        assert_eq!(table.learn((0, OTHER), a.id(), None, start), Source::Changed);
        assert_eq!(table.learn((0, OTHER), b.id(), None, start), Source::Changed);
        assert_eq!(ids(&table.route(&a, (0, OTHER), start)), Vec::<u64>::new(), "not wanted by b");
    }

    #[test]
    fn addresses_of_devices_are_not_learned() {
        let [a, b] = [A, B].map(|mac| seat(mac, learning()));
        let mut table = table(&[a.clone(), b.clone()]);
        let now = Instant::now();
        table.reserve(OTHER);
        for mac in [A, OTHER] {
            assert_eq!(table.learn((0, mac), b.id(), Some(B), now), Source::Owned);
        }
        assert_eq!(table.learn((0, OTHER), b.id(), Some(OTHER), now), Source::Changed, "its own");
        table.release(OTHER);
        assert_eq!(table.learn((7, OTHER), a.id(), Some(A), now), Source::Changed);
        // Nobody takes an address that is behind another port, until it has aged.
        assert!(!table.set_mac(&b, OTHER, now) && !table.set_mac(&a, OTHER, now));
        // A device that gets the address takes it over in every VLAN.
        assert!(table.set_mac(&b, OTHER, now + AGE));
        assert_eq!(table.learned().count(), 0);
        assert_eq!(table.counts.values().sum::<usize>(), 0);
    }

    #[test]
    fn no_driver_takes_an_address_of_the_outside() {
        let (up, b) = (uplink(), seat(B, learning()));
        let mut table = table(&[up.clone(), b.clone()]);
        let now = Instant::now();
        table.learn((0, OTHER), up.id(), None, now);
        assert!(!table.set_mac(&b, OTHER, now));
        assert!(table.set_mac(&b, OTHER, now + AGE), "it has aged");
    }

    #[test]
    fn a_device_that_comes_back_has_its_address() {
        let [a, b] = [A, B].map(|mac| seat(mac, learning()));
        let mut table = table(&[a.clone(), b.clone()]);
        let now = Instant::now();
        [A, B].into_iter().for_each(|mac| assert!(table.reserve(mac).is_none()));
        // The device with the address OTHER has been removed. Meanwhile it is anybody's.
        assert!(table.set_mac(&b, OTHER, now));
        let back = table.reserve(OTHER).map(|seat| seat.id());
        assert_eq!((back, b.port.filter.mac()), (Some(b.id()), B));
        assert!(table.owner(OTHER).is_none() && !table.set_mac(&b, OTHER, now));
        table.release(OTHER);
        assert_eq!(table.learn((0, OTHER), a.id(), Some(A), now), Source::Changed);
        assert!(table.reserve(OTHER).is_none());
        assert_eq!(table.learned().count(), 0);
    }

    #[test]
    fn one_port_cannot_fill_the_table() {
        let [a, b] = [A, B].map(|mac| seat(mac, learning()));
        let mut table = table(&[a.clone(), b.clone()]);
        let now = Instant::now();
        let mac = |n: u32| {
            let [.., c, d] = n.to_be_bytes();
            [2, 9, 9, 9, c, d]
        };
        (0..10_000).for_each(|n| _ = table.learn((0, mac(n)), a.id(), None, now));
        assert_eq!(table.learned().count(), LEARNED_PER_PORT);
        assert_eq!(table.learn((0, OTHER), b.id(), None, now), Source::Changed);
        assert_eq!(table.learn((0, mac(20_000)), a.id(), None, now + AGE), Source::Changed, "aged");
        assert_eq!(table.learned().count(), 1);
        table.remove(a.id());
        assert_eq!(table.learned().count(), 0);
    }

    #[test]
    fn a_device_without_a_driver_has_no_eavesdropper() {
        let (a, up) = (seat(A, learning()), uplink());
        let mut table = table(&[a.clone(), up.clone()]);
        let now = Instant::now();
        assert_eq!(ids(&table.route(&a, (0, OTHER), now)), [up.id()], "nobody's address");
        table.reserve(OTHER);
        let route = table.route(&a, (0, OTHER), now);
        assert!(route.to.is_empty() && !route.is_flood && !route.is_denied);
        table.release(OTHER);
        assert_eq!(ids(&table.route(&a, (0, OTHER), now)), [up.id()]);
    }

    #[test]
    fn isolated_ports_reach_the_uplink_only() {
        let isolated = || PortRules { isolated: true, ..PortRules::default() };
        let (up, a) = (uplink(), seat(A, isolated()));
        let (b, c) = (seat(B, isolated()), seat(OTHER, PortRules::default()));
        let mut table = table(&[up.clone(), a.clone(), b.clone(), c.clone()]);
        let now = Instant::now();
        let to = |table: &Table, from: &Seat, mac| ids(&table.route(from, (0, mac), now));
        let all = [0xff; 6];
        assert_eq!(to(&table, &a, all), [up.id()]);
        assert_eq!(to(&table, &c, all), [up.id()]);
        assert_eq!(to(&table, &up, all), [a.id(), b.id(), c.id()]);
        assert!(table.route(&a, (0, B), now).is_denied && table.route(&c, (0, A), now).is_denied);
        assert_eq!(to(&table, &up, A), [a.id()]);
        let far = [2, 8, 8, 8, 8, 8];
        table.learn((0, far), up.id(), None, now);
        assert_eq!((to(&table, &a, far), to(&table, &c, far)), (vec![up.id()], vec![up.id()]));
    }

    #[test]
    fn vlans_are_apart() {
        let vlan = |vlan| PortRules { vlan, ..learning() };
        let (a, b) = (seat(A, vlan(Vlan::Access(10))), seat(B, vlan(Vlan::Access(20))));
        let trunk = seat(OTHER, vlan(Vlan::Trunk { ids: vec![10], native: Some(20) }));
        let mut table = table(&[a.clone(), b.clone(), trunk.clone()]);
        let now = Instant::now();
        let to = |table: &Table, from: &Seat, vlan, mac| ids(&table.route(from, (vlan, mac), now));
        assert_eq!(to(&table, &a, 10, [0xff; 6]), [trunk.id()]);
        assert_eq!(to(&table, &b, 20, [0xff; 6]), [trunk.id()]);
        assert_eq!(to(&table, &trunk, 10, [0xff; 6]), [a.id()]);
        assert_eq!(to(&table, &a, 10, B), Vec::<u64>::new(), "an unknown address there");
        // The same address may be behind different ports in different VLANs.
        let far = [2, 8, 8, 8, 8, 8];
        let all = Addresses::from(Modes { promiscuous: true, ..Modes::default() });
        a.port.filter.set_addresses(all.clone());
        b.port.filter.set_addresses(all);
        table.learn((10, far), a.id(), None, now);
        table.learn((20, far), b.id(), None, now);
        assert_eq!(to(&table, &trunk, 10, far), [a.id()]);
        assert_eq!(to(&table, &trunk, 20, far), [b.id()]);
    }
}
