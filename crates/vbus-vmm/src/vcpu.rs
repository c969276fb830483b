// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One virtual CPU: its state after a reset, and its exits to user space.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC2, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_enable_cap,
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
use crate::vcpu_state::{MSR_TSC, VcpuState, msr_indices, set_msr};

/// The status of a Hyper-V hypercall for an event connection that does not exist.
const NO_CONNECTION: u64 = 0x12;

/// `IA32_MISC_ENABLE` with fast string instructions.
const MSR_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// Memory is cached unless the page tables say otherwise, as a PC's firmware sets it.
const MSR_MTRR_DEFAULT: (u32, u64) = (0x2ff, 1 << 11 | 6);
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
    /// The state of the new CPU, to which a reset brings it back.
    fresh: VcpuState,
    /// The MSRs of its state.
    msrs: Vec<u32>,
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
        let msrs = msr_indices(kvm, model.hyperv())?;
        let mut fresh = VcpuState::of(&fd, &msrs).context("cannot read a virtual CPU's state")?;
        fresh.msrs.retain(|(index, _)| *index != MSR_TSC);
        fresh.mp_state.mp_state =
            if number == 0 { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        Ok(Vcpu { number, fd, fresh, msrs, exits: Arc::default() })
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
    pub fn reset(&mut self, start: &Start) -> Result<()> {
        let fresh = (self.fresh.system, self.fresh.registers);
        if self.number == 0 {
            start.set_up(&mut self.fresh.system);
            self.fresh.registers = *start.registers();
        }
        // An MSR that KVM does not take has nothing to reset.
        let put = self.fresh.put(&self.fd);
        (self.fresh.system, self.fresh.registers) = fresh;
        put.map(drop).with_context(|| format!("cannot reset virtual CPU {}", self.number))
    }

    /// The CPU's state, see [`VcpuState::of`].
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn save(&self) -> Result<VcpuState> {
        VcpuState::of(&self.fd, &self.msrs)
            .with_context(|| format!("cannot read the state of virtual CPU {}", self.number))
    }

    /// Gives the CPU a saved state, see [`VcpuState::restore`].
    ///
    /// # Errors
    /// The state has an MSR that no state here has, or KVM refuses a part of it.
    pub(crate) fn restore(&self, state: &mut VcpuState, ticks: u64) -> Result<()> {
        state
            .restore(&self.fd, &self.msrs, ticks, self.number == 0)
            .with_context(|| format!("cannot restore virtual CPU {}", self.number))
    }

    /// The frequency of its time stamp counter in kHz.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn tsc_khz(&self) -> Result<u32> {
        self.fd.get_tsc_khz().context("KVM does not tell the frequency of the time stamp counter")
    }

    /// Sets the frequency of its time stamp counter, unless it has it.
    ///
    /// # Errors
    /// This processor cannot.
    pub(crate) fn set_tsc_khz(&self, khz: u32) -> Result<()> {
        let own = self.tsc_khz()?;
        if own != khz {
            self.fd.set_tsc_khz(khz).with_context(|| {
                format!("the time stamp counter has {khz} kHz there, and {own} kHz on this machine")
            })?;
        }
        Ok(())
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
