// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A panic of this crate is a bug of this crate. It ends the thread, as the kernel's BUG() does.

use core::panic::PanicInfo;

use crate::kernel::log::{Text, bug};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    bug(&Text::<200>::new(format_args!("{info}")))
}
