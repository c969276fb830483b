// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The kernel's network stack for the Rust driver of venet: calls and callbacks, no decision. See
 * net.h.
 */
#include <linux/bpf.h>
#include <linux/bpf_trace.h>
#include <linux/etherdevice.h>
#include <linux/ethtool.h>
#include <linux/filter.h>
#include <linux/hrtimer.h>
#include <linux/if_vlan.h>
#include <linux/netdevice.h>
#include <linux/pci.h>
#include <linux/rtnetlink.h>
#include <linux/sched/stat.h>
#include <linux/tcp.h>
#include <linux/timer.h>
#include <linux/udp.h>
#include <linux/version.h>
#include <net/xdp.h>
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
#include <net/page_pool/helpers.h>
#else
#include <net/page_pool.h>
#endif
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 10, 0)
#include <net/netdev_queues.h>
#endif

#include "net.h"
#include "vbus.h"

/* What Rust takes for given. */
static_assert(PAGE_SIZE == 4096);
static_assert(MAX_SKB_FRAGS >= 17 && MAX_SKB_FRAGS <= VBUS_NET_PIECES_MAX - 2);
static_assert(SKB_DATA_ALIGN(sizeof(struct skb_shared_info)) <= 320);

struct shim_queue;

struct shim_net {
	void *rust;
	struct net_device *dev;
	struct pci_dev *pci;
	struct bpf_prog __rcu *program;
	struct shim_queue *queues[VBUS_NET_QUEUES_MAX];
};

struct shim_group {
	struct napi_struct napi;
	void *rust;
	struct net_device *dev;
	struct hrtimer nap;
	struct timer_list later;
};

struct shim_queue {
	void *rust;
	struct shim_net *net;
	struct net_device *dev;
	struct device *dma;
	struct netdev_queue *tx;
	struct page_pool *pool;
	struct shim_group *group;
	u32 index;
	/* The frame that a program looks at. */
	struct xdp_buff buff;
	struct xdp_rxq_info rxq;
};

/* ---- transmit ---- */

static void describe(struct sk_buff *skb, struct vbus_tx_frame *frame)
{
	const struct skb_shared_info *shared = skb_shinfo(skb);

	frame->skb = skb;
	frame->data = skb->data;
	frame->bytes = skb->len;
	frame->linear = skb_headlen(skb);
	frame->headroom = skb_header_cloned(skb) ? 0 : min_t(u32, skb_headroom(skb), U16_MAX);
	frame->frags = shared->nr_frags;
	frame->partial = skb->ip_summed == CHECKSUM_PARTIAL;
	frame->csum_start = 0;
	frame->csum_offset = 0;
	if (frame->partial) {
		frame->csum_start = skb_checksum_start_offset(skb);
		frame->csum_offset = skb->csum_offset;
	}
	frame->gso = VBUS_GSO_NONE;
	frame->gso_size = 0;
	frame->headers = 0;
	frame->cwr = false;
	if (shared->gso_size) {
		u32 transport = skb_transport_offset(skb);

		if (shared->gso_type & SKB_GSO_TCPV4)
			frame->gso = VBUS_GSO_TCP4;
		else if (shared->gso_type & SKB_GSO_TCPV6)
			frame->gso = VBUS_GSO_TCP6;
		else
			frame->gso = VBUS_GSO_UDP;
		frame->headers = transport + (frame->gso == VBUS_GSO_UDP ? sizeof(struct udphdr)
									 : tcp_hdrlen(skb));
		frame->gso_size = shared->gso_size;
		frame->cwr = shared->gso_type & SKB_GSO_TCP_ECN;
	}
}

static netdev_tx_t start_xmit(struct sk_buff *skb, struct net_device *dev)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_tx_frame frame;

	describe(skb, &frame);
	frame.more = netdev_xmit_more();
	return vbus_net_xmit(net->queues[skb_get_queue_mapping(skb)]->rust, &frame) ?
		       NETDEV_TX_OK : NETDEV_TX_BUSY;
}

void shim_tx_lock(void *handle)
{
	struct shim_queue *queue = handle;

	__netif_tx_lock(queue->tx, smp_processor_id());
}

bool shim_tx_trylock(void *handle)
{
	struct shim_queue *queue = handle;

	return __netif_tx_trylock(queue->tx);
}

void shim_tx_unlock(void *handle)
{
	struct shim_queue *queue = handle;

	__netif_tx_unlock(queue->tx);
}

void shim_tx_lock_bh(void *handle)
{
	struct shim_queue *queue = handle;

	__netif_tx_lock_bh(queue->tx);
}

void shim_tx_unlock_bh(void *handle)
{
	struct shim_queue *queue = handle;

	__netif_tx_unlock_bh(queue->tx);
}

void shim_tx_timestamp(void *skb)
{
	skb_tx_timestamp(skb);
}

int shim_tx_map(void *handle, void *frame, bool linear, u32 headroom, struct vbus_piece *pieces)
{
	struct device *dma = ((struct shim_queue *)handle)->dma;
	struct sk_buff *skb = frame;
	const struct skb_shared_info *shared = skb_shinfo(skb);
	int count = 0, i;

	if (linear) {
		pieces->bytes = skb_headlen(skb) + headroom;
		pieces->address = dma_map_single(dma, skb->data - headroom, pieces->bytes,
						 DMA_TO_DEVICE);
		if (dma_mapping_error(dma, pieces->address))
			return -ENOMEM;
		count = 1;
	}
	for (i = 0; i < shared->nr_frags; i++) {
		const skb_frag_t *frag = &shared->frags[i];
		u32 bytes = skb_frag_size(frag);
		dma_addr_t address;

		if (!bytes)
			continue;
		if (count == VBUS_NET_PIECES_MAX)
			goto undo;
		address = skb_frag_dma_map(dma, frag, 0, bytes, DMA_TO_DEVICE);
		if (dma_mapping_error(dma, address))
			goto undo;
		pieces[count].address = address;
		pieces[count].bytes = bytes;
		count++;
	}
	return count;
undo:
	shim_tx_unmap(handle, pieces, count);
	return -ENOMEM;
}

void shim_tx_unmap(void *handle, const struct vbus_piece *pieces, u32 count)
{
	struct device *dma = ((struct shim_queue *)handle)->dma;
	u32 i;

	for (i = 0; i < count; i++)
		dma_unmap_page(dma, pieces[i].address, pieces[i].bytes, DMA_TO_DEVICE);
}

int shim_tx_copy(void *skb, u8 *to, u32 bytes)
{
	return skb_copy_bits(skb, 0, to, bytes);
}

int shim_tx_linearize(void *skb, struct vbus_tx_frame *frame)
{
	bool more = frame->more;
	int error = __skb_linearize(skb);

	if (error)
		return error;
	describe(skb, frame);
	frame->more = more;
	return 0;
}

void shim_tx_free(void *skb, int budget)
{
	napi_consume_skb(skb, budget);
}

void shim_tx_drop(void *skb)
{
	dev_kfree_skb_any(skb);
}

u32 shim_tx_sent(void *handle, u32 bytes, bool more)
{
	struct shim_queue *queue = handle;
	bool post = __netdev_tx_sent_queue(queue->tx, bytes, more);

	return (post ? SHIM_TX_POST : 0) | (netif_xmit_stopped(queue->tx) ? SHIM_TX_STOPPED : 0);
}

bool shim_tx_completed(void *handle, u32 frames, u32 bytes)
{
	struct shim_queue *queue = handle;

	if (frames)
		netdev_tx_completed_queue(queue->tx, frames, bytes);
	return netif_xmit_stopped(queue->tx);
}

void shim_tx_reset(void *handle)
{
	netdev_tx_reset_queue(((struct shim_queue *)handle)->tx);
}

void shim_tx_stop(void *handle)
{
	netif_tx_stop_queue(((struct shim_queue *)handle)->tx);
}

void shim_tx_wake(void *handle)
{
	netif_tx_wake_queue(((struct shim_queue *)handle)->tx);
}

bool shim_tx_is_stopped(void *handle)
{
	return netif_tx_queue_stopped(((struct shim_queue *)handle)->tx);
}

void shim_tx_touch(void *handle)
{
	WRITE_ONCE(((struct shim_queue *)handle)->tx->trans_start, jiffies);
}

/* ---- receive ---- */

u32 shim_rx_pages(void *handle, u32 count, struct vbus_page *out)
{
	struct page_pool *pool = ((struct shim_queue *)handle)->pool;
	u32 i;

	for (i = 0; i < count; i++) {
		struct page *page = page_pool_dev_alloc_pages(pool);

		if (unlikely(!page))
			break;
		out[i].memory = page_address(page);
		out[i].address = page_pool_get_dma_addr(page);
	}
	return i;
}

void shim_rx_page_put(void *handle, u8 *memory, bool napi)
{
	page_pool_put_full_page(((struct shim_queue *)handle)->pool, virt_to_page(memory), napi);
}

void shim_rx_sync(void *handle, const struct vbus_rx_piece *pieces, u32 count)
{
	struct shim_queue *queue = handle;
	u32 i;

	for (i = 0; i < count; i++)
		dma_sync_single_range_for_cpu(queue->dma,
					      page_pool_get_dma_addr(virt_to_page(pieces[i].memory)),
					      pieces[i].offset, pieces[i].bytes,
					      page_pool_get_dma_dir(queue->pool));
}

void shim_rx_sync_device(void *handle, u8 *memory)
{
	struct shim_queue *queue = handle;

	dma_sync_single_for_device(queue->dma, page_pool_get_dma_addr(virt_to_page(memory)),
				   PAGE_SIZE, page_pool_get_dma_dir(queue->pool));
}

void *shim_rx_skb(void *handle, const u8 *data, u32 bytes)
{
	struct shim_group *group = handle;
	/* Of one size, so that the stack may pull more headers into it. */
	struct sk_buff *skb = napi_alloc_skb(&group->napi, max_t(u32, bytes, 256));

	if (unlikely(!skb))
		return NULL;
	__skb_put_data(skb, data, bytes);
	return skb;
}

void *shim_rx_skb_in_place(void *handle)
{
	struct shim_queue *queue = handle;
	struct xdp_buff *buff = &queue->buff;
	struct sk_buff *skb = napi_build_skb(buff->data_hard_start, PAGE_SIZE);

	if (unlikely(!skb))
		return NULL;
	skb_mark_for_recycle(skb);
	skb_reserve(skb, buff->data - buff->data_hard_start);
	__skb_put(skb, buff->data_end - buff->data);
	if (buff->data > buff->data_meta)
		skb_metadata_set(skb, buff->data - buff->data_meta);
	return skb;
}

bool shim_rx_deliver(void *handle, void *frame, const struct vbus_rx_frame *info,
		     const struct vbus_rx_piece *pieces, u32 count)
{
	struct shim_group *group = handle;
	struct sk_buff *skb = frame;
	u32 i;

	for (i = 0; i < count; i++)
		skb_add_rx_frag(skb, i, virt_to_page(pieces[i].memory), pieces[i].offset,
				pieces[i].bytes, PAGE_SIZE);
	if (count)
		skb_mark_for_recycle(skb);
	if (info->partial) {
		if (unlikely(!skb_partial_csum_set(skb, info->csum_start, info->csum_offset))) {
			kfree_skb(skb);
			return false;
		}
	} else if (info->verified) {
		skb->ip_summed = CHECKSUM_UNNECESSARY;
	}
	if (info->gso) {
		struct skb_shared_info *shared = skb_shinfo(skb);

		shared->gso_size = info->gso_size;
		/* Whoever segments the frame checks its headers. */
		shared->gso_type = SKB_GSO_DODGY | (info->cwr ? SKB_GSO_TCP_ECN : 0);
		if (info->gso == VBUS_GSO_TCP4)
			shared->gso_type |= SKB_GSO_TCPV4;
		else if (info->gso == VBUS_GSO_TCP6)
			shared->gso_type |= SKB_GSO_TCPV6;
		else
			shared->gso_type |= SKB_GSO_UDP_L4;
		shared->gso_segs = 0;
	}
	if (info->hashed)
		skb_set_hash(skb, info->hash,
			     info->hashed == 2 ? PKT_HASH_TYPE_L4 : PKT_HASH_TYPE_L3);
	skb_record_rx_queue(skb, info->index);
	skb->protocol = eth_type_trans(skb, group->dev);
	napi_gro_receive(&group->napi, skb);
	return true;
}

/* ---- XDP ---- */

u32 shim_xdp_run(void *handle, u8 *memory, u32 headroom, u32 bytes)
{
	struct shim_queue *queue = handle;
	struct bpf_prog *program = rcu_dereference_check(queue->net->program,
							 rcu_read_lock_bh_held());
	u32 verdict;

	xdp_init_buff(&queue->buff, PAGE_SIZE, &queue->rxq);
	xdp_prepare_buff(&queue->buff, memory, headroom, bytes, true);
	if (!program)
		return SHIM_XDP_PASS;
	verdict = bpf_prog_run_xdp(program, &queue->buff);
	switch (verdict) {
	case XDP_PASS:
	case XDP_TX:
	case XDP_REDIRECT:
	case XDP_DROP:
		return verdict;
	case XDP_ABORTED:
		break;
	default:
		bpf_warn_invalid_xdp_action(queue->dev, program, verdict);
	}
	trace_xdp_exception(queue->dev, program, verdict);
	return SHIM_XDP_ABORTED;
}

void *shim_xdp_frame(void *handle, struct vbus_piece *piece)
{
	struct shim_queue *queue = handle;
	struct xdp_frame *frame = xdp_convert_buff_to_frame(&queue->buff);
	struct page *page;
	u32 offset;

	if (unlikely(!frame))
		return NULL;
	page = virt_to_page(frame->data);
	offset = frame->data - page_address(page);
	piece->bytes = frame->len;
	piece->address = page_pool_get_dma_addr(page) + offset;
	dma_sync_single_for_device(queue->dma, piece->address, piece->bytes, DMA_BIDIRECTIONAL);
	return frame;
}

int shim_xdp_redirect(void *handle)
{
	struct shim_queue *queue = handle;
	struct bpf_prog *program = rcu_dereference_check(queue->net->program,
							 rcu_read_lock_bh_held());

	if (!program)
		return -EINVAL;
	return xdp_do_redirect(queue->dev, &queue->buff, program);
}

void shim_xdp_flush(void)
{
	xdp_do_flush();
}

int shim_xdp_map(void *handle, void *xdp, struct vbus_piece *piece)
{
	struct device *dma = ((struct shim_queue *)handle)->dma;
	struct xdp_frame *frame = xdp;

	if (unlikely(xdp_frame_has_frags(frame)))
		return -EOPNOTSUPP;
	piece->bytes = frame->len;
	piece->address = dma_map_single(dma, frame->data, frame->len, DMA_TO_DEVICE);
	return dma_mapping_error(dma, piece->address) ? -ENOMEM : 0;
}

u32 shim_xdp_bytes(void *frame)
{
	return xdp_frame_has_frags(frame) ? 0 : ((struct xdp_frame *)frame)->len;
}

void shim_xdp_copy(void *xdp, u8 *to)
{
	const struct xdp_frame *frame = xdp;

	memcpy(to, frame->data, frame->len);
}

void shim_xdp_free(void *frame, int budget)
{
	if (budget)
		xdp_return_frame_rx_napi(frame);
	else
		xdp_return_frame(frame);
}

static int xdp_xmit(struct net_device *dev, int count, struct xdp_frame **frames, u32 flags)
{
	struct shim_net *net = netdev_priv(dev);

	if (unlikely(flags & ~XDP_XMIT_FLAGS_MASK))
		return -EINVAL;
	return vbus_net_xdp_xmit(net->rust, smp_processor_id(), (void **)frames, count,
				 flags & XDP_XMIT_FLUSH);
}

static int set_program(struct net_device *dev, struct netdev_bpf *bpf)
{
	struct shim_net *net = netdev_priv(dev);
	struct bpf_prog *before = rtnl_dereference(net->program);
	int error = 0;

	if (bpf->command != XDP_SETUP_PROG)
		return -EINVAL;
	if (bpf->prog && SKB_DATA_ALIGN(sizeof(struct skb_shared_info)) > VBUS_NET_XDP_TAILROOM) {
		NL_SET_ERR_MSG_MOD(bpf->extack, "This kernel has too large MAX_SKB_FRAGS for XDP");
		return -EOPNOTSUPP;
	}
	if (bpf->prog && !before)
		error = vbus_net_xdp(net->rust, true);
	if (error == -ERANGE)
		NL_SET_ERR_MSG_MOD(bpf->extack, "The MTU is too large for XDP");
	if (error)
		return error;
	rcu_assign_pointer(net->program, bpf->prog);
	if (before)
		bpf_prog_put(before);
	if (!bpf->prog && before) {
		synchronize_net();
		error = vbus_net_xdp(net->rust, false);
		/* The program has gone, whatever became of the interface. */
		if (error)
			netdev_warn(dev, "the interface is down: cannot set it up without XDP (%d)\n",
				    error);
	}
	return 0;
}

/* ---- NAPI ---- */

static int poll(struct napi_struct *napi, int budget)
{
	struct shim_group *group = container_of(napi, struct shim_group, napi);

	return vbus_net_poll(group->rust, budget);
}

static enum hrtimer_restart nap_ends(struct hrtimer *timer)
{
	napi_schedule(&container_of(timer, struct shim_group, nap)->napi);
	return HRTIMER_NORESTART;
}

static void later(struct timer_list *timer)
{
	napi_schedule(&container_of(timer, struct shim_group, later)->napi);
}

void *shim_group_new(void *handle, u32 index, void *rust)
{
	struct net_device *dev = handle;
	struct shim_group *group = kzalloc(sizeof(*group), GFP_KERNEL);

	if (!group)
		return NULL;
	group->rust = rust;
	group->dev = dev;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 13, 0)
	hrtimer_setup(&group->nap, nap_ends, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED);
#else
	hrtimer_init(&group->nap, CLOCK_MONOTONIC, HRTIMER_MODE_REL_PINNED);
	group->nap.function = nap_ends;
#endif
	timer_setup(&group->later, later, 0);
	netif_napi_add(dev, &group->napi, poll);
	return group;
}

static void stop_timers(struct shim_group *group)
{
	hrtimer_cancel(&group->nap);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 2, 0)
	timer_delete_sync(&group->later);
#else
	del_timer_sync(&group->later);
#endif
}

void shim_group_free(void *handle)
{
	struct shim_group *group = handle;

	/* After it no poll runs. One that was late may have started a timer after `disable`. */
	netif_napi_del(&group->napi);
	stop_timers(group);
	/* Pools that stay when the system goes down refer to it. */
	if (!shim_goes_down())
		kfree(group);
}

void shim_group_enable(void *handle)
{
	napi_enable(&((struct shim_group *)handle)->napi);
}

void shim_group_disable(void *handle)
{
	struct shim_group *group = handle;

	napi_disable(&group->napi);
	stop_timers(group);
}

void shim_group_schedule(void *handle)
{
	struct shim_group *group = handle;

	/*
	 * Then the poll begins at the end of what runs now, which may have interrupts off: a handler
	 * in a thread, or one of a line that the kernel repeats by software.
	 */
	if (in_interrupt()) {
		napi_schedule(&group->napi);
		return;
	}
	local_bh_disable();
	napi_schedule(&group->napi);
	local_bh_enable();
}

void shim_group_nap(void *handle, u64 nanoseconds)
{
	hrtimer_start(&((struct shim_group *)handle)->nap, ns_to_ktime(nanoseconds),
		      HRTIMER_MODE_REL_PINNED);
}

void shim_group_later(void *handle, u32 milliseconds)
{
	struct shim_group *group = handle;

	if (!timer_pending(&group->later))
		mod_timer(&group->later, jiffies + msecs_to_jiffies(milliseconds));
}

bool shim_others_wait(void)
{
	/* Within an interrupt of the idle task, or of a task that has work of its own. */
	if (is_idle_task(current))
		return need_resched();
	/* A thread of the kernel polls, as ksoftirqd does: it is one of those who run. */
	return !(current->flags & PF_KTHREAD) || !single_task_running();
}

bool shim_group_complete(void *handle, int done)
{
	return napi_complete_done(&((struct shim_group *)handle)->napi, done);
}

/* ---- queue pairs ---- */

void *shim_queue_new(void *handle, u32 index, void *rust, void *group)
{
	struct net_device *dev = handle;
	struct shim_net *net = netdev_priv(dev);
	struct shim_queue *queue;

	if (index >= ARRAY_SIZE(net->queues) || index >= dev->num_tx_queues)
		return NULL;
	queue = kzalloc(sizeof(*queue), GFP_KERNEL);
	if (!queue)
		return NULL;
	queue->rust = rust;
	queue->net = net;
	queue->dev = dev;
	queue->dma = &net->pci->dev;
	queue->tx = netdev_get_tx_queue(dev, index);
	queue->group = group;
	queue->index = index;
	net->queues[index] = queue;
	return queue;
}

static void name_napi(struct shim_queue *queue, struct napi_struct *napi)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
	netif_queue_set_napi(queue->dev, queue->index, NETDEV_QUEUE_TYPE_RX, napi);
	netif_queue_set_napi(queue->dev, queue->index, NETDEV_QUEUE_TYPE_TX, napi);
#endif
}

int shim_queue_open(void *handle, u32 pages, bool xdp)
{
	struct shim_queue *queue = handle;
	struct page_pool_params params = {
		.flags = PP_FLAG_DMA_MAP | PP_FLAG_DMA_SYNC_DEV,
		.pool_size = pages,
		.nid = dev_to_node(queue->dma),
		.dev = queue->dma,
		.dma_dir = xdp ? DMA_BIDIRECTIONAL : DMA_FROM_DEVICE,
		.max_len = PAGE_SIZE,
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
		.napi = &queue->group->napi,
#endif
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
		.netdev = queue->dev,
#endif
	};
	int error;

	queue->pool = page_pool_create(&params);
	if (IS_ERR(queue->pool)) {
		error = PTR_ERR(queue->pool);
		queue->pool = NULL;
		return error;
	}
	error = xdp_rxq_info_reg(&queue->rxq, queue->dev, queue->index,
				 queue->group->napi.napi_id);
	if (error)
		goto no_info;
	error = xdp_rxq_info_reg_mem_model(&queue->rxq, MEM_TYPE_PAGE_POOL, queue->pool);
	if (error)
		goto no_model;
	name_napi(queue, &queue->group->napi);
	return 0;
no_model:
	xdp_rxq_info_unreg(&queue->rxq);
no_info:
	page_pool_destroy(queue->pool);
	queue->pool = NULL;
	return error;
}

void shim_queue_close(void *handle)
{
	struct shim_queue *queue = handle;

	name_napi(queue, NULL);
	xdp_rxq_info_unreg(&queue->rxq);
	page_pool_destroy(queue->pool);
	queue->pool = NULL;
}

/* ---- the interface ---- */

static int open(struct net_device *dev)
{
	struct shim_net *net = netdev_priv(dev);

	return vbus_net_open(net->rust);
}

static int stop(struct net_device *dev)
{
	struct shim_net *net = netdev_priv(dev);

	vbus_net_stop(net->rust);
	return 0;
}

static void set_rx_mode(struct net_device *dev)
{
	struct shim_net *net = netdev_priv(dev);

	vbus_net_rx_mode(net->rust);
}

static int set_mac(struct net_device *dev, void *address)
{
	struct shim_net *net = netdev_priv(dev);
	const struct sockaddr *to = address;
	int error;

	if (!is_valid_ether_addr(to->sa_data))
		return -EADDRNOTAVAIL;
	error = vbus_net_set_mac(net->rust, to->sa_data);
	if (!error)
		eth_hw_addr_set(dev, to->sa_data);
	return error;
}

static int set_mtu(struct net_device *dev, int mtu)
{
	struct shim_net *net = netdev_priv(dev);
	int error = vbus_net_set_mtu(net->rust, mtu);

	if (!error)
		WRITE_ONCE(dev->mtu, mtu);
	return error;
}

static int set_features(struct net_device *dev, netdev_features_t features)
{
	struct shim_net *net = netdev_priv(dev);
	u32 wanted = 0;

	if (!((features ^ dev->features) & (NETIF_F_RXCSUM | NETIF_F_GRO_HW)))
		return 0;
	if (features & NETIF_F_RXCSUM)
		wanted |= VBUS_NET_RX_CSUM;
	if (features & NETIF_F_GRO_HW)
		wanted |= VBUS_NET_RX_GSO;
	return vbus_net_set_features(net->rust, wanted);
}

static int add_vlan(struct net_device *dev, __be16 protocol, u16 id)
{
	struct shim_net *net = netdev_priv(dev);

	return vbus_net_vlan(net->rust, id, true);
}

static int remove_vlan(struct net_device *dev, __be16 protocol, u16 id)
{
	struct shim_net *net = netdev_priv(dev);

	return vbus_net_vlan(net->rust, id, false);
}

static void get_stats(struct net_device *dev, struct rtnl_link_stats64 *out)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_net_stats stats = {};

	vbus_net_stats(net->rust, &stats);
	out->rx_packets = stats.rx_frames;
	out->rx_bytes = stats.rx_bytes;
	out->rx_errors = stats.rx_errors;
	out->rx_dropped = stats.rx_dropped;
	out->tx_packets = stats.tx_frames;
	out->tx_bytes = stats.tx_bytes;
	out->tx_dropped = stats.tx_dropped;
}

static void tx_timeout(struct net_device *dev, unsigned int index)
{
	struct shim_net *net = netdev_priv(dev);

	vbus_net_tx_timeout(net->rust, index);
}

static const struct net_device_ops ops = {
	.ndo_open = open,
	.ndo_stop = stop,
	.ndo_start_xmit = start_xmit,
	.ndo_set_rx_mode = set_rx_mode,
	.ndo_set_mac_address = set_mac,
	.ndo_validate_addr = eth_validate_addr,
	.ndo_change_mtu = set_mtu,
	.ndo_set_features = set_features,
	.ndo_vlan_rx_add_vid = add_vlan,
	.ndo_vlan_rx_kill_vid = remove_vlan,
	.ndo_get_stats64 = get_stats,
	.ndo_tx_timeout = tx_timeout,
	.ndo_features_check = passthru_features_check,
	.ndo_bpf = set_program,
	.ndo_xdp_xmit = xdp_xmit,
};

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 10, 0)
static void queue_stats_rx(struct net_device *dev, int index, struct netdev_queue_stats_rx *out)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_queue_stats stats = {};

	vbus_net_queue_stats(net->rust, index, &stats);
	out->packets = stats.rx_frames;
	out->bytes = stats.rx_bytes;
	out->alloc_fail = stats.rx_alloc_failed;
}

static void queue_stats_tx(struct net_device *dev, int index, struct netdev_queue_stats_tx *out)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_queue_stats stats = {};

	vbus_net_queue_stats(net->rust, index, &stats);
	out->packets = stats.tx_frames;
	out->bytes = stats.tx_bytes;
	out->stop = stats.tx_stops;
	out->wake = stats.tx_wakes;
}

static void base_stats(struct net_device *dev, struct netdev_queue_stats_rx *rx,
		       struct netdev_queue_stats_tx *tx)
{
	/* What queues that are not in use have done. */
	struct shim_net *net = netdev_priv(dev);
	u32 index;

	rx->packets = rx->bytes = rx->alloc_fail = 0;
	tx->packets = tx->bytes = tx->stop = tx->wake = 0;
	for (index = dev->real_num_rx_queues; index < dev->num_rx_queues; index++) {
		struct vbus_queue_stats stats = {};

		vbus_net_queue_stats(net->rust, index, &stats);
		rx->packets += stats.rx_frames;
		rx->bytes += stats.rx_bytes;
		rx->alloc_fail += stats.rx_alloc_failed;
		tx->packets += stats.tx_frames;
		tx->bytes += stats.tx_bytes;
		tx->stop += stats.tx_stops;
		tx->wake += stats.tx_wakes;
	}
}

static const struct netdev_stat_ops stat_ops = {
	.get_queue_stats_rx = queue_stats_rx,
	.get_queue_stats_tx = queue_stats_tx,
	.get_base_stats = base_stats,
};
#endif

/* ---- ethtool ---- */

static void get_drvinfo(struct net_device *dev, struct ethtool_drvinfo *info)
{
	struct shim_net *net = netdev_priv(dev);

	strscpy(info->driver, "vbus", sizeof(info->driver));
	strscpy(info->version, VBUS_VERSION, sizeof(info->version));
	strscpy(info->bus_info, pci_name(net->pci), sizeof(info->bus_info));
}

static int get_link_settings(struct net_device *dev, struct ethtool_link_ksettings *settings)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_link link = {};

	vbus_net_link(net->rust, &link);
	ethtool_link_ksettings_zero_link_mode(settings, supported);
	ethtool_link_ksettings_zero_link_mode(settings, advertising);
	settings->base.speed = link.speed ? link.speed : SPEED_UNKNOWN;
	settings->base.duplex = link.duplex == 0 ? DUPLEX_HALF :
				link.duplex == 1 ? DUPLEX_FULL : DUPLEX_UNKNOWN;
	settings->base.port = PORT_OTHER;
	settings->base.autoneg = AUTONEG_DISABLE;
	return 0;
}

static int get_sset_count(struct net_device *dev, int set)
{
	struct shim_net *net = netdev_priv(dev);

	return set == ETH_SS_STATS ? vbus_net_stat_count(net->rust) : -EOPNOTSUPP;
}

static void get_strings(struct net_device *dev, u32 set, u8 *names)
{
	struct shim_net *net = netdev_priv(dev);

	if (set == ETH_SS_STATS)
		vbus_net_stat_names(net->rust, names);
}

static void get_ethtool_stats(struct net_device *dev, struct ethtool_stats *stats, u64 *values)
{
	struct shim_net *net = netdev_priv(dev);

	vbus_net_stat_values(net->rust, values);
}

static void get_ringparam(struct net_device *dev, struct ethtool_ringparam *ring,
			  struct kernel_ethtool_ringparam *kernel, struct netlink_ext_ack *extack)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_rings rings = {};

	vbus_net_get_rings(net->rust, &rings);
	ring->rx_max_pending = rings.rx_max;
	ring->tx_max_pending = rings.tx_max;
	ring->rx_pending = rings.rx;
	ring->tx_pending = rings.tx;
}

static int set_ringparam(struct net_device *dev, struct ethtool_ringparam *ring,
			 struct kernel_ethtool_ringparam *kernel, struct netlink_ext_ack *extack)
{
	struct shim_net *net = netdev_priv(dev);

	if (ring->rx_mini_pending || ring->rx_jumbo_pending)
		return -EINVAL;
	return vbus_net_set_rings(net->rust, ring->rx_pending, ring->tx_pending);
}

static void get_channels(struct net_device *dev, struct ethtool_channels *out)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_channels channels = {};

	vbus_net_get_channels(net->rust, &channels);
	out->max_combined = channels.max;
	out->combined_count = channels.used;
}

static int set_channels(struct net_device *dev, struct ethtool_channels *to)
{
	struct shim_net *net = netdev_priv(dev);

	if (to->rx_count || to->tx_count || to->other_count)
		return -EINVAL;
	return vbus_net_set_channels(net->rust, to->combined_count);
}

static int get_coalesce(struct net_device *dev, struct ethtool_coalesce *out,
			struct kernel_ethtool_coalesce *kernel, struct netlink_ext_ack *extack)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_coalesce coalesce = {};

	vbus_net_get_coalesce(net->rust, &coalesce);
	out->rx_coalesce_usecs = coalesce.rx_usecs;
	out->rx_max_coalesced_frames = coalesce.rx_frames;
	out->tx_coalesce_usecs = coalesce.tx_usecs;
	out->tx_max_coalesced_frames = coalesce.tx_frames;
	return 0;
}

static int set_coalesce(struct net_device *dev, struct ethtool_coalesce *to,
			struct kernel_ethtool_coalesce *kernel, struct netlink_ext_ack *extack)
{
	struct shim_net *net = netdev_priv(dev);
	struct vbus_coalesce coalesce = {
		.rx_usecs = to->rx_coalesce_usecs,
		.rx_frames = to->rx_max_coalesced_frames,
		.tx_usecs = to->tx_coalesce_usecs,
		.tx_frames = to->tx_max_coalesced_frames,
	};

	return vbus_net_set_coalesce(net->rust, &coalesce);
}

static int get_tunable(struct net_device *dev, const struct ethtool_tunable *tunable, void *value)
{
	struct shim_net *net = netdev_priv(dev);

	if (tunable->id != ETHTOOL_TX_COPYBREAK)
		return -EOPNOTSUPP;
	*(u32 *)value = vbus_net_get_copybreak(net->rust);
	return 0;
}

static int set_tunable(struct net_device *dev, const struct ethtool_tunable *tunable,
		       const void *value)
{
	struct shim_net *net = netdev_priv(dev);

	if (tunable->id != ETHTOOL_TX_COPYBREAK)
		return -EOPNOTSUPP;
	return vbus_net_set_copybreak(net->rust, *(const u32 *)value);
}

static int get_rxnfc(struct net_device *dev, struct ethtool_rxnfc *info, u32 *rules)
{
	if (info->cmd != ETHTOOL_GRXRINGS)
		return -EOPNOTSUPP;
	info->data = dev->real_num_rx_queues;
	return 0;
}

static u32 get_rxfh_key_size(struct net_device *dev)
{
	struct shim_net *net = netdev_priv(dev);

	return vbus_net_key_bytes(net->rust);
}

static u32 get_rxfh_indir_size(struct net_device *dev)
{
	struct shim_net *net = netdev_priv(dev);

	return vbus_net_table_entries(net->rust);
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 8, 0)
static int get_rxfh(struct net_device *dev, struct ethtool_rxfh_param *param)
{
	struct shim_net *net = netdev_priv(dev);

	vbus_net_get_rss(net->rust, param->indir, param->key);
	param->hfunc = ETH_RSS_HASH_TOP;
	return 0;
}

static int set_rxfh(struct net_device *dev, struct ethtool_rxfh_param *param,
		    struct netlink_ext_ack *extack)
{
	struct shim_net *net = netdev_priv(dev);

	if ((param->hfunc != ETH_RSS_HASH_NO_CHANGE && param->hfunc != ETH_RSS_HASH_TOP) ||
	    param->rss_context)
		return -EOPNOTSUPP;
	return vbus_net_set_rss(net->rust, param->indir, param->key);
}
#else
static int get_rxfh(struct net_device *dev, u32 *table, u8 *key, u8 *function)
{
	struct shim_net *net = netdev_priv(dev);

	vbus_net_get_rss(net->rust, table, key);
	if (function)
		*function = ETH_RSS_HASH_TOP;
	return 0;
}

static int set_rxfh(struct net_device *dev, const u32 *table, const u8 *key, const u8 function)
{
	struct shim_net *net = netdev_priv(dev);

	if (function != ETH_RSS_HASH_NO_CHANGE && function != ETH_RSS_HASH_TOP)
		return -EOPNOTSUPP;
	return vbus_net_set_rss(net->rust, table, key);
}
#endif

#define ETHTOOL_COMMON										\
	.supported_coalesce_params = ETHTOOL_COALESCE_USECS | ETHTOOL_COALESCE_MAX_FRAMES,	\
	.get_drvinfo = get_drvinfo,								\
	.get_link = ethtool_op_get_link,							\
	.get_link_ksettings = get_link_settings,						\
	.get_ts_info = ethtool_op_get_ts_info,							\
	.get_sset_count = get_sset_count,							\
	.get_strings = get_strings,								\
	.get_ethtool_stats = get_ethtool_stats,							\
	.get_ringparam = get_ringparam,								\
	.set_ringparam = set_ringparam,								\
	.get_channels = get_channels,								\
	.set_channels = set_channels,								\
	.get_coalesce = get_coalesce,								\
	.set_coalesce = set_coalesce,								\
	.get_tunable = get_tunable,								\
	.set_tunable = set_tunable

static const struct ethtool_ops ethtool = {
	ETHTOOL_COMMON,
	.get_rxnfc = get_rxnfc,
	.get_rxfh_key_size = get_rxfh_key_size,
	.get_rxfh_indir_size = get_rxfh_indir_size,
	.get_rxfh = get_rxfh,
	.set_rxfh = set_rxfh,
};

/* An interface without a table and a key. */
static const struct ethtool_ops ethtool_without_rss = { ETHTOOL_COMMON };

/* ---- life of the interface ---- */

void *shim_net_new(void *pci, void *rust, u32 queues)
{
	struct net_device *dev = alloc_etherdev_mqs(sizeof(struct shim_net), queues, queues);
	struct shim_net *net;

	if (!dev)
		return NULL;
	net = netdev_priv(dev);
	net->rust = rust;
	net->dev = dev;
	net->pci = pci;
	SET_NETDEV_DEV(dev, &net->pci->dev);
	return dev;
}

void shim_net_free(void *handle)
{
	struct net_device *dev = handle;
	struct shim_net *net = netdev_priv(dev);
	u32 index;

	for (index = 0; index < ARRAY_SIZE(net->queues); index++)
		kfree(net->queues[index]);
	free_netdev(dev);
}

int shim_net_register(void *handle, const struct vbus_net_traits *traits)
{
	struct net_device *dev = handle;
	netdev_features_t able = 0;
	int error;

	dev->netdev_ops = &ops;
	dev->ethtool_ops = traits->able & VBUS_NET_RSS ? &ethtool : &ethtool_without_rss;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 10, 0)
	dev->stat_ops = &stat_ops;
#endif
	if (is_valid_ether_addr(traits->mac))
		eth_hw_addr_set(dev, traits->mac);
	else
		eth_hw_addr_random(dev);
	dev->min_mtu = ETH_MIN_MTU;
	/* To the kernel 0 would be no limit. */
	dev->max_mtu = max_t(u32, traits->mtu_max, ETH_MIN_MTU);
	dev->mtu = min_t(u32, ETH_DATA_LEN, dev->max_mtu);
	dev->watchdog_timeo = 5 * HZ;
	dev->needed_headroom = 16;
	dev->priv_flags |= IFF_UNICAST_FLT | IFF_LIVE_ADDR_CHANGE;

	able |= NETIF_F_SG;
	if (traits->able & VBUS_NET_CSUM)
		able |= NETIF_F_HW_CSUM;
	if (traits->able & VBUS_NET_TSO4)
		able |= NETIF_F_TSO;
	if (traits->able & VBUS_NET_TSO6)
		able |= NETIF_F_TSO6;
	if (traits->able & VBUS_NET_ECN)
		able |= NETIF_F_TSO_ECN;
	if (traits->able & VBUS_NET_USO)
		able |= NETIF_F_GSO_UDP_L4;
	dev->vlan_features = able;
	if (traits->able & VBUS_NET_RX_CSUM)
		able |= NETIF_F_RXCSUM;
	if (traits->able & VBUS_NET_RX_GSO)
		able |= NETIF_F_GRO_HW;
	dev->hw_features = able;
	dev->features = able | NETIF_F_HIGHDMA;
	if (traits->able & VBUS_NET_VLAN)
		dev->features |= NETIF_F_HW_VLAN_CTAG_FILTER;
	/* No frame has more segments than spec/venet.md allows. */
	netif_set_tso_max_segs(dev, 1024);
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
	dev->xdp_features = NETDEV_XDP_ACT_BASIC | NETDEV_XDP_ACT_REDIRECT |
			    NETDEV_XDP_ACT_NDO_XMIT;
#endif
	netif_carrier_off(dev);
	rtnl_lock();
	error = netif_set_real_num_tx_queues(dev, traits->queues);
	if (!error)
		error = netif_set_real_num_rx_queues(dev, traits->queues);
	rtnl_unlock();
	return error ? error : register_netdev(dev);
}

void shim_net_unregister(void *dev)
{
	unregister_netdev(dev);
}

u32 shim_net_mtu(void *dev)
{
	return READ_ONCE(((struct net_device *)dev)->mtu);
}

void shim_net_mac(void *dev, u8 *mac)
{
	ether_addr_copy(mac, ((struct net_device *)dev)->dev_addr);
}

void shim_net_key(u8 *key, u32 bytes)
{
	netdev_rss_key_fill(key, bytes);
}

bool shim_net_keeps_table(void *dev)
{
	return netif_is_rxfh_configured(dev);
}

int shim_net_use_queues(void *dev, u32 queues)
{
	int error = netif_set_real_num_tx_queues(dev, queues);

	return error ? error : netif_set_real_num_rx_queues(dev, queues);
}

void shim_rtnl_lock(void)
{
	rtnl_lock();
}

void shim_rtnl_unlock(void)
{
	rtnl_unlock();
}

void shim_net_announce(void *dev)
{
	netdev_notify_peers(dev);
}

void shim_net_carrier(void *dev, bool on)
{
	if (on)
		netif_carrier_on(dev);
	else
		netif_carrier_off(dev);
}

void shim_net_detach(void *dev)
{
	netif_device_detach(dev);
}

void shim_net_attach(void *dev)
{
	netif_device_attach(dev);
}

void shim_net_tx_disable(void *dev)
{
	netif_tx_disable(dev);
}

void shim_net_tx_wake_all(void *dev)
{
	netif_tx_wake_all_queues(dev);
}

u32 shim_net_addresses(void *handle, u8 *out, bool *promiscuous, bool *all_multicast)
{
	struct net_device *dev = handle;
	struct netdev_hw_addr *address;
	u32 count = 0;

	netif_addr_lock_bh(dev);
	*promiscuous = dev->flags & IFF_PROMISC;
	*all_multicast = dev->flags & IFF_ALLMULTI;
	netdev_for_each_uc_addr(address, dev) {
		if (count < VBUS_NET_ADDRESSES_MAX)
			ether_addr_copy(out + count * ETH_ALEN, address->addr);
		count++;
	}
	netdev_for_each_mc_addr(address, dev) {
		if (count < VBUS_NET_ADDRESSES_MAX)
			ether_addr_copy(out + count * ETH_ALEN, address->addr);
		count++;
	}
	netif_addr_unlock_bh(dev);
	return count;
}
