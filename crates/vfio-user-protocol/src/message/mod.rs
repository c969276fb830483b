// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The messages of vfio-user 0.1: the header, the body of every command, and the body of its reply.
//!
//! | command | request | reply | type here |
//! |---|---|---|---|
//! | `VERSION` | client: versions and capabilities | what the server accepts | [`Version`] |
//! | `DMA_MAP` | client: memory that the device may use, with a descriptor | header alone | [`DmaMap`] |
//! | `DMA_UNMAP` | client: memory that the device must let go of | the request's body | [`DmaUnmap`] |
//! | `DEVICE_GET_INFO` | client | flags, numbers of regions and of interrupt indexes | [`Info`] |
//! | `DEVICE_GET_REGION_INFO` | client: a region | its size and what it allows | [`RegionInfo`] |
//! | `DEVICE_GET_REGION_IO_FDS` | client: a region | its ioeventfds, with descriptors | [`Info`], [`SubRegion`] |
//! | `DEVICE_GET_IRQ_INFO` | client: an index | its count and what it allows | [`Info`] |
//! | `DEVICE_SET_IRQS` | client: what to do with which interrupts | header alone | [`SetIrqs`] |
//! | `REGION_READ` | client: a place | the place, and its bytes | [`RegionAccess`] |
//! | `REGION_WRITE` | client: a place, and bytes | the place | [`RegionAccess`] |
//! | `REGION_WRITE_MULTI` | client: up to 8 bytes each at several places | how many were done | [`MultiWrite`] |
//! | `DEVICE_RESET` | client: no body | header alone | |
//! | `DEVICE_FEATURE` | client: a feature, and data | the feature, and its data | [`Feature`], [`MigrationFlags`], [`MigrationState`], [`LoggingControl`], [`LoggingReport`] |
//! | `DMA_READ`, `DMA_WRITE` | server | refused here: see the crate's limits | |
//! | `MIG_DATA_READ` | client: a number of bytes | bytes of the device's state | [`MigData`] |
//! | `MIG_DATA_WRITE` | client: bytes of a device's state | header alone | [`MigData`] |
//!
//! The parsers check byte slices, and the `body` methods make byte vectors. This module does no
//! input and no output, and no bytes make it panic. A parser returns [`Malformed`] if a body is too
//! short, or does not agree with its counts. The [session](crate::session) checks indexes, offsets
//! and addresses against the device.
//!
//! All integers have the machine's byte order: both ends of a UNIX socket are on the same machine.

mod device;
mod device_feature;
mod fields;
mod header;
mod irq;
mod memory;
mod migration;
mod region;
mod version;

pub use device::{DEVICE_IS_PCI, DEVICE_RESETS, Info};
pub use device_feature::{
    DmaRange, FEATURE_LEN, Feature, LoggingControl, LoggingReport, MigrationFlags, MigrationState,
    feature,
};
pub use fields::Malformed;
pub use header::{BadHeader, HEADER_LEN, Header, Kind, command, command_name, message};
pub use irq::{IrqData, IrqVerb, SetIrqs};
pub use memory::{DmaMap, DmaUnmap};
pub use migration::MigData;
pub use region::{
    DATAMATCH, MultiWrite, REGION_ACCESS_LEN, RegionAccess, RegionInfo, SUB_REGION_LEN, SubRegion,
};
pub use version::{MAJOR, MINOR, Version};
