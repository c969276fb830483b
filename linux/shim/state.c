// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* State pages as character devices. state.h says what each function does. */
#include <linux/cc_platform.h>
#include <linux/cdev.h>
#include <linux/completion.h>
#include <linux/device.h>
#include <linux/fs.h>
#include <linux/idr.h>
#include <linux/list.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/poll.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#include "state.h"
#include "vbus.h"

/* As many nodes as there can be. */
#define NODES (1U << MINORBITS)

static dev_t first;
static DEFINE_IDA(minors);
/* Whoever looks for a folder and makes one holds it. */
static DEFINE_MUTEX(folders);

/*
 * Somebody else may hold a device of the class after the driver has let it go, and then its release
 * function runs late. This counts the devices that are not released yet, and the module itself.
 */
static atomic_t unreleased = ATOMIC_INIT(1);
static DECLARE_COMPLETION(all_released);

static void count_release(void)
{
	if (atomic_dec_and_test(&unreleased))
		complete(&all_released);
}

struct node {
	struct device dev;
	struct cdev cdev;
	wait_queue_head_t queue;
	/* The openings, for shim_node_unmap. */
	struct mutex lock;
	struct list_head openings;
	umode_t mode;
	void *page;
};

struct opening {
	struct list_head list;
	struct file *file;
	struct node *node;
	void *rust;
};

static struct node *node_of(const struct device *dev)
{
	return container_of(dev, struct node, dev);
}

static ssize_t show(struct device *dev, unsigned int which, char *text)
{
	return vbus_state_show(node_of(dev)->page, which, text, PAGE_SIZE);
}

SHIM_ATTRIBUTE(owner, SHIM_STATE_OWNER);
SHIM_ATTRIBUTE(bytes, SHIM_STATE_BYTES);
SHIM_ATTRIBUTE(number, SHIM_STATE_NUMBER);
SHIM_ATTRIBUTE(page, SHIM_STATE_PAGE);

static struct attribute *node_attrs[] = {
	&dev_attr_owner.attr, &dev_attr_bytes.attr, &dev_attr_number.attr, &dev_attr_page.attr, NULL,
};
ATTRIBUTE_GROUPS(node);

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
static char *devnode(const struct device *dev, umode_t *mode)
#else
static char *devnode(struct device *dev, umode_t *mode)
#endif
{
	char *path;

	/* A folder has no node of its own. */
	if (!MAJOR(dev->devt))
		return NULL;
	if (mode)
		*mode = node_of(dev)->mode;
	/* A '!' in the name of a device stands for a '/'. */
	path = kasprintf(GFP_KERNEL, "vbus/%s", dev_name(dev));
	if (path)
		strreplace(path, '!', '/');
	return path;
}

/* Allocated: the kernel may look at it after the module has gone. */
static struct class *class;

static int node_open(struct inode *inode, struct file *file)
{
	struct node *node = container_of(inode->i_cdev, struct node, cdev);
	struct opening *opening = kzalloc(sizeof(*opening), GFP_KERNEL);
	int error;

	if (!opening)
		return -ENOMEM;
	error = vbus_state_open(node->page, node, file->f_mode & FMODE_WRITE, &opening->rust);
	if (error) {
		kfree(opening);
		return error;
	}
	opening->file = file;
	opening->node = node;
	file->private_data = opening;
	mutex_lock(&node->lock);
	list_add(&opening->list, &node->openings);
	mutex_unlock(&node->lock);
	return 0;
}

static int node_release(struct inode *inode, struct file *file)
{
	struct opening *opening = file->private_data;

	mutex_lock(&opening->node->lock);
	list_del(&opening->list);
	mutex_unlock(&opening->node->lock);
	vbus_state_release(opening->rust);
	kfree(opening);
	return 0;
}

static ssize_t node_read(struct file *file, char __user *user, size_t bytes, loff_t *offset)
{
	struct opening *opening = file->private_data;
	long copied = vbus_state_read(opening->rust, (void __force *)user, bytes, *offset);

	if (copied > 0)
		*offset += copied;
	return copied;
}

static ssize_t node_write(struct file *file, const char __user *user, size_t bytes, loff_t *offset)
{
	struct opening *opening = file->private_data;
	long copied = vbus_state_write(opening->rust, (const void __force *)user, bytes, *offset);

	if (copied > 0)
		*offset += copied;
	return copied;
}

static loff_t node_llseek(struct file *file, loff_t offset, int whence)
{
	struct opening *opening = file->private_data;

	return fixed_size_llseek(file, offset, whence, vbus_state_bytes(opening->rust));
}

static __poll_t node_poll(struct file *file, poll_table *table)
{
	struct opening *opening = file->private_data;
	__poll_t mask = 0;
	u32 ready;

	poll_wait(file, &opening->node->queue, table);
	ready = vbus_state_poll(opening->rust);
	if (ready & SHIM_POLL_IN)
		mask |= EPOLLIN | EPOLLRDNORM;
	if (ready & SHIM_POLL_OUT)
		mask |= EPOLLOUT | EPOLLWRNORM;
	if (ready & SHIM_POLL_GONE)
		mask |= EPOLLERR | EPOLLHUP;
	return mask;
}

static int node_fsync(struct file *file, loff_t start, loff_t end, int datasync)
{
	return vbus_state_sync(((struct opening *)file->private_data)->rust);
}

static void *rust_of(struct vm_area_struct *vma)
{
	return ((struct opening *)vma->vm_file->private_data)->rust;
}

static void mapping_open(struct vm_area_struct *vma)
{
	if (vma->vm_flags & VM_MAYWRITE)
		vbus_state_mapped(rust_of(vma), true);
}

static void mapping_close(struct vm_area_struct *vma)
{
	if (vma->vm_flags & VM_MAYWRITE)
		vbus_state_mapped(rust_of(vma), false);
}

static vm_fault_t mapping_fault(struct vm_fault *fault)
{
	u32 result = vbus_state_fault(rust_of(fault->vma), fault->pgoff, fault);

	return result == U32_MAX ? VM_FAULT_SIGBUS : (__force vm_fault_t)result;
}

static const struct vm_operations_struct mapping_ops = {
	.open = mapping_open,
	.close = mapping_close,
	.fault = mapping_fault,
};

static int node_mmap(struct file *file, struct vm_area_struct *vma)
{
	const unsigned long set = VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP;
	bool writable = vma->vm_flags & VM_WRITE;
	int error;

	/* A private copy would not change with the page. */
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	error = vbus_state_map(((struct opening *)file->private_data)->rust, vma->vm_pgoff,
			       vma_pages(vma), writable);
	if (error)
		return error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	vm_flags_mod(vma, set, writable ? 0 : VM_MAYWRITE);
#else
	vma->vm_flags |= set;
	if (!writable)
		vma->vm_flags &= ~VM_MAYWRITE;
#endif
	vma->vm_ops = &mapping_ops;
	mapping_open(vma);
	return 0;
}

static const struct file_operations node_fops = {
	.owner = THIS_MODULE,
	.open = node_open,
	.release = node_release,
	.read = node_read,
	.write = node_write,
	.llseek = node_llseek,
	.poll = node_poll,
	.mmap = node_mmap,
	.fsync = node_fsync,
};

static void folder_release(struct device *dev)
{
	kfree(dev);
	count_release();
}

void *shim_folder_new(void *pci, const char *name, u64 bytes, int *error)
{
	struct device *dev = kzalloc(sizeof(*dev), GFP_KERNEL);
	struct device *other;

	*error = -ENOMEM;
	if (!dev)
		return NULL;
	atomic_inc(&unreleased);
	device_initialize(dev);
	dev->class = class;
	dev->parent = &((struct pci_dev *)pci)->dev;
	dev->release = folder_release;
	mutex_lock(&folders);
	*error = dev_set_name(dev, "%.*s", (int)bytes, name);
	if (!*error) {
		other = class_find_device_by_name(class, dev_name(dev));
		if (other) {
			put_device(other);
			*error = -EEXIST;
		} else {
			*error = device_add(dev);
		}
	}
	mutex_unlock(&folders);
	if (*error) {
		put_device(dev);
		return NULL;
	}
	return dev;
}

void shim_folder_free(void *folder)
{
	device_unregister(folder);
}

static void node_release_dev(struct device *dev)
{
	struct node *node = node_of(dev);

	if (node->page)
		vbus_state_free(node->page);
	ida_free(&minors, MINOR(dev->devt));
	mutex_destroy(&node->lock);
	kfree(node);
	count_release();
}

void *shim_node_new(void *folder, const char *name, u64 bytes, unsigned int mode, void *page,
		    int *error)
{
	struct node *node = kzalloc(sizeof(*node), GFP_KERNEL);
	int minor;

	*error = -ENOMEM;
	if (!node)
		return NULL;
	minor = ida_alloc_max(&minors, NODES - 1, GFP_KERNEL);
	if (minor < 0) {
		*error = minor;
		kfree(node);
		return NULL;
	}
	init_waitqueue_head(&node->queue);
	mutex_init(&node->lock);
	INIT_LIST_HEAD(&node->openings);
	node->mode = mode;
	node->page = page;
	atomic_inc(&unreleased);
	device_initialize(&node->dev);
	node->dev.class = class;
	node->dev.parent = folder;
	node->dev.groups = node_groups;
	node->dev.devt = MKDEV(MAJOR(first), minor);
	node->dev.release = node_release_dev;
	cdev_init(&node->cdev, &node_fops);
	node->cdev.owner = THIS_MODULE;
	*error = dev_set_name(&node->dev, "%s!%.*s", dev_name(folder), (int)bytes, name);
	if (!*error)
		*error = cdev_device_add(&node->cdev, &node->dev);
	if (*error) {
		/* The page stays the caller's. */
		node->page = NULL;
		put_device(&node->dev);
		return NULL;
	}
	return node;
}

void shim_node_free(void *handle)
{
	struct node *node = handle;

	cdev_device_del(&node->cdev, &node->dev);
	put_device(&node->dev);
}

void shim_node_wake(void *node)
{
	wake_up_interruptible_poll(&((struct node *)node)->queue, EPOLLIN | EPOLLOUT | EPOLLERR |
				   EPOLLHUP | EPOLLRDNORM | EPOLLWRNORM);
}

void shim_node_unmap(void *handle)
{
	struct node *node = handle;
	struct opening *opening;

	mutex_lock(&node->lock);
	list_for_each_entry(opening, &node->openings, list)
		unmap_mapping_range(opening->file->f_mapping, 0, 0, 1);
	mutex_unlock(&node->lock);
}

int shim_copy_to_user(void *user, const void *from, u64 bytes)
{
	return copy_to_user((void __user __force *)user, from, bytes) ? -EFAULT : 0;
}

int shim_copy_from_user(void *to, const void *user, u64 bytes)
{
	return copy_from_user(to, (const void __user __force *)user, bytes) ? -EFAULT : 0;
}

u32 shim_fault_insert(void *handle, const void *place, bool shared)
{
	struct vm_fault *fault = handle;
	pgprot_t prot = fault->vma->vm_page_prot;
	unsigned long pfn = is_vmalloc_addr(place) ? vmalloc_to_pfn(place) :
						      virt_to_phys((void *)place) >> PAGE_SHIFT;

	if (shared && cc_platform_has(CC_ATTR_MEM_ENCRYPT))
		prot = pgprot_decrypted(prot);
	return (__force u32)vmf_insert_pfn_prot(fault->vma, fault->address, pfn, prot);
}

void *shim_pages_new(u64 bytes)
{
	return vzalloc(bytes);
}

void shim_pages_free(void *memory)
{
	vfree(memory);
}

int shim_state_start(void)
{
	int error = alloc_chrdev_region(&first, 0, NODES, "vbus-state");

	if (error)
		return error;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
	class = class_create("vbus-state");
#else
	class = class_create(THIS_MODULE, "vbus-state");
#endif
	if (IS_ERR(class)) {
		unregister_chrdev_region(first, NODES);
		return PTR_ERR(class);
	}
	class->devnode = devnode;
	return 0;
}

void shim_state_end(void)
{
	count_release();
	wait_for_completion(&all_released);
	class_destroy(class);
	unregister_chrdev_region(first, NODES);
	ida_destroy(&minors);
}
