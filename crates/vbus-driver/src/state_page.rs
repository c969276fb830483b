// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Makes and registers state pages. The driver's end is attached before the device can write the
//! page's header, and does not read the header again.

use vbus_shm::signal::end::Driver;
use vbus_shm::state::{BadStatePage, DEFAULT_SLOTS, Layout, Reader, SIGNAL_OFFSET, Writer};

use crate::{Error, Function, Hal, Region};

/// Registers a page for values of `bytes` bytes that the device writes, as region `id`.
pub fn reader<H: Hal>(
    function: &mut Function<H>,
    id: u32,
    vector: u16,
    bytes: u32,
) -> Result<(Reader<H::Dma, Driver>, Region), Error> {
    register(function, id, vector, bytes, |memory| Reader::attach(memory, Driver))
}

/// Registers a page for values of `bytes` bytes that the driver writes, as region `id`.
pub fn writer<H: Hal>(
    function: &mut Function<H>,
    id: u32,
    vector: u16,
    bytes: u32,
) -> Result<(Writer<H::Dma, Driver>, Region), Error> {
    register(function, id, vector, bytes, |memory| Writer::attach(memory, Driver))
}

fn register<H: Hal, T>(
    function: &mut Function<H>,
    id: u32,
    vector: u16,
    bytes: u32,
    attach: impl FnOnce(H::Dma) -> Result<T, BadStatePage>,
) -> Result<(T, Region), Error> {
    const LAYOUT: Error = Error::Unsupported("a state page of that size");
    let layout = Layout::new(bytes, DEFAULT_SLOTS).map_err(|_| LAYOUT)?;
    let memory = function.hal().alloc(layout.bytes())?;
    layout.format(&memory, 0).map_err(|_| LAYOUT)?;
    let end = attach(memory.clone()).map_err(|_| LAYOUT)?;
    let range = (0, layout.bytes());
    let region = function.region_add(id, vector, &memory, range, Some(SIGNAL_OFFSET))?;
    Ok((end, region))
}
