// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The state of one virtual CPU: all that KVM keeps of it, read and written in the order that KVM
//! needs, and as bytes (`spec/vmm-snapshot.md`, "Virtual CPUs").

use anyhow::{Context, Result, bail, ensure};
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The time stamp counter, which goes on through a reset.
pub(crate) const MSR_TSC: u32 = 0x10;
/// The time of the local APIC's timer in its mode "TSC deadline". KVM ignores a write in another
/// mode.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Memory types by address, which older kernels do not list.
const MTRRS: [std::ops::RangeInclusive<u32>; 6] =
    [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x277..=0x277, 0x2ff..=0x2ff];
/// The SynIC's registers, which KVM does not list: control, its two pages, and its interrupt
/// sources.
const SYNIC: [u32; 3] = [0x4000_0080, 0x4000_0082, 0x4000_0083];
const SYNIC_SOURCES: std::ops::RangeInclusive<u32> = 0x4000_0090..=0x4000_009f;

/// The most MSRs in a state. KVM lists far fewer.
const MSRS_MAX: usize = 1024;
/// More bytes than any state has.
pub(crate) const STATE_BYTES_MAX: u64 = 64 << 10;

/// The numbers of the parts in a state as bytes.
mod part {
    pub(super) const REGISTERS: u32 = 1;
    pub(super) const SYSTEM: u32 = 2;
    pub(super) const EXTENDED: u32 = 3;
    pub(super) const XCRS: u32 = 4;
    pub(super) const DEBUG: u32 = 5;
    pub(super) const APIC: u32 = 6;
    pub(super) const MSRS: u32 = 7;
    pub(super) const EVENTS: u32 = 8;
    pub(super) const MP_STATE: u32 = 9;
}

/// The MSRs that make up a virtual CPU's state, the time stamp counter among them.
///
/// # Errors
/// KVM does not list them.
pub(crate) fn msr_indices(kvm: &Kvm, hyperv: bool) -> Result<Vec<u32>> {
    let list = kvm.get_msr_index_list().context("KVM does not list its MSRs")?;
    let synic = SYNIC.into_iter().chain(SYNIC_SOURCES).filter(|_| hyperv);
    let mut indices: Vec<u32> =
        list.as_slice().iter().copied().chain(MTRRS.into_iter().flatten()).chain(synic).collect();
    let mut seen = std::collections::BTreeSet::new();
    indices.retain(|index| seen.insert(*index));
    Ok(indices)
}

/// The state of a virtual CPU.
pub(crate) struct VcpuState {
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) registers: kvm_regs,
    pub(crate) system: kvm_sregs,
    extended: Box<kvm_xsave>,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    apic: kvm_lapic_state,
    /// Number and value. The order is that of KVM's list.
    pub(crate) msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a virtual CPU, which must not run and have no unfinished exit. MSRs of
    /// `indices` that this virtual CPU does not have are left out.
    ///
    /// # Errors
    /// KVM refuses.
    pub(crate) fn of(fd: &VcpuFd, indices: &[u32]) -> Result<VcpuState> {
        // The first call lets KVM handle an INIT or a start-up message that waits, which changes
        // other parts. The calls of APIC and of others may change the events, which come last.
        let mp_state = fd.get_mp_state()?;
        Ok(VcpuState {
            mp_state,
            registers: fd.get_regs()?,
            system: fd.get_sregs()?,
            extended: Box::new(fd.get_xsave()?),
            xcrs: fd.get_xcrs()?,
            debug: fd.get_debug_regs()?,
            apic: fd.get_lapic()?,
            msrs: indices
                .iter()
                .filter_map(|index| get_msr(fd, *index).map(|data| (*index, data)))
                .collect(),
            events: fd.get_vcpu_events()?,
        })
    }

    /// Writes the state to a virtual CPU, which must not run and have no unfinished exit. Returns
    /// the MSRs that KVM did not take: some can only be read.
    ///
    /// # Errors
    /// KVM refuses a part.
    #[allow(unsafe_code, reason = "KVM reads a structure whose size it knows")]
    pub(crate) fn put(&self, fd: &VcpuFd) -> Result<Vec<(u32, u64)>> {
        // The special registers hold the APIC's mode, so the APIC's registers come after them. The
        // features of the extended state must be in XCR0 before it is of use; KVM takes it in any
        // order. The time stamp counter is right before the timers that depend on it.
        fd.set_sregs(&self.system).context("the special registers")?;
        // SAFETY: KVM reads as many bytes as it has told to need: 4096, unless this process has
        // asked for larger features, which it never does.
        unsafe { fd.set_xsave(&self.extended) }.context("the extended state")?;
        fd.set_xcrs(&self.xcrs).context("the extended control registers")?;
        fd.set_debug_regs(&self.debug).context("the debug registers")?;
        fd.set_regs(&self.registers).context("the registers")?;
        let refused: Vec<_> =
            self.msrs.iter().filter(|(index, data)| !set_msr(fd, *index, *data)).copied().collect();
        fd.set_lapic(&self.apic).context("the local APIC")?;
        // Once more, since only now the APIC's timer has its mode.
        if let Some((index, data)) = self.msrs.iter().find(|(index, _)| *index == MSR_TSC_DEADLINE)
        {
            set_msr(fd, *index, *data);
        }
        fd.set_vcpu_events(&self.events).context("the events")?;
        fd.set_mp_state(self.mp_state).context("the state of running")?;
        Ok(refused)
    }

    /// Writes a saved state to a new virtual CPU, as [`put`](Self::put) does. Its time stamp
    /// counter goes on by `ticks` from its saved value. `indices` are the MSRs that a state here
    /// has. `first`: no other CPU of the virtual machine has its counter yet.
    ///
    /// # Errors
    /// The state has another MSR, KVM refuses a part, or an MSR does not take its value.
    pub(crate) fn restore(
        &mut self,
        fd: &VcpuFd,
        indices: &[u32],
        ticks: u64,
        first: bool,
    ) -> Result<()> {
        self.check_msrs(indices)?;
        for (_, data) in self.msrs.iter_mut().filter(|(index, _)| *index == MSR_TSC) {
            *data = data.wrapping_add(ticks);
            // KVM takes a write that is less than a second off for an attempt to synchronize, and
            // then keeps the counter of before. That is right for all CPUs but the first.
            if first {
                set_msr(fd, MSR_TSC, data.wrapping_add(1 << 50));
            }
        }
        for (index, data) in self.put(fd)? {
            // A register that can only be read must have the value already.
            ensure!(
                get_msr(fd, index) == Some(data),
                "KVM does not take the value {data:#x} of MSR {index:#x}"
            );
        }
        // The guest is told that it has been stopped, so that its watchdogs stay quiet. This fails
        // if the guest does not use KVM's clock.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }

    /// Checks that the state has no MSR but those of `indices`, and each once. A state comes from
    /// outside, and KVM lets this process write MSRs that make up no state.
    fn check_msrs(&self, indices: &[u32]) -> Result<()> {
        let mut seen = std::collections::BTreeSet::new();
        for (index, _) in &self.msrs {
            ensure!(indices.contains(index), "MSR {index:#x} is no part of a CPU's state here");
            ensure!(seen.insert(index), "MSR {index:#x} is there twice");
        }
        Ok(())
    }

    /// The state as bytes.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut add = |kind: u32, content: &[u8]| {
            bytes.extend_from_slice(&kind.to_le_bytes());
            bytes.extend_from_slice(&u32::try_from(content.len()).unwrap_or(0).to_le_bytes());
            bytes.extend_from_slice(content);
        };
        add(part::REGISTERS, self.registers.as_bytes());
        add(part::SYSTEM, self.system.as_bytes());
        add(part::EXTENDED, self.extended.region.as_bytes());
        add(part::XCRS, self.xcrs.as_bytes());
        add(part::DEBUG, self.debug.as_bytes());
        add(part::APIC, self.apic.as_bytes());
        let msr = |(index, data): &(u32, u64)| kvm_msr_entry {
            index: *index,
            data: *data,
            ..Default::default()
        };
        let msrs: Vec<_> = self.msrs.iter().map(msr).collect();
        add(part::MSRS, msrs.as_slice().as_bytes());
        add(part::EVENTS, self.events.as_bytes());
        add(part::MP_STATE, self.mp_state.as_bytes());
        bytes
    }

    /// Decodes a state. KVM checks the values.
    ///
    /// # Errors
    /// The bytes are no state. The text names the part.
    pub(crate) fn decode(bytes: &[u8]) -> Result<VcpuState> {
        let mut parts = Parts::of(bytes)?;
        let extended = parts.take::<[u32; 1024]>(part::EXTENDED, "extended state")?;
        let state = VcpuState {
            registers: parts.take(part::REGISTERS, "registers")?,
            system: parts.take(part::SYSTEM, "special registers")?,
            extended: Box::new(kvm_xsave { region: extended, ..Default::default() }),
            xcrs: parts.take(part::XCRS, "extended control registers")?,
            debug: parts.take(part::DEBUG, "debug registers")?,
            apic: parts.take(part::APIC, "local APIC")?,
            msrs: parts.msrs()?,
            events: parts.take(part::EVENTS, "events")?,
            mp_state: parts.take(part::MP_STATE, "state of running")?,
        };
        parts.end()?;
        // The count of these registers comes from outside, and the array has 16.
        ensure!(state.xcrs.nr_xcrs <= 16, "{} extended control registers", state.xcrs.nr_xcrs);
        Ok(state)
    }
}

/// The parts of a state as bytes, by their numbers.
struct Parts<'a>(std::collections::BTreeMap<u32, &'a [u8]>);

impl<'a> Parts<'a> {
    fn of(mut bytes: &'a [u8]) -> Result<Parts<'a>> {
        let mut parts = std::collections::BTreeMap::new();
        while let Some((kind, rest)) = bytes.split_first_chunk() {
            let (len, rest) = rest.split_first_chunk().context("it ends within a part")?;
            let len = usize::try_from(u32::from_le_bytes(*len))?;
            let (content, rest) = rest.split_at_checked(len).context("it ends within a part")?;
            let kind = u32::from_le_bytes(*kind);
            ensure!(parts.insert(kind, content).is_none(), "part {kind} is there twice");
            bytes = rest;
        }
        ensure!(bytes.is_empty(), "it ends within a part");
        Ok(Parts(parts))
    }

    fn bytes(&mut self, kind: u32, name: &str) -> Result<&'a [u8]> {
        self.0.remove(&kind).with_context(|| format!("the {name} are missing"))
    }

    fn take<T: FromBytes + Immutable>(&mut self, kind: u32, name: &str) -> Result<T> {
        let bytes = self.bytes(kind, name)?;
        let Ok(value) = T::read_from_bytes(bytes) else {
            bail!("the {name} have {} bytes, not {}", bytes.len(), size_of::<T>())
        };
        Ok(value)
    }

    fn msrs(&mut self) -> Result<Vec<(u32, u64)>> {
        let bytes = self.bytes(part::MSRS, "MSRs")?;
        let entries = bytes.chunks_exact(size_of::<kvm_msr_entry>());
        let whole = entries.remainder().is_empty() && entries.len() <= MSRS_MAX;
        ensure!(whole, "the MSRs have {} bytes", bytes.len());
        let entry = |bytes: &[u8]| kvm_msr_entry::read_from_bytes(bytes).ok();
        Ok(entries.filter_map(entry).map(|entry| (entry.index, entry.data)).collect())
    }

    fn end(self) -> Result<()> {
        match self.0.keys().next() {
            Some(kind) => bail!("part {kind} is unknown"),
            None => Ok(()),
        }
    }
}

fn get_msr(fd: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]).ok()?;
    let read = fd.get_msrs(&mut msrs).ok()?;
    msrs.as_slice().first().filter(|_| read == 1).map(|entry| entry.data)
}

/// Writes an MSR. Returns whether KVM took it.
pub(crate) fn set_msr(fd: &VcpuFd, index: u32, data: u64) -> bool {
    let msrs = Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]);
    msrs.is_ok_and(|msrs| fd.set_msrs(&msrs).is_ok_and(|written| written == 1))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn state() -> VcpuState {
        let mut extended = kvm_xsave::default();
        extended.region[100] = 7;
        VcpuState {
            mp_state: kvm_mp_state { mp_state: 3 },
            registers: kvm_regs { rip: 0x1234, ..Default::default() },
            system: kvm_sregs { cr3: 0x5000, ..Default::default() },
            extended: Box::new(extended),
            xcrs: kvm_xcrs { nr_xcrs: 1, ..Default::default() },
            debug: kvm_debugregs { dr7: 0x400, ..Default::default() },
            apic: kvm_lapic_state::default(),
            msrs: vec![(0x10, 1), (0xc000_0080, 0xd01)],
            events: kvm_vcpu_events::default(),
        }
    }

    fn fault(bytes: &[u8]) -> String {
        VcpuState::decode(bytes).err().unwrap().to_string()
    }

    /// The sizes of the document.
    #[test]
    fn parts_have_the_sizes_of_the_kernels_interface() {
        let sizes = [
            (size_of::<kvm_regs>(), 144),
            (size_of::<kvm_sregs>(), 312),
            (size_of::<kvm_xsave>(), 4096),
            (size_of::<kvm_xcrs>(), 392),
            (size_of::<kvm_debugregs>(), 128),
            (size_of::<kvm_lapic_state>(), 1024),
            (size_of::<kvm_msr_entry>(), 16),
            (size_of::<kvm_vcpu_events>(), 64),
            (size_of::<kvm_mp_state>(), 4),
        ];
        assert!(sizes.iter().all(|(is, told)| is == told), "{sizes:?}");
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let (state, again) = (state(), VcpuState::decode(&state().encode()).unwrap());
        assert_eq!((again.registers, again.system), (state.registers, state.system));
        assert_eq!((&again.msrs, again.extended.region[100]), (&state.msrs, 7));
        assert_eq!((again.mp_state.mp_state, again.debug.dr7), (3, 0x400));
        assert!((state.encode_len() as u64) < STATE_BYTES_MAX);
    }

    impl VcpuState {
        fn encode_len(&self) -> usize {
            self.encode().len() + MSRS_MAX * size_of::<kvm_msr_entry>()
        }
    }

    #[test]
    fn a_forged_state_writes_no_other_msr() {
        let mut forged = state();
        forged.check_msrs(&[0xc000_0080, 0x10, 0x11]).unwrap();
        let fault = |state: &VcpuState| state.check_msrs(&[0x10, 0xc000_0080]).unwrap_err();
        forged.msrs.push((0x8b, 1));
        assert!(fault(&forged).to_string().contains("MSR 0x8b is no part"));
        forged.msrs.pop();
        forged.msrs.push((0x10, 2));
        assert!(fault(&forged).to_string().contains("MSR 0x10 is there twice"));
    }

    #[test]
    fn what_is_no_state_is_named() {
        let good = state().encode();
        for len in 0..good.len() {
            assert!(VcpuState::decode(&good[..len]).is_err(), "{len} bytes");
        }
        assert!(fault(&[]).contains("are missing"));
        assert!(fault(&[&good[..], &good[..]].concat()).contains("twice"));
        assert!(fault(&[&good[..], &[99, 0, 0, 0, 0, 0, 0, 0]].concat()).contains("part 99"));
        // The first part are the registers. One byte less than they have.
        let mut short = good.clone();
        short[4] -= 1;
        short.remove(8);
        assert!(fault(&short).contains("the registers have 143 bytes, not 144"));
        let mut many = state();
        many.xcrs.nr_xcrs = u32::MAX;
        assert!(fault(&many.encode()).contains("extended control registers"));
        many = state();
        many.msrs = vec![(0, 0); MSRS_MAX + 1];
        assert!(fault(&many.encode()).contains("MSRs"));
    }
}
