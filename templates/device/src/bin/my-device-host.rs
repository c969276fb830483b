//! Serves a bus with devices of this class beside those of vbus, and controls it.

use std::process::ExitCode;

use my_device::device::MyDeviceClass;

fn main() -> ExitCode {
    vbus_host::Program::new("my-device-host", env!("CARGO_PKG_VERSION")).class(MyDeviceClass).run()
}
