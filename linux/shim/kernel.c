// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * What Rust needs of the kernel and cannot call itself: inline functions, macros, and structs whose
 * size differs from kernel to kernel. vbus.h says what each function does.
 */
#include <linux/bug.h>
#include <linux/cc_platform.h>
#include <linux/cpumask.h>
#include <linux/delay.h>
#include <linux/dma-mapping.h>
#include <linux/hrtimer.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/iommu.h>
#include <linux/ioport.h>
#include <linux/irq.h>
#include <linux/ktime.h>
#include <linux/lockdep.h>
#include <linux/mm.h>
#include <linux/moduleparam.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/ratelimit.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/string.h>
#include <linux/version.h>
#include <linux/vmalloc.h>
#include <linux/workqueue.h>

#ifdef CONFIG_X86
#include <asm/cpufeature.h>
#include <asm/msr.h>
#include <asm/processor.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 16, 0)
#include <asm/cpuid/api.h>
#endif
#endif

#include "vbus.h"

void *shim_alloc(u64 bytes)
{
	return kvzalloc(bytes, GFP_KERNEL);
}

void shim_free(void *memory)
{
	kvfree(memory);
}

void shim_log(void *pci, int level, const char *text, u64 bytes)
{
	struct device *dev = &((struct pci_dev *)pci)->dev;
	int length = min_t(u64, bytes, 1024);

	switch (level) {
	case SHIM_ERROR:
		dev_err(dev, "%.*s\n", length, text);
		break;
	case SHIM_WARNING:
		dev_warn(dev, "%.*s\n", length, text);
		break;
	default:
		dev_info(dev, "%.*s\n", length, text);
	}
}

bool shim_may_log(void)
{
	static DEFINE_RATELIMIT_STATE(limit, DEFAULT_RATELIMIT_INTERVAL, DEFAULT_RATELIMIT_BURST);

	return __ratelimit(&limit);
}

void shim_panic(const char *text, u64 bytes)
{
	pr_emerg("vbus: bug in the driver: %.*s\n", (int)min_t(u64, bytes, 1024), text);
	BUG();
}

void shim_pci_get(void *pci)
{
	pci_dev_get(pci);
}

void shim_pci_put(void *pci)
{
	pci_dev_put(pci);
}

const char *shim_pci_name(void *pci)
{
	return pci_name(pci);
}

u32 shim_pci_config_read32(void *pci, u16 offset)
{
	u32 value = ~0u;

	if (pci_read_config_dword(pci, offset, &value))
		return ~0u;
	return value;
}

int shim_pci_enable(void *pci)
{
	return pci_enable_device_mem(pci);
}

void shim_pci_disable(void *pci)
{
	pci_disable_device(pci);
}

int shim_pci_claim(void *pci)
{
	return pci_request_region(pci, 0, "vbus");
}

void shim_pci_unclaim(void *pci)
{
	pci_release_region(pci, 0);
}

u64 shim_pci_bar_bytes(void *pci)
{
	return pci_resource_len((struct pci_dev *)pci, 0);
}

void *shim_pci_map(void *pci)
{
	return (__force void *)pci_ioremap_bar(pci, 0);
}

void shim_pci_unmap(void *bar)
{
	iounmap((__force void __iomem *)bar);
}

void shim_pci_set_master(void *pci)
{
	pci_set_master(pci);
}

void shim_pci_clear_master(void *pci)
{
	pci_clear_master(pci);
}

void shim_pci_save(void *pci)
{
	pci_save_state(pci);
}

void shim_pci_restore(void *pci)
{
	pci_restore_state(pci);
	/* The kept state is for one restore, and there may be more of them. */
	pci_save_state(pci);
}

u32 shim_pci_msix_vectors(void *pci)
{
	int vectors = pci_msix_vec_count(pci);

	return vectors > 0 ? vectors : 0;
}

int shim_pci_vectors(void *pci, u32 most, u32 kinds)
{
	unsigned int flags = 0;

	/* The kernel's names differ between versions; bit 0 is INTx in all of them. */
	if (kinds & SHIM_INTX)
		flags |= 1;
	if (kinds & SHIM_MSI)
		flags |= PCI_IRQ_MSI;
	if (kinds & SHIM_MSIX)
		flags |= PCI_IRQ_MSIX;
	return pci_alloc_irq_vectors(pci, 1, most, flags);
}

void shim_pci_free_vectors(void *pci)
{
	pci_free_irq_vectors(pci);
}

int shim_pci_vector(void *pci, u32 index)
{
	return pci_irq_vector(pci, index);
}

struct shim_irq {
	bool (*handler)(void *data);
	void *data;
	struct pci_dev *pci;
	u32 number;
	char name[32];
};

static irqreturn_t shim_irq_handler(int number, void *irq)
{
	struct shim_irq *shim = irq;

	return shim->handler(shim->data) ? IRQ_HANDLED : IRQ_NONE;
}

void *shim_irq_request(void *pci, u32 number, u32 traits, const char *name, u64 name_bytes,
		       bool (*handler)(void *data), void *data, int *error)
{
	struct shim_irq *irq = kzalloc(sizeof(*irq), GFP_KERNEL);
	unsigned long flags = 0;

	*error = -ENOMEM;
	if (!irq)
		return NULL;
	if (traits & SHIM_IRQ_SHARED)
		flags |= IRQF_SHARED;
	if (traits & SHIM_IRQ_PASSES_ON)
		flags |= IRQF_NO_THREAD;
	if (traits & SHIM_IRQ_BOUND)
		flags |= IRQF_NOBALANCING;
	irq->handler = handler;
	irq->data = data;
	irq->pci = pci;
	irq->number = number;
	memcpy(irq->name, name, min_t(u64, name_bytes, sizeof(irq->name) - 1));
	/* It becomes the name of a folder in /proc/irq, and a device may have any name. */
	strreplace(irq->name, '/', '!');
	*error = request_irq(number, shim_irq_handler, flags, irq->name, irq);
	if (*error) {
		kfree(irq);
		return NULL;
	}
	return irq;
}

void shim_irq_free(void *irq)
{
	/* The kernel complains of a preference that stays. */
	irq_update_affinity_hint(((struct shim_irq *)irq)->number, NULL);
	free_irq(((struct shim_irq *)irq)->number, irq);
	kfree(irq);
}

u32 shim_irq_number(void *irq)
{
	return ((struct shim_irq *)irq)->number;
}

void shim_irq_prefer(void *irq, u32 nth)
{
	struct shim_irq *shim = irq;
	int cpu = cpumask_local_spread(nth, dev_to_node(&shim->pci->dev));

	/* Without this preference all is as before, only slower. */
	(void)irq_set_affinity_and_hint(shim->number, cpumask_of(cpu));
}

void shim_irq_bind(u32 number, u32 cpu)
{
	const struct cpumask *now = irq_get_effective_affinity_mask(number);

	if (!shim_cpu_online(cpu) || (now && cpumask_equal(now, cpumask_of(cpu))))
		return;
	/* Without this all is as before, only on another processor. */
	(void)irq_set_affinity_and_hint(number, cpumask_of(cpu));
}

u32 shim_cpus(void)
{
	return nr_cpu_ids;
}

bool shim_cpu_online(u32 cpu)
{
	return cpu < nr_cpu_ids && cpu_online(cpu);
}

int shim_dma_mask(void *pci, u32 bits)
{
	return dma_set_mask_and_coherent(&((struct pci_dev *)pci)->dev, DMA_BIT_MASK(bits));
}

u32 shim_dma_iommu(void *pci)
{
#ifdef CONFIG_IOMMU_API
	const struct iommu_domain *domain = iommu_get_domain_for_dev(&((struct pci_dev *)pci)->dev);

	if (domain)
		return domain->type == IOMMU_DOMAIN_IDENTITY ? SHIM_IOMMU_IDENTITY :
							       SHIM_IOMMU_TRANSLATES;
#endif
	return SHIM_IOMMU_NONE;
}

void *shim_dma_alloc(void *pci, u64 bytes, u64 *address)
{
	struct device *dev = &((struct pci_dev *)pci)->dev;
	dma_addr_t dma = 0;
	/*
	 * Behind an IOMMU pages from anywhere are contiguous for the device too. But in one piece
	 * they need fewer entries of its tables, and of the processor's.
	 */
	void *memory = dma_alloc_attrs(dev, bytes, &dma, GFP_KERNEL | __GFP_NOWARN | __GFP_NORETRY,
				       DMA_ATTR_FORCE_CONTIGUOUS);

	if (!memory)
		memory = dma_alloc_coherent(dev, bytes, &dma, GFP_KERNEL | __GFP_NOWARN);
	*address = dma;
	return memory;
}

void shim_dma_free(void *pci, u64 bytes, void *memory, u64 address)
{
	dma_free_coherent(&((struct pci_dev *)pci)->dev, bytes, memory, address);
}

void shim_dma_flush(void *pci)
{
#ifdef CONFIG_IOMMU_API
	struct iommu_domain *domain = iommu_get_domain_for_dev(&((struct pci_dev *)pci)->dev);

	if (domain && domain->type == IOMMU_DOMAIN_DMA_FQ)
		iommu_flush_iotlb_all(domain);
#endif
}

void *shim_dma_join(void *const *parts, u64 count, u64 bytes)
{
	const u64 each = bytes >> PAGE_SHIFT;
	pgprot_t prot = PAGE_KERNEL;
	struct page **pages;
	void *joined;
	u64 page;

	pages = kvmalloc_array(count * each, sizeof(*pages), GFP_KERNEL);
	if (!pages)
		return NULL;
	for (page = 0; page < count * each; page++) {
		void *place = parts[page / each] + (page % each << PAGE_SHIFT);

		pages[page] = is_vmalloc_addr(place) ? vmalloc_to_page(place) : virt_to_page(place);
	}
	if (cc_platform_has(CC_ATTR_MEM_ENCRYPT))
		prot = pgprot_decrypted(prot);
	joined = vmap(pages, count * each, VM_MAP, prot);
	kvfree(pages);
	return joined;
}

void shim_dma_part(void *joined)
{
	vunmap(joined);
}

u32 shim_read32(const void *place)
{
	return readl((const void __iomem __force *)place);
}

u64 shim_read64(const void *place)
{
	return readq((const void __iomem __force *)place);
}

void shim_write32(void *place, u32 value)
{
	writel(value, (void __iomem __force *)place);
}

void shim_write64(void *place, u64 value)
{
	writeq(value, (void __iomem __force *)place);
}

void shim_port_write8(u16 port, u8 value)
{
	outb(value, port);
}

bool shim_ports_claim(u16 first, u32 count)
{
	return request_region(first, count, "vbus");
}

void shim_ports_release(u16 first, u32 count)
{
	release_region(first, count);
}

static bool hypercalls;
module_param(hypercalls, bool, 0444);
MODULE_PARM_DESC(hypercalls,
		 "ring doorbells by hypercalls if that is the cheapest; KVM's own hypercalls then fail");

bool shim_hypercalls(void)
{
	return hypercalls;
}

#ifdef CONFIG_X86

bool shim_has_hypervisor(void)
{
	return boot_cpu_has(X86_FEATURE_HYPERVISOR);
}

bool shim_has_vmmcall(void)
{
	return boot_cpu_has(X86_FEATURE_VMMCALL);
}

void shim_cpuid(u32 leaf, u32 *registers)
{
	cpuid(leaf, &registers[0], &registers[1], &registers[2], &registers[3]);
}

int shim_msr_read(u32 msr, u64 *value)
{
	u32 low = 0, high = 0;
	int error = rdmsr_safe(msr, &low, &high);

	*value = (u64)high << 32 | low;
	return error;
}

int shim_msr_write(u32 msr, u64 value)
{
	return wrmsr_safe(msr, (u32)value, (u32)(value >> 32));
}

#else

bool shim_has_hypervisor(void)
{
	return false;
}

bool shim_has_vmmcall(void)
{
	return false;
}

void shim_cpuid(u32 leaf, u32 *registers)
{
	memset(registers, 0, 4 * sizeof(*registers));
}

int shim_msr_read(u32 msr, u64 *value)
{
	*value = 0;
	return -ENODEV;
}

int shim_msr_write(u32 msr, u64 value)
{
	return -ENODEV;
}

#endif

u64 shim_now(void)
{
	return ktime_get_ns();
}

void shim_sleep(u32 least, u32 most)
{
	usleep_range(least, most);
}

/*
 * Each lock is a class of its own for lockdep. The locks of one place in this file would otherwise
 * be one class, whatever Rust does with them.
 */
struct shim_mutex {
	struct mutex mutex;
	struct lock_class_key key;
};

void *shim_mutex_new(void)
{
	struct shim_mutex *shim = kzalloc(sizeof(*shim), GFP_KERNEL);

	if (!shim)
		return NULL;
	lockdep_register_key(&shim->key);
	mutex_init(&shim->mutex);
	lockdep_set_class(&shim->mutex, &shim->key);
	return shim;
}

void shim_mutex_free(void *mutex)
{
	struct shim_mutex *shim = mutex;

	mutex_destroy(&shim->mutex);
	lockdep_unregister_key(&shim->key);
	kfree(shim);
}

void shim_mutex_lock(void *mutex)
{
	mutex_lock(&((struct shim_mutex *)mutex)->mutex);
}

void shim_mutex_unlock(void *mutex)
{
	mutex_unlock(&((struct shim_mutex *)mutex)->mutex);
}

struct shim_spin {
	raw_spinlock_t lock;
	struct lock_class_key key;
};

void *shim_spin_new(void)
{
	struct shim_spin *shim = kzalloc(sizeof(*shim), GFP_KERNEL);

	if (!shim)
		return NULL;
	lockdep_register_key(&shim->key);
	raw_spin_lock_init(&shim->lock);
	lockdep_set_class(&shim->lock, &shim->key);
	return shim;
}

void shim_spin_free(void *lock)
{
	struct shim_spin *shim = lock;

	lockdep_unregister_key(&shim->key);
	kfree(shim);
}

unsigned long shim_spin_lock(void *lock)
{
	unsigned long flags;

	raw_spin_lock_irqsave(&((struct shim_spin *)lock)->lock, flags);
	return flags;
}

void shim_spin_unlock(void *lock, unsigned long flags)
{
	raw_spin_unlock_irqrestore(&((struct shim_spin *)lock)->lock, flags);
}

struct shim_work {
	struct delayed_work work;
	u32 (*run)(void *data);
	void *data;
};

static void shim_work_run(struct work_struct *work)
{
	struct shim_work *shim = container_of(to_delayed_work(work), struct shim_work, work);
	u32 again = shim->run(shim->data);

	/* This does nothing if the work is asked for already, or is being cancelled. */
	if (again != U32_MAX)
		queue_delayed_work(shim_queue, &shim->work, msecs_to_jiffies(again));
}

void *shim_work_new(u32 (*run)(void *data), void *data)
{
	struct shim_work *shim = kzalloc(sizeof(*shim), GFP_KERNEL);

	if (!shim)
		return NULL;
	shim->run = run;
	shim->data = data;
	INIT_DELAYED_WORK(&shim->work, shim_work_run);
	return shim;
}

void shim_work_free(void *work)
{
	cancel_delayed_work_sync(&((struct shim_work *)work)->work);
	kfree(work);
}

void shim_work_after(void *work, u32 milliseconds)
{
	mod_delayed_work(shim_queue, &((struct shim_work *)work)->work,
			 msecs_to_jiffies(milliseconds));
}

void shim_work_cancel(void *work)
{
	cancel_delayed_work_sync(&((struct shim_work *)work)->work);
}

struct shim_timer {
	struct hrtimer timer;
	void (*run)(void *data);
	void *data;
};

static enum hrtimer_restart shim_timer_runs(struct hrtimer *timer)
{
	struct shim_timer *shim = container_of(timer, struct shim_timer, timer);

	shim->run(shim->data);
	return HRTIMER_NORESTART;
}

void *shim_timer_new(void (*run)(void *data), void *data)
{
	struct shim_timer *shim = kzalloc(sizeof(*shim), GFP_KERNEL);

	if (!shim)
		return NULL;
	shim->run = run;
	shim->data = data;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	hrtimer_setup(&shim->timer, shim_timer_runs, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
#else
	hrtimer_init(&shim->timer, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED_HARD);
	shim->timer.function = shim_timer_runs;
#endif
	return shim;
}

void shim_timer_free(void *timer)
{
	hrtimer_cancel(&((struct shim_timer *)timer)->timer);
	kfree(timer);
}

void shim_timer_after(void *timer, u64 nanoseconds)
{
	hrtimer_start(&((struct shim_timer *)timer)->timer, ns_to_ktime(nanoseconds),
		      HRTIMER_MODE_REL_PINNED_HARD);
}
