// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The filter of system calls. It lists what may be called; every other call fails with EPERM. So a
//! bus that was taken over can use the descriptors that it has, and can get no others except from
//! its supervisor.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use rustix::io::Errno;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::Sandbox;

/// Calls with any arguments: they work on open descriptors, on the process's own memory, threads
/// and signals, and on time.
const ANY: &[i64] = &[
    libc::SYS_accept4,
    // Only of sockets that it has, to be the process that their clients see.
    libc::SYS_listen,
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_io_cancel,
    libc::SYS_io_destroy,
    libc::SYS_io_getevents,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pselect6,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_shutdown,
    libc::SYS_sigaltstack,
    libc::SYS_fstatfs,
    libc::SYS_statfs,
    libc::SYS_sysinfo,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_uname,
    libc::SYS_wait4,
    libc::SYS_waitid,
    libc::SYS_write,
    libc::SYS_writev,
    // These tell what is at a path, and open nothing.
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    libc::SYS_newfstatat,
    libc::SYS_readlinkat,
    libc::SYS_statx,
];

/// Older forms of the calls above, which newer architectures do not have.
#[cfg(target_arch = "x86_64")]
const OLD: &[i64] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_lstat,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[i64] = &[];

/// Calls for classes that open files. Landlock confines the paths.
const FILES: &[i64] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fchmod,
    libc::SYS_getdents64,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_symlinkat,
    libc::SYS_unlinkat,
];
#[cfg(target_arch = "x86_64")]
const OLD_FILES: &[i64] = &[
    libc::SYS_creat,
    libc::SYS_link,
    libc::SYS_mkdir,
    libc::SYS_open,
    libc::SYS_rename,
    libc::SYS_rmdir,
    libc::SYS_symlink,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD_FILES: &[i64] = &[];

/// Calls for classes that make sockets.
const SOCKETS: &[i64] = &[
    libc::SYS_accept,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_socket,
    libc::SYS_socketpair,
];

/// The commands of `fcntl`. Those that direct signals to other processes are not among them.
const FCNTLS: [i32; 9] = [
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_ADD_SEALS,
    libc::F_GET_SEALS,
    libc::F_GETPIPE_SZ,
];

/// The options of sockets, of level SOL_SOCKET.
const OPTIONS: [i32; 5] = [
    libc::SO_RCVTIMEO,
    libc::SO_SNDTIMEO,
    libc::SO_RCVBUF,
    libc::SO_SNDBUF,
    vbus_control::SO_PASSRIGHTS,
];

/// Filters the calls of the calling thread and of the threads that it starts. Returns whether the
/// kernel has filters.
///
/// # Errors
/// This program has no filter for this processor, or the kernel refuses the filter.
pub fn apply(sandbox: &Sandbox) -> Result<bool> {
    let (clone3, calls) = programs(sandbox)?;
    // The list comes last, because it does not allow the calls that apply a filter.
    match apply_filter(&clone3) {
        Ok(()) => {}
        Err(Error::Prctl(error) | Error::Seccomp(error)) if is_missing(&error) => return Ok(false),
        Err(error) => bail!(error),
    }
    apply_filter(&calls)?;
    Ok(true)
}

/// Whether the error means that the kernel has no filters, or that a container forbids them.
fn is_missing(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOSYS | Errno::INVAL | Errno::PERM))
}

/// Two filters. The first one makes `clone3` fail as in a kernel that does not have it: its flags
/// are in memory, where no filter can look, and the C library then calls `clone`. The second one is
/// the list.
fn programs(sandbox: &Sandbox) -> Result<(BpfProgram, BpfProgram)> {
    let architecture: TargetArch = std::env::consts::ARCH.try_into()?;
    let no_clone3 = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        errno(Errno::NOSYS),
        architecture,
    )?;
    let list = SeccompFilter::new(
        rules(sandbox)?,
        errno(Errno::PERM),
        SeccompAction::Allow,
        architecture,
    )?;
    Ok((no_clone3.try_into()?, list.try_into()?))
}

fn errno(errno: Errno) -> SeccompAction {
    SeccompAction::Errno(errno.raw_os_error().unsigned_abs())
}

/// A rule that holds if each argument, under its mask, has its value.
fn when(conditions: &[(u8, u64, u64)]) -> Result<SeccompRule> {
    let conditions = conditions.iter().map(|(argument, mask, value)| {
        let op = SeccompCmpOp::MaskedEq(*mask);
        SeccompCondition::new(*argument, SeccompCmpArgLen::Qword, op, *value)
    });
    Ok(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?)
}

fn rules(sandbox: &Sandbox) -> Result<BTreeMap<i64, Vec<SeccompRule>>> {
    /// The arguments of these calls are ints. Their upper halves may hold anything.
    const INT: u64 = u32::MAX as u64;
    let int = |number: i32| u64::from(number.unsigned_abs());
    let own = int(rustix::process::getpid().as_raw_nonzero().get());
    let executable = int(libc::PROT_EXEC);
    // A new thread, and no new process or namespace.
    let namespaces = int(libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET);
    let thread = int(libc::CLONE_THREAD);
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::from([
        (libc::SYS_clone, vec![when(&[(0, thread | namespaces, thread)])?]),
        // The first filter decides.
        (libc::SYS_clone3, Vec::new()),
        (libc::SYS_mmap, vec![when(&[(2, executable, 0)])?]),
        (libc::SYS_mprotect, vec![when(&[(2, executable, 0)])?]),
        (libc::SYS_prctl, vec![when(&[(0, INT, int(libc::PR_SET_NAME))])?]),
        // Signals to this process alone: the C library ends it with one.
        (libc::SYS_tgkill, vec![when(&[(0, INT, own)])?]),
        // The limits of this process alone.
        (libc::SYS_prlimit64, vec![when(&[(0, INT, 0)])?]),
        // No address: the socket's peer is fixed.
        (libc::SYS_sendto, vec![when(&[(4, u64::MAX, 0)])?]),
    ]);
    let of = |commands: &[u64]| -> Result<Vec<SeccompRule>> {
        commands.iter().map(|command| when(&[(1, INT, *command)])).collect()
    };
    rules.insert(libc::SYS_fcntl, of(&FCNTLS.map(int))?);
    let mut ioctls = vec![libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD];
    ioctls.extend(vbus_tap::QUEUE_IOCTLS.map(u64::from));
    ioctls.extend(vbus_tap::VHOST_IOCTLS.map(u64::from));
    ioctls.extend(vbus_core::memory::IOCTLS.map(u64::from));
    rules.insert(libc::SYS_ioctl, of(&ioctls)?);
    let level = int(libc::SOL_SOCKET);
    let options = OPTIONS.map(|option| when(&[(1, INT, level), (2, INT, int(option))]));
    rules.insert(libc::SYS_setsockopt, options.into_iter().collect::<Result<_>>()?);
    let mut lists = vec![ANY, OLD];
    if sandbox.has_files() {
        lists.extend([FILES, OLD_FILES]);
    }
    if sandbox.sockets {
        lists.push(SOCKETS);
    }
    lists.push(&sandbox.calls);
    for call in lists.into_iter().flatten() {
        rules.insert(*call, Vec::new());
    }
    Ok(rules)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_filter_can_be_made() {
        let all = Sandbox::default().configured_files().sockets().system_call(libc::SYS_ptrace);
        for sandbox in [Sandbox::default(), all] {
            let (clone3, calls) = programs(&sandbox).unwrap();
            assert!(clone3.len() + calls.len() < 4096, "the kernel takes no longer ones");
        }
    }

    #[test]
    fn the_strict_filter_has_no_call_that_opens() {
        let rules = rules(&Sandbox::default()).unwrap();
        for call in FILES.iter().chain(OLD_FILES).chain([
            &libc::SYS_socket,
            &libc::SYS_socketpair,
            &libc::SYS_connect,
            &libc::SYS_bind,
            &libc::SYS_execve,
            &libc::SYS_ptrace,
            &libc::SYS_kill,
        ]) {
            assert!(!rules.contains_key(call), "call {call}");
        }
    }
}
