// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `seqlock`, `triple_buffer` and the blackboard of `iceoryx2`.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use iceoryx2::prelude::*;
use iceoryx2::service::port_factory::blackboard::PortFactory;

use super::Page;

pub struct SeqLock<const N: usize>(seqlock::SeqLock<[u64; N]>);

impl<const N: usize> Page<N> for SeqLock<N> {
    fn new() -> Self {
        SeqLock(seqlock::SeqLock::new([0; N]))
    }

    fn writer(&self) -> impl FnMut(&[u64; N]) {
        |value| *self.0.lock_write() = *value
    }

    fn reader(&self) -> impl FnMut(&mut [u64; N]) -> bool {
        |out| {
            *out = self.0.read();
            true
        }
    }
}

type Ends<const N: usize> =
    (Option<triple_buffer::Input<[u64; N]>>, Option<triple_buffer::Output<[u64; N]>>);

/// One reader only.
pub struct TripleBuffer<const N: usize>(Mutex<Ends<N>>);

impl<const N: usize> Page<N> for TripleBuffer<N> {
    fn new() -> Self {
        let (input, output) = triple_buffer::triple_buffer(&[0; N]);
        TripleBuffer(Mutex::new((Some(input), Some(output))))
    }

    fn writer(&self) -> impl FnMut(&[u64; N]) {
        let mut input = self.0.lock().expect("nobody panics").0.take().expect("one writer");
        move |value| {
            *input.input_buffer_mut() = *value;
            input.publish();
        }
    }

    fn reader(&self) -> impl FnMut(&mut [u64; N]) -> bool {
        let mut output = self.0.lock().expect("nobody panics").1.take().expect("one reader");
        move |out| {
            *out = *output.read();
            true
        }
    }
}

pub struct Blackboard<const N: usize> {
    name: ServiceName,
    _service: PortFactory<ipc_threadsafe::Service, u64>,
    // Dropped after what it made.
    _node: Node<ipc_threadsafe::Service>,
}

impl<const N: usize> Page<N> for Blackboard<N> {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vbus-bench/{}/{number}", std::process::id());
        let name = ServiceName::new(&name).expect("a valid name");
        // It would tell at each start that it has no configuration file.
        set_log_level(LogLevel::Error);
        let node = NodeBuilder::new().create::<ipc_threadsafe::Service>().expect("a node");
        let service =
            node.service_builder(&name).blackboard_creator::<u64>().add::<[u64; N]>(0, [0; N]);
        Blackboard { name, _service: service.create().expect("a blackboard"), _node: node }
    }

    fn writer(&self) -> impl FnMut(&[u64; N]) {
        // The plain service, whose ports are not shared between threads, is the faster.
        // It would tell at each start that it has no configuration file.
        set_log_level(LogLevel::Error);
        let node = NodeBuilder::new().create::<ipc::Service>().expect("a node");
        let service =
            node.service_builder(&self.name).blackboard_opener::<u64>().open().expect("it exists");
        let writer = service.writer_builder().create().expect("the one writer");
        let entry = writer.entry::<[u64; N]>(&0).expect("the one entry");
        move |value| {
            let _ = (&node, &service, &writer);
            entry.update_with_copy(*value);
        }
    }

    fn reader(&self) -> impl FnMut(&mut [u64; N]) -> bool {
        // It would tell at each start that it has no configuration file.
        set_log_level(LogLevel::Error);
        let node = NodeBuilder::new().create::<ipc::Service>().expect("a node");
        let service =
            node.service_builder(&self.name).blackboard_opener::<u64>().open().expect("it exists");
        let reader = service.reader_builder().create().expect("a reader");
        let entry = reader.entry::<[u64; N]>(&0).expect("the one entry");
        move |out| {
            let _ = (&node, &service, &reader);
            *out = *entry.get();
            true
        }
    }
}
