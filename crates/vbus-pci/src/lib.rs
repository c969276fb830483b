//! A vbus device as a PCI function: configuration space, interrupts, BAR0 with the register block.
