//! The vfio-user connector of vbus: server for VMMs, client for plain processes.
