/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* The interface of sched.c, the hook in the scheduler. src/sched/ffi.rs declares it for Rust. */
#ifndef VBUS_SCHED_H
#define VBUS_SCHED_H

#include <linux/types.h>

/* A task, as the scheduler sees it. */
struct shim_task {
	/* 0: the task that runs when there is no other. */
	u32 pid;
	/* SCHED_NORMAL and so on. */
	u32 policy;
	/* Of real-time tasks 1 to 99; of others the nice value. */
	s32 priority;
	/* The CPU on which it runs, or ran last. */
	u32 cpu;
	/* A thread of the kernel. */
	bool kernel;
	/* It waits for something: it is neither running nor ready, and has not ended. */
	bool sleeps;
};

/* ---- Rust, called by sched.c ---- */

/*
 * CPU `cpu`, which runs this, goes from one task to the next. Interrupts are off, and the
 * scheduler holds its lock: nothing may sleep, wake anything or lock anything.
 */
void vbus_sched_switch(void *data, u32 cpu, const struct shim_task *from,
		       const struct shim_task *to);
/* In a thread that may sleep. The milliseconds until the next call; all ones: there is none. */
u32 vbus_sched_renew(void *data);
/* On CPU `cpu`, with interrupts off. */
void vbus_sched_renew_on(void *data, u32 cpu);

/* ---- sched.c, called by Rust ---- */

/* A hook that does nothing yet. NULL: there is no memory. */
void *shim_sched_new(void *data);
/* From now on each switch of each CPU calls vbus_sched_switch. 0 or a negative errno. */
int shim_sched_start(void *hook);
/* Nothing calls Rust with `data` any more when this returns. May sleep. */
void shim_sched_free(void *hook);
/* Has vbus_sched_renew called soon. From any context, vbus_sched_switch included. */
void shim_sched_renew_soon(void *hook);
/* Calls vbus_sched_renew_on on CPU `cpu`, and waits for it. Nothing if the CPU is off. */
void shim_sched_renew_on(void *hook, u32 cpu);
/* Looks for the task with this id. False: there is none. From any context. */
bool shim_sched_task(u32 pid, struct shim_task *task);
/* Whether a CPU keeps the class of real-time tasks that sleep: the module's parameter. */
bool shim_sched_sleeping(void);
/* Nanoseconds of this CPU's clock. From any context. */
u64 shim_sched_clock(void);

#endif
