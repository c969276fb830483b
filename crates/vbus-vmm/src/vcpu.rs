// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One virtual CPU: its state after a reset, and its exits to user space.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC2, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs,
    kvm_enable_cap, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use serde_json::Value;
use vm_memory::GuestMemoryMmap;

use crate::boot::Start;
use crate::bus::Bus;
use crate::counters::VcpuCounters;
use crate::cpuid::Model;
use crate::dump;
use crate::exits::{ExitKind, Exits};
use crate::ioapic::IoApic;

/// The status of a Hyper-V hypercall for an event connection that does not exist.
const NO_CONNECTION: u64 = 0x12;

/// The time stamp counter, which goes on through a reset.
const MSR_TSC: u32 = 0x10;
/// `IA32_MISC_ENABLE` with fast string instructions.
const MSR_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// Memory is cached unless the page tables say otherwise, as a PC's firmware sets it.
const MSR_MTRR_DEFAULT: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// The SynIC's registers, which KVM does not list: control, its two pages, and its interrupt
/// sources.
const SYNIC: [u32; 3] = [0x4000_0080, 0x4000_0082, 0x4000_0083];
const SYNIC_SOURCES: std::ops::RangeInclusive<u32> = 0x4000_0090..=0x4000_009f;

/// The devices at which the guest's accesses end.
#[derive(Default)]
pub struct Buses {
    /// Devices in memory.
    pub mmio: Bus,
    /// Devices at ports.
    pub pio: Bus,
    /// The I/O APIC, if it is in this process. It must learn of the ends of interrupts.
    pub io_apic: Option<Arc<IoApic>>,
}

/// Why a virtual CPU pauses.
pub enum Pause {
    /// The machine holds its virtual CPUs.
    Held,
    /// The guest caused a triple fault, which resets a PC.
    TripleFault,
}

/// A virtual CPU.
pub struct Vcpu {
    number: u32,
    fd: VcpuFd,
    fresh: Fresh,
    exits: Arc<Exits>,
}

impl Vcpu {
    /// Makes CPU `number` of `vm`.
    pub fn new(kvm: &Kvm, vm: &VmFd, number: u32, model: &Model) -> Result<Vcpu> {
        let fd = vm
            .create_vcpu(number.into())
            .with_context(|| format!("KVM cannot make virtual CPU {number}"))?;
        fd.set_cpuid2(&model.of(number)?).context("KVM does not accept the CPU's features")?;
        if model.hyperv() {
            let cap = kvm_enable_cap { cap: KVM_CAP_HYPERV_SYNIC2, ..Default::default() };
            fd.enable_cap(&cap).context("KVM does not switch the SynIC on")?;
        }
        for (index, data) in [MSR_MISC_ENABLE, MSR_MTRR_DEFAULT] {
            set_msr(&fd, index, data);
        }
        let fresh = Fresh::of(kvm, &fd, number == 0, model.hyperv())
            .context("cannot read a virtual CPU's state")?;
        Ok(Vcpu { number, fd, fresh, exits: Arc::default() })
    }

    /// KVM's descriptor of the CPU.
    pub fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The CPU's counters.
    pub fn counters(&self) -> VcpuCounters {
        VcpuCounters::new(self.number, self.exits.clone(), &self.fd)
    }

    /// Puts the CPU into the state after a reset. The first CPU begins at `start`, the others wait
    /// to be started. The CPU must not be running, nor have an unfinished exit.
    ///
    /// # Errors
    /// KVM refuses a part of the state.
    pub fn reset(&self, start: &Start) -> Result<()> {
        let start = (self.number == 0).then_some(start);
        self.fresh
            .restore(&self.fd, start)
            .with_context(|| format!("cannot reset virtual CPU {}", self.number))
    }

    /// What the CPU does, which must not be running. `memory` is the guest's.
    pub fn dump(&self, memory: &GuestMemoryMmap) -> Value {
        dump::vcpu(&self.fd, memory)
    }

    /// Runs the CPU until it must pause. If the result is [`Pause::Held`], every exit is finished.
    /// Calls `between` after the work of each exit, before KVM has finished it.
    ///
    /// # Errors
    /// KVM cannot run the CPU any more.
    pub fn run(&mut self, buses: &Buses, between: &dyn Fn()) -> Result<Pause> {
        loop {
            let exit = match self.fd.run() {
                Ok(exit) => exit,
                Err(error) => match io::Error::from(error).kind() {
                    io::ErrorKind::Interrupted => {
                        self.exits.count(ExitKind::Interrupted);
                        return Ok(Pause::Held);
                    }
                    // KVM says "try again", as after an INIT.
                    io::ErrorKind::WouldBlock => continue,
                    _ => {
                        return Err(error)
                            .with_context(|| format!("virtual CPU {} does not run", self.number));
                    }
                },
            };
            let kind = match exit {
                VcpuExit::IoIn(port, data) => {
                    buses.pio.read(port.into(), data);
                    ExitKind::PioRead
                }
                VcpuExit::IoOut(port, data) => {
                    buses.pio.write(port.into(), data);
                    ExitKind::PioWrite
                }
                VcpuExit::MmioRead(address, data) => {
                    buses.mmio.read(address, data);
                    ExitKind::MmioRead
                }
                VcpuExit::MmioWrite(address, data) => {
                    buses.mmio.write(address, data);
                    ExitKind::MmioWrite
                }
                VcpuExit::IoapicEoi(vector) => {
                    if let Some(io_apic) = &buses.io_apic {
                        io_apic.end(vector);
                    }
                    ExitKind::IoapicEoi
                }
                VcpuExit::Shutdown => {
                    self.exits.count(ExitKind::Other);
                    return Ok(Pause::TripleFault);
                }
                VcpuExit::Hyperv => {
                    // Either the guest moved the SynIC's pages, which this program does not use. Or
                    // it made a hypercall for a connection that does not exist; this is its status.
                    self.fd.get_kvm_run().__bindgen_anon_1.hyperv.u.hcall.result = NO_CONNECTION;
                    ExitKind::Other
                }
                VcpuExit::IrqWindowOpen => ExitKind::Other,
                VcpuExit::FailEntry(reason, _) => {
                    bail!(
                        "virtual CPU {}: the processor refuses its state ({reason:#x})",
                        self.number
                    )
                }
                other => {
                    let what = format!("{other:?}");
                    return Err(self.fault(&what));
                }
            };
            self.exits.count(kind);
            between();
        }
    }

    /// An error that says what went wrong, and where the guest was.
    fn fault(&self, what: &str) -> anyhow::Error {
        let at =
            self.fd.get_regs().map(|registers| format!("{:#x}", registers.rip)).unwrap_or_default();
        anyhow!("virtual CPU {}: KVM cannot continue at {at} ({what})", self.number)
    }
}

/// The state of a new virtual CPU, to which a reset brings it back.
struct Fresh {
    mp_state: kvm_mp_state,
    registers: kvm_regs,
    system: kvm_sregs,
    fpu: kvm_fpu,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    apic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
}

impl Fresh {
    fn of(kvm: &Kvm, fd: &VcpuFd, first: bool, hyperv: bool) -> Result<Fresh> {
        let list = kvm.get_msr_index_list()?;
        let synic = SYNIC.into_iter().chain(SYNIC_SOURCES).filter(|_| hyperv);
        let indices =
            list.as_slice().iter().copied().filter(|index| *index != MSR_TSC).chain(synic);
        let mp_state = if first { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        Ok(Fresh {
            mp_state: kvm_mp_state { mp_state },
            registers: fd.get_regs()?,
            system: fd.get_sregs()?,
            fpu: fd.get_fpu()?,
            xcrs: fd.get_xcrs()?,
            debug: fd.get_debug_regs()?,
            events: fd.get_vcpu_events()?,
            apic: fd.get_lapic()?,
            // A register that cannot be read needs no reset.
            msrs: indices
                .filter_map(|index| get_msr(fd, index).map(|data| (index, data)))
                .collect(),
        })
    }

    fn restore(&self, fd: &VcpuFd, start: Option<&Start>) -> Result<()> {
        let mut system = self.system;
        if let Some(start) = start {
            start.set_up(&mut system);
        }
        // The special registers hold the APIC's mode, so the APIC's registers come after them. MSRs
        // come before the APIC, since its registers decide on timers last.
        fd.set_sregs(&system)?;
        for (index, data) in &self.msrs {
            set_msr(fd, *index, *data);
        }
        fd.set_lapic(&self.apic)?;
        fd.set_xcrs(&self.xcrs)?;
        fd.set_fpu(&self.fpu)?;
        fd.set_debug_regs(&self.debug)?;
        fd.set_regs(start.map_or(&self.registers, |start| start.registers()))?;
        fd.set_vcpu_events(&self.events)?;
        fd.set_mp_state(self.mp_state)?;
        Ok(())
    }
}

fn get_msr(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let read = fd.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().first().filter(|_| read == 1).map(|entry| entry.data)
}

/// Writes an MSR. Some MSRs can be read but not written; they have nothing to reset.
fn set_msr(fd: &VcpuFd, index: u32, data: u64) {
    if let Ok(msrs) = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]) {
        let _ = fd.set_msrs(&msrs);
    }
}
