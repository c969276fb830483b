/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The interface between pic.c and src/pic: what vbus.h says of handles holds here too. */
#ifndef VBUS_PIC_H
#define VBUS_PIC_H

#include <linux/types.h>

/* ---- pic.c ---- */

/* The lock of all sources of interrupts and all interrupt controllers of the module. It sleeps. */
void shim_sources_lock(void);
void shim_sources_unlock(void);

/*
 * Lines 0 to `lines` - 1 as interrupts of the kernel's, named for the function. NULL: there is no
 * memory. Sleeps.
 */
void *shim_pic_new(void *pci, u32 lines, void *data);
/* No line has a number any more. Sleeps. */
void shim_pic_free(void *pic);
/* Gives a line a number by which the kernel knows it; 0: there is none. Sleeps. */
u32 shim_pic_map(void *pic, u32 line);
/* Takes the number back. It has no handler any more. Sleeps. */
void shim_pic_unmap(u32 number);
/* The line has interrupted: in hard interrupt context. False: it has no number. */
bool shim_pic_handle(void *pic, u32 line);
/* Whether processor `cpu` is online and among those of `mask`. */
bool shim_mask_has(const void *mask, u32 cpu);

/* ---- Rust, called by pic.c with the interrupt's own lock held: it does not sleep ---- */

/* The kernel wants no interrupts of the line, or wants them again. */
void vbus_pic_mask(void *data, u32 line, bool masked);
/* The processor of `mask` that gets the line soon, or a negative errno. */
int vbus_pic_affinity(void *data, u32 line, const void *mask);

#endif
