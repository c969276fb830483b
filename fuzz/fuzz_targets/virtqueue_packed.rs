// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The device end of a packed virtqueue.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vbus_virtio::queue::Format;

fuzz_target!(|input: &[u8]| vbus_fuzz::virtqueue::run(Format::Packed, input));
