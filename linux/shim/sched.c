// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The hook in Linux's scheduler. sched.h says what each function does. */
#include <linux/cpumask.h>
#include <linux/err.h>
#include <linux/irq_work.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/clock.h>
#include <linux/sched/prio.h>
#include <linux/slab.h>
#include <linux/smp.h>
#include <linux/string.h>
#include <linux/tracepoint.h>
#include <linux/workqueue.h>

#include "sched.h"
#include "vbus.h"

static bool sched_sleeping;
module_param(sched_sleeping, bool, 0644);
MODULE_PARM_DESC(sched_sleeping,
		 "a CPU keeps the class of a real-time task that sleeps there, so that it wakes at once");

struct hook {
	void *data;
	struct tracepoint *point;
	bool started;
	struct irq_work soon;
	struct delayed_work renew;
};

static void describe(struct shim_task *out, const struct task_struct *task, unsigned int state)
{
	out->pid = task->pid;
	out->policy = task->policy;
	out->priority = task->rt_priority ? task->rt_priority : PRIO_TO_NICE(task->static_prio);
	out->cpu = task_cpu(task);
	out->kernel = task->flags & PF_KTHREAD;
	out->sleeps = state & (TASK_INTERRUPTIBLE | TASK_UNINTERRUPTIBLE);
}

static void notrace switched(void *data, bool preempt, struct task_struct *prev,
			     struct task_struct *next, unsigned int prev_state)
{
	struct shim_task from, to;

	describe(&from, prev, preempt ? TASK_RUNNING : prev_state);
	describe(&to, next, TASK_RUNNING);
	vbus_sched_switch(data, raw_smp_processor_id(), &from, &to);
}

static void soon(struct irq_work *work)
{
	struct hook *hook = container_of(work, struct hook, soon);

	queue_delayed_work(shim_queue, &hook->renew, 0);
}

static void renew(struct work_struct *work)
{
	struct hook *hook = container_of(to_delayed_work(work), struct hook, renew);
	u32 again = vbus_sched_renew(hook->data);

	if (again != U32_MAX)
		queue_delayed_work(shim_queue, &hook->renew, msecs_to_jiffies(again));
}

void *shim_sched_new(void *data)
{
	struct hook *hook = kzalloc(sizeof(*hook), GFP_KERNEL);

	if (!hook)
		return NULL;
	hook->data = data;
	init_irq_work(&hook->soon, soon);
	INIT_DELAYED_WORK(&hook->renew, renew);
	return hook;
}

static void find(struct tracepoint *point, void *found)
{
	if (!strcmp(point->name, "sched_switch"))
		*(struct tracepoint **)found = point;
}

int shim_sched_start(void *handle)
{
	struct hook *hook = handle;
	int error;

	for_each_kernel_tracepoint(find, &hook->point);
	if (!hook->point)
		return -EOPNOTSUPP;
	error = tracepoint_probe_register(hook->point, switched, hook->data);
	hook->started = !error;
	return error;
}

void shim_sched_free(void *handle)
{
	struct hook *hook = handle;

	if (hook->started) {
		tracepoint_probe_unregister(hook->point, switched, hook->data);
		tracepoint_synchronize_unregister();
	}
	irq_work_sync(&hook->soon);
	cancel_delayed_work_sync(&hook->renew);
	kfree(hook);
}

void shim_sched_renew_soon(void *hook)
{
	irq_work_queue(&((struct hook *)hook)->soon);
}

static void renew_here(void *data)
{
	vbus_sched_renew_on(data, raw_smp_processor_id());
}

void shim_sched_renew_on(void *hook, u32 cpu)
{
	smp_call_function_single(cpu, renew_here, ((struct hook *)hook)->data, 1);
}

bool shim_sched_task(u32 pid, struct shim_task *task)
{
	struct task_struct *found;

	rcu_read_lock();
	found = pid_task(find_pid_ns(pid, &init_pid_ns), PIDTYPE_PID);
	if (found)
		describe(task, found, READ_ONCE(found->__state));
	rcu_read_unlock();
	return found;
}

bool shim_sched_sleeping(void)
{
	return READ_ONCE(sched_sleeping);
}

u64 shim_sched_clock(void)
{
	return sched_clock();
}
