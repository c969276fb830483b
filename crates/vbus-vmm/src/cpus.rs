// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The virtual CPUs with their threads, which run and pause together.
#![allow(
    unsafe_code,
    reason = "a byte that this program shares with the kernel tells a thread in KVM to come back"
)]

use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_run;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::thread::Pid;
use serde_json::Value;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::boot::Start;
use crate::events::{EventSender, VmEvent};
use crate::lock::lock;
use crate::seccomp::{self, Thread};
use crate::vcpu::{Buses, Pause, Vcpu};
use crate::vcpu_gate::VcpuGate;
use crate::vcpu_state::VcpuState;

/// The signal that brings a thread back from KVM: the first real-time signal. Its handler does
/// nothing.
fn signal() -> i32 {
    SIGRTMIN()
}

/// The threads of all virtual CPUs.
pub struct Cpus {
    gate: Arc<VcpuGate>,
    cpus: Vec<Cpu>,
}

struct Cpu {
    /// The CPU's thread holds the lock while the CPU runs.
    vcpu: Arc<Mutex<Vcpu>>,
    page: Arc<RunPage>,
    thread: Option<JoinHandle<()>>,
    id: Pid,
}

impl Cpus {
    /// Starts a thread for each of `vcpus`. The threads wait at `gate`, which must be closed, for
    /// [`run`](Self::run). Events that they cannot handle themselves go to `events`.
    ///
    /// # Errors
    /// The process has no more threads or descriptors, or a filter of system calls cannot be armed.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: &Arc<Buses>,
        gate: Arc<VcpuGate>,
        events: &EventSender,
        filter: bool,
    ) -> Result<Cpus> {
        register_signal_handler(signal(), wake).context("cannot catch a signal")?;
        let mut cpus = Cpus { gate, cpus: Vec::new() };
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let page = Arc::new(RunPage::of(&vcpu).context("cannot map a virtual CPU")?);
            let vcpu = Arc::new(Mutex::new(vcpu));
            let runner = Runner {
                number,
                vcpu: vcpu.clone(),
                page: page.clone(),
                gate: cpus.gate.clone(),
                buses: buses.clone(),
                events: events.clone(),
            };
            let (tell, told) = std::sync::mpsc::channel();
            let thread =
                std::thread::Builder::new().name(format!("vcpu{number}")).spawn(move || {
                    // The receiver below learns of an error. Without its filter the thread must not
                    // run a guest.
                    let ready = if filter { seccomp::apply(Thread::Vcpu) } else { Ok(()) };
                    let failed = ready.is_err();
                    let _ = tell.send(ready.map(|()| rustix::thread::gettid()));
                    if !failed {
                        runner.run();
                    }
                })?;
            let id = told.recv().context("a virtual CPU's thread has ended at once")??;
            cpus.cpus.push(Cpu { vcpu, page, thread: Some(thread), id });
        }
        Ok(cpus)
    }

    /// Lets the virtual CPUs run.
    pub fn run(&self) {
        self.gate.open();
    }

    /// Stops the virtual CPUs wherever they are. Returns when none is in KVM or in a device, and
    /// every exit is finished.
    ///
    /// # Errors
    /// A virtual CPU does not come back within 10 s, because a device does not answer.
    pub fn hold(&self) -> Result<()> {
        self.gate.hold(self.cpus.len(), || {
            self.cpus.iter().for_each(|cpu| cpu.page.leave_at_once(true));
            // A signal has no effect if it arrives just before the thread enters KVM or a system
            // call of a device. So there is the byte, and the gate calls this again.
            for thread in self.cpus.iter().filter_map(|cpu| cpu.thread.as_ref()) {
                thread.kill(signal()).context("cannot signal a thread")?;
            }
            Ok(())
        })
    }

    /// Puts all virtual CPUs into the state after a reset. They must be held.
    ///
    /// # Errors
    /// KVM refuses a part of the state.
    pub fn reset(&self, start: &Start) -> Result<()> {
        self.cpus.iter().try_for_each(|cpu| lock(&cpu.vcpu).reset(start))
    }

    /// The states of all virtual CPUs, by number. They must be held.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn save(&self) -> Result<Vec<VcpuState>> {
        self.cpus.iter().map(|cpu| lock(&cpu.vcpu).save()).collect()
    }

    /// Gives the virtual CPUs saved states, by number. They must be held. Their time stamp
    /// counters, which have a frequency of `khz`, go on by `elapsed` from their saved values.
    ///
    /// # Errors
    /// The number of states is not that of the CPUs, KVM refuses a part of a state, or this
    /// processor has no such frequency.
    pub(crate) fn restore(
        &self,
        states: &mut [VcpuState],
        khz: u32,
        elapsed: Duration,
    ) -> Result<()> {
        let (have, need) = (states.len(), self.cpus.len());
        ensure!(have == need, "there are {have} states for {need} virtual CPUs");
        let ticks = u64::try_from(elapsed.as_nanos() * u128::from(khz) / 1_000_000)?;
        // All counters have their frequency before the first one is set: KVM keeps them together.
        self.cpus.iter().try_for_each(|cpu| lock(&cpu.vcpu).set_tsc_khz(khz))?;
        let mut pairs = self.cpus.iter().zip(states);
        pairs.try_for_each(|(cpu, state)| lock(&cpu.vcpu).restore(state, ticks))
    }

    /// What each virtual CPU does, by number: all of them if they are held. One that runs all the
    /// same is told as null. `memory` is the guest's.
    pub fn dump(&self, memory: &GuestMemoryMmap) -> Vec<Value> {
        let dump = |cpu: &Cpu| cpu.vcpu.try_lock().ok().map(|vcpu| vcpu.dump(memory)).into();
        self.cpus.iter().map(dump).collect()
    }

    /// The number of virtual CPUs.
    pub fn count(&self) -> usize {
        self.cpus.len()
    }

    /// The number of each virtual CPU, and the id of the thread that runs it.
    pub fn threads(&self) -> impl Iterator<Item = (usize, Pid)> {
        self.cpus.iter().enumerate().map(|(number, cpu)| (number, cpu.id))
    }
}

impl Drop for Cpus {
    fn drop(&mut self) {
        // If a thread does not come back, it stays where it is: the process is about to end.
        if self.hold().is_ok() {
            self.gate.end();
            for cpu in &mut self.cpus {
                let _ = cpu.thread.take().map(JoinHandle::join);
            }
        }
    }
}

/// The thread of one virtual CPU.
struct Runner {
    number: usize,
    vcpu: Arc<Mutex<Vcpu>>,
    page: Arc<RunPage>,
    gate: Arc<VcpuGate>,
    buses: Arc<Buses>,
    events: EventSender,
}

impl Runner {
    /// Runs the CPU whenever the gate is open, until the thread must end.
    fn run(&self) {
        while self.gate.wait(|| self.page.leave_at_once(false)) {
            let mut vcpu = lock(&self.vcpu);
            let pause = vcpu.run(&self.buses, &|| {
                // KVM finishes the exit when it is entered once more.
                if self.gate.is_closed() {
                    self.page.leave_at_once(true);
                }
            });
            let event = match pause {
                Ok(Pause::Held) => continue,
                Ok(Pause::TripleFault) => {
                    // Few guests reset themselves by a triple fault on purpose.
                    tracing::warn!("virtual CPU {}: triple fault; the machine resets", self.number);
                    VmEvent::Reset(format!("virtual CPU {}: triple fault", self.number))
                }
                Err(error) => VmEvent::Fail(error),
            };
            self.gate.close();
            // The receiver is gone only if the machine is about to end.
            let _ = self.events.send(event);
        }
    }
}

/// The handler of the signal. The signal itself has interrupted a system call already.
extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A second mapping of the page that a virtual CPU shares with KVM. Other threads write one byte of
/// it.
struct RunPage {
    page: NonNull<kvm_run>,
}

// SAFETY: Only an atomic byte of the page is ever accessed.
unsafe impl Send for RunPage {}
// SAFETY: As above.
unsafe impl Sync for RunPage {}

impl RunPage {
    fn of(vcpu: &Vcpu) -> Result<RunPage> {
        let fd = vcpu.fd().as_raw_fd();
        // SAFETY: The descriptor is open as long as `vcpu` is borrowed. The mapping is new and
        // replaces no other one.
        let page = unsafe {
            let fd = BorrowedFd::borrow_raw(fd);
            let bytes = size_of::<kvm_run>();
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
            )?
        };
        Ok(RunPage { page: NonNull::new(page.cast()).context("mapped at 0")? })
    }

    /// Sets whether KVM comes back without running the guest once it has finished the last exit.
    fn leave_at_once(&self, leave: bool) {
        // SAFETY: The byte is in the mapping. All other Rust code accesses it as an atomic too.
        let byte = unsafe {
            AtomicU8::from_ptr(
                self.page.as_ptr().cast::<u8>().add(offset_of!(kvm_run, immediate_exit)),
            )
        };
        byte.store(u8::from(leave), Ordering::SeqCst);
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: The mapping is this value's own, and no reference to it outlives a call.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), size_of::<kvm_run>()) };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::{Duration, Instant};

    use kvm_ioctls::Kvm;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::bus::BusDevice;
    use crate::cpuid::Model;
    use crate::irqchip::IrqChip;
    use crate::memory::Ram;

    /// The address of a test's code.
    const CODE: u64 = 0x10_0000;
    /// The port of [`Counter`].
    const PORT: u64 = 0x80;

    /// Counts accesses.
    #[derive(Default)]
    struct Counter(std::sync::atomic::AtomicU64);

    impl BusDevice for Counter {
        fn read(&self, _: u64, _: &mut [u8]) {}
        fn write(&self, _: u64, _: &[u8]) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    struct TestVm {
        cpus: Cpus,
        start: Start,
        counter: Arc<Counter>,
        events: Receiver<VmEvent>,
        ram: Ram,
    }

    /// Makes a machine with one CPU that runs `code` in 32-bit mode. `None` without /dev/kvm.
    fn test_vm(code: &[u8]) -> Option<TestVm> {
        let Ok(kvm) = Kvm::new() else {
            println!("skipped: no /dev/kvm");
            return None;
        };
        let vm = Arc::new(kvm.create_vm().unwrap());
        let ram = Ram::new(16 << 20).unwrap();
        ram.give_to(&vm).unwrap();
        let _chip = IrqChip::new(&vm, false).unwrap();
        ram.map().write_slice(code, GuestAddress(CODE)).unwrap();
        let start = Start::protected(ram.map(), CODE, 0).unwrap();
        let (sender, events) = channel();
        let (mut buses, counter) = (Buses::default(), Arc::<Counter>::default());
        buses.pio.add(PORT, 1, counter.clone());
        let model = Model::new(&kvm, 1, false).unwrap();
        let vcpu = Vcpu::new(&kvm, &vm, 0, &model).unwrap();
        let cpus =
            Cpus::start(vec![vcpu], &Arc::new(buses), VcpuGate::new(), &sender, false).unwrap();
        cpus.reset(&start).unwrap();
        Some(TestVm { cpus, start, counter, events, ram })
    }

    #[test]
    fn a_cpu_stops_wherever_it_is() {
        let (spin, halt, out): (&[u8], &[u8], &[u8]) =
            (&[0xeb, 0xfe], &[0xf4, 0xeb, 0xfd], &[0xe6, 0x80, 0xeb, 0xfc]);
        for code in [spin, halt, out] {
            let Some(vm) = test_vm(code) else { return };
            for turn in 0..100 {
                vm.cpus.run();
                if turn % 2 == 0 {
                    // The CPU may not have entered KVM yet.
                    std::thread::yield_now();
                }
                vm.cpus.hold().unwrap();
                let before = vm.counter.0.load(Ordering::Relaxed);
                if turn % 10 == 0 {
                    vm.cpus.reset(&vm.start).unwrap();
                }
                assert_eq!(vm.counter.0.load(Ordering::Relaxed), before);
            }
            assert!(vm.events.try_recv().is_err());
        }
    }

    #[test]
    fn an_exit_is_finished_before_a_reset() {
        // The guest writes port 0x80 once after each reset, and then spins.
        let Some(vm) = test_vm(&[0xe6, 0x80, 0xeb, 0xfe]) else { return };
        for turn in 1..=50 {
            vm.cpus.run();
            let until = Instant::now() + Duration::from_secs(60);
            while vm.counter.0.load(Ordering::Relaxed) < turn {
                assert!(Instant::now() < until, "the guest does not run");
                std::thread::yield_now();
            }
            vm.cpus.hold().unwrap();
            vm.cpus.reset(&vm.start).unwrap();
        }
        assert_eq!(vm.counter.0.load(Ordering::Relaxed), 50);
    }

    /// A guest that counts in a register and in memory goes on in another virtual machine.
    #[test]
    fn a_saved_cpu_goes_on_elsewhere() {
        // inc ebx; mov [0x200000], ebx; out 0x80, al; jmp back
        let code = [0x43, 0x89, 0x1d, 0, 0, 0x20, 0, 0xe6, 0x80, 0xeb, 0xf5];
        let Some(vm) = test_vm(&code) else { return };
        let at = GuestAddress(0x20_0000);
        let until = Instant::now() + Duration::from_secs(60);
        vm.cpus.run();
        while vm.counter.0.load(Ordering::Relaxed) < 100 {
            assert!(Instant::now() < until, "the guest does not run");
            std::thread::yield_now();
        }
        vm.cpus.hold().unwrap();
        let counted = u64::from(vm.ram.map().read_obj::<u32>(at).unwrap());
        let khz = lock(&vm.cpus.cpus[0].vcpu).tsc_khz().unwrap();
        let bytes: Vec<_> = vm.cpus.save().unwrap().iter().map(VcpuState::encode).collect();
        let mut states: Vec<_> =
            bytes.iter().map(|bytes| VcpuState::decode(bytes).unwrap()).collect();

        let next = test_vm(&code).unwrap();
        next.ram.map().write_obj(u32::try_from(counted).unwrap(), at).unwrap();
        // A forged state with an MSR that no state has is refused.
        states[0].msrs.push((0x8b, 0));
        let fault = next.cpus.restore(&mut states, khz, Duration::ZERO).unwrap_err();
        assert!(format!("{fault:#}").contains("MSR 0x8b"), "{fault:#}");
        states[0].msrs.pop();
        next.cpus.restore(&mut states, khz, Duration::ZERO).unwrap();
        next.cpus.run();
        while next.counter.0.load(Ordering::Relaxed) < 100 {
            assert!(Instant::now() < until, "the guest does not go on");
            std::thread::yield_now();
        }
        next.cpus.hold().unwrap();
        let later = u64::from(next.ram.map().read_obj::<u32>(at).unwrap());
        let rings = next.counter.0.load(Ordering::Relaxed);
        // Each machine may have stopped between its two writes.
        assert!((counted + rings).abs_diff(later) <= 1, "{counted} and {rings} are not {later}");
        assert!(next.cpus.restore(&mut [], khz, Duration::ZERO).is_err());
    }

    #[test]
    fn a_triple_fault_is_a_reset_event() {
        // An invalid instruction, without a handler for any exception.
        let Some(vm) = test_vm(&[0x0f, 0x0b]) else { return };
        vm.cpus.run();
        let event = vm.events.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(matches!(event, VmEvent::Reset(why) if why.contains("triple fault")));
        vm.cpus.hold().unwrap();
    }
}
