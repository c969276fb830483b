//! Serves a bus with this class and the classes of vbus, and controls it.

use std::process::ExitCode;

use my_device::device::MyDeviceClass;

// If the class opens files or sockets, `Program::sandbox` must say so: docs/writing-a-device.md of
// vbus, "The sandbox".
fn main() -> ExitCode {
    vbus_host::Program::new("my-device-host", env!("CARGO_PKG_VERSION")).class(MyDeviceClass).run()
}
