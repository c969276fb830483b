// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much of the process's own means the memory of its peers may take.
//!
//! A peer makes the process map files and keep descriptors. The process has limits for both, and a
//! process at its limits cannot even allocate memory. So all peers together get a part of each
//! limit, the *total*. One peer may have half of what the others leave of it. The first peer may
//! take half of the total, the next one a quarter, and so on: something is always left for the
//! next.
//!
//! **Pages that the bus touches first.** The kernel charges a page of tmpfs to the control group of
//! whoever touches it first, and leaves it there until the file lets go of it. So a peer with a
//! sparse file can have the device touch every page, and fill the control group of the bus, which
//! ends the bus. The bus cannot count such pages: the peer may punch a hole into its file at any
//! time, also between a look at a page (mincore, SEEK_DATA) and the access. It could count the
//! pages that it has ever reached, but a good guest's buffers are everywhere in its memory, and the
//! guest has touched them before. What is exact, and known before any access, is how much the peer
//! has mapped: no page beyond that can be charged. So where the control group has a limit, the
//! files of tmpfs that all peers have mapped stay below it ([`Resource::Pages`]). It makes no
//! difference whether their pages are there already, because they may go again. Pages of hugetlbfs
//! are not charged in this way, and the kernel takes back those of a disk. Where the control group
//! has no limit, the program can set one for these files alone ([`limit_pages`]): a peer whose own
//! control group has a limit could otherwise have the memory of the whole machine through the bus.
//!
//! A peer is a process ([`PeerProcess`]): a VMM with many devices has one [`Client`] for all of
//! them. Each device has an [`Account`] of it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use rustix::process::{Resource as Limit, getrlimit};
use serde_json::{Value, json};

use super::process::PeerProcess;
use crate::lock::lock;
use crate::metric::Metric;

/// What the numbers in the part `memory` of a device mean. The client is the process that uses the
/// device. The sums of all clients are not in it.
pub const METRICS: &[Metric] = &[
    Metric::gauge(
        "address_space.used",
        "memory_address_space_bytes",
        "Bytes of address space in which the client's memory is mapped, for this device",
    )
    .unit("bytes"),
    Metric::gauge(
        "address_space.client_used",
        "memory_client_address_space_bytes",
        "Bytes of address space in which the client's memory is mapped, for all its devices",
    )
    .unit("bytes"),
    Metric::gauge(
        "address_space.of",
        "memory_address_space_limit_bytes",
        "The most bytes of address space that the client may have now, for all its devices",
    )
    .unit("bytes"),
    Metric::gauge(
        "mappings.used",
        "memory_mappings",
        "Mappings in the kernel for the client's memory, for this device",
    )
    .unit("mappings"),
    Metric::gauge(
        "mappings.client_used",
        "memory_client_mappings",
        "Mappings in the kernel for the client's memory, for all its devices",
    )
    .unit("mappings"),
    Metric::gauge(
        "mappings.of",
        "memory_mappings_limit",
        "The most mappings that the client may have now, for all its devices",
    )
    .unit("mappings"),
    Metric::gauge("maps.used", "memory_maps", "Ranges that the client has mapped, for this device")
        .unit("maps"),
    Metric::gauge(
        "maps.client_used",
        "memory_client_maps",
        "Ranges that the client has mapped, for all its devices",
    )
    .unit("maps"),
    Metric::gauge(
        "maps.of",
        "memory_maps_limit",
        "The most maps that the client may have now, for all its devices",
    )
    .unit("maps"),
    Metric::gauge(
        "pages.used",
        "memory_pages_bytes",
        "Bytes of the client's files whose pages can be charged to the bus, for this device",
    )
    .unit("bytes"),
    Metric::gauge(
        "pages.client_used",
        "memory_client_pages_bytes",
        "Bytes of the client's files whose pages can be charged to the bus, for all its devices",
    )
    .unit("bytes"),
    Metric::gauge(
        "pages.of",
        "memory_pages_limit_bytes",
        "The most bytes of such files that the client may have now, for all its devices",
    )
    .unit("bytes"),
    Metric::gauge(
        "descriptors.used",
        "memory_descriptors",
        "Descriptors of the client's memory files, for this device",
    )
    .unit("descriptors"),
    Metric::gauge(
        "descriptors.client_used",
        "memory_client_descriptors",
        "Descriptors of the client's memory files, for all its devices",
    )
    .unit("descriptors"),
    Metric::gauge(
        "descriptors.of",
        "memory_descriptors_limit",
        "The most descriptors that the client may have now, for all its devices",
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
    /// Bytes of mapped files whose pages are charged to this process's control group, if the
    /// process is the first to touch them.
    Pages,
}

impl Resource {
    /// All of them.
    pub const ALL: [Resource; 5] = [
        Resource::AddressSpace,
        Resource::Mappings,
        Resource::Maps,
        Resource::Descriptors,
        Resource::Pages,
    ];

    /// The name in statistics.
    pub fn name(self) -> &'static str {
        match self {
            Resource::AddressSpace => "address_space",
            Resource::Mappings => "mappings",
            Resource::Maps => "maps",
            Resource::Descriptors => "descriptors",
            Resource::Pages => "pages",
        }
    }

    fn text(self) -> (&'static str, &'static str) {
        match self {
            Resource::AddressSpace => ("bytes of address space", "RLIMIT_AS, or 2^47"),
            Resource::Mappings => ("mappings in the kernel", "vm.max_map_count"),
            Resource::Maps => ("maps", "the memory of the machine or of the control group"),
            Resource::Descriptors => ("descriptors of memory files", "RLIMIT_NOFILE"),
            Resource::Pages => (
                "bytes of files whose pages can be charged to the bus",
                "memory.max of its control group (MemoryMax= in systemd), guest-memory-mib of its \
                 configuration, or as address space",
            ),
        }
    }
}

type Amounts = [u64; Resource::ALL.len()];

/// A peer wants more than its budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// What there is too little of.
    pub resource: Resource,
    /// The peer's process. `None`: it is not known.
    pub process: Option<i32>,
    /// How many devices the peer uses.
    pub devices: usize,
    /// How much the peer has, for all its devices.
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
        let Exceeded { resource, process, devices, has, wants, may_have, total } = self;
        let (what, limit) = resource.text();
        write!(f, "the budget of {what}: the client")?;
        if let Some(process) = process {
            write!(f, ", process {process},")?;
        }
        if *devices > 1 {
            write!(f, " with {devices} devices")?;
        }
        write!(
            f,
            " has {has}, wants {wants} more, and may have {may_have} (all clients together \
             {total}; from {limit})"
        )
    }
}

impl std::error::Error for Exceeded {}

/// Sets how many bytes of files whose pages can be charged to this process all peers together may
/// map ([`Resource::Pages`]). It holds beside what the limits of the process give, and from now on:
/// what is mapped stays. `None`: only the limits of the process hold.
pub fn limit_pages(bytes: Option<u64>) {
    Budget::of_process().limit_pages(bytes);
}

/// The budget of a process.
#[derive(Debug)]
pub struct Budget {
    totals: Amounts,
    /// What the program allows of [`Resource::Pages`]. [`u64::MAX`]: it has set nothing.
    pages: AtomicU64,
    used: Mutex<Amounts>,
    /// By the id of their process.
    clients: Mutex<HashMap<i32, Weak<Client>>>,
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
            // Without a limit there is nothing to keep: the address space bounds what is mapped.
            Resource::Pages => limits.control_group.min(limits.address_space) / 4 * 3,
        });
        let pages = AtomicU64::new(u64::MAX);
        Arc::new(Budget { totals, pages, used: Mutex::default(), clients: Mutex::default() })
    }

    fn limit_pages(&self, bytes: Option<u64>) {
        // No other memory goes with the number.
        self.pages.store(bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How much of the resource number `at` all peers may have.
    fn total(&self, at: usize) -> u64 {
        let set = match Resource::ALL[at] {
            Resource::Pages => self.pages.load(Ordering::Relaxed),
            _ => u64::MAX,
        };
        self.totals[at].min(set)
    }

    /// The client that `process` is. Without a process, and for one that has ended already, it is a
    /// client of its own.
    pub(super) fn client(self: &Arc<Self>, process: Option<PeerProcess>) -> Arc<Client> {
        let pid = process.as_ref().filter(|process| !process.has_ended()).map(PeerProcess::id);
        let new = |process| {
            Arc::new(Client {
                budget: self.clone(),
                process,
                used: Mutex::default(),
                devices: Mutex::default(),
            })
        };
        let Some(pid) = pid else { return new(process) };
        let mut clients = lock(&self.clients);
        // A process that has ended may have left connections behind. Its id can then be another's.
        let lives = |client: &Arc<Client>| !client.process.as_ref().is_some_and(|p| p.has_ended());
        if let Some(known) = clients.get(&pid).and_then(Weak::upgrade).filter(lives) {
            return known;
        }
        clients.retain(|_, client| client.strong_count() > 0);
        let client = new(process);
        clients.insert(pid, Arc::downgrade(&client));
        client
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
    /// Bytes of the machine, or of the control group.
    memory: u64,
    /// Bytes of the control group; [`u64::MAX`]: it has no limit.
    control_group: u64,
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
        let group = control_group_memory();
        Limits {
            address_space: limit(Limit::As).min(ADDRESS_SPACE),
            mappings: number("/proc/sys/vm/max_map_count").unwrap_or(MAPPINGS),
            descriptors: limit(Limit::Nofile),
            memory: group.into_iter().chain(machine).min().unwrap_or(MEMORY),
            control_group: group.unwrap_or(u64::MAX),
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

/// A peer: what it has for all its devices.
#[derive(Debug)]
pub struct Client {
    budget: Arc<Budget>,
    process: Option<PeerProcess>,
    /// Changed only under the lock of the budget.
    used: Mutex<Amounts>,
    /// A name for each account.
    devices: Mutex<Vec<String>>,
}

impl Client {
    /// The account of a device of this client.
    pub(super) fn account(self: Arc<Self>, device: &str) -> Arc<Account> {
        lock(&self.devices).push(device.to_owned());
        Arc::new(Account { client: self, device: device.to_owned(), own: Mutex::default() })
    }

    fn devices(&self) -> BTreeSet<String> {
        lock(&self.devices).iter().cloned().collect()
    }

    fn may_have(&self, all: u64, own: u64, at: usize) -> u64 {
        self.budget.total(at).saturating_sub(all - own) / 2
    }
}

/// What a client has for one device.
#[derive(Debug)]
pub struct Account {
    client: Arc<Client>,
    device: String,
    /// Changed only under the lock of the budget.
    own: Mutex<Amounts>,
}

impl Account {
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
        let (at, client) = (resource as usize, &*self.client);
        let mut all = lock(&client.budget.used);
        let mut used = lock(&client.used);
        let may_have = client.may_have(all[at], used[at], at);
        if amount > may_have.saturating_sub(used[at]) {
            return Err(Exceeded {
                resource,
                process: client.process.as_ref().map(PeerProcess::id),
                devices: client.devices().len(),
                has: used[at],
                wants: amount,
                may_have,
                total: client.budget.total(at),
            });
        }
        all[at] += amount;
        used[at] += amount;
        lock(&self.own)[at] += amount;
        Ok(())
    }

    fn give_back(&self, resource: Resource, amount: u64) {
        let at = resource as usize;
        let mut all = lock(&self.client.budget.used);
        all[at] -= amount;
        lock(&self.client.used)[at] -= amount;
        lock(&self.own)[at] -= amount;
    }

    /// How much more of `resource` the peer may take now.
    pub fn left(&self, resource: Resource) -> u64 {
        let (at, client) = (resource as usize, &*self.client);
        let all = lock(&client.budget.used);
        let used = lock(&client.used)[at];
        client.may_have(all[at], used, at).saturating_sub(used)
    }

    /// By the name of the resource: what the peer has for this device (`used`) and for all its
    /// devices (`client_used`), and may have now (`of`); and what all peers have (`all_used`) and
    /// may have (`all_of`). `client` says who the peer is.
    pub fn inspect(&self) -> Value {
        let client = &*self.client;
        let (all, used, own) = {
            let all = lock(&client.budget.used);
            (*all, *lock(&client.used), *lock(&self.own))
        };
        let each = |r: Resource| {
            let at = r as usize;
            let amounts = json!({
                "used": own[at],
                "client_used": used[at],
                "of": client.may_have(all[at], used[at], at),
                "all_used": all[at],
                "all_of": client.budget.total(at),
            });
            (r.name().to_owned(), amounts)
        };
        let mut told: serde_json::Map<_, _> = Resource::ALL.into_iter().map(each).collect();
        if let Some(process) = &client.process {
            let who = json!({ "process": process.id(), "devices": client.devices() });
            told.insert("client".to_owned(), who);
        }
        told.into()
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let mut devices = lock(&self.client.devices);
        if let Some(at) = devices.iter().position(|device| *device == self.device) {
            devices.swap_remove(at);
        }
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
        let back = self.amount.saturating_sub(amount);
        self.account.give_back(self.resource, back);
        self.amount -= back;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

#[cfg(test)]
impl Budget {
    /// That of a process in a control group with this many bytes.
    pub(super) fn in_control_group(bytes: u64) -> Arc<Budget> {
        Budget::new(Limits { control_group: bytes, memory: bytes, ..Limits::of_process() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(descriptors: u64) -> Arc<Budget> {
        let (address_space, mappings, memory) = (4096, 4096, 256 << 20);
        let control_group = u64::MAX;
        Budget::new(Limits { address_space, mappings, descriptors, memory, control_group })
    }

    #[test]
    fn something_is_always_left_for_the_next_peer() {
        let budget = budget(4096);
        let accounts: Vec<_> = (0..8).map(|_| budget.client(None).account("")).collect();
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
        let expected =
            json!({ "used": 0, "client_used": 0, "of": 512, "all_used": 0, "all_of": 1024 });
        assert_eq!(accounts[0].inspect()["descriptors"], expected);
        assert!(accounts[0].inspect().get("client").is_none());
    }

    #[test]
    fn the_devices_of_a_process_have_one_budget() {
        let budget = budget(4096);
        let (this, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let of = |device: &str| budget.client(PeerProcess::of(&this)).account(device);
        let (first, second) = (of("first"), of("second"));
        let _most = first.take(Resource::Descriptors, 512).unwrap();
        let error = second.take(Resource::Descriptors, 1).unwrap_err();
        assert_eq!((error.has, error.may_have), (512, 512));
        let pid = std::process::id();
        let start = format!(
            "the budget of descriptors of memory files: the client, process {pid}, with 2 devices \
             has 512,"
        );
        assert!(error.to_string().starts_with(&start), "{error}");
        let told = second.inspect();
        let of_device = (&told["descriptors"]["used"], &told["descriptors"]["client_used"]);
        assert_eq!(of_device, (&json!(0), &json!(512)));
        assert_eq!(told["client"], json!({ "process": pid, "devices": ["first", "second"] }));
        drop(first);
        // The share keeps the account of the first device.
        assert_eq!(second.inspect()["client"]["devices"], json!(["first", "second"]));
        // Another client has its own half of the rest.
        assert_eq!(budget.client(None).account("").left(Resource::Descriptors), 256);
    }

    #[test]
    fn the_program_bounds_the_pages_of_peers_where_no_control_group_does() {
        let budget = budget(4096);
        let (first, other) = (budget.client(None).account(""), budget.client(None).account(""));
        let before = first.left(Resource::AddressSpace);
        budget.limit_pages(Some(1024));
        let most = first.take(Resource::Pages, 512).unwrap();
        let error = first.take(Resource::Pages, 1).unwrap_err();
        assert_eq!((error.has, error.may_have, error.total), (512, 512, 1024));
        assert!(error.to_string().contains("guest-memory-mib"), "{error}");
        assert_eq!(other.left(Resource::Pages), 256, "the other has its half of the rest");
        assert_eq!(first.inspect()["pages"]["all_of"], 1024);
        assert_eq!(first.left(Resource::AddressSpace), before, "nothing else has this limit");
        // Less than what is mapped: that stays, and nobody gets more.
        budget.limit_pages(Some(256));
        assert_eq!((first.left(Resource::Pages), other.left(Resource::Pages)), (0, 0));
        drop(most);
        budget.limit_pages(None);
        assert!(first.left(Resource::Pages) > 1024);
    }

    #[test]
    fn the_id_of_a_process_that_has_ended_is_another_client() {
        let budget = budget(4096);
        let client = |process| budget.client(Some(process));
        let first = client(PeerProcess::ended(7));
        let (second, third) = (client(PeerProcess::unknown(7)), client(PeerProcess::unknown(7)));
        assert!(!Arc::ptr_eq(&first, &second) && Arc::ptr_eq(&second, &third));
        // Left behind by an earlier process of that id.
        assert!(!Arc::ptr_eq(&second, &client(PeerProcess::ended(7))));
        assert!(Arc::ptr_eq(&second, &client(PeerProcess::unknown(7))));
        assert!(!Arc::ptr_eq(&second, &client(PeerProcess::unknown(8))));
        drop((second, third));
        drop(client(PeerProcess::unknown(9)));
        assert!(lock(&budget.clients).len() <= 2, "clients that have gone leave nothing");
    }

    #[test]
    fn a_first_peer_may_have_all_the_maps_of_the_protocol_in_a_small_control_group() {
        let account = budget(1024).client(None).account("");
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
