// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The calls of KVM that `kvm-ioctls` lacks.
#![allow(unsafe_code, reason = "ioctls")]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use kvm_bindings::{KVM_HYPERV_EVENTFD_DEASSIGN, KVMIO, kvm_hyperv_eventfd};
use kvm_ioctls::{VcpuFd, VmFd};
use rustix::io::Errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};

vmm_sys_util::ioctl_iow_nr!(KVM_HYPERV_EVENTFD, KVMIO, 0xbd, kvm_hyperv_eventfd);
vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Converts a descriptor to the type that `kvm-ioctls` takes. KVM checks whether it is an eventfd.
pub(crate) fn as_event(fd: OwnedFd) -> EventFd {
    // SAFETY: The descriptor was owned by `fd`, and is now owned by the result.
    unsafe { EventFd::from_raw_fd(fd.into_raw_fd()) }
}

/// The descriptor of an eventfd.
pub(crate) fn as_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` has the descriptor open for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Connects event connection `id` to `event`, or to nothing.
pub(crate) fn hyperv_eventfd(vm: &VmFd, id: u32, event: Option<&EventFd>) -> Result<(), Errno> {
    let argument = kvm_hyperv_eventfd {
        conn_id: id,
        fd: event.map_or(-1, AsRawFd::as_raw_fd),
        flags: if event.is_some() { 0 } else { KVM_HYPERV_EVENTFD_DEASSIGN },
        padding: [0; 3],
    };
    // SAFETY: `vm` is a virtual machine's descriptor, and the kernel reads `argument`, which is of
    // the type that the call wants.
    let result = unsafe { ioctl_with_ref(vm, KVM_HYPERV_EVENTFD(), &argument) };
    check(result).map(drop)
}

/// Opens the statistics of the virtual machine.
pub(crate) fn vm_stats(vm: &VmFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `vm` is a virtual machine's descriptor; the call takes no argument.
    stats(unsafe { ioctl(vm, KVM_GET_STATS_FD()) })
}

/// Opens the statistics of the virtual CPU.
pub(crate) fn vcpu_stats(vcpu: &VcpuFd) -> Result<OwnedFd, Errno> {
    // SAFETY: `vcpu` is a virtual CPU's descriptor; the call takes no argument.
    stats(unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) })
}

fn stats(result: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: the kernel has just made this descriptor for us.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn check(result: i32) -> Result<i32, Errno> {
    if result >= 0 {
        Ok(result)
    } else {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
