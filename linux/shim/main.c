// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The module and its PCI driver. What happens to a function is decided in Rust (src/device.rs). */
#include <linux/device.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/pm.h>
#include <linux/reboot.h>
#include <linux/sysfs.h>
#include <linux/workqueue.h>

#include "state.h"
#include "vbus.h"

struct workqueue_struct *shim_queue;

static ssize_t show(struct device *dev, unsigned int which, char *text)
{
	void *device = dev_get_drvdata(dev);

	return device ? vbus_show(device, which, text, PAGE_SIZE) : -ENODEV;
}

SHIM_ATTRIBUTE(class, VBUS_SHOW_CLASS);
SHIM_ATTRIBUTE(name, VBUS_SHOW_NAME);
SHIM_ATTRIBUTE(doorbell, VBUS_SHOW_DOORBELL);
SHIM_ATTRIBUTE(costs, VBUS_SHOW_COSTS);
SHIM_ATTRIBUTE(incarnation, VBUS_SHOW_INCARNATION);
SHIM_ATTRIBUTE(interrupts, VBUS_SHOW_INTERRUPTS);

static struct attribute *attributes[] = {
	&dev_attr_class.attr,	    &dev_attr_name.attr,       &dev_attr_doorbell.attr,
	&dev_attr_costs.attr,	    &dev_attr_incarnation.attr, &dev_attr_interrupts.attr,
	NULL,
};

/* PCI functions have attributes of their own with some of these names. So these are in a folder. */
static const struct attribute_group group = { .name = "vbus", .attrs = attributes };
static const struct attribute_group *groups[] = { &group, NULL };

static int probe(struct pci_dev *pci, const struct pci_device_id *id)
{
	void *device = NULL;
	int error = vbus_probe(pci, &device);

	if (!error)
		pci_set_drvdata(pci, device);
	return error;
}

static void remove(struct pci_dev *pci)
{
	void *device = pci_get_drvdata(pci);

	pci_set_drvdata(pci, NULL);
	vbus_remove(device);
}

static void shutdown(struct pci_dev *pci)
{
	vbus_shutdown(pci_get_drvdata(pci));
}

static int __maybe_unused suspend(struct device *dev)
{
	vbus_suspend(dev_get_drvdata(dev));
	return 0;
}

static int __maybe_unused resume(struct device *dev)
{
	vbus_resume(dev_get_drvdata(dev));
	return 0;
}

static SIMPLE_DEV_PM_OPS(pm, suspend, resume);

static void reset_prepare(struct pci_dev *pci)
{
	vbus_suspend(pci_get_drvdata(pci));
}

static void reset_done(struct pci_dev *pci)
{
	vbus_resume(pci_get_drvdata(pci));
}

static const struct pci_error_handlers errors = {
	.reset_prepare = reset_prepare,
	.reset_done = reset_done,
};

/* The ids of this implementation. A function with other ids may be bound by hand (new_id). */
static const struct pci_device_id ids[] = {
	{ PCI_DEVICE(0x1af4, 0x10f5) },
	{},
};
MODULE_DEVICE_TABLE(pci, ids);

static struct pci_driver driver = {
	.name = "vbus",
	.id_table = ids,
	.probe = probe,
	.remove = remove,
	.shutdown = shutdown,
	.driver.pm = &pm,
	.err_handler = &errors,
	.dev_groups = groups,
};

static bool goes_down;

bool shim_goes_down(void)
{
	return READ_ONCE(goes_down);
}

/*
 * The kernel is about to shut the devices down, in an order of its own. An IOMMU that is a device
 * itself may come first, and a request to it that is under way then is waited for without an end
 * and with interrupts off (virtio-iommu in newer kernels). So the driver is done before, where an
 * IOMMU translates. Elsewhere the network may still be needed, for a disk that it carries.
 */
static int going_down(struct notifier_block *block, unsigned long action, void *data)
{
	struct device *dev, *next;

	WRITE_ONCE(goes_down, true);
	/*
	 * Not by driver_for_each_device: whoever takes a function from the driver has its lock, and
	 * waits until nobody has stopped at it on the way through the list.
	 */
	for (dev = driver_find_next_device(&driver.driver, NULL); dev; dev = next) {
		device_lock(dev);
		if (dev->driver == &driver.driver) {
			if (shim_dma_iommu(to_pci_dev(dev)) == SHIM_IOMMU_TRANSLATES) {
				vbus_shutdown(dev_get_drvdata(dev));
				shim_dma_flush(to_pci_dev(dev));
			}
			next = driver_find_next_device(&driver.driver, dev);
		} else {
			/* It has left the driver meanwhile, and the list. */
			next = driver_find_next_device(&driver.driver, NULL);
		}
		device_unlock(dev);
		put_device(dev);
	}
	return NOTIFY_OK;
}

static struct notifier_block reboot = {
	.notifier_call = going_down,
};

static int __init start(void)
{
	int error;

	shim_queue = alloc_workqueue("vbus", WQ_UNBOUND | WQ_FREEZABLE, 0);
	if (!shim_queue)
		return -ENOMEM;
	error = shim_state_start();
	if (error)
		goto no_state;
	error = pci_register_driver(&driver);
	if (error)
		goto no_driver;
	error = register_reboot_notifier(&reboot);
	if (error)
		goto no_notifier;
	return 0;

no_notifier:
	pci_unregister_driver(&driver);
no_driver:
	shim_state_end();
no_state:
	destroy_workqueue(shim_queue);
	return error;
}

static void __exit end(void)
{
	unregister_reboot_notifier(&reboot);
	pci_unregister_driver(&driver);
	shim_state_end();
	destroy_workqueue(shim_queue);
}

module_init(start);
module_exit(end);

MODULE_AUTHOR("The authors of vbus");
MODULE_DESCRIPTION("Driver of vbus, a bus of virtual devices");
MODULE_LICENSE("Dual MIT/GPL");
MODULE_VERSION(VBUS_VERSION);
