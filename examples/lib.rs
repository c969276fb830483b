//! Complete small devices with their drivers.
