// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of all scenarios. Those in `vm::` run guests under QEMU, those in `linux::` run guests
//! with the Linux driver there; those in `kvm::` run guests on the KVM of an L1.

mod kvm;
mod linux;
mod vm;

use crate::l1::L1;
use crate::lab::Scene;
use crate::report::Figures;
use crate::scenario::{Scenario, Test};

/// All scenarios. In each group the quick and basic ones come first.
///
/// Rust's own test harness does not suit them. A scenario can find out only while it runs that this
/// machine lacks something. It can measure figures. It shares its L1 with the scenario before it.
pub const SCENARIOS: &[Scenario] = &[
    in_guests("vm::boot", "a guest boots, runs commands, and powers off", vm::harness::boot),
    in_guests("vm::reboot", "a guest is reset and reboots by itself", vm::harness::reboot),
    in_guests(
        "vm::guest_command",
        "cargo xtask guest: devices, programs of the user's (examples/block), a command",
        vm::command::guest,
    ),
    in_guests(
        "vm::new_device",
        "cargo xtask new-device: a new crate's device works in a real guest",
        vm::template::new_device,
    ),
    in_guests(
        "vm::two_guests",
        "two guests with QEMU's own virtio-net: this tests the test kit",
        vm::harness::two_guests,
    ),
    in_guests(
        "vm::traffic",
        "1 queue pair, MTU 1500, offloads; the hash of the data is right",
        vm::traffic::plain,
    ),
    in_guests("vm::traffic_mtu_9000", "the same with an MTU of 9000", vm::traffic::jumbo),
    in_guests(
        "vm::traffic_two_pairs",
        "the same with 2 queue pairs and 2 CPUs",
        vm::traffic::two_pairs,
    ),
    in_guests("vm::traffic_no_offloads", "the same without offloads", vm::traffic::no_offloads),
    in_guests(
        "vm::few_kicks",
        "under load doorbells and interrupts are far fewer than packets",
        vm::traffic::few_kicks,
    ),
    in_guests(
        "vm::stream",
        "the stream back end against QEMU's netdev and virtio-net",
        vm::backends::stream,
    ),
    in_guests(
        "vm::passt",
        "the stream back end against passt, to the host and back",
        vm::backends::passt,
    ),
    in_guests(
        "vm::tap",
        "TCP to the host over TAP, and over QEMU's virtio-net in the same guest",
        vm::backends::tap,
    ),
    in_guests(
        "vm::virtio_net",
        "the kernel's own virtio driver, packed and split, MSI-X and INTx, to venet and back",
        vm::virtio::net,
    ),
    in_guests(
        "vm::virtio_6_1",
        "Linux 6.1: virtio cards with most features and with few; unbind and reset under load",
        vm::virtio_kernels::v6_1,
    ),
    in_guests("vm::virtio_6_12", "the same with Linux 6.12", vm::virtio_kernels::v6_12),
    in_guests("vm::virtio_7", "the same with Linux 7", vm::virtio_kernels::v7),
    in_guests(
        "vm::virtio_intel_iommu",
        "the same driver behind Intel's IOMMU: packed and split, mappings come and go under load",
        vm::virtio_iommu::intel,
    ),
    in_guests(
        "vm::virtio_virtio_iommu",
        "the same behind virtio's IOMMU",
        vm::virtio_iommu::virtio,
    ),
    in_guests(
        "vm::vhost_user",
        "the kernel's virtio driver behind QEMU's vhost-user: split, packed, two pairs; the bus dies",
        vm::vhost_user::net,
    ),
    in_guests(
        "vm::testpmd",
        "DPDK's testpmd as the front end of two vhost-user devices, split and packed; no guest",
        vm::testpmd::passes,
    ),
    in_guests(
        "vm::vhost_migrate",
        "QEMU moves a guest with that card to another QEMU, under streams both ways",
        vm::vhost_migrate::moves,
    ),
    in_guests(
        "vm::idle_64",
        "64 idle devices: memory, threads, processor time",
        vm::idle::many_devices,
    ),
    in_guests("vm::state", "state pages from and to the host, up to 1 MiB", vm::state::pages),
    in_guests(
        "vm::plug_cycles",
        "20 times plug, use and unplug beside traffic on another NIC",
        vm::plug::cycles,
    ),
    in_guests(
        "vm::plug_all",
        "one driver follows NICs that come and go, and their links",
        vm::plug::follow,
    ),
    in_guests("vm::kill_guest", "kill -9 of a guest in mid-traffic", vm::deaths::guest),
    in_guests("vm::kill_driver", "kill -9 of the driver in mid-traffic", vm::deaths::driver),
    in_guests("vm::kill_bus", "kill -9 of the bus in mid-traffic", vm::deaths::bus),
    in_guests(
        "vm::snapshot_qmp",
        "savevm and loadvm: drivers open their devices anew, the bus warns; vbus snapshot is safe",
        vm::snapshot_qmp::snapshots,
    ),
    in_guests(
        "vm::take_over",
        "the bus is upgraded again and again under load, and upgrades fail: no frame is lost",
        vm::take_over::upgrades,
    ),
    in_guests(
        "vm::keep",
        "the bus is killed again and again under load, and its keeper starts the next one",
        vm::keep::kills,
    ),
    in_guests("vm::reset_guest", "a guest is reset in mid-traffic", vm::deaths::reboot),
    in_guests("vm::reopen", "the driver is opened 100 times, without a leak", vm::deaths::reopen),
    in_guests(
        "vm::hostile_guest",
        "random writes and a hostile virtio driver of one guest beside the traffic of two others",
        vm::hostile::scribbler,
    ),
    in_guests(
        "vm::virtio_firmware",
        "iPXE boots Linux over a virtio card, and UEFI gets a file over one",
        vm::firmware::netboot,
    ),
    in_guests(
        "vm::flat",
        "a guest without an operating system: MSI and MSI-X, frames and state pages",
        vm::flat::drives_devices,
    ),
    in_guests(
        "vm::sched",
        "virtual CPUs' threads follow a guest's real-time tasks, and are given back",
        vm::sched::follows,
    ),
    in_guests(
        "vm::sched_kill_bus",
        "kill -9 of the bus: the threads are given back all the same",
        vm::sched::bus_killed,
    ),
    in_guests(
        "vm::sched_latency",
        "how late a guest's real-time task wakes under load, with and without sched",
        vm::sched::latency,
    ),
    in_guests(
        "vm::vfio_user_example",
        "the example of vfio-user-protocol, a device without the bus: its BAR and its interrupt",
        vm::vfio_user::example,
    ),
    in_guests(
        "vm::share_off",
        "the driver reports guest memory that is not shared",
        vm::hostile::share_off,
    ),
    in_guests(
        "linux::load_6_1",
        "Linux 6.1 loads the driver, finds its devices, unloads it, again and again",
        linux::load::v6_1,
    ),
    in_guests("linux::load_6_12", "the same with Linux 6.12", linux::load::v6_12),
    in_guests("linux::load_7", "the same with Linux 7", linux::load::v7),
    in_guests(
        "linux::net",
        "two interfaces of the driver in one guest: traffic, and all that ethtool, ip and others set",
        linux::net::tools,
    ),
    in_guests(
        "linux::net_long",
        "link, groups, XDP, the driver leaves under load; each kernel; only with --times",
        linux::net::long,
    ),
    in_guests(
        "linux::load_generic",
        "the same with the kernels for machines of all kinds; only with --times",
        linux::load::generic,
    ),
    in_guests(
        "linux::sched",
        "virtual CPUs' threads follow a guest's tasks at each switch, and are given back",
        linux::sched::follows,
    ),
    in_guests(
        "linux::pic",
        "the bus's interrupt controller carries NICs' interrupts, and comes and goes under load",
        linux::pic::carries,
    ),
    in_guests(
        "linux::pic_sleep",
        "suspended to RAM and woken under load: pic carries interrupts again, by messages and INTx",
        linux::pic::sleeps,
    ),
    in_guests(
        "linux::state",
        "an ordinary user reads, writes, maps and awaits state pages; unplug while they are open",
        linux::state::pages,
    ),
    in_guests(
        "linux::tap",
        "a TAP interface whose device has run out of receive buffers goes on",
        linux::tap::out_of_buffers,
    ),
    in_guests(
        "linux::driver",
        "under load: rmmod and insmod, unbind and bind, a CPU off and on; no leak",
        linux::lives::driver,
    ),
    in_guests(
        "linux::machine",
        "under load: unplug and plug, loss of the connection, stop and cont; no leak",
        linux::lives::machine,
    ),
    in_guests(
        "linux::restart",
        "kexec and reboot under a flood of frames: none comes into the new kernel's memory",
        linux::restart::kernel,
    ),
    in_guests(
        "linux::leaving",
        "a reboot while functions leave the driver and come back: nobody waits without an end",
        linux::restart::leaving,
    ),
    in_guests(
        "linux::sleep",
        "suspended to RAM and woken under a flood of frames",
        linux::restart::sleep,
    ),
    in_guests(
        "linux::intel_iommu",
        "data both ways behind an IOMMU, with its hash; the module is loaded anew",
        linux::memory::intel,
    ),
    in_guests("linux::virtio_iommu", "the same behind virtio's IOMMU", linux::memory::virtio),
    in_guests(
        "linux::swiotlb",
        "the same if every mapping is a copy; NICs and pic share an interrupt line, in threads",
        linux::memory::copies,
    ),
    in_guests(
        "linux::liars",
        "devices that lie in registers and shared memory: the kernel has nothing to complain of",
        linux::liars::lie,
    ),
    beside_kvm(
        "kvm::harness",
        "QEMU boots a guest on the KVM of L1: this tests the test kit",
        kvm::linux::harness,
    ),
    beside_kvm(
        "kvm::flat",
        "a guest without an operating system drives devices by each kind of doorbell",
        kvm::flat::drives_devices,
    ),
    beside_kvm(
        "kvm::doorbells",
        "one exit for a ring of each kind, and none to user space",
        kvm::flat::doorbells,
    ),
    beside_kvm(
        "kvm::interrupts",
        "exits of an interrupt, by how it ends and with pic",
        kvm::flat::interrupts,
    ),
    beside_kvm(
        "kvm::linux_interrupts",
        "exits of an interrupt in Linux, with pic and PV EOI and without; only with --times",
        kvm::pic::interrupts,
    ),
    beside_kvm(
        "kvm::pic_cpus",
        "pic on two CPUs: lines raised, masked and moved all the time, none lost, urgent ones \
         first",
        kvm::processors::pic,
    ),
    beside_kvm(
        "kvm::connector",
        "vbus-kvm by itself: doorbells, messages, levels, their routes and exits",
        kvm::doorbells::connector,
    ),
    beside_kvm(
        "kvm::counted",
        "by a clock that counts instructions, figures of two machines are nearly the same",
        kvm::counted::repeats,
    ),
    beside_kvm(
        "kvm::boot",
        "Linux boots in vbus-vmm, with 1 and 2 CPUs, full and split irqchip",
        kvm::linux::boot,
    ),
    beside_kvm(
        "kvm::snapshot",
        "a guest is saved, restored, moved and moved back: it counts on, its clocks are right",
        kvm::snapshot::snapshot,
    ),
    beside_kvm(
        "kvm::moved_program",
        "a guest with devices is saved alive, restored, and moved between two buses under TCP",
        kvm::moved::program,
    ),
    beside_kvm(
        "kvm::moved_driver",
        "the same with the Linux driver; only with --times",
        kvm::moved::driver,
    ),
    beside_kvm(
        "kvm::moves_fail",
        "receiver or sender dies or stalls in a move under TCP, a device leaves during a save",
        kvm::moves_fail::moves,
    ),
    beside_kvm(
        "kvm::traffic",
        "TCP both ways with 2 CPUs, interrupts that move, a virtio card, reboot",
        kvm::devices::traffic,
    ),
    beside_kvm(
        "kvm::vhost",
        "the kernel carries a virtio card's frames while the bus sleeps; moves and unplug under load",
        kvm::vhost::carries,
    ),
    beside_kvm(
        "kvm::plug_cycles",
        "20 times plug, use and unplug beside traffic on another NIC",
        kvm::devices::plug_cycles,
    ),
    beside_kvm(
        "kvm::shared_pins",
        "ten devices with INTx on eight pins: each interrupt arrives",
        kvm::pins::shared,
    ),
    beside_kvm(
        "kvm::config_writes",
        "random writes of configuration spaces, beside traffic on another NIC",
        kvm::config::writes,
    ),
    beside_kvm(
        "kvm::liars",
        "servers that lie about a device that is plugged, beside traffic on a NIC",
        kvm::liars::lie,
    ),
    beside_kvm(
        "kvm::deaths",
        "the bus dies under a guest and comes back; the VMM dies",
        kvm::devices::deaths,
    ),
    beside_kvm(
        "kvm::doorbell_kinds",
        "Linux is offered doorbells by memory, port and hypercall; program and driver take the \
         cheapest",
        kvm::doorbells::kinds,
    ),
    beside_kvm(
        "kvm::doorbell_storm",
        "Linux rings without end: its other devices and the bus go on",
        kvm::doorbells::storm,
    ),
    beside_kvm(
        "kvm::sched",
        "how late a real-time task of the guest wakes under load, with and without sched",
        kvm::sched::latency,
    ),
    beside_kvm(
        "kvm::against_virtio",
        "exits and interrupts of the same traffic, beside QEMU's virtio-net",
        kvm::against::against_virtio,
    ),
];

const fn in_guests(
    name: &'static str,
    about: &'static str,
    test: fn(&Scene) -> anyhow::Result<()>,
) -> Scenario {
    Scenario { name, about, test: Test::InGuests(test) }
}

const fn beside_kvm(
    name: &'static str,
    about: &'static str,
    test: fn(&L1, &mut Figures) -> anyhow::Result<()>,
) -> Scenario {
    Scenario { name, about, test: Test::BesideKvm(test) }
}
