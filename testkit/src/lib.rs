//! What the tests of vbus need to run real guests on any machine: a kit with QEMU and a stock
//! kernel, machines, buses, and the scenarios that join them.
//!
//! A scenario is a function. It gets a [`Scene`](lab::Scene), starts a bus and guests in it, and
//! runs commands in the guests:
//!
//! ```no_run
//! use testkit::{bus::{Bus, device}, lab::Options, machine::Machine, trial};
//!
//! # fn main() -> anyhow::Result<()> {
//! let lab = trial::open(&Options::default())?;
//! let scene = lab.scene("example")?;
//! let bus = Bus::start(&scene, &device("net0", "venet", "backend = \"null\""))?;
//! let vm = Machine::new("a").device(bus.socket("net0")).boot(&scene)?;
//! assert!(vm.guest.ok("vbus-guest list")?.contains("net0"));
//! # Ok(())
//! # }
//! ```
//!
//! [`scenarios::SCENARIOS`] lists the scenarios, and [`runner::run`] runs them. The modules, each
//! of which uses only those above it:
//!
//! | module | what it answers |
//! |---|---|
//! | [`workspace`], [`template`], [`process`], [`progress`], [`report`] | where are we, what runs, how far, what became of it? |
//! | [`kit`], [`initramfs`], [`put`] | what are the guests made of? |
//! | [`lab`], [`qmp`], [`guest`] | what do all guests share; how do we speak to one? |
//! | [`machine`], [`trial`], [`bus`] | one guest, with KVM or without; one bus |
//! | [`nic`], [`pair`], [`flat`] | what many scenarios begin with |
//! | [`rig`], [`inner`] | a Linux with a real KVM, and a guest in it |
//! | [`scenario`], [`scenarios`], [`runner`] | the tests |

pub mod bus;
pub mod flat;
pub mod guest;
pub mod initramfs;
pub mod inner;
pub mod kit;
pub mod lab;
pub mod machine;
pub mod nic;
pub mod pair;
pub mod process;
pub mod progress;
pub mod put;
pub mod qmp;
pub mod report;
pub mod rig;
pub mod runner;
pub mod scenario;
pub mod scenarios;
pub mod template;
pub mod trial;
pub mod workspace;
