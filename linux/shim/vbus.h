/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The interface between the kernel's C and the driver's Rust: plain types only. Handles are
 * pointers whose contents the other side does not know.
 *
 * The shim is the kernel's interface and nothing else: structs, inline functions and macros, which
 * have no ABI. Every decision is in Rust. Differences between the versions of Linux are in the shim
 * alone. What the shim offers begins with shim_; src/kernel/ffi.rs declares it for Rust and says
 * nothing else than this file. What Rust offers begins with vbus_.
 */
#ifndef VBUS_H
#define VBUS_H

#include <linux/types.h>

/* The version of the module: that of linux/Cargo.toml. */
#define VBUS_VERSION "0.1.0"

/* ---- Rust, called by main.c: one PCI function. 0 or a negative errno. ---- */

/* Takes the function, and stores what the other calls get as `device`. May sleep. */
int vbus_probe(void *pci, void **device);
/* Gives the function up and frees `device`. May sleep. */
void vbus_remove(void *device);
/* The system goes down, or another kernel starts: ends all DMA. May sleep. */
void vbus_shutdown(void *device);
/* Before and after a sleep of the system, or a reset of the function by the PCI core. May sleep. */
void vbus_suspend(void *device);
void vbus_resume(void *device);
/* The text of sysfs attribute `which`, at most `bytes` at `text`; returns its bytes. */
long vbus_show(void *device, unsigned int which, char *text, unsigned long bytes);

#define VBUS_SHOW_CLASS 0
#define VBUS_SHOW_NAME 1
#define VBUS_SHOW_DOORBELL 2
#define VBUS_SHOW_COSTS 3
#define VBUS_SHOW_INCARNATION 4
#define VBUS_SHOW_INTERRUPTS 5

/* ---- main.c ---- */

/* An attribute of sysfs. The including file's `show` gets the device, `which`, and a page. */
#define SHIM_ATTRIBUTE(name, which)                                                              \
	static ssize_t name##_show(struct device *dev, struct device_attribute *attr, char *text) \
	{                                                                                        \
		return show(dev, which, text);                                                   \
	}                                                                                        \
	static DEVICE_ATTR_RO(name)

/*
 * The system goes down, or another kernel starts. From then on the driver unmaps nothing, and frees
 * nothing that a device can reach: the IOMMU may not answer.
 */
bool shim_goes_down(void);

/* The driver's work queue. */
struct workqueue_struct;
extern struct workqueue_struct *shim_queue;

/* ---- kernel.c: memory ---- */

/*
 * Zeroed memory, aligned to 8, and to its size if that is a power of two. NULL: there is none. May
 * sleep.
 */
void *shim_alloc(u64 bytes);
void shim_free(void *memory);

/* ---- kernel.c: messages ---- */

#define SHIM_ERROR 3
#define SHIM_WARNING 4
#define SHIM_INFO 6
/* Logs a line for the device of `pci`. `text` has no newline. */
void shim_log(void *pci, int level, const char *text, u64 bytes);
/* Whether one more of the messages that a device can cause may be logged now. */
bool shim_may_log(void);
/* A bug of the Rust code: ends the thread, as BUG() does. */
void shim_panic(const char *text, u64 bytes) __attribute__((noreturn));

/* ---- kernel.c: PCI functions ---- */

void shim_pci_get(void *pci);
void shim_pci_put(void *pci);
/* Its address, as /sys/bus/pci/devices has it. */
const char *shim_pci_name(void *pci);
/* All ones if the function has gone. */
u32 shim_pci_config_read32(void *pci, u16 offset);
int shim_pci_enable(void *pci);
void shim_pci_disable(void *pci);
/* Claims BAR 0; maps it, uncached. NULL: it cannot be mapped. */
int shim_pci_claim(void *pci);
void shim_pci_unclaim(void *pci);
u64 shim_pci_bar_bytes(void *pci);
void *shim_pci_map(void *pci);
void shim_pci_unmap(void *bar);
/* Bus Master, without which the function reaches no memory and sends no message. */
void shim_pci_set_master(void *pci);
void shim_pci_clear_master(void *pci);
/* Keeps configuration space, and writes what was kept back. */
void shim_pci_save(void *pci);
void shim_pci_restore(void *pci);

/* ---- kernel.c: interrupts ---- */

#define SHIM_INTX 1
#define SHIM_MSI 2
#define SHIM_MSIX 4
/* The vectors of the function's MSI-X; 0: it has none. */
u32 shim_pci_msix_vectors(void *pci);
/* Allocates 1 to `most` vectors of one of `kinds`. Their number, or a negative errno. */
int shim_pci_vectors(void *pci, u32 most, u32 kinds);
void shim_pci_free_vectors(void *pci);
/* The number by which the kernel knows a vector, or a negative errno. */
int shim_pci_vector(void *pci, u32 index);

#define SHIM_IRQ_SHARED 1	/* others may have handlers of it too */
#define SHIM_IRQ_PASSES_ON 2	/* the handler calls others, and so never runs in a thread */
#define SHIM_IRQ_BOUND 4	/* only the driver says which processor handles it */
/*
 * Calls `handler` with `data` at each interrupt of this number, in hard interrupt context. It
 * returns false if the interrupt was not its own. The first 31 bytes of `name` are copied. NULL,
 * and a negative errno in `error`: it cannot be had.
 */
void *shim_irq_request(void *pci, u32 number, u32 traits, const char *name, u64 name_bytes,
		       bool (*handler)(void *data), void *data, int *error);
/* Returns when no handler runs any more. May sleep. */
void shim_irq_free(void *irq);
/* The number by which the kernel knows it. */
u32 shim_irq_number(void *irq);
/* The nth of the processors near the function handles it, unless the administrator says else. */
void shim_irq_prefer(void *irq, u32 nth);
/*
 * Lets a processor handle the interrupt of this number, if it is online and does not do so already.
 * May sleep.
 */
void shim_irq_bind(u32 number, u32 cpu);
/* One more than the highest number that a processor of this machine can have. */
u32 shim_cpus(void);
bool shim_cpu_online(u32 cpu);

/* ---- kernel.c: DMA ---- */

/* The bits of an address that the function can use. */
int shim_dma_mask(void *pci, u32 bits);
#define SHIM_IOMMU_NONE 0
#define SHIM_IOMMU_IDENTITY 1	/* there is one, which translates no addresses */
#define SHIM_IOMMU_TRANSLATES 2
/* What is between the function and memory, as long as a driver has the function. */
u32 shim_dma_iommu(void *pci);
/* Coherent zeroed memory, whole pages, contiguous for the device. NULL: there is none. Sleeps. */
void *shim_dma_alloc(void *pci, u64 bytes, u64 *address);
void shim_dma_free(void *pci, u64 bytes, void *memory, u64 address);
/* Waits until the IOMMU has done all that it was told about the function. */
void shim_dma_flush(void *pci);
/*
 * The same memory as one piece for the driver: `count` parts of shim_dma_alloc, of `bytes` each,
 * whole pages, in their order. NULL: there is no room. Sleeps.
 */
void *shim_dma_join(void *const *parts, u64 count, u64 bytes);
void shim_dma_part(void *joined);

/* ---- kernel.c: registers. The device sees a write after all earlier writes to memory. ---- */

u32 shim_read32(const void *place);
u64 shim_read64(const void *place);
void shim_write32(void *place, u32 value);
void shim_write64(void *place, u64 value);
void shim_port_write8(u16 port, u8 value);
/* Claims I/O ports for this driver. False: somebody else has one of them. */
bool shim_ports_claim(u16 first, u32 count);
void shim_ports_release(u16 first, u32 count);

/* ---- kernel.c: the hypervisor. There is none on other than x86. ---- */

/* Whether the administrator allows hypercalls (the module's parameter). */
bool shim_hypercalls(void);
bool shim_has_hypervisor(void);
/* Whether hypercalls are VMMCALL (processors compatible with AMD's) or VMCALL. */
bool shim_has_vmmcall(void);
/* eax, ebx, ecx and edx of a leaf. */
void shim_cpuid(u32 leaf, u32 *registers);
/* Model-specific registers. 0 or a negative errno if the processor refuses. */
int shim_msr_read(u32 msr, u64 *value);
int shim_msr_write(u32 msr, u64 value);

/* ---- kernel.c: time ---- */

/* Nanoseconds since the start, without the time of sleeps of the system. */
u64 shim_now(void);
/* Sleeps for this time, in microseconds. */
void shim_sleep(u32 least, u32 most);

/* ---- kernel.c: locks ---- */

/* A mutex; NULL: there is no memory. */
void *shim_mutex_new(void);
void shim_mutex_free(void *mutex);
void shim_mutex_lock(void *mutex);
void shim_mutex_unlock(void *mutex);

/*
 * A spin lock for any context, also where the kernel's own spin locks sleep. It is held with
 * interrupts off. NULL: there is no memory.
 */
void *shim_spin_new(void);
void shim_spin_free(void *lock);
/* Returns what unlock needs. */
unsigned long shim_spin_lock(void *lock);
void shim_spin_unlock(void *lock, unsigned long flags);

/* ---- kernel.c: delayed work, on the driver's own queue, in process context ---- */

/*
 * Runs `run` with `data` when asked. It returns the milliseconds after which it is to run again if
 * nobody has asked for that meanwhile; all ones: it is not. NULL: there is no memory.
 */
void *shim_work_new(u32 (*run)(void *data), void *data);
/* Cancels it and frees it. May sleep. Not from the work itself. */
void shim_work_free(void *work);
/* Runs it after this time, in place of the time set before. From any context. */
void shim_work_after(void *work, u32 milliseconds);
/* It does not run, and is not asked to run, when this returns. May sleep. */
void shim_work_cancel(void *work);

/* ---- kernel.c: timers, in hard interrupt context ---- */

/* Calls `run` with `data` when the time has come. NULL: there is no memory. */
void *shim_timer_new(void (*run)(void *data), void *data);
/* Returns when it does not run, and frees it. May sleep. Nobody starts it any more. */
void shim_timer_free(void *timer);
/* Runs it on this processor after this time, in place of the time set before. From any context. */
void shim_timer_after(void *timer, u64 nanoseconds);

#endif
