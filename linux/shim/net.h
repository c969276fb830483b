/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The interface between the kernel's network stack and the Rust driver of venet: plain types only,
 * as in vbus.h. src/net/ffi.rs declares it for Rust and says nothing else than this file.
 *
 * Handles: `net` is Rust's interface, `dev` the kernel's. A `group` is what one NAPI context
 * serves: one queue pair, or all of them where they share a vector. `queue` is a queue pair. Each
 * of them has a pointer of Rust (given at creation, passed to Rust) and a handle of the shim
 * (returned at creation, passed to the shim).
 */
#ifndef VBUS_NET_H
#define VBUS_NET_H

#include <linux/types.h>

#define VBUS_NET_QUEUES_MAX 16
#define VBUS_NET_ADDRESSES_MAX 64
#define VBUS_NET_PIECES_MAX 20
/* What XDP leaves free at the end of a page, for the kernel's struct skb_shared_info. */
#define VBUS_NET_XDP_TAILROOM 320

/* What a frame leaves to the device, or may leave to the driver. */
#define VBUS_NET_CSUM (1 << 0)
#define VBUS_NET_TSO4 (1 << 1)
#define VBUS_NET_TSO6 (1 << 2)
#define VBUS_NET_ECN (1 << 3)
#define VBUS_NET_USO (1 << 4)
/* Further abilities of an interface. */
#define VBUS_NET_VLAN (1 << 5)	/* filters by VLAN id */
#define VBUS_NET_RSS (1 << 6)	/* has an indirection table and a key */
#define VBUS_NET_RX_CSUM (1 << 8)
#define VBUS_NET_RX_GSO (1 << 9)

/* What kind of segments a frame is to be cut into. */
#define VBUS_GSO_NONE 0
#define VBUS_GSO_TCP4 1
#define VBUS_GSO_TCP6 2
#define VBUS_GSO_UDP 3

/* What a newly made interface is. */
struct vbus_net_traits {
	u8 mac[6];
	u16 mtu_max;
	u32 able;	/* VBUS_NET_ */
	u32 queues;	/* queue pairs */
};

/* A frame to send. */
struct vbus_tx_frame {
	void *skb;
	const u8 *data;		/* the linear part */
	u32 bytes;		/* of the whole frame */
	u32 linear;		/* of the linear part */
	u16 headroom;		/* before the linear part, that the driver may write */
	u16 frags;
	u16 csum_start;		/* if `partial` */
	u16 csum_offset;
	u16 gso_size;		/* if `gso` */
	u16 headers;		/* if `gso`: bytes of all headers */
	u8 gso;			/* VBUS_GSO_ */
	bool partial;		/* the checksum is left to the device */
	bool cwr;
	bool more;		/* another frame follows at once */
};

/* Contiguous bytes, by the device's addresses. */
struct vbus_piece {
	u64 address;
	u32 bytes;
	u32 pad;
};

/* A page to receive into. */
struct vbus_page {
	u8 *memory;
	u64 address;
};

/* Part of a received frame: bytes of a page of the pool. */
struct vbus_rx_piece {
	u8 *memory;		/* the page */
	u32 offset;
	u32 bytes;
};

/* What Rust knows of a received frame. */
struct vbus_rx_frame {
	u32 hash;
	u16 csum_start;		/* if `partial` */
	u16 csum_offset;
	u16 gso_size;		/* if `gso` */
	u8 gso;			/* VBUS_GSO_ */
	bool cwr;
	bool partial;
	bool verified;		/* the checksum was verified */
	u8 hashed;		/* 0: no hash, 1: of addresses, 2: of addresses and ports */
	u8 index;		/* the queue pair */
	u8 pad[2];
};

struct vbus_net_stats {
	u64 rx_frames, rx_bytes, rx_errors, rx_dropped;
	u64 tx_frames, tx_bytes, tx_dropped;
};

/* Statistics of one queue. */
struct vbus_queue_stats {
	u64 rx_frames, rx_bytes, rx_alloc_failed;
	u64 tx_frames, tx_bytes, tx_stops, tx_wakes;
};

struct vbus_rings {
	u32 rx_max, tx_max, rx, tx;
};

struct vbus_channels {
	u32 max, used;
};

struct vbus_coalesce {
	u32 rx_usecs, rx_frames, tx_usecs, tx_frames;
};

struct vbus_link {
	u32 speed;		/* Mb/s; 0: unknown */
	u8 duplex;		/* 0 half, 1 full, 2 unknown */
};

/* ---- Rust, called by net.c. 0 or a negative errno where nothing else is said. ---- */

/* With rtnl. May sleep. */
int vbus_net_open(void *net);
void vbus_net_stop(void *net);
int vbus_net_set_mac(void *net, const u8 *mac);
int vbus_net_set_mtu(void *net, u32 mtu);
int vbus_net_set_features(void *net, u32 wanted);
int vbus_net_vlan(void *net, u16 id, bool on);
/* Whether XDP programs run from now on. -ERANGE: the MTU is too large for them. */
int vbus_net_xdp(void *net, bool on);

/* From any context. */
void vbus_net_rx_mode(void *net);
void vbus_net_tx_timeout(void *net, u32 index);
void vbus_net_stats(void *net, struct vbus_net_stats *stats);
void vbus_net_queue_stats(void *net, u32 index, struct vbus_queue_stats *stats);

/* The data path. xmit has the queue's transmit lock; false: there was no room. */
bool vbus_net_xmit(void *queue, struct vbus_tx_frame *frame);
/* The NAPI poll of a group. It completes NAPI itself. */
int vbus_net_poll(void *group, int budget);
/* Sends frames of XDP; without the lock. How many were taken. */
int vbus_net_xdp_xmit(void *net, u32 cpu, void **frames, int count, bool flush);

/* ethtool. With rtnl. May sleep. */
void vbus_net_get_rings(void *net, struct vbus_rings *rings);
int vbus_net_set_rings(void *net, u32 rx, u32 tx);
void vbus_net_get_channels(void *net, struct vbus_channels *channels);
int vbus_net_set_channels(void *net, u32 used);
void vbus_net_get_coalesce(void *net, struct vbus_coalesce *coalesce);
int vbus_net_set_coalesce(void *net, const struct vbus_coalesce *coalesce);
/* Frames of at most so many bytes are copied to be sent. */
u32 vbus_net_get_copybreak(void *net);
int vbus_net_set_copybreak(void *net, u32 bytes);
void vbus_net_link(void *net, struct vbus_link *link);
u32 vbus_net_stat_count(void *net);
/* `names` has 32 bytes for each, zeroed. */
void vbus_net_stat_names(void *net, u8 *names);
void vbus_net_stat_values(void *net, u64 *values);
/* `table` or `key` may be NULL. */
u32 vbus_net_table_entries(void *net);
u32 vbus_net_key_bytes(void *net);
void vbus_net_get_rss(void *net, u32 *table, u8 *key);
int vbus_net_set_rss(void *net, const u32 *table, const u8 *key);

/* ---- net.c, called by Rust ---- */

/* An interface that nobody sees yet, for `net`, with room for `queues` pairs. NULL: no memory. */
void *shim_net_new(void *pci, void *net, u32 queues);
void shim_net_free(void *dev);
/* Makes the interface visible; its opposite. Take rtnl. */
int shim_net_register(void *dev, const struct vbus_net_traits *traits);
void shim_net_unregister(void *dev);
u32 shim_net_mtu(void *dev);
void shim_net_mac(void *dev, u8 *mac);
/* The system's key for hashes of frames. */
void shim_net_key(u8 *key, u32 bytes);
/* Whether the administrator has set the indirection table. With rtnl. */
bool shim_net_keeps_table(void *dev);
/* With rtnl. */
int shim_net_use_queues(void *dev, u32 queues);

void shim_rtnl_lock(void);
void shim_rtnl_unlock(void);
/* Takes rtnl. */
void shim_net_announce(void *dev);
void shim_net_carrier(void *dev, bool on);
/* Takes the interface from the stack for a while, and gives it back. */
void shim_net_detach(void *dev);
void shim_net_attach(void *dev);
/* No transmission runs, and none begins, when this returns. */
void shim_net_tx_disable(void *dev);
void shim_net_tx_wake_all(void *dev);
/* Copies up to VBUS_NET_ADDRESSES_MAX addresses to filter for; the number of all. */
u32 shim_net_addresses(void *dev, u8 *out, bool *promiscuous, bool *all_multicast);

/* NAPI. */
void *shim_group_new(void *dev, u32 index, void *group);
void shim_group_free(void *group);
void shim_group_enable(void *group);
/* May sleep. */
void shim_group_disable(void *group);
void shim_group_schedule(void *group);
/* Polls the group after this time, in nanoseconds; exactly, or roughly but cheaper. */
void shim_group_nap(void *group, u64 nanoseconds);
void shim_group_later(void *group, u32 milliseconds);
/* In a poll: whether a task waits for this CPU. */
bool shim_others_wait(void);
/* Whether NAPI is done: interrupts are wanted. */
bool shim_group_complete(void *group, int done);

/* A queue pair `index` of `dev`, served by `group`. */
void *shim_queue_new(void *dev, u32 index, void *queue, void *group);
/* With rtnl. `pages` is how many are with the device at most; `xdp`: programs may send them. */
int shim_queue_open(void *queue, u32 pages, bool xdp);
void shim_queue_close(void *queue);

/* Receive. In NAPI, or while it is disabled. Up to `count` pages; how many there were. */
u32 shim_rx_pages(void *queue, u32 count, struct vbus_page *out);
/* `napi`: in NAPI. */
void shim_rx_page_put(void *queue, u8 *memory, bool napi);
/* Makes what the device wrote visible. */
void shim_rx_sync(void *queue, const struct vbus_rx_piece *pieces, u32 count);
/* Gives a page to the device again that a program may have written. */
void shim_rx_sync_device(void *queue, u8 *memory);
/* A frame whose first `bytes` bytes are copied from `data`; NULL: no memory. */
void *shim_rx_skb(void *group, const u8 *data, u32 bytes);
/* The same in place, in the page of the frame that XDP has passed. */
void *shim_rx_skb_in_place(void *queue);
/*
 * Adds the pieces, whose pages then belong to the frame, and gives it to the stack. False: the
 * frame was invalid, and has been freed.
 */
bool shim_rx_deliver(void *group, void *skb, const struct vbus_rx_frame *frame,
		     const struct vbus_rx_piece *pieces, u32 count);

/* Transmit. */
/* In NAPI, with which it excludes xmit; and in a thread. */
void shim_tx_lock(void *queue);
/* As shim_tx_lock, without a wait. False: somebody has the lock, whom this may have interrupted. */
bool shim_tx_trylock(void *queue);
void shim_tx_unlock(void *queue);
void shim_tx_lock_bh(void *queue);
void shim_tx_unlock_bh(void *queue);
/* Notes the time, if the sender wants it. Once for each frame, before the device can see it. */
void shim_tx_timestamp(void *skb);
/*
 * Maps the frame's frags, and before them its linear part with `headroom` bytes before it, if
 * `linear`. The number of pieces, at most VBUS_NET_PIECES_MAX, or a negative errno.
 */
int shim_tx_map(void *queue, void *skb, bool linear, u32 headroom, struct vbus_piece *pieces);
void shim_tx_unmap(void *queue, const struct vbus_piece *pieces, u32 count);
/* Copies all `bytes` bytes of the frame to `to`. A negative errno: that was not possible. */
int shim_tx_copy(void *skb, u8 *to, u32 bytes);
/* Copies all frags into the linear part. */
int shim_tx_linearize(void *skb, struct vbus_tx_frame *frame);
/* Frees a frame that was sent; `budget` is that of the NAPI poll, 0 outside of it. */
void shim_tx_free(void *skb, int budget);
void shim_tx_drop(void *skb);
#define SHIM_TX_POST 1		/* make it visible to the device now */
#define SHIM_TX_STOPPED 2	/* the stack sends no more until frames have come back */
u32 shim_tx_sent(void *queue, u32 bytes, bool more);
/* Whether the stack still sends no more. */
bool shim_tx_completed(void *queue, u32 frames, u32 bytes);
/* Forgets the frames that have not come back. */
void shim_tx_reset(void *queue);
void shim_tx_stop(void *queue);
void shim_tx_wake(void *queue);
/* Whether the driver has stopped it. */
bool shim_tx_is_stopped(void *queue);
/* The watchdog waits for this queue again from now on. */
void shim_tx_touch(void *queue);

/* XDP. The verdicts are the kernel's. */
#define SHIM_XDP_ABORTED 0
#define SHIM_XDP_PASS 2
#define SHIM_XDP_TX 3
#define SHIM_XDP_REDIRECT 4
/* Runs the program on a frame of one piece, whose page has `headroom` bytes before it. */
u32 shim_xdp_run(void *queue, u8 *memory, u32 headroom, u32 bytes);
/* The frame that the program has returned, to be sent; and its piece, mapped already. */
void *shim_xdp_frame(void *queue, struct vbus_piece *piece);
int shim_xdp_redirect(void *queue);
void shim_xdp_flush(void);
/* Maps a frame of another interface. A negative errno: it cannot be mapped. */
int shim_xdp_map(void *queue, void *frame, struct vbus_piece *piece);
/* Its bytes; 0: they are in several pieces. */
u32 shim_xdp_bytes(void *frame);
/* Copies all of them to `to`. */
void shim_xdp_copy(void *frame, u8 *to);
/* Frees a frame of XDP. `budget` as above. */
void shim_xdp_free(void *frame, int budget);

#endif
