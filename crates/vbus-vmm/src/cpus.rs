//! All virtual CPUs with their threads, which run and pause together.
#![allow(
    unsafe_code,
    reason = "a thread in KVM is told to come back by a byte that it shares with the kernel"
)]

use std::mem::offset_of;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_run;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::thread::Pid;
use vbus_kvm::Stats;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::boot::Start;
use crate::exits::Exits;
use crate::machine::Ask;
use crate::seccomp::{self, Thread};
use crate::vcpu::{Buses, Pause, Vcpu};

/// How long a virtual CPU may take to come back from whatever it does, in a device too.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long until it is told again.
const AGAIN: Duration = Duration::from_millis(100);
/// The signal that fetches a thread out of KVM: the first real-time one. Its handler does nothing.
fn signal() -> i32 {
    SIGRTMIN()
}

/// Where the threads wait for one another.
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    /// Threads that come here wait. Opened with the lock held; closed by anybody.
    closed: AtomicBool,
}

struct State {
    /// Threads that wait, or have ended.
    waiting: usize,
    /// Those that wait shall end.
    end: bool,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of all virtual CPUs.
pub struct Cpus {
    gate: Arc<Gate>,
    cpus: Vec<Cpu>,
}

struct Cpu {
    /// Locked by its thread while that runs.
    vcpu: Arc<Mutex<Vcpu>>,
    page: Arc<RunPage>,
    exits: Arc<Exits>,
    stats: Option<Stats>,
    thread: Option<JoinHandle<()>>,
    id: Pid,
}

impl Cpus {
    /// Starts a thread for each of `vcpus`, which waits for [`run`](Self::run). What they cannot
    /// handle goes to `asks`.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: &Arc<Buses>,
        asks: &Sender<Ask>,
        filter: bool,
    ) -> Result<Cpus> {
        register_signal_handler(signal(), wake).context("cannot catch a signal")?;
        let state = Mutex::new(State { waiting: 0, end: false });
        let gate = Arc::new(Gate { state, changed: Condvar::new(), closed: AtomicBool::new(true) });
        let mut cpus = Cpus { gate, cpus: Vec::new() };
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let page = Arc::new(RunPage::of(&vcpu).context("cannot map a virtual CPU")?);
            let (exits, stats) = (vcpu.exits().clone(), Stats::of_vcpu(vcpu.fd()).ok());
            let vcpu = Arc::new(Mutex::new(vcpu));
            let work = Work {
                number,
                vcpu: vcpu.clone(),
                page: page.clone(),
                gate: cpus.gate.clone(),
                buses: buses.clone(),
                asks: asks.clone(),
            };
            let (tell, told) = std::sync::mpsc::channel();
            let thread =
                std::thread::Builder::new().name(format!("vcpu{number}")).spawn(move || {
                    // What fails is told to who waits below; there is no use in going on without
                    // the filter.
                    let ready = if filter { seccomp::apply(Thread::Vcpu) } else { Ok(()) };
                    let failed = ready.is_err();
                    let _ = tell.send(ready.map(|()| rustix::thread::gettid()));
                    if !failed {
                        work.work();
                    }
                })?;
            let id = told.recv().context("a virtual CPU's thread has ended at once")??;
            cpus.cpus.push(Cpu { vcpu, page, exits, stats, thread: Some(thread), id });
        }
        Ok(cpus)
    }

    /// Lets them run.
    pub fn run(&self) {
        let _state = self.gate.lock();
        self.gate.closed.store(false, Ordering::Relaxed);
        self.gate.changed.notify_all();
    }

    /// Stops them, wherever they are, and waits until none is in KVM or in a device and every exit
    /// is finished.
    ///
    /// # Errors
    /// If one does not come back: a device does not answer.
    pub fn hold(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let mut state = self.gate.lock();
        // Within the lock, for a thread that is let go takes the bytes back there.
        self.gate.closed.store(true, Ordering::Relaxed);
        self.cpus.iter().for_each(|cpu| cpu.page.leave_at_once(true));
        while state.waiting < self.cpus.len() {
            let busy = self.cpus.len() - state.waiting;
            ensure!(
                Instant::now() < until,
                "{busy} virtual CPUs do not come back: a device does not answer"
            );
            // A signal that comes just before the thread is in KVM, or in a device's system call,
            // is without effect there: hence the byte, and hence again.
            for thread in self.cpus.iter().filter_map(|cpu| cpu.thread.as_ref()) {
                thread.kill(signal()).context("cannot signal a thread")?;
            }
            state = self
                .gate
                .changed
                .wait_timeout(state, AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Puts all into the state after a reset. They must be held.
    pub fn reset(&self, start: &Start) -> Result<()> {
        self.cpus.iter().try_for_each(|cpu| {
            cpu.vcpu.lock().unwrap_or_else(PoisonError::into_inner).reset(start)
        })
    }

    /// Their number, thread, and counters.
    pub fn list(&self) -> impl Iterator<Item = (usize, Pid, &Exits, Option<&Stats>)> {
        self.cpus
            .iter()
            .enumerate()
            .map(|(number, cpu)| (number, cpu.id, &*cpu.exits, cpu.stats.as_ref()))
    }

    /// A handle by which a device, on a virtual CPU's thread, makes that CPU stop after the access.
    pub fn brake(&self) -> Brake {
        Brake(self.gate.clone())
    }
}

impl Drop for Cpus {
    fn drop(&mut self) {
        // A thread that does not come back is left where it is: the process is about to end.
        if self.hold().is_ok() {
            self.gate.lock().end = true;
            self.gate.changed.notify_all();
            for cpu in &mut self.cpus {
                let _ = cpu.thread.take().map(JoinHandle::join);
            }
        }
    }
}

/// See [`Cpus::brake`].
#[derive(Clone)]
pub struct Brake(Arc<Gate>);

impl Brake {
    /// Closes the gate, until it is opened by [`Cpus::run`]; the calling thread's CPU stops there
    /// once it has finished its exit.
    pub fn close(&self) {
        self.0.closed.store(true, Ordering::Relaxed);
    }
}

/// A thread's own.
struct Work {
    number: usize,
    vcpu: Arc<Mutex<Vcpu>>,
    page: Arc<RunPage>,
    gate: Arc<Gate>,
    buses: Arc<Buses>,
    asks: Sender<Ask>,
}

impl Work {
    fn work(&self) {
        while self.wait() {
            let mut vcpu = self.vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            let pause = vcpu.run(&self.buses, &|| {
                // The exit has still to be finished, by entering KVM once more.
                if self.gate.closed.load(Ordering::Relaxed) {
                    self.page.leave_at_once(true);
                }
            });
            let ask = match pause {
                Ok(Pause::Asked) => continue,
                Ok(Pause::TripleFault) => {
                    // Few guests reset themselves so on purpose.
                    tracing::warn!(
                        "virtual CPU {}: triple fault; the machine begins anew",
                        self.number
                    );
                    Ask::Reset(format!("virtual CPU {}: triple fault", self.number))
                }
                Err(error) => Ask::Fail(error),
            };
            self.gate.closed.store(true, Ordering::Relaxed);
            // Nobody listens any more only if the machine is about to end.
            let _ = self.asks.send(ask);
        }
    }

    /// Waits until it may run; false: it shall end.
    fn wait(&self) -> bool {
        let mut state = self.gate.lock();
        state.waiting += 1;
        self.gate.changed.notify_all();
        while self.gate.closed.load(Ordering::Relaxed) && !state.end {
            state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.end {
            return false;
        }
        state.waiting -= 1;
        self.page.leave_at_once(false);
        true
    }
}

/// What the handler of the signal does: the signal has ended a system call already.
extern "C" fn wake(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// A mapping of its own of the page that a virtual CPU shares with KVM, for the one byte in it that
/// other threads may write.
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
        // SAFETY: The descriptor is open as long as `vcpu` is borrowed, and the mapping is new and
        // touches nothing else.
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

    /// Whether KVM shall come back without running the guest, once it has finished the last exit.
    fn leave_at_once(&self, leave: bool) {
        // SAFETY: The byte lies in the mapping, and is accessed by nobody else in Rust but as an
        // atomic.
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

    use kvm_ioctls::Kvm;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::bus::BusDevice;
    use crate::cpuid::Model;
    use crate::irqchip::IrqChip;
    use crate::memory::Ram;

    /// Where the code of a test lies.
    const CODE: u64 = 0x10_0000;
    /// The port that [`Counter`] is at.
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

    struct Machine {
        cpus: Cpus,
        start: Start,
        counter: Arc<Counter>,
        asks: Receiver<Ask>,
        _ram: Ram,
    }

    /// A machine with one CPU that runs `code` in 32-bit mode. `None` where there is no KVM.
    fn machine(code: &[u8]) -> Option<Machine> {
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
        let (asks, asked) = channel();
        let (mut buses, counter) = (Buses::default(), Arc::<Counter>::default());
        buses.pio.add(PORT, 1, counter.clone());
        let model = Model::new(&kvm, 1, false).unwrap();
        let vcpu = Vcpu::new(&kvm, &vm, 0, &model).unwrap();
        let cpus = Cpus::start(vec![vcpu], &Arc::new(buses), &asks, false).unwrap();
        cpus.reset(&start).unwrap();
        Some(Machine { cpus, start, counter, asks: asked, _ram: ram })
    }

    #[test]
    fn a_cpu_stops_wherever_it_is() {
        let (spin, halt, out): (&[u8], &[u8], &[u8]) =
            (&[0xeb, 0xfe], &[0xf4, 0xeb, 0xfd], &[0xe6, 0x80, 0xeb, 0xfc]);
        for code in [spin, halt, out] {
            let Some(machine) = machine(code) else { return };
            for turn in 0..100 {
                machine.cpus.run();
                if turn % 2 == 0 {
                    // At times before it has got into KVM at all.
                    std::thread::yield_now();
                }
                machine.cpus.hold().unwrap();
                let before = machine.counter.0.load(Ordering::Relaxed);
                if turn % 10 == 0 {
                    machine.cpus.reset(&machine.start).unwrap();
                }
                assert_eq!(machine.counter.0.load(Ordering::Relaxed), before);
            }
            assert!(machine.asks.try_recv().is_err());
        }
    }

    #[test]
    fn an_exit_is_finished_before_a_reset() {
        // Port 0x80 is written once, then nothing more; after each reset once again.
        let Some(machine) = machine(&[0xe6, 0x80, 0xeb, 0xfe]) else { return };
        for turn in 1..=50 {
            machine.cpus.run();
            let until = Instant::now() + Duration::from_secs(60);
            while machine.counter.0.load(Ordering::Relaxed) < turn {
                assert!(Instant::now() < until, "the guest does not run");
                std::thread::yield_now();
            }
            machine.cpus.hold().unwrap();
            machine.cpus.reset(&machine.start).unwrap();
        }
        assert_eq!(machine.counter.0.load(Ordering::Relaxed), 50);
    }

    #[test]
    fn a_triple_fault_asks_for_a_reset() {
        // An invalid instruction, and no handler for anything.
        let Some(machine) = machine(&[0x0f, 0x0b]) else { return };
        machine.cpus.run();
        let ask = machine.asks.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(matches!(ask, Ask::Reset(why) if why.contains("triple fault")));
        machine.cpus.hold().unwrap();
    }
}
