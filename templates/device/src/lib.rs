//! A device class for vbus, with its driver.

pub mod device;
pub mod driver;
