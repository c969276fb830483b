// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scenarios in whole virtual machines: stock Linux guests under stock QEMU.

pub(super) mod backends;
pub(super) mod command;
pub(super) mod deaths;
pub(super) mod firmware;
pub(super) mod flat;
pub(super) mod harness;
pub(super) mod hostile;
pub(super) mod idle;
pub(super) mod keep;
pub(super) mod plug;
pub(super) mod sched;
pub(super) mod snapshot_qmp;
pub(super) mod state;
pub(super) mod take_over;
pub(super) mod template;
pub(super) mod testpmd;
pub(super) mod traffic;
pub(super) mod vfio_user;
pub(super) mod vhost_migrate;
pub(super) mod vhost_user;
pub(super) mod virtio;
pub(super) mod virtio_iommu;
pub(super) mod virtio_kernels;
