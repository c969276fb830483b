// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What ethtool asks and sets. The kernel holds rtnl around all of it.
#![allow(unsafe_code, reason = "callbacks of the shim")]

use core::ffi::{c_int, c_void};
use core::fmt::Write;
use core::sync::atomic::Ordering;

use vbus_driver::Error;
use vbus_driver::venet::{Duplex, F_COALESCE, F_RSS, PairCounters, RSS_KEY_BYTES, counters_page};

use super::ffi;
use super::interface::{Control, Net, number, of};
use super::pair::Pair;
use super::settings::{ENTRIES_MIN, Rss, TABLE_MAX};
use super::stats::Counter;
use super::tx::COPYBREAK_MAX;
use crate::kernel::Errno;
use crate::kernel::log::Text;

/// Bytes of a name of a statistic.
const NAME: usize = 32;
/// Bytes of the key.
const KEY: u32 = 40;
const _: () = assert!(KEY as usize == RSS_KEY_BYTES);
/// The device holds an interrupt back for so long at most, in microseconds. With a longer time the
/// interface would seem dead.
const USECS_MAX: u32 = 1_000_000;

type Read = fn(&Pair) -> &Counter;

/// Statistics of each queue pair, by the driver.
const DRIVER: [(&str, Read); 22] = [
    ("rx{}_frames", |pair| &pair.rx_stats.frames),
    ("rx{}_bytes", |pair| &pair.rx_stats.bytes),
    ("rx{}_alloc_failed", |pair| &pair.rx_stats.alloc_failed),
    ("rx{}_invalid", |pair| &pair.rx_stats.invalid),
    ("rx{}_polls", |pair| &pair.rx_stats.polls),
    ("rx{}_arms", |pair| &pair.rx_stats.arms),
    ("rx{}_kicks", |pair| &pair.rx_stats.kicks),
    ("rx{}_xdp_drops", |pair| &pair.rx_stats.xdp_dropped),
    ("rx{}_xdp_tx", |pair| &pair.rx_stats.xdp_tx),
    ("rx{}_xdp_redirects", |pair| &pair.rx_stats.xdp_redirected),
    ("tx{}_frames", |pair| &pair.tx_stats.frames),
    ("tx{}_bytes", |pair| &pair.tx_stats.bytes),
    ("tx{}_dropped", |pair| &pair.tx_stats.dropped),
    ("tx{}_copied", |pair| &pair.tx_stats.copied),
    ("tx{}_mapped", |pair| &pair.tx_stats.mapped),
    ("tx{}_posts", |pair| &pair.tx_stats.posts),
    ("tx{}_kicks", |pair| &pair.tx_stats.kicks),
    ("tx{}_arms", |pair| &pair.tx_stats.arms),
    ("tx{}_stops", |pair| &pair.tx_stats.stops),
    ("tx{}_wakes", |pair| &pair.tx_stats.wakes),
    ("tx{}_xdp", |pair| &pair.tx_stats.xdp),
    ("tx{}_xdp_bytes", |pair| &pair.tx_stats.xdp_bytes),
];

/// Statistics of each queue pair, by the device: words of the counters page.
const DEVICE: [(&str, usize); 27] = [
    ("dev_tx{}_frames", counters_page::TX_FRAMES),
    ("dev_tx{}_bytes", counters_page::TX_BYTES),
    ("dev_tx{}_batches", counters_page::TX_BATCHES),
    ("dev_tx{}_waits", counters_page::TX_WAITS),
    ("dev_tx{}_csum", counters_page::TX_CSUM),
    ("dev_tx{}_segments", counters_page::TX_SEGMENTS),
    ("dev_tx{}_drop_short", counters_page::TX_DROPS_SHORT),
    ("dev_tx{}_drop_header", counters_page::TX_DROPS_HEADER),
    ("dev_tx{}_drop_no_link", counters_page::TX_DROPS_NO_LINK),
    ("dev_tx{}_drop_refused", counters_page::TX_DROPS_REFUSED),
    ("dev_tx{}_drop_too_long", counters_page::TX_DROPS_LONG),
    ("dev_tx{}_drop_spoofed", counters_page::TX_DROPS_SPOOFED),
    ("dev_tx{}_drop_denied", counters_page::TX_DROPS_DENIED),
    ("dev_tx{}_drop_storm", counters_page::TX_DROPS_STORM),
    ("dev_rx{}_frames", counters_page::RX_FRAMES),
    ("dev_rx{}_bytes", counters_page::RX_BYTES),
    ("dev_rx{}_posts", counters_page::RX_BATCHES),
    ("dev_rx{}_waits", counters_page::RX_STARVED),
    ("dev_rx{}_csum", counters_page::RX_CSUM),
    ("dev_rx{}_segments", counters_page::RX_SEGMENTS),
    ("dev_rx{}_filtered", counters_page::RX_FILTERED),
    ("dev_rx{}_drop_no_buffers", counters_page::RX_DROPS_BUFFERS),
    ("dev_rx{}_drop_too_long", counters_page::RX_DROPS_LONG),
    ("dev_rx{}_drop_unconverted", counters_page::RX_DROPS_BAD),
    ("dev_rx{}_drop_too_slow", counters_page::RX_DROPS_SLOW),
    ("dev_rx{}_drop_rate", counters_page::RX_DROPS_RATE),
    ("dev_rx{}_drop_no_ring", counters_page::RX_DROPS_NO_LINK),
];

/// Visits all statistics of the interface in their order: with the name, whose `{}` stands for the
/// number, and with the value.
fn visit(net: &Net, mut each: impl FnMut(&str, usize, u64)) {
    let control = net.control();
    let used = usize::from(control.settings.pairs);
    for (at, pair) in net.pairs().iter().enumerate().take(used) {
        for (name, read) in &DRIVER {
            each(name, at, read(pair).get());
        }
        let counters = match &control.nic {
            Some(nic) => nic.counters(number(at)).unwrap_or_default(),
            None => PairCounters::default(),
        };
        for (name, word) in &DEVICE {
            each(name, at, counters.0.get(*word).copied().unwrap_or_default());
        }
    }
    for (at, group) in net.groups().iter().enumerate() {
        each("irq{}_interrupts", at, group.interrupts.get());
    }
    each("faults", 0, net.faults.load(Ordering::Relaxed));
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_stat_count(net: *mut c_void) -> u32 {
    let mut count = 0;
    // SAFETY: the shim passes the net.
    visit(unsafe { of(net) }, |_, _, _| count += 1);
    count
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_stat_names(net: *mut c_void, names: *mut u8) {
    let mut at = names;
    // SAFETY: as above.
    visit(unsafe { of(net) }, |name, number, _| {
        let mut text = Text::<{ NAME - 1 }>::new(format_args!(""));
        let (before, behind) = name.split_once("{}").unwrap_or((name, ""));
        // A name that is too long is cut.
        let _ = match name.len() == before.len() {
            true => text.write_str(name),
            false => write!(text, "{before}{number}{behind}"),
        };
        let bytes = text.as_bytes();
        // SAFETY: there are 32 bytes for each statistic, and rtnl keeps their number.
        unsafe {
            core::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
            at = at.add(NAME);
        }
    });
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_stat_values(net: *mut c_void, values: *mut u64) {
    let mut at = values;
    // SAFETY: as above.
    visit(unsafe { of(net) }, |_, _, value| {
        // SAFETY: there is a place for each statistic, and rtnl keeps their number.
        unsafe {
            at.write(value);
            at = at.add(1);
        }
    });
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_get_rings(net: *mut c_void, rings: *mut ffi::Rings) {
    // SAFETY: as above, with a place for them.
    let (net, rings) = unsafe { (of(net), &mut *rings) };
    let control = net.control();
    let max = control.config.ring_entries;
    let (rx, tx) = (control.settings.rx_entries, control.settings.tx_entries);
    *rings = ffi::Rings { rx_max: max, tx_max: max, rx: rx.min(max), tx: tx.min(max) };
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_rings(net: *mut c_void, rx: u32, tx: u32) -> c_int {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    let mut control = net.control();
    let max = control.config.ring_entries;
    // As other drivers do: the next size that is possible.
    let fit = |entries: u32| entries.clamp(ENTRIES_MIN.min(max), max).next_power_of_two();
    if rx > max || tx > max || rx == 0 || tx == 0 {
        return Errno::INVALID.negative();
    }
    let before = (control.settings.rx_entries, control.settings.tx_entries);
    (control.settings.rx_entries, control.settings.tx_entries) = (fit(rx), fit(tx));
    change(net, &mut control, |control| {
        (control.settings.rx_entries, control.settings.tx_entries) = before;
    })
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_get_channels(net: *mut c_void, channels: *mut ffi::Channels) {
    // SAFETY: as above, with a place for them.
    let (net, channels) = unsafe { (of(net), &mut *channels) };
    let used = u32::from(net.control().pairs());
    *channels = ffi::Channels { max: u32::from(net.pairs_max()), used };
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_channels(net: *mut c_void, used: u32) -> c_int {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    let mut control = net.control();
    let Some(pairs) = u16::try_from(used).ok().filter(|n| (1..=net.pairs_max()).contains(n)) else {
        return Errno::INVALID.negative();
    };
    let before = (control.settings.pairs, control.settings.rss.clone());
    if let Some(rss) = &mut control.settings.rss {
        // SAFETY: the handle is valid, and the caller holds rtnl.
        if !unsafe { ffi::shim_net_keeps_table(net.dev()) } {
            // Nobody has set the table since it was the default: it stays that.
            *rss = Rss::spread(rss.key, rss.entries, pairs);
        } else if rss.entries().iter().any(|pair| *pair >= pairs) {
            // The table is the administrator's: `ethtool -X ... default` takes it away.
            return Errno::BUSY.negative();
        }
    }
    control.settings.pairs = pairs;
    let error = change(net, &mut control, |control| {
        (control.settings.pairs, control.settings.rss) = before;
    });
    if error == 0 {
        // SAFETY: the caller holds rtnl.
        return unsafe { ffi::shim_net_use_queues(net.dev(), u32::from(control.pairs())) };
    }
    error
}

/// Connects again with changed settings. If that fails, `undo` takes the change back, and the
/// interface connects as it was.
fn change(net: &Net, control: &mut Control, undo: impl FnOnce(&mut Control)) -> c_int {
    let was_open = control.nic.is_some();
    let Err(error) = net.reconnect(control) else { return 0 };
    undo(control);
    // A device that is slow would be so again, under rtnl: that is for the watch.
    if was_open && !matches!(error, Error::TimedOut(_)) {
        // If that fails too, the watch tries again.
        let _ = net.connect(control);
    }
    Errno::from(error).negative()
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_get_coalesce(net: *mut c_void, coalesce: *mut ffi::Coalesce) {
    // SAFETY: as above, with a place for it.
    let (net, coalesce) = unsafe { (of(net), &mut *coalesce) };
    *coalesce = net.control().settings.coalesce;
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_coalesce(net: *mut c_void, coalesce: *const ffi::Coalesce) -> c_int {
    // SAFETY: as above, with a value.
    let (net, coalesce) = unsafe { (of(net), *coalesce) };
    let mut control = net.control();
    if control.offered & F_COALESCE == 0 {
        return Errno::NOT_SUPPORTED.negative();
    }
    if coalesce.rx_usecs > USECS_MAX || coalesce.tx_usecs > USECS_MAX {
        return Errno::INVALID.negative();
    }
    let before = core::mem::replace(&mut control.settings.coalesce, coalesce);
    let (rx, tx) = control.settings.coalescing();
    let Some(nic) = &mut control.nic else { return 0 };
    let result = nic.set_coalesce(None, rx, tx);
    if result.is_err() {
        control.settings.coalesce = before;
    }
    Errno::result(result.map_err(Errno::from))
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_get_copybreak(net: *mut c_void) -> u32 {
    // SAFETY: as above.
    unsafe { of(net) }.control().settings.tx_copybreak
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_copybreak(net: *mut c_void, bytes: u32) -> c_int {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    if bytes > COPYBREAK_MAX {
        return Errno::INVALID.negative();
    }
    let mut control = net.control();
    control.settings.tx_copybreak = bytes;
    net.pairs().iter().for_each(|pair| pair.set_copybreak(bytes));
    0
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_link(net: *mut c_void, link: *mut ffi::Link) {
    // SAFETY: as above, with a place for it.
    let (net, link) = unsafe { (of(net), &mut *link) };
    let status = net.control().status;
    link.speed = status.speed.unwrap_or(0);
    link.duplex = match status.duplex {
        Duplex::Half => 0,
        Duplex::Full => 1,
        Duplex::Unknown => 2,
    };
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_table_entries(net: *mut c_void) -> u32 {
    // SAFETY: as above.
    let control = unsafe { of(net) }.control();
    if control.offered & F_RSS == 0 { 0 } else { u32::from(entries(&control)) }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_key_bytes(net: *mut c_void) -> u32 {
    // SAFETY: as above.
    let control = unsafe { of(net) }.control();
    if control.offered & F_RSS == 0 { 0 } else { KEY }
}

/// Entries of the table: a power of two.
fn entries(control: &Control) -> u16 {
    match &control.settings.rss {
        Some(rss) => rss.entries,
        None => 1 << control.config.rss_table_max.clamp(1, TABLE_MAX).ilog2(),
    }
}

/// The setting, or what it is before somebody has set it.
fn rss(control: &Control) -> Rss {
    match &control.settings.rss {
        Some(rss) => rss.clone(),
        None => {
            let mut key = [0; RSS_KEY_BYTES];
            // SAFETY: there is room for so many bytes.
            unsafe { ffi::shim_net_key(key.as_mut_ptr(), KEY) };
            Rss::spread(key, entries(control), control.settings.pairs)
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_get_rss(net: *mut c_void, table: *mut u32, key: *mut u8) {
    // SAFETY: as above.
    let rss = rss(&unsafe { of(net) }.control());
    if !table.is_null() {
        for (at, pair) in rss.entries().iter().enumerate() {
            // SAFETY: there is a place for each entry, and rtnl keeps their number.
            unsafe { table.add(at).write(u32::from(*pair)) };
        }
    }
    if !key.is_null() {
        // SAFETY: there is a place for the key.
        unsafe { key.cast::<[u8; RSS_KEY_BYTES]>().write(rss.key) };
    }
}

#[unsafe(no_mangle)]
extern "C" fn vbus_net_set_rss(net: *mut c_void, table: *const u32, key: *const u8) -> c_int {
    // SAFETY: as above.
    let net = unsafe { of(net) };
    let mut control = net.control();
    if control.offered & F_RSS == 0 {
        return Errno::NOT_SUPPORTED.negative();
    }
    let mut to = rss(&control);
    if !table.is_null() {
        let used = usize::from(to.entries);
        for (at, entry) in to.table.iter_mut().enumerate().take(used) {
            // SAFETY: the kernel passes as many entries as the table has.
            let pair = unsafe { table.add(at).read() };
            match u16::try_from(pair).ok().filter(|pair| *pair < control.settings.pairs) {
                Some(pair) => *entry = pair,
                None => return Errno::INVALID.negative(),
            }
        }
    }
    if !key.is_null() {
        // SAFETY: the kernel passes a whole key.
        to.key = unsafe { key.cast::<[u8; RSS_KEY_BYTES]>().read() };
    }
    let before = control.settings.rss.replace(to);
    if before.is_some() {
        // The connection has the feature.
        return match net.tell_rss(&mut control) {
            Ok(()) => 0,
            Err(error) => {
                control.settings.rss = before;
                Errno::from(error).negative()
            }
        };
    }
    change(net, &mut control, |control| control.settings.rss = None)
}
