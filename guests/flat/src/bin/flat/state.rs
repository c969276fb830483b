// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Test `state`: pages of both owners.

use vbus_driver::state::{Owner, Pages};
use vbus_shm::abi::class;
use vbus_shm::signal::Armed;

use crate::report::{Failure, Outcome, ensure, line};
use crate::{Setting, apic, clock, traps};

/// The most bytes of a value that the test reads.
const SHOWN: usize = 64;

/// Reads every page of the device, and waits for `updates=` newer values of each. A line of the
/// report announces each wait, and a program outside answers it by setting a value. Writes every
/// page of the driver.
pub fn run<'a>(setting: &Setting<'a>) -> Outcome<'a> {
    let updates = setting.number("updates", 0);
    let hal =
        setting.of_class(class::STATE).next().ok_or(Failure::Said("no device of class state"))?;
    let vector = apic::vector();
    hal.enable_messages(&[vector]).ok_or(Failure::Said("the device has no messages"))?;
    let mut pages = Pages::open(hal.function()?)?;
    for number in 0..pages.count() {
        let page = pages.describe(number)?;
        let bytes = page.value_bytes as usize;
        if page.owner == Owner::Driver {
            let mut writer = pages.writer(&page, 0)?;
            writer.write(b"flat was here");
            pages.finish(writer)?;
            line("state")
                .value("ok", true)
                .text("page", page.name)
                .text("wrote", "flat was here")
                .end();
            continue;
        }
        ensure(bytes <= SHOWN, "a page of the device is too large for this test")?;
        let mut reader = pages.reader(&page, 0)?;
        let mut value = [0; SHOWN];
        let mut version = reader.read(&mut value)?;
        line("state").value("ok", true).text("page", page.name).text("value", text(&value)).end();
        for _ in 0..updates {
            let before = traps::taken();
            let armed = reader.arm_newer(version);
            line("state").text("page", page.name).text("waiting", version).end();
            let began = clock::now();
            if armed == Armed::Waiting {
                apic::wait(before);
                pages.function().acknowledge();
            }
            let newer = reader.read(&mut value)?;
            ensure(newer != version, "an interrupt came without a newer value")?;
            version = newer;
            line("state")
                .value("ok", true)
                .text("page", page.name)
                .text("value", text(&value))
                .value("interrupts", traps::taken() - before)
                .value("us", (clock::now() - began) / 1000)
                .end();
        }
        reader.disarm();
    }
    drop(pages);
    apic::reuse(vector);
    Ok(())
}

/// The text of a value, up to its zeros.
fn text(value: &[u8]) -> &str {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    core::str::from_utf8(&value[..end]).unwrap_or("?")
}
