// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Serial ports. The other end of a port is this process's terminal, a socket or a file.
//!
//! The guest's output goes through a queue to a thread of the port. No virtual CPU ever waits for
//! the reader at the other end.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vm_superio::serial::{SerialEvents, SerialState};
use vm_superio::{Serial, Trigger};

use crate::bus::{Bus, BusDevice};
use crate::events::{EventSender, VmEvent};
use crate::irqchip::IrqChip;
use crate::layout;
use crate::lock::lock;
use crate::seccomp::{self, Thread};
use crate::terminal::{Escape, Escaped};

/// The most bytes of output that wait for a reader. Beyond that the oldest are lost.
const QUEUE_MAX: usize = 1 << 20;
/// The number of I/O ports of a UART.
const PORTS: u64 = 8;
/// The bytes that a UART holds for the guest.
const FIFO: usize = 64;
/// The registers interrupt enable, interrupt identification and line control.
const ENABLE: u8 = 1;
const IDENTIFICATION: u8 = 2;
const LINE_CONTROL: u8 = 3;
/// Interrupt enable: received data.
const ENABLE_RECEIVED: u8 = 1;
/// Interrupt identification: the kinds, of which these are "none" and "received data".
const KINDS: u8 = 0x0f;
const KIND_NONE: u8 = 1;
const KIND_RECEIVED: u8 = 4;
/// Line control: the registers 0 and 1 are the divisor's.
const DIVISOR: u8 = 0x80;
/// How long the reader may take for the last output.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The other end of a serial port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Standard input and output.
    Stdio,
    /// Nothing.
    None,
    /// A socket that this program makes. One client at a time connects, and also gets the output of
    /// the time before.
    Unix(PathBuf),
    /// A file, which is emptied first. It gives no input.
    File(PathBuf),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Target::Stdio),
            None if text == "none" => Ok(Target::None),
            Some(("unix", path)) if !path.is_empty() => Ok(Target::Unix(path.into())),
            Some(("file", path)) if !path.is_empty() => Ok(Target::File(path.into())),
            _ => Err("one of stdio, none, unix:PATH, file:PATH".into()),
        }
    }
}

/// The registers of a UART, as a saved machine has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SavedUart {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// What the guest has not taken yet, at most 64 bytes.
    received: Vec<u8>,
}

type Uart = Serial<Line, Drained, Output>;

/// The interrupt of a UART, which is an edge on a pin.
struct Line(Arc<IrqChip>, u32);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse(self.1);
        Ok(())
    }
}

/// Tells the thread that the guest has taken all input.
struct Drained(Arc<OutputQueue>);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.wake();
    }
}

/// The guest's end of the output queue.
struct Output(Arc<OutputQueue>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut queue = self.0.queue();
        let wake = queue.is_empty();
        queue.extend(bytes);
        let surplus = queue.len().saturating_sub(QUEUE_MAX);
        queue.drain(..surplus);
        drop(queue);
        if wake {
            self.0.wake();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The output on its way from the virtual CPUs to the port's thread.
struct OutputQueue {
    queue: Mutex<VecDeque<u8>>,
    event: OwnedFd,
    end: AtomicBool,
}

impl OutputQueue {
    fn queue(&self) -> MutexGuard<'_, VecDeque<u8>> {
        lock(&self.queue)
    }

    fn wake(&self) {
        // The write fails only if the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }
}

/// A serial port.
pub struct SerialPort {
    number: usize,
    uart: Mutex<Uart>,
    irqchip: Arc<IrqChip>,
    output: Arc<OutputQueue>,
}

impl SerialPort {
    fn uart(&self) -> MutexGuard<'_, Uart> {
        lock(&self.uart)
    }

    fn fresh(irqchip: &Arc<IrqChip>, number: usize, output: &Arc<OutputQueue>) -> Uart {
        let line = Line(irqchip.clone(), layout::SERIAL[number].1);
        Serial::with_events(line, Drained(output.clone()), Output(output.clone()))
    }

    /// Puts the UART into the state after a reset. Output on its way is not lost.
    pub fn reset(&self) {
        *self.uart() = SerialPort::fresh(&self.irqchip, self.number, &self.output);
        // The thread may wait until the guest has taken what was in the old one.
        self.output.wake();
    }

    /// The registers of the UART. Output on its way stays with this port.
    pub(crate) fn save(&self) -> SavedUart {
        let state = self.uart().state();
        SavedUart {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Gives the UART saved registers.
    ///
    /// # Errors
    /// It holds more bytes for the guest than a UART has room for.
    pub(crate) fn restore(&self, saved: &SavedUart) -> Result<()> {
        let count = saved.received.len();
        ensure!(count <= FIFO, "serial port {} holds {count} bytes", self.number);
        let state = SerialState {
            baud_divisor_low: saved.divisor[0],
            baud_divisor_high: saved.divisor[1],
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received.clone(),
        };
        let line = Line(self.irqchip.clone(), layout::SERIAL[self.number].1);
        let (drained, output) = (Drained(self.output.clone()), Output(self.output.clone()));
        let uart = Serial::from_state(&state, line, drained, output);
        *self.uart() = uart.map_err(|error| anyhow!("serial port {}: {error:?}", self.number))?;
        Ok(())
    }

    /// Its registers and what waits in it, as the control request `dump` tells them.
    pub(crate) fn dump(&self) -> Value {
        let state = self.uart().state();
        json!({
            "serial": self.number,
            "enable": state.interrupt_enable,
            "identification": state.interrupt_identification,
            "line_status": state.line_status,
            "received": state.in_buffer.len(),
            "sent": self.output.queue().len(),
        })
    }

    /// Gives the guest as much of `input` as its UART takes, and returns the number of bytes.
    fn enqueue(&self, input: &[u8]) -> usize {
        let mut uart = self.uart();
        let room = uart.fifo_capacity().min(input.len());
        uart.enqueue_raw_bytes(&input[..room]).unwrap_or(0)
    }
}

/// Reads a register for the guest.
///
/// A UART tells of received data as long as it has some. That of `vm-superio` forgets it at each
/// read of a byte or of the identification, and interrupts again only when more comes. Linux takes
/// 256 bytes at most at a time, and then asks whether there is more. If it were told that there is
/// none, it would leave the rest for the next interrupt. But no more data comes before the guest
/// has taken the rest: the port would be silent for ever. So this function tells of data that is
/// there.
fn read_register(uart: &mut Uart, offset: u8) -> u8 {
    let value = uart.read(offset);
    if offset == IDENTIFICATION
        && value & KINDS == KIND_NONE
        && uart.fifo_capacity() < FIFO
        && uart.read(LINE_CONTROL) & DIVISOR == 0
        && uart.read(ENABLE) & ENABLE_RECEIVED != 0
    {
        return value & !KINDS | KIND_RECEIVED;
    }
    value
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // A wider access reaches the first register only. The other bytes stay as they are.
        if let (Ok(offset), [first, ..]) = (u8::try_from(offset), data) {
            *first = read_register(&mut self.uart(), offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [first, ..]) = (u8::try_from(offset), data) {
            // Neither the interrupt nor the queue fails.
            let _ = self.uart().write(offset, *first);
        }
    }
}

/// A port with its thread. Dropping this value writes the last output.
pub struct AttachedPort {
    /// The port.
    pub port: Arc<SerialPort>,
    ended: Receiver<()>,
    path: Option<PathBuf>,
}

impl AttachedPort {
    /// Puts port `number` (0: COM1) onto `pio` and connects it to `target`.
    ///
    /// # Errors
    /// `target` cannot be opened, or the process has no more threads or descriptors.
    pub fn start(
        number: usize,
        target: &Target,
        irqchip: &Arc<IrqChip>,
        pio: &mut Bus,
        events: &EventSender,
        options: SerialOptions,
    ) -> Result<AttachedPort> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let output =
            Arc::new(OutputQueue { queue: Mutex::default(), event, end: AtomicBool::new(false) });
        let uart = Mutex::new(SerialPort::fresh(irqchip, number, &output));
        let port = Arc::new(SerialPort { number, uart, irqchip: irqchip.clone(), output });
        pio.add(layout::SERIAL[number].0.into(), PORTS, port.clone());
        let (remote, path) = Remote::open(target, options.raw)?;
        let mut pump =
            Pump { port: port.clone(), remote, input: VecDeque::new(), events: events.clone() };
        let (tell, ended) = channel();
        std::thread::Builder::new().name(format!("serial{number}")).spawn(move || {
            match if options.filter { seccomp::apply(Thread::Serial) } else { Ok(()) } {
                Ok(()) => pump.run(),
                Err(error) => drop(pump.events.send(VmEvent::Fail(error))),
            }
            let _ = tell.send(());
        })?;
        Ok(AttachedPort { port, ended, path })
    }
}

/// Options of the threads of serial ports.
#[derive(Clone, Copy)]
pub struct SerialOptions {
    /// Standard input is a terminal in raw mode.
    pub raw: bool,
    /// A filter restricts the system calls of the thread.
    pub filter: bool,
}

impl Drop for AttachedPort {
    fn drop(&mut self) {
        self.port.output.end.store(true, Ordering::Release);
        self.port.output.wake();
        // A reader that takes nothing is not waited for.
        let _ = self.ended.recv_timeout(DRAIN_TIMEOUT);
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The other end.
enum Remote {
    Stdio { input: Option<io::Stdin>, escape: Option<Escape> },
    Unix { listener: UnixListener, client: Option<UnixStream> },
    File(File),
    None,
}

impl Remote {
    fn open(target: &Target, raw: bool) -> Result<(Remote, Option<PathBuf>)> {
        Ok(match target {
            Target::Stdio => (
                Remote::Stdio { input: Some(io::stdin()), escape: raw.then(Escape::default) },
                None,
            ),
            Target::None => (Remote::None, None),
            Target::File(path) => {
                let file = File::create(path)
                    .with_context(|| format!("cannot make {}", path.display()))?;
                (Remote::File(file), None)
            }
            Target::Unix(path) => {
                let listener = crate::socket::listen(path)?;
                (Remote::Unix { listener, client: None }, Some(path.clone()))
            }
        })
    }

    /// The descriptor that gives input.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Remote::Stdio { input, .. } => input.as_ref().map(AsFd::as_fd),
            Remote::Unix { client, .. } => client.as_ref().map(AsFd::as_fd),
            Remote::File(_) | Remote::None => None,
        }
    }

    /// The descriptor that takes output.
    fn sink(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Remote::Stdio { .. } => Some(rustix::stdio::stdout()),
            Remote::Unix { client, .. } => client.as_ref().map(AsFd::as_fd),
            Remote::File(file) => Some(file.as_fd()),
            Remote::None => None,
        }
    }

    /// Closes the input, or both directions.
    fn close(&mut self) {
        match self {
            Remote::Stdio { input, .. } => *input = None,
            Remote::Unix { client, .. } => *client = None,
            Remote::File(_) | Remote::None => {}
        }
    }
}

/// The work of a port's thread.
struct Pump {
    port: Arc<SerialPort>,
    remote: Remote,
    /// Input that the guest has not taken yet.
    input: VecDeque<u8>,
    events: EventSender,
}

impl Pump {
    fn run(&mut self) {
        loop {
            let end = self.port.output.end.load(Ordering::Acquire);
            let output = !self.port.output.queue().is_empty();
            if matches!(self.remote, Remote::None) {
                self.port.output.queue().clear();
            }
            if end && (!output || self.remote.sink().is_none()) {
                return;
            }
            let Ok((readable, writable, caller)) = self.wait(output) else { return };
            if caller {
                self.accept();
            }
            if readable {
                self.read();
            }
            if writable {
                self.write();
            }
            let taken = self.port.enqueue(self.input.make_contiguous());
            self.input.drain(..taken);
        }
    }

    /// Waits for the guest or for the other end: input, room for output, a new client.
    fn wait(&self, output: bool) -> io::Result<(bool, bool, bool)> {
        let nothing = PollFlags::empty();
        let event = &self.port.output.event;
        let mut fds = vec![PollFd::new(event, PollFlags::IN)];
        // A descriptor that is not needed now is not polled: its hang-up would wake the thread
        // again and again.
        let source = self.remote.source().filter(|_| self.input.is_empty());
        let sink = self.remote.sink().filter(|_| output);
        let caller = match &self.remote {
            Remote::Unix { listener, client: None } => Some(listener.as_fd()),
            _ => None,
        };
        let of = [(source, PollFlags::IN), (sink, PollFlags::OUT), (caller, PollFlags::IN)];
        for (fd, flags) in of {
            fds.push(fd.map_or_else(
                || PollFd::new(event, nothing),
                |fd| PollFd::from_borrowed_fd(fd, flags),
            ));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        if !fds[0].revents().is_empty() {
            let _ = rustix::io::read(event, &mut [0_u8; 8]);
        }
        let ready =
            |at: usize, fd: Option<BorrowedFd<'_>>| fd.is_some() && !fds[at].revents().is_empty();
        Ok((ready(1, source), ready(2, sink), ready(3, caller)))
    }

    fn accept(&mut self) {
        let Remote::Unix { listener, client } = &mut self.remote else { return };
        let Ok((socket, _)) = listener.accept() else { return };
        if socket.set_nonblocking(true).is_ok() {
            *client = Some(socket);
        }
    }

    fn read(&mut self) {
        let Some(source) = self.remote.source() else { return };
        let mut bytes = [0; 256];
        match rustix::io::read(source, &mut bytes) {
            Ok(0) => self.remote.close(),
            Ok(count) => {
                let bytes = &bytes[..count];
                match &mut self.remote {
                    Remote::Stdio { escape: Some(escape), .. } => {
                        for byte in bytes {
                            match escape.next(*byte) {
                                Escaped::Input(byte) => self.input.push_back(byte),
                                Escaped::Nothing => {}
                                Escaped::Quit => drop(self.events.send(VmEvent::Quit)),
                            }
                        }
                    }
                    _ => self.input.extend(bytes),
                }
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => self.remote.close(),
        }
    }

    fn write(&mut self) {
        let mut queue = self.port.output.queue();
        let (bytes, _) = queue.as_slices();
        let mut piece = [0; 4096];
        let count = bytes.len().min(piece.len());
        piece[..count].copy_from_slice(&bytes[..count]);
        drop(queue);
        let Some(sink) = self.remote.sink() else { return };
        // The bytes leave the queue after they are written. Only this thread takes bytes, and from
        // the front. A queue that became full meanwhile has lost the same bytes.
        match rustix::io::write(sink, &piece[..count]) {
            Ok(written) => {
                queue = self.port.output.queue();
                let written = written.min(queue.len());
                queue.drain(..written);
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            // A terminal or a file takes no more output, and no one can be told of it.
            Err(_) if !matches!(self.remote, Remote::Unix { .. }) => self.remote = Remote::None,
            Err(_) => self.remote.close(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use std::io::Read;
    use std::time::Instant;

    use super::*;

    const COM1: u64 = layout::SERIAL[0].0 as u64;
    const LINE_STATUS: u64 = COM1 + 5;

    /// A serial port without a machine.
    struct Fixture {
        pio: Bus,
        attached: AttachedPort,
    }

    fn fixture(target: &Target) -> Fixture {
        let (mut pio, irqchip) = (Bus::default(), Arc::new(IrqChip::for_tests()));
        let options = SerialOptions { raw: false, filter: false };
        let attached =
            AttachedPort::start(0, target, &irqchip, &mut pio, &channel().0, options).unwrap();
        Fixture { pio, attached }
    }

    impl Fixture {
        fn write(&self, bytes: &[u8]) {
            bytes.iter().for_each(|byte| self.pio.write(COM1, &[*byte]));
        }

        fn read_byte(&self, port: u64) -> u8 {
            let mut data = [0];
            self.pio.read(port, &mut data);
            data[0]
        }

        /// Reads as a guest that polls would.
        fn read(&self, count: usize) -> Vec<u8> {
            let until = Instant::now() + Duration::from_secs(60);
            let mut bytes = Vec::new();
            while bytes.len() < count {
                assert!(Instant::now() < until, "{} of {count} bytes came", bytes.len());
                if self.read_byte(LINE_STATUS) & 1 == 1 {
                    bytes.push(self.read_byte(COM1))
                } else {
                    std::thread::yield_now()
                }
            }
            bytes
        }
    }

    #[test]
    fn a_socket_carries_both_ways_and_keeps_what_came_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let fixture = fixture(&Target::Unix(path.clone()));
        fixture.write(b"early ");
        for turn in 0..2 {
            let mut client = UnixStream::connect(&path).unwrap();
            fixture.write(b"hello");
            let expected: &[u8] = if turn == 0 { b"early hello" } else { b"hello" };
            let mut heard = vec![0; expected.len()];
            client.read_exact(&mut heard).unwrap();
            assert_eq!(heard, expected);
            // This is more than the UART holds at a time.
            let typed: Vec<u8> = (0..=255).cycle().take(1000).collect();
            client.write_all(&typed).unwrap();
            assert_eq!(fixture.read(1000), typed);
            drop(client);
        }
        drop(fixture);
        assert!(!path.exists());
    }

    /// Reads as Linux's interrupt handler does: at most 256 bytes at a time, and again as long as
    /// the UART tells of an interrupt. Returns the bytes that it has taken in all.
    fn handle_interrupt(fixture: &Fixture) -> Vec<u8> {
        let mut taken = Vec::new();
        while fixture.read_byte(COM1 + u64::from(IDENTIFICATION)) & KINDS != KIND_NONE {
            for _ in 0..256 {
                if fixture.read_byte(LINE_STATUS) & 1 == 0 {
                    break;
                }
                taken.push(fixture.read_byte(COM1));
            }
        }
        taken
    }

    #[test]
    fn the_uart_tells_of_data_as_long_as_it_has_some() {
        let fixture = fixture(&Target::None);
        let kind = || fixture.read_byte(COM1 + u64::from(IDENTIFICATION)) & KINDS;
        let port = &fixture.attached.port;
        assert_eq!(port.uart().fifo_capacity(), FIFO);
        // A guest that polls is told of no interrupt.
        assert_eq!(port.enqueue(b"a"), 1);
        assert_eq!((kind(), fixture.read_byte(COM1)), (KIND_NONE, b'a'));

        fixture.pio.write(COM1 + u64::from(ENABLE), &[ENABLE_RECEIVED]);
        assert_eq!(port.enqueue(b"bcd"), 3);
        for byte in b"bcd" {
            assert_eq!((kind(), kind()), (KIND_RECEIVED, KIND_RECEIVED), "before {byte}");
            assert_eq!(fixture.read_byte(COM1), *byte);
        }
        assert_eq!(kind(), KIND_NONE);
    }

    #[test]
    fn a_guest_that_takes_256_bytes_at_a_time_gets_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let fixture = fixture(&Target::Unix(path.clone()));
        fixture.pio.write(COM1 + u64::from(ENABLE), &[ENABLE_RECEIVED]);
        let mut client = UnixStream::connect(&path).unwrap();
        let typed: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        client.write_all(&typed).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        let mut taken = Vec::new();
        while taken.len() < typed.len() {
            assert!(Instant::now() < until, "{} of {} bytes came", taken.len(), typed.len());
            taken.extend(handle_interrupt(&fixture));
        }
        assert_eq!(taken, typed);
    }

    #[test]
    fn a_file_has_all_that_was_written_when_the_port_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "older").unwrap();
        let fixture = fixture(&Target::File(path.clone()));
        let text: Vec<u8> = (b' '..=b'~').cycle().take(100_000).collect();
        fixture.write(&text);
        // A reset loses nothing either.
        fixture.attached.port.reset();
        drop(fixture);
        assert_eq!(std::fs::read(&path).unwrap(), text);
    }

    #[test]
    fn what_nobody_takes_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let fixture = fixture(&Target::Unix(path.clone()));
        fixture.write(b"lost");
        fixture.write(&vec![b'x'; QUEUE_MAX]);
        assert_eq!(fixture.attached.port.output.queue().len(), QUEUE_MAX);
        assert_eq!(fixture.attached.port.output.queue()[0], b'x');
    }

    #[test]
    fn targets_are_read_as_they_are_written() {
        assert_eq!("unix:/a:b".parse(), Ok(Target::Unix("/a:b".into())));
        assert_eq!("file:log".parse(), Ok(Target::File("log".into())));
        for wrong in ["", "unix:", "stdio:", "tcp:1", "/dev/pts/1"] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong}");
        }
    }
}
