//! Shared memory of vbus: the ABI's layouts, and both ends of signal, ring and state page.
