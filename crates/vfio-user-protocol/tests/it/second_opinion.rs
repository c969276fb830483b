// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of the crate `vfio_user` against this server. Other authors have written it.
//!
//! That client takes every reply for a success, so other tests check refusals.

use std::os::fd::AsRawFd;

use crate::support::Bench;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vfio_user::Client;

#[test]
fn another_client_drives_the_device() {
    let mut bench = Bench::new();
    let memory = memfd_create("memory", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, 1 << 20).unwrap();
    let eventfds: Vec<_> = (0..16).map(|_| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).collect();
    let raw: Vec<_> = eventfds.iter().map(AsRawFd::as_raw_fd).collect();
    for round in 1..=3 {
        bench.with(|path| {
            // Negotiates, and asks for the device and its nine regions.
            let mut client = Client::new(path).unwrap();
            for (index, size, flags) in
                [(0, 4096, 3), (1, 64, 2), (2, 0, 0), (6, 512, 1), (7, 256, 3), (8, 0, 0)]
            {
                let region = client.region(index).unwrap();
                assert_eq!((region.size, region.flags), (size, flags), "region {index}");
                assert!(region.file_offset.is_none() && region.sparse_areas.is_empty());
            }
            assert!(client.region(9).is_none());
            let msix = client.get_irq_info(2).unwrap();
            assert_eq!((msix.index, msix.count, msix.flags), (2, 32, 0b1001));
            assert_eq!(client.get_irq_info(0).unwrap().flags, 0b0111);

            client.dma_map(0x4000, 0x1000_0000, 0x8000, memory.as_raw_fd()).unwrap();
            client.dma_map(0, 0, 0x4000, memory.as_raw_fd()).unwrap();
            client.dma_unmap(0x1000_0000, 0x8000).unwrap();

            client.set_irqs(2, 0x24, 8, 16, &raw).unwrap();
            client.set_irqs(2, 0x21, 9, 1, &[]).unwrap();
            let mut count = [0; 8];
            rustix::io::read(&eventfds[1], &mut count).unwrap();
            assert_eq!(u64::from_ne_bytes(count), 1);
            client.set_irqs(2, 0x21, 0, 0, &[]).unwrap();

            client.region_write(0, 16, &[1, 2, 3, 4, 5]).unwrap();
            let mut bytes = [0; 8];
            client.region_read(0, 14, &mut bytes).unwrap();
            assert_eq!(bytes, [0, 0, 1, 2, 3, 4, 5, 0]);
            let mut config = [0; 256];
            client.region_read(7, 0, &mut config).unwrap();
            assert_eq!(config, [0x5a; 256]);
            client.reset().unwrap();
            client.region_read(0, 14, &mut bytes).unwrap();
            assert_eq!(bytes, [0; 8]);
            client.shutdown().unwrap();
        });
        bench.until_gone();
        assert_eq!(bench.server.target().resets, round);
        assert!(bench.server.target().maps.is_empty());
    }
    let stats = bench.server.stats();
    assert_eq!((stats.clients, stats.violations, stats.failures), (3, 0, 0));
}
