//! The device end of vbus: bus, devices, connections, memory, interrupts, the event loop. It knows neither PCI nor KVM nor QEMU.
//!
//! A device is written against three traits: [`DeviceClass`] makes it from a configuration, [`Device`] is what sits on the [`Bus`], and
//! [`Connection`] is one driver's use of it. A connector holds the device's [`Endpoint`]. Everything runs on the few threads of an [`Executor`].

mod bus;
mod counter;
mod device;
mod endpoint;
mod executor;
mod interrupt;
pub mod memory;
mod status;
mod sync;
mod wake;

pub use bus::{Bus, BusError, DEVICES_MAX, NAME_MAX};
pub use counter::{ConnectionCounters, Counter};
pub use device::{Connection, CreateError, Device, DeviceClass, Fail, Identity, Open, Region};
pub use endpoint::{Doorbell, Endpoint, REGION_BYTES_MAX, RegionRequest, State};
pub use executor::{Executor, Interest, Progress, Task, TaskHandle, Tuning};
pub use interrupt::{Interrupt, InterruptSink};
pub use memory::{MapError, MemoryContext, Trust, View, Window};
pub use status::Status;
pub use vbus_shm as shm;
