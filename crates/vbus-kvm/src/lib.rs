//! The KVM connector of vbus: doorbells that end as an eventfd in the kernel, and interrupts that begin as one.
