// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a machine does at this moment, for somebody who looks for the reason why its guest hangs
//! (the control request `dump`).

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, kvm_irqchip, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events,
};
use kvm_ioctls::VcpuFd;
use serde_json::{Value, json};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of the code at the instruction pointer, and words of the stack.
const CODE: usize = 16;
const STACK: usize = 24;

/// The state of a virtual CPU, which must not run. `memory` is the guest's.
///
/// What KVM does not tell is null.
pub(crate) fn vcpu(fd: &VcpuFd, memory: &GuestMemoryMmap) -> Value {
    let registers = fd.get_regs().ok();
    let events = fd.get_vcpu_events().ok();
    json!({
        "mp_state": fd.get_mp_state().ok().map(|state| state.mp_state),
        "registers": registers.as_ref().map(general),
        "system": fd.get_sregs().ok().as_ref().map(system),
        "events": events.as_ref().map(pending),
        "apic": fd.get_lapic().ok().as_ref().map(apic),
        "code": registers.map(|registers| words::<CODE>(fd, memory, registers.rip, 1)),
        "stack": registers.map(|registers| words::<STACK>(fd, memory, registers.rsp, 8)),
    })
}

/// `COUNT` units of `bytes` bytes at a linear address, as far as the guest has mapped them.
fn words<const COUNT: usize>(
    fd: &VcpuFd,
    memory: &GuestMemoryMmap,
    address: u64,
    bytes: usize,
) -> Value {
    let unit = |number: usize| -> Option<String> {
        let at = address.checked_add(u64::try_from(number * bytes).ok()?)?;
        let translated = fd.translate_gva(at).ok().filter(|found| found.valid != 0)?;
        let mut unit = [0; 8];
        memory.read_slice(&mut unit[..bytes], GuestAddress(translated.physical_address)).ok()?;
        Some(format!("{:0width$x}", u64::from_le_bytes(unit), width = bytes * 2))
    };
    (0..COUNT).map_while(unit).collect::<Vec<_>>().join(" ").into()
}

fn hex(value: u64) -> Value {
    format!("{value:#x}").into()
}

fn general(of: &kvm_regs) -> Value {
    json!({
        "rip": hex(of.rip), "rflags": hex(of.rflags), "rsp": hex(of.rsp), "rbp": hex(of.rbp),
        "rax": hex(of.rax), "rbx": hex(of.rbx), "rcx": hex(of.rcx), "rdx": hex(of.rdx),
        "rsi": hex(of.rsi), "rdi": hex(of.rdi), "r8": hex(of.r8), "r9": hex(of.r9),
        "r10": hex(of.r10), "r11": hex(of.r11), "r12": hex(of.r12), "r13": hex(of.r13),
        "r14": hex(of.r14), "r15": hex(of.r15),
    })
}

fn system(of: &kvm_sregs) -> Value {
    // An interrupt that KVM has chosen for the processor, and that has not begun, is in the bitmap.
    let chosen = of.interrupt_bitmap.iter().map(|word| word.to_le_bytes());
    let chosen: Vec<u8> = chosen.flatten().collect();
    json!({
        "cr0": hex(of.cr0), "cr2": hex(of.cr2), "cr3": hex(of.cr3), "cr4": hex(of.cr4),
        "cr8": of.cr8, "efer": hex(of.efer), "apic_base": hex(of.apic_base),
        "cs": of.cs.selector, "ss": of.ss.selector, "cpl": of.cs.dpl,
        "gs": hex(of.gs.base), "idt": hex(of.idt.base), "injecting": vectors(&chosen),
    })
}

fn pending(of: &kvm_vcpu_events) -> Value {
    json!({
        "exception": {
            "injected": of.exception.injected, "pending": of.exception.pending,
            "nr": of.exception.nr, "error_code": of.exception.error_code,
        },
        "interrupt": {
            "injected": of.interrupt.injected, "nr": of.interrupt.nr,
            "soft": of.interrupt.soft, "shadow": of.interrupt.shadow,
        },
        "nmi": {
            "injected": of.nmi.injected, "pending": of.nmi.pending, "masked": of.nmi.masked,
        },
        "smi": { "smm": of.smi.smm, "pending": of.smi.pending },
        "triple_fault": of.triple_fault.pending,
    })
}

/// The registers of a local APIC.
fn apic(of: &kvm_lapic_state) -> Value {
    let byte = |at: usize| of.regs[at].to_le_bytes()[0];
    let word = |at: usize| u32::from_le_bytes([byte(at), byte(at + 1), byte(at + 2), byte(at + 3)]);
    // 256 bits in eight words, each of which takes 16 bytes.
    let set = |at: usize| {
        let bytes = (0..8).flat_map(|number| word(at + number * 16).to_le_bytes());
        vectors(&bytes.collect::<Vec<u8>>())
    };
    json!({
        "id": word(0x20) >> 24, "task_priority": word(0x80), "processor_priority": word(0xa0),
        "spurious": hex(word(0xf0).into()),
        "in_service": set(0x100), "level_triggered": set(0x180), "requested": set(0x200),
        "command": [hex(word(0x300).into()), hex(word(0x310).into())],
        "timer": {
            "lvt": hex(word(0x320).into()), "initial": word(0x380), "current": word(0x390),
        },
        "lint": [hex(word(0x350).into()), hex(word(0x360).into())],
    })
}

/// The numbers of the bits that are set.
fn vectors(bytes: &[u8]) -> Value {
    let bits = (0..bytes.len() * 8).filter(|bit| bytes[bit / 8] & 1 << (bit % 8) != 0);
    bits.collect::<Vec<_>>().into()
}

/// An interrupt controller of the kernel.
#[allow(unsafe_code, reason = "KVM's structure is a union of the three chips")]
pub(crate) fn irqchip(chip: &kvm_irqchip) -> Value {
    if chip.chip_id == KVM_IRQCHIP_IOAPIC {
        // SAFETY: KVM has filled in this chip, and any bytes are numbers.
        let of = unsafe { &chip.chip.ioapic };
        // SAFETY: as above.
        let entries = of.redirtbl.iter().map(|entry| unsafe { entry.bits });
        return io_apic(entries, of.irr);
    }
    // SAFETY: as above.
    let of = unsafe { &chip.chip.pic };
    json!({ "pic": chip.chip_id, "requested": of.irr, "masked": of.imr, "in_service": of.isr })
}

/// The pins of an I/O APIC that are in use: their redirection entries, and whether they are high.
pub(crate) fn io_apic(entries: impl Iterator<Item = u64>, high: u32) -> Value {
    const MASKED: u64 = 1 << 16;
    let pin = |(number, entry): (u32, u64)| {
        let high = high & 1 << number != 0;
        (entry & 0xff != 0 || entry & MASKED == 0 || high).then(|| {
            json!({
                "pin": number, "high": high, "entry": hex(entry), "vector": entry & 0xff,
                "to": entry >> 56, "logical": entry & 1 << 11 != 0, "level": entry & 1 << 15 != 0,
                "serviced": entry & 1 << 14 != 0, "masked": entry & MASKED != 0,
            })
        })
    };
    json!({ "io_apic": (0..32).zip(entries).filter_map(pin).collect::<Vec<_>>() })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn bits_are_told_by_number() {
        assert_eq!(vectors(&[0x80, 0, 0x01]), json!([7, 16]));
        let mut state = kvm_lapic_state { regs: [0; 1024] };
        // Vector 0x41 is bit 1 of the third word.
        state.regs[0x200 + 2 * 16] = 2;
        state.regs[0x320] = 0x6c;
        let told = apic(&state);
        assert_eq!((&told["requested"], &told["in_service"]), (&json!([0x41]), &json!([])));
        assert_eq!(told["timer"]["lvt"], "0x6c");
    }

    #[test]
    fn only_pins_in_use_are_told() {
        let mut entries = [1 << 16; 24];
        entries[17] = 0x2 << 56 | 1 << 15 | 1 << 14 | 0x51;
        let told = io_apic(entries.into_iter(), 1 << 17 | 1 << 9);
        let pins = told["io_apic"].as_array().unwrap();
        assert_eq!(pins.len(), 2);
        assert_eq!((&pins[0]["pin"], &pins[0]["masked"]), (&json!(9), &json!(true)));
        assert_eq!(pins[1]["pin"], 17);
        assert_eq!((&pins[1]["to"], &pins[1]["vector"]), (&json!(2), &json!(0x51)));
        assert_eq!((&pins[1]["serviced"], &pins[1]["high"]), (&json!(true), &json!(true)));
    }
}
