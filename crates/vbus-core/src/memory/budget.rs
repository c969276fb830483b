// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much of the process's own means the memory of its peers may take.
//!
//! A peer makes the process map files and keep descriptors. The process has limits for both, and a
//! process at its limits cannot even allocate memory. So all peers together get a part of each
//! limit, the *total*. One peer may have half of what the others leave of it. The first peer may
//! take half of the total, the next one a quarter, and so on: something is always left for the
//! next.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use rustix::process::{Resource as Limit, getrlimit};
use serde_json::{Value, json};

use crate::lock::lock;
use crate::metric::Metric;

/// What the numbers of a client in the part `memory` of a device mean. The sums of all clients are
/// not in it.
pub const METRICS: &[Metric] = &[
    Metric::gauge(
        "address_space.used",
        "memory_address_space_bytes",
        "Bytes of address space in which the client's memory is mapped",
    )
    .unit("bytes"),
    Metric::gauge(
        "address_space.of",
        "memory_address_space_limit_bytes",
        "The most bytes of address space that the client may have now",
    )
    .unit("bytes"),
    Metric::gauge(
        "mappings.used",
        "memory_mappings",
        "Mappings in the kernel for the client's memory",
    )
    .unit("mappings"),
    Metric::gauge(
        "mappings.of",
        "memory_mappings_limit",
        "The most mappings that the client may have now",
    )
    .unit("mappings"),
    Metric::gauge("maps.used", "memory_maps", "Ranges that the client has mapped").unit("maps"),
    Metric::gauge("maps.of", "memory_maps_limit", "The most maps that the client may have now")
        .unit("maps"),
    Metric::gauge(
        "descriptors.used",
        "memory_descriptors",
        "Descriptors of the client's memory files",
    )
    .unit("descriptors"),
    Metric::gauge(
        "descriptors.of",
        "memory_descriptors_limit",
        "The most descriptors that the client may have now",
    )
    .unit("descriptors"),
];

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resource {
    /// Bytes of address space in which files are mapped.
    AddressSpace,
    /// Mappings of the process, of which the kernel allows some 65,000 (`vm.max_map_count`).
    Mappings,
    /// Ranges that peers have mapped. They cost the process's own memory.
    Maps,
    /// Descriptors of peers' memory files.
    Descriptors,
}

impl Resource {
    /// All of them.
    pub const ALL: [Resource; 4] =
        [Resource::AddressSpace, Resource::Mappings, Resource::Maps, Resource::Descriptors];

    /// The name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Resource::AddressSpace => "address_space",
            Resource::Mappings => "mappings",
            Resource::Maps => "maps",
            Resource::Descriptors => "descriptors",
        }
    }

    fn text(self) -> (&'static str, &'static str) {
        match self {
            Resource::AddressSpace => ("bytes of address space", "RLIMIT_AS, or 2^47"),
            Resource::Mappings => ("mappings in the kernel", "vm.max_map_count"),
            Resource::Maps => ("maps", "the memory of the machine or of the control group"),
            Resource::Descriptors => ("descriptors of memory files", "RLIMIT_NOFILE"),
        }
    }
}

type Amounts = [u64; Resource::ALL.len()];

/// A peer wants more than its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// What there is too little of.
    pub resource: Resource,
    /// How much the peer has.
    pub has: u64,
    /// How much more it wants.
    pub wants: u64,
    /// How much it may have now, in all.
    pub may_have: u64,
    /// How much all peers may have.
    pub total: u64,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Exceeded { resource, has, wants, may_have, total } = self;
        let (what, limit) = resource.text();
        write!(
            f,
            "the budget of {what}: the client has {has}, wants {wants} more, and may have \
             {may_have} (all clients together {total}; from {limit})"
        )
    }
}

impl std::error::Error for Exceeded {}

/// The budget of a process.
#[derive(Debug)]
pub struct Budget {
    totals: Amounts,
    used: Mutex<Amounts>,
}

impl Budget {
    /// The budget of this process. It is made from the process's limits at the first call.
    pub fn of_process() -> Arc<Budget> {
        static PROCESS: OnceLock<Arc<Budget>> = OnceLock::new();
        PROCESS.get_or_init(|| Budget::new(Limits::of_process())).clone()
    }

    /// The budget of a process of a machine with so many bytes of memory.
    #[cfg(test)]
    pub fn of_memory(memory: u64) -> Arc<Budget> {
        Budget::new(Limits { memory, ..Limits::of_process() })
    }

    fn new(limits: Limits) -> Arc<Budget> {
        let totals = Resource::ALL.map(|resource| match resource {
            Resource::AddressSpace => limits.address_space / 4 * 3,
            Resource::Mappings => limits.mappings / 4 * 3,
            Resource::Maps => (limits.memory / MAPS_SHARE / MAP_COST).min(MAPS_TOTAL_MAX),
            Resource::Descriptors => limits.descriptors / 4,
        });
        Arc::new(Budget { totals, used: Mutex::default() })
    }
}

/// The maps of all peers may take this part of the memory.
const MAPS_SHARE: u64 = 16;
/// What a map costs, in bytes: its place in the tables here and in the connector.
const MAP_COST: u64 = 128;
/// The most maps of all peers.
const MAPS_TOTAL_MAX: u64 = 4 << 20;

/// The limits of a process.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Bytes.
    address_space: u64,
    mappings: u64,
    descriptors: u64,
    /// Bytes.
    memory: u64,
}

impl Limits {
    fn of_process() -> Limits {
        /// What a process has on x86-64, and less than what it has on other machines.
        const ADDRESS_SPACE: u64 = 1 << 47;
        const MAPPINGS: u64 = 65_530;
        const MEMORY: u64 = 1 << 30;
        let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
        let limit = |limit| getrlimit(limit).current.unwrap_or(u64::MAX);
        let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
            let words = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
            Some(words.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
        });
        Limits {
            address_space: limit(Limit::As).min(ADDRESS_SPACE),
            mappings: number("/proc/sys/vm/max_map_count").unwrap_or(MAPPINGS),
            descriptors: limit(Limit::Nofile),
            memory: control_group_memory().into_iter().chain(machine).min().unwrap_or(MEMORY),
        }
    }
}

/// The least `memory.max` of the control group of this process and of the groups above it.
fn control_group_memory() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let folder = PathBuf::from("/sys/fs/cgroup").join(path);
    let limits = folder.ancestors().take_while(|folder| folder.starts_with("/sys/fs/cgroup"));
    limits
        .filter_map(|folder| std::fs::read_to_string(folder.join("memory.max")).ok())
        .filter_map(|text| text.trim().parse().ok())
        .min()
}

/// What one peer has.
#[derive(Debug)]
pub struct Account {
    budget: Arc<Budget>,
    /// Changed only under the lock of the budget.
    own: Mutex<Amounts>,
}

impl Account {
    /// A peer that has nothing yet.
    pub fn new(budget: Arc<Budget>) -> Arc<Account> {
        Arc::new(Account { budget, own: Mutex::default() })
    }

    /// Takes `amount` of `resource`, until the share is dropped.
    ///
    /// # Errors
    /// The peer would have too much. Nothing is taken then.
    pub fn take(self: &Arc<Self>, resource: Resource, amount: u64) -> Result<Share, Exceeded> {
        let mut share = self.nothing(resource);
        self.add(resource, amount)?;
        share.amount = amount;
        Ok(share)
    }

    /// Takes what stands for `bytes` of this process's memory: as many maps as cost that.
    ///
    /// # Errors
    /// As for [`take`](Self::take).
    pub fn charge(self: &Arc<Self>, bytes: u64) -> Result<Charge, Exceeded> {
        self.take(Resource::Maps, bytes.div_ceil(MAP_COST)).map(|share| Charge { _share: share })
    }

    /// A share of nothing, which can grow.
    pub fn nothing(self: &Arc<Self>, resource: Resource) -> Share {
        Share { account: self.clone(), resource, amount: 0 }
    }

    fn add(&self, resource: Resource, amount: u64) -> Result<(), Exceeded> {
        let at = resource as usize;
        let mut used = lock(&self.budget.used);
        let mut own = lock(&self.own);
        let may_have = self.may_have(used[at], own[at], at);
        if amount > may_have.saturating_sub(own[at]) {
            return Err(Exceeded {
                resource,
                has: own[at],
                wants: amount,
                may_have,
                total: self.budget.totals[at],
            });
        }
        used[at] += amount;
        own[at] += amount;
        Ok(())
    }

    /// How much more of `resource` the peer may take now.
    pub fn left(&self, resource: Resource) -> u64 {
        let at = resource as usize;
        let used = lock(&self.budget.used);
        let own = lock(&self.own)[at];
        self.may_have(used[at], own, at).saturating_sub(own)
    }

    fn may_have(&self, used: u64, own: u64, at: usize) -> u64 {
        self.budget.totals[at].saturating_sub(used - own) / 2
    }

    /// What the peer has (`used`) and may have now (`of`), and what all peers have (`all_used`) and
    /// may have (`all_of`), by the name of the resource.
    pub fn inspect(&self) -> Value {
        let used = *lock(&self.budget.used);
        let own = *lock(&self.own);
        let each = |r: Resource| {
            let at = r as usize;
            let may_have = self.may_have(used[at].max(own[at]), own[at], at);
            let (all_used, all_of) = (used[at].max(own[at]), self.budget.totals[at]);
            let amounts =
                json!({ "used": own[at], "of": may_have, "all_used": all_used, "all_of": all_of });
            (r.name().to_owned(), amounts)
        };
        Resource::ALL.into_iter().map(each).collect::<serde_json::Map<_, _>>().into()
    }
}

/// Memory of this process that a peer is charged with. Dropping it gives it back.
#[derive(Debug)]
pub struct Charge {
    _share: Share,
}

/// A part of a budget. Dropping it gives it back.
#[derive(Debug)]
pub struct Share {
    account: Arc<Account>,
    resource: Resource,
    amount: u64,
}

impl Share {
    /// Takes one more.
    ///
    /// # Errors
    /// As for [`Account::take`].
    pub fn grow(&mut self) -> Result<(), Exceeded> {
        self.account.add(self.resource, 1)?;
        self.amount += 1;
        Ok(())
    }

    /// Gives back what is more than `amount`.
    pub fn shrink(&mut self, amount: u64) {
        let at = self.resource as usize;
        let back = self.amount.saturating_sub(amount);
        let mut used = lock(&self.account.budget.used);
        let mut own = lock(&self.account.own);
        used[at] -= back;
        own[at] -= back;
        self.amount -= back;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(descriptors: u64) -> Arc<Budget> {
        let limits = Limits { address_space: 4096, mappings: 4096, descriptors, memory: 256 << 20 };
        Budget::new(limits)
    }

    #[test]
    fn something_is_always_left_for_the_next_peer() {
        let budget = budget(4096);
        let accounts: Vec<_> = (0..8).map(|_| Account::new(budget.clone())).collect();
        let mut shares = Vec::new();
        for account in &accounts {
            let before = shares.len();
            while let Ok(share) = account.take(Resource::Descriptors, 1) {
                shares.push(share);
            }
            assert!(shares.len() > before, "{}", shares.len());
        }
        assert_eq!(accounts[0].left(Resource::Descriptors), 0);
        let error = accounts[1].take(Resource::Descriptors, 1).unwrap_err();
        assert_eq!((error.has, error.may_have, error.total), (256, 130, 1024));
        assert!(
            error.to_string().starts_with("the budget of descriptors of memory files: the client")
        );
        // A share that is given back can be taken again, and a refusal took none.
        drop(shares);
        assert_eq!(accounts[5].left(Resource::Descriptors), 512);
        let expected = json!({ "used": 0, "of": 512, "all_used": 0, "all_of": 1024 });
        assert_eq!(accounts[0].inspect()["descriptors"], expected);
    }

    #[test]
    fn a_first_peer_may_have_all_the_maps_of_the_protocol_in_a_small_control_group() {
        let account = Account::new(budget(1024));
        assert!(account.left(Resource::Maps) >= 65_535);
    }

    #[test]
    fn the_process_has_limits() {
        let budget = Budget::of_process();
        assert!(budget.totals.iter().all(|total| *total > 0), "{budget:?}");
        let at = Resource::Mappings as usize;
        assert!(budget.totals[at] <= 3 * (1 << 30), "{budget:?}");
    }
}
