//! The driver end of vbus, for any environment: probe, open, regions, calls, and the class drivers.
