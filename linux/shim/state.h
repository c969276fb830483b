/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The interface of state.c, the character devices of state pages. src/state/ffi.rs declares it for
 * Rust. A *folder* stands for a state device, a *node* for one of its pages.
 */
#ifndef VBUS_STATE_H
#define VBUS_STATE_H

#include <linux/types.h>

/* ---- state.c, called by main.c ---- */

int shim_state_start(void);
void shim_state_end(void);

/* ---- Rust, called by state.c ---- */

/*
 * `page` is what shim_node_new got. `file` stands for one opening of it. All may sleep, but
 * vbus_state_show. 0 or a negative errno, unless said otherwise.
 */
int vbus_state_open(void *page, void *node, bool writes, void **file);
void vbus_state_release(void *file);
/* Bytes of a value: the size of the file. */
u64 vbus_state_bytes(void *file);
/* The bytes copied, by shim_copy_to_user and shim_copy_from_user. */
long vbus_state_read(void *file, void *user, u64 bytes, u64 offset);
long vbus_state_write(void *file, const void *user, u64 bytes, u64 offset);
/* An OR of SHIM_POLL_... The caller has put the file's thread into the node's queue. */
u32 vbus_state_poll(void *file);
#define SHIM_POLL_IN 1
#define SHIM_POLL_OUT 2
#define SHIM_POLL_GONE 4
/* Lets the device know of what a mapping has written. */
int vbus_state_sync(void *file);
/* `pages` pages from number `first` of the page's memory are to be mapped. */
int vbus_state_map(void *file, u64 first, u64 pages, bool writable);
/* One more mapping that can be written, or one less. */
void vbus_state_mapped(void *file, bool more);
/*
 * Has page number `page` of the memory mapped, by a call of shim_fault_insert with `fault`, whose
 * result it returns; all ones: there is no such memory.
 */
u32 vbus_state_fault(void *file, u64 page, void *fault);
/* The text of attribute `which` of a page; returns its bytes. */
long vbus_state_show(void *page, unsigned int which, char *text, unsigned long bytes);
#define SHIM_STATE_OWNER 0
#define SHIM_STATE_BYTES 1
#define SHIM_STATE_NUMBER 2
#define SHIM_STATE_PAGE 3
/* The node has gone, and nobody has it open: `page` is not used again. */
void vbus_state_free(void *page);

/* ---- state.c, called by Rust. Names have `bytes` bytes; they may not contain '/' or '!'. ---- */

/* A folder below /dev/vbus. NULL, and a negative errno in `error` (EEXIST: there is one). */
void *shim_folder_new(void *pci, const char *name, u64 bytes, int *error);
/* Its nodes are gone. */
void shim_folder_free(void *folder);
/* Makes the node; from now on it can be opened. NULL, and a negative errno: `page` is not used. */
void *shim_node_new(void *folder, const char *name, u64 bytes, unsigned int mode, void *page,
		    int *error);
/* Takes the node away. Who has it open keeps `page` and its mappings. */
void shim_node_free(void *node);
/* Wakes all who wait for the node. From any context. */
void shim_node_wake(void *node);
/* Takes all mappings away: the next access of each asks vbus_state_fault again. May sleep. */
void shim_node_unmap(void *node);

/* 0 or -EFAULT. May sleep. */
int shim_copy_to_user(void *user, const void *from, u64 bytes);
int shim_copy_from_user(void *to, const void *user, u64 bytes);
/* Maps the page of memory at `place`. `shared`: it is memory of shim_dma_alloc. */
u32 shim_fault_insert(void *fault, const void *place, bool shared);
/* Zeroed whole pages. NULL: there is no memory. May sleep. */
void *shim_pages_new(u64 bytes);
void shim_pages_free(void *memory);

#endif
