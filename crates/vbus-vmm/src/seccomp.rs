// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Filters of system calls. Each kind of thread may make some calls; any other ends the process.
#![allow(unsafe_code, reason = "a signal handler ends the process, and the allocator is set up")]

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};
use vmm_sys_util::signal::register_signal_handler;

/// The exit code after a forbidden system call: 128 and the number of SIGSYS.
const EXIT_CODE: i32 = 159;

/// The kinds of threads. A thread also has the filter of the thread that started it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Handles events: resets and ends the machine.
    Main,
    /// Runs a virtual CPU and the devices at which its exits end.
    Vcpu,
    /// Carries bytes between a serial port and its other end.
    Serial,
    /// Serves control clients, and plugs devices.
    Control,
    /// Watches the devices' connections.
    Watch,
    /// Waits for signals that end the machine.
    Signals,
    /// Waits for a loss of the guest's memory.
    Memory,
    /// Writes the log.
    Log,
}

/// The calls that any thread may need: memory, locks, time, waiting, open descriptors, the end. No
/// thread may make memory executable (see [`rules`]).
const ALL: [i64; 45] = [
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_io_destroy,
    libc::SYS_io_getevents,
    libc::SYS_io_submit,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Further calls that a kind of thread may make.
fn more(thread: Thread) -> &'static [i64] {
    match thread {
        Thread::Main => &[libc::SYS_fallocate, libc::SYS_unlink],
        Thread::Vcpu | Thread::Watch | Thread::Signals | Thread::Memory | Thread::Log => &[],
        Thread::Serial => &[libc::SYS_accept4],
        Thread::Control => &[
            libc::SYS_accept4,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_connect,
            libc::SYS_getpeername,
            libc::SYS_getsockname,
            libc::SYS_getsockopt,
            libc::SYS_prctl,
            libc::SYS_readlink,
            libc::SYS_readlinkat,
            libc::SYS_rseq,
            libc::SYS_sched_getaffinity,
            libc::SYS_set_robust_list,
            libc::SYS_setsockopt,
            libc::SYS_socket,
            libc::SYS_socketpair,
        ],
    }
}

/// Limits the number of the allocator's arenas. It must be called before the first thread is
/// started.
///
/// Without this limit glibc would read the number of processors from a file when the process has
/// more than eight threads, and no filter allows that.
pub fn prepare() {
    #[cfg(target_env = "gnu")]
    {
        const ARENAS: libc::c_int = 8;
        // SAFETY: The call changes a setting of the allocator. No other thread exists yet that
        // could race with it. It does not fail for this value.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
    }
}

/// Arms the filter of the calling thread for good.
pub fn apply(thread: Thread) -> Result<()> {
    register_signal_handler(libc::SIGSYS, complain).context("cannot catch a signal")?;
    apply_filter(&filter(thread)?)
        .with_context(|| format!("cannot arm the filter of system calls of {thread:?}"))
}

fn filter(thread: Thread) -> Result<BpfProgram> {
    // The signal says which call it was. Its handler ends the process.
    let filter = SeccompFilter::new(
        rules(thread)?,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    Ok(filter.try_into()?)
}

fn rules(thread: Thread) -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let masked = |argument, mask, value| {
        let op = SeccompCmpOp::MaskedEq(mask);
        SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)?])
    };
    // The second byte of an ioctl's number tells KVM's calls and, for the main thread, a
    // terminal's.
    let mut ioctls =
        vec![masked(1, 0xff00, 0xae00)?, masked(1, u64::from(u32::MAX), libc::FIONBIO)?];
    if thread == Thread::Main {
        ioctls.push(masked(1, 0xff00, 0x5400)?);
    }
    let not_executable = masked(2, u64::try_from(libc::PROT_EXEC)?, 0)?;
    let mut rules: BTreeMap<_, _> =
        ALL.iter().chain(more(thread)).map(|call| (*call, Vec::new())).collect();
    rules.insert(libc::SYS_ioctl, ioctls);
    rules.insert(libc::SYS_mmap, vec![not_executable.clone()]);
    rules.insert(libc::SYS_mprotect, vec![not_executable]);
    Ok(rules)
}

/// Says which system call it was, and ends the process. It makes only calls that a signal handler
/// may make.
extern "C" fn complain(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    /// The offset of the system call's number in the structure. libc has no name for the field.
    const NUMBER: usize = 24;
    // SAFETY: The kernel gives a valid structure, which for SIGSYS has the number there.
    let mut number =
        unsafe { info.cast::<u8>().add(NUMBER).cast::<libc::c_int>().read_unaligned() };
    let mut text =
        *b"vbus-vmm: ended at system call     , which is not allowed (see --no-seccomp)\n";
    let mut at = 35;
    while number > 0 && at > 31 {
        at -= 1;
        text[at] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
    // SAFETY: Both may be called in a signal handler; the text is valid for its length.
    unsafe {
        libc::write(2, text.as_ptr().cast(), text.len());
        libc::_exit(EXIT_CODE);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    /// Runs the test `name`, which is not run otherwise, in a process of its own.
    fn run(name: &str) -> (Option<i32>, String) {
        let program = std::env::current_exe().unwrap();
        let arguments = ["--ignored", "--exact", "--nocapture", "--test-threads=1"];
        let output = Command::new(program)
            .arg(format!("seccomp::tests::{name}"))
            .args(arguments)
            .output()
            .unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    }

    #[test]
    fn a_forbidden_call_ends_the_process_and_is_named() {
        for (name, call) in [("opens_a_file", libc::SYS_openat), ("makes_code", libc::SYS_mmap)] {
            let (code, text) = run(name);
            assert_eq!(code, Some(EXIT_CODE), "{name}: {text}");
            assert!(text.contains(&format!("system call {call:>4},")), "{text}");
        }
        assert_eq!(run("does_what_it_may").0, Some(0));
    }

    #[test]
    #[ignore = "ends its process"]
    fn opens_a_file() {
        apply(Thread::Vcpu).unwrap();
        let _ = std::fs::File::open("/dev/null");
    }

    #[test]
    #[ignore = "ends its process"]
    fn makes_code() {
        apply(Thread::Control).unwrap();
        // SAFETY: A new mapping, which touches nothing else.
        let _ = unsafe {
            let (prot, flags) =
                (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0)
        };
    }

    #[test]
    #[ignore = "its filter stays"]
    fn does_what_it_may() {
        let signaller = vbus_kvm::Signaller::new().unwrap();
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
        apply(Thread::Vcpu).unwrap();
        let words: Vec<String> = (0..10_000).map(|n| n.to_string()).collect();
        assert_eq!(words.len(), 10_000);
        signaller.signal(event.as_fd()).unwrap();
        assert!(vbus_kvm::take_signal(event.as_fd()));
        drop(signaller);
    }

    #[test]
    fn descriptors_of_a_server_are_closed_by_a_thread_that_runs_already() {
        let (code, text) = run("reads_from_a_server_that_sends_descriptors");
        assert_eq!(code, Some(0), "{text}");
    }

    /// A server may attach descriptors to any reply. A virtual CPU's thread closes none of them: a
    /// close may wait. It starts no thread for that either.
    #[test]
    #[ignore = "its filter stays"]
    fn reads_from_a_server_that_sends_descriptors() {
        use vfio_user_protocol::message::{HEADER_LEN, Kind, Version, command, message};
        use vfio_user_protocol::{Client, version};

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            let reply = Kind::Reply { error: None };
            let mut request = [0; 4096];
            let len = theirs.read(&mut request).unwrap();
            let proposal = Version::parse(&request[HEADER_LEN..len]).unwrap();
            let (_, agreed) = version::answer(&proposal, 512).unwrap();
            theirs.write_all(&message(0, command::VERSION, reply, &agreed)).unwrap();
            let (end, sent) = UnixStream::pair().unwrap();
            let len = theirs.read(&mut request).unwrap();
            // The reply to a read repeats the body of the request. The data follow.
            let body = [&request[HEADER_LEN..len], &[7; 4]].concat();
            let bytes = message(1, command::REGION_READ, reply, &body);
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = [sent.as_fd()];
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
            let parts = [std::io::IoSlice::new(&bytes)];
            sendmsg(&theirs, &parts, &mut ancillary, SendFlags::empty()).unwrap();
            end
        });
        let mut client = Client::negotiate(ours.into()).unwrap();
        apply(Thread::Vcpu).unwrap();
        let mut data = [0; 4];
        client.region_read(0, 0, &mut data).unwrap();
        assert_eq!(data, [7; 4]);
        // Nobody has the other end any more when this reads the end of the stream.
        let mut end = server.join().unwrap();
        assert_eq!(end.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn every_filter_can_be_made() {
        for thread in [
            Thread::Main,
            Thread::Vcpu,
            Thread::Serial,
            Thread::Control,
            Thread::Watch,
            Thread::Signals,
            Thread::Memory,
            Thread::Log,
        ] {
            assert!(filter(thread).unwrap().len() < 4096, "the kernel takes no longer ones");
        }
    }
}
