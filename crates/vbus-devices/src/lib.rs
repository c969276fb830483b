//! The device classes of vbus: venet and state.
