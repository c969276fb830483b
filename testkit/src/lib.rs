// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tests of vbus need to run real guests on any machine: a kit with QEMU and a stock
//! kernel, virtual machines, buses, and the scenarios that use them.
//!
//! A scenario is a function. It gets a [`Scene`](lab::Scene), starts a bus and guests in it, and
//! runs commands in the guests:
//!
//! ```no_run
//! use testkit::{bus::{Bus, device}, lab::Options, trial, vm::VmSpec};
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = trial::open(&Options::default())?;
//! let scene = lab.scene("example")?;
//! let bus = Bus::start(&scene, &device("net0", "venet", "backend = \"null\""))?;
//! let vm = VmSpec::new("a").device(bus.socket("net0")).boot(&scene)?;
//! assert!(vm.guest.ok("vbus-guest list")?.contains("net0"));
//! # Ok(())
//! # }
//! ```
//!
//! [`scenarios::SCENARIOS`] lists the scenarios, and [`runner::run`] runs them. The words of this
//! crate:
//!
//! | word | what it is |
//! |---|---|
//! | kit | the files fetched from Debian: QEMU, kernels, busybox, iperf3 ([`kit::Kit`]) |
//! | system | a kernel and the root file system that fits it ([`system::System`]) |
//! | lab | what all guests of one run share: kit, programs, accelerator ([`lab::Lab`]) |
//! | scene | the folder with the sockets and logs of one scenario ([`lab::Scene`]) |
//! | scenario | a test in real guests ([`scenario::Scenario`]) |
//! | VM | a virtual machine under QEMU: described ([`vm::VmSpec`]) or running ([`vm::Vm`]) |
//! | guest | the system inside a VM, reached through its agent ([`guest::Guest`]) |
//! | agent | the program `guest-agent`, which runs in each guest |
//! | L1 | a Linux with a real KVM: a VM with emulated SVM, or this host ([`l1::L1`]) |
//! | L2 | a guest on the KVM of an L1 ([`l2::L2Spec`], [`l2::L2`]) |
//! | module | the Linux driver, built for a kernel of Debian ([`module::Module`]) |
//! | bus | `vbus serve` on the host ([`bus::Bus`]) or in an L1 ([`l2::L1Bus`]) |
//! | pair | two guests whose NICs are on one switch ([`pair::Pair`]) |
//!
//! The modules. Each one uses only those above it:
//!
//! | module | what it answers |
//! |---|---|
//! | [`workspace`], [`template`] | where is the workspace, and how is it built? |
//! | [`process`], [`progress`], [`report`] | what runs, how far is it, how did it end? |
//! | [`kit`], [`initramfs`], [`system`], [`put`] | what are the guests made of? |
//! | [`module`] | how is the Linux driver built? |
//! | [`lab`], [`qmp`], [`guest`] | what do all guests share, and how does a test speak to one? |
//! | [`vm`], [`trial`], [`bus`], [`linux`] | one VM, with KVM or without; one bus; the Linux driver in a guest |
//! | [`process_guest`] | a guest without a virtual machine |
//! | [`iperf`], [`nic`], [`pair`], [`tap`], [`flat`] | what many scenarios start with |
//! | [`lost`] | what does a machine do that does not answer any more? |
//! | [`l1`], [`l2`] | a Linux with a real KVM, and a guest in it |
//! | [`exits`], [`l1_wire`] | why does that guest exit, and what does its traffic cost? |
//! | [`netbench`] | how do NICs compare? |
//! | [`soak`] | guests and hostile clients on one bus, for a long time |
//! | [`faults`] | what does a bus do when a system call fails? |
//! | [`scenario`], [`scenarios`], [`runner`] | the tests |

pub mod bus;
pub mod exits;
pub mod faults;
pub mod flat;
mod flood;
pub mod guest;
pub mod initramfs;
pub mod iperf;
pub mod kit;
pub mod l1;
pub mod l1_wire;
pub mod l2;
pub mod lab;
pub mod linux;
pub mod lost;
pub mod module;
pub mod netbench;
pub mod netboot;
pub mod nic;
pub mod pair;
pub mod pauses;
pub mod process;
pub mod process_guest;
pub mod progress;
pub mod put;
pub mod qmp;
pub mod report;
pub mod runner;
pub mod scenario;
pub mod scenarios;
pub mod snapshot;
pub mod soak;
pub mod system;
pub mod tap;
pub mod template;
pub mod testpmd;
pub mod trial;
pub mod vm;
pub mod wire;
pub mod workspace;
