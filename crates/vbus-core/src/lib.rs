//! The device end of vbus: bus, devices, connections, memory, interrupts, the event loop.
