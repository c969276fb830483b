// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * An interrupt controller of the bus as one of Linux's: its lines are interrupts with numbers of
 * their own, in a domain. What happens to a line is decided in Rust (src/pic).
 */
#include <linux/cpumask.h>
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/irqdesc.h>
#include <linux/irqdomain.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/slab.h>
#include <linux/version.h>

#include "pic.h"

static DEFINE_MUTEX(sources);

void shim_sources_lock(void)
{
	mutex_lock(&sources);
}

void shim_sources_unlock(void)
{
	mutex_unlock(&sources);
}

struct pic {
	struct fwnode_handle *node;
	struct irq_domain *domain;
	void *data;
};

static void line_ack(struct irq_data *data)
{
	/* The line was taken from its page before the kernel heard of it. */
}

static void line_mask(struct irq_data *data)
{
	struct pic *pic = irq_data_get_irq_chip_data(data);

	vbus_pic_mask(pic->data, irqd_to_hwirq(data), true);
}

static void line_unmask(struct irq_data *data)
{
	struct pic *pic = irq_data_get_irq_chip_data(data);

	vbus_pic_mask(pic->data, irqd_to_hwirq(data), false);
}

static int line_set_affinity(struct irq_data *data, const struct cpumask *mask, bool force)
{
	struct pic *pic = irq_data_get_irq_chip_data(data);
	int cpu = vbus_pic_affinity(pic->data, irqd_to_hwirq(data), mask);

	if (cpu < 0)
		return cpu;
	irq_data_update_effective_affinity(data, cpumask_of(cpu));
	return IRQ_SET_MASK_OK;
}

static struct irq_chip chip = {
	.name = "vbus-pic",
	.irq_ack = line_ack,
	.irq_mask = line_mask,
	.irq_unmask = line_unmask,
	.irq_set_affinity = line_set_affinity,
	.flags = IRQCHIP_SKIP_SET_WAKE,
};

static int map(struct irq_domain *domain, unsigned int number, irq_hw_number_t line)
{
	irq_set_chip_data(number, domain->host_data);
	irq_set_chip_and_handler_name(number, &chip, handle_edge_irq, "edge");
	irq_set_noprobe(number);
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 14, 0)
	/* A line moves at once. Later kernels take that for granted. */
	irq_set_status_flags(number, IRQ_MOVE_PCNTXT);
#endif
	return 0;
}

static const struct irq_domain_ops operations = { .map = map };

void *shim_pic_new(void *pci, u32 lines, void *data)
{
	struct pic *pic = kzalloc(sizeof(*pic), GFP_KERNEL);

	if (!pic)
		return NULL;
	pic->data = data;
	pic->node = irq_domain_alloc_named_fwnode(pci_name(pci));
	if (!pic->node)
		goto no_node;
	pic->domain = irq_domain_create_linear(pic->node, lines, &operations, pic);
	if (!pic->domain)
		goto no_domain;
	return pic;

no_domain:
	irq_domain_free_fwnode(pic->node);
no_node:
	kfree(pic);
	return NULL;
}

void shim_pic_free(void *handle)
{
	struct pic *pic = handle;

	irq_domain_remove(pic->domain);
	irq_domain_free_fwnode(pic->node);
	kfree(pic);
}

u32 shim_pic_map(void *pic, u32 line)
{
	return irq_create_mapping(((struct pic *)pic)->domain, line);
}

void shim_pic_unmap(u32 number)
{
	irq_dispose_mapping(number);
}

bool shim_pic_handle(void *pic, u32 line)
{
	return !generic_handle_domain_irq_safe(((struct pic *)pic)->domain, line);
}

bool shim_mask_has(const void *mask, u32 cpu)
{
	return cpu < nr_cpu_ids && cpu_online(cpu) && cpumask_test_cpu(cpu, mask);
}
