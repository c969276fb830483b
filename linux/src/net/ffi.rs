// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What shim/net.h says, for Rust: the functions of the shim, and the plain types of both sides.
#![allow(unsafe_code, reason = "foreign functions")]

use core::ffi::{c_int, c_void};

/// A handle of the shim.
pub type Handle = *mut c_void;

pub const ADDRESSES_MAX: usize = 64;
pub const PIECES_MAX: usize = 20;
pub const XDP_TAILROOM: u32 = 320;

pub const CSUM: u32 = 1 << 0;
pub const TSO4: u32 = 1 << 1;
pub const TSO6: u32 = 1 << 2;
pub const ECN: u32 = 1 << 3;
pub const USO: u32 = 1 << 4;
pub const VLAN: u32 = 1 << 5;
pub const RSS: u32 = 1 << 6;
pub const RX_CSUM: u32 = 1 << 8;
pub const RX_GSO: u32 = 1 << 9;

pub const GSO_TCP4: u8 = 1;
pub const GSO_TCP6: u8 = 2;
pub const GSO_UDP: u8 = 3;

pub const TX_POST: u32 = 1;
pub const TX_STOPPED: u32 = 2;

pub const XDP_PASS: u32 = 2;
pub const XDP_TX: u32 = 3;
pub const XDP_REDIRECT: u32 = 4;

/// What a newly made interface is.
#[repr(C)]
pub struct Traits {
    pub mac: [u8; 6],
    pub mtu_max: u16,
    pub able: u32,
    pub queues: u32,
}

/// A frame to send.
#[repr(C)]
pub struct TxFrame {
    pub skb: Handle,
    pub data: *const u8,
    pub bytes: u32,
    pub linear: u32,
    pub headroom: u16,
    pub frags: u16,
    pub csum_start: u16,
    pub csum_offset: u16,
    pub gso_size: u16,
    pub headers: u16,
    pub gso: u8,
    pub partial: bool,
    pub cwr: bool,
    pub more: bool,
}

/// Contiguous bytes, by the device's addresses.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Piece {
    pub address: u64,
    pub bytes: u32,
    pub pad: u32,
}

/// A page to receive into.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Page {
    pub memory: *mut u8,
    pub address: u64,
}

/// Part of a received frame: bytes of a page.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RxPiece {
    pub memory: *mut u8,
    pub offset: u32,
    pub bytes: u32,
}

/// What is known of a received frame.
#[repr(C)]
#[derive(Default)]
pub struct RxFrame {
    pub hash: u32,
    pub csum_start: u16,
    pub csum_offset: u16,
    pub gso_size: u16,
    pub gso: u8,
    pub cwr: bool,
    pub partial: bool,
    pub verified: bool,
    pub hashed: u8,
    pub index: u8,
    pub pad: [u8; 2],
}

/// The statistics of an interface.
#[repr(C)]
pub struct Stats {
    pub rx_frames: u64,
    pub rx_bytes: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_frames: u64,
    pub tx_bytes: u64,
    pub tx_dropped: u64,
}

/// The statistics of a queue pair.
#[repr(C)]
pub struct QueueStats {
    pub rx_frames: u64,
    pub rx_bytes: u64,
    pub rx_alloc_failed: u64,
    pub tx_frames: u64,
    pub tx_bytes: u64,
    pub tx_stops: u64,
    pub tx_wakes: u64,
}

/// The sizes of the rings, in entries.
#[repr(C)]
pub struct Rings {
    pub rx_max: u32,
    pub tx_max: u32,
    pub rx: u32,
    pub tx: u32,
}

/// Numbers of queue pairs.
#[repr(C)]
pub struct Channels {
    pub max: u32,
    pub used: u32,
}

/// How long the device holds interrupts back.
#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct Coalesce {
    pub rx_usecs: u32,
    pub rx_frames: u32,
    pub tx_usecs: u32,
    pub tx_frames: u32,
}

/// The link.
#[repr(C)]
pub struct Link {
    pub speed: u32,
    pub duplex: u8,
}

unsafe extern "C" {
    pub fn shim_net_new(pci: Handle, net: *mut c_void, queues: u32) -> Handle;
    pub fn shim_net_free(dev: Handle);
    pub fn shim_net_register(dev: Handle, traits: *const Traits) -> c_int;
    pub fn shim_net_unregister(dev: Handle);
    pub fn shim_net_mtu(dev: Handle) -> u32;
    pub fn shim_net_mac(dev: Handle, mac: *mut u8);
    pub fn shim_net_key(key: *mut u8, bytes: u32);
    pub fn shim_net_keeps_table(dev: Handle) -> bool;
    pub fn shim_net_use_queues(dev: Handle, queues: u32) -> c_int;
    pub fn shim_rtnl_lock();
    pub fn shim_rtnl_unlock();
    pub fn shim_net_announce(dev: Handle);
    pub fn shim_net_carrier(dev: Handle, on: bool);
    pub fn shim_net_detach(dev: Handle);
    pub fn shim_net_attach(dev: Handle);
    pub fn shim_net_tx_disable(dev: Handle);
    pub fn shim_net_tx_wake_all(dev: Handle);
    pub fn shim_net_addresses(
        dev: Handle,
        out: *mut u8,
        promiscuous: *mut bool,
        all_multicast: *mut bool,
    ) -> u32;

    pub fn shim_group_new(dev: Handle, index: u32, group: *mut c_void) -> Handle;
    pub fn shim_group_free(group: Handle);
    pub fn shim_group_enable(group: Handle);
    pub fn shim_group_disable(group: Handle);
    pub fn shim_group_schedule(group: Handle);
    pub fn shim_group_nap(group: Handle, nanoseconds: u64);
    pub fn shim_group_later(group: Handle, milliseconds: u32);
    pub fn shim_others_wait() -> bool;
    pub fn shim_group_complete(group: Handle, done: c_int) -> bool;

    pub fn shim_queue_new(dev: Handle, index: u32, queue: *mut c_void, group: Handle) -> Handle;
    pub fn shim_queue_open(queue: Handle, pages: u32, xdp: bool) -> c_int;
    pub fn shim_queue_close(queue: Handle);

    pub fn shim_rx_pages(queue: Handle, count: u32, out: *mut Page) -> u32;
    pub fn shim_rx_page_put(queue: Handle, memory: *mut u8, napi: bool);
    pub fn shim_rx_sync(queue: Handle, pieces: *const RxPiece, count: u32);
    pub fn shim_rx_sync_device(queue: Handle, memory: *mut u8);
    pub fn shim_rx_skb(group: Handle, data: *const u8, bytes: u32) -> Handle;
    pub fn shim_rx_skb_in_place(queue: Handle) -> Handle;
    pub fn shim_rx_deliver(
        group: Handle,
        skb: Handle,
        frame: *const RxFrame,
        pieces: *const RxPiece,
        count: u32,
    ) -> bool;

    pub fn shim_tx_lock(queue: Handle);
    pub fn shim_tx_trylock(queue: Handle) -> bool;
    pub fn shim_tx_unlock(queue: Handle);
    pub fn shim_tx_lock_bh(queue: Handle);
    pub fn shim_tx_unlock_bh(queue: Handle);
    pub fn shim_tx_map(
        queue: Handle,
        skb: Handle,
        linear: bool,
        headroom: u32,
        pieces: *mut Piece,
    ) -> c_int;
    pub fn shim_tx_unmap(queue: Handle, pieces: *const Piece, count: u32);
    pub fn shim_tx_copy(skb: Handle, to: *mut u8, bytes: u32) -> c_int;
    pub fn shim_tx_linearize(skb: Handle, frame: *mut TxFrame) -> c_int;
    pub fn shim_tx_free(skb: Handle, budget: c_int);
    pub fn shim_tx_drop(skb: Handle);
    pub fn shim_tx_timestamp(skb: Handle);
    pub fn shim_tx_sent(queue: Handle, bytes: u32, more: bool) -> u32;
    pub fn shim_tx_completed(queue: Handle, frames: u32, bytes: u32) -> bool;
    pub fn shim_tx_reset(queue: Handle);
    pub fn shim_tx_stop(queue: Handle);
    pub fn shim_tx_wake(queue: Handle);
    pub fn shim_tx_is_stopped(queue: Handle) -> bool;
    pub fn shim_tx_touch(queue: Handle);

    pub fn shim_xdp_run(queue: Handle, memory: *mut u8, headroom: u32, bytes: u32) -> u32;
    pub fn shim_xdp_frame(queue: Handle, piece: *mut Piece) -> Handle;
    pub fn shim_xdp_redirect(queue: Handle) -> c_int;
    pub fn shim_xdp_flush();
    pub fn shim_xdp_map(queue: Handle, frame: Handle, piece: *mut Piece) -> c_int;
    pub fn shim_xdp_bytes(frame: Handle) -> u32;
    pub fn shim_xdp_copy(frame: Handle, to: *mut u8);
    pub fn shim_xdp_free(frame: Handle, budget: c_int);
}
