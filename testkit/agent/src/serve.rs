// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs commands for the host. Each line on a serial port in raw mode is one frame.
//!
//! | frame | direction | meaning |
//! |---|---|---|
//! | `hello` | to the host | the agent has started; a second one means a reboot |
//! | `ping` | to the guest | the agent answers `pong` at once |
//! | `run ID HEX` | to the guest | start `/bin/sh -c` with the command HEX |
//! | `input ID HEX` | to the guest | write to the command's input; an empty HEX closes it |
//! | `kill ID` | to the guest | SIGKILL to the process group of the command |
//! | `out ID HEX`, `err ID HEX` | to the host | a piece of the command's output |
//! | `end ID CODE` | to the host | it has ended, after its output; CODE may be 128 + signal |
//!
//! Data is hexadecimal: no output of a command can look like a frame. Commands run side by side. A
//! process that a command leaves in the background may still print after the end of the command.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;

/// The most bytes of output in one frame.
const PIECE: usize = 2048;

/// After a command has ended, its output counts as whole once nothing more came for this long. The
/// output is not closed if a process in the background still has it.
const QUIET: Duration = Duration::from_secs(2);

/// The running commands by id: process group and standard input.
type Running = Arc<Mutex<HashMap<String, (u32, Option<ChildStdin>)>>>;

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The channel to the host: a serial port or a socket. All threads that send frames share it.
#[derive(Clone)]
struct Channel(Arc<Mutex<File>>);

impl Channel {
    fn say(&self, frame: &str) {
        let mut channel = lock(&self.0);
        // If this fails, the host is gone, and nobody is left to tell.
        let _ = channel.write_all(format!("{frame}\n").as_bytes());
    }
}

/// Serves the channel until it is closed.
pub fn serve(path: &str) -> io::Result<()> {
    let file = if fs::metadata(path)?.file_type().is_socket() {
        File::from(OwnedFd::from(UnixStream::connect(path)?))
    } else {
        File::options().read(true).write(true).open(path)?
    };
    let input = BufReader::new(file.try_clone()?);
    let channel = Channel(Arc::new(Mutex::new(file)));
    let running = Running::default();
    channel.say("hello");
    for line in input.lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["ping"] => channel.say("pong"),
            ["run", id, hex] => match start(&String::from_utf8_lossy(&decode(hex))) {
                Ok(mut child) => {
                    lock(&running).insert(id.to_owned(), (child.id(), child.stdin.take()));
                    let (id, channel, running) =
                        (id.to_owned(), channel.clone(), Arc::clone(&running));
                    thread::spawn(move || {
                        let code = follow(&id, child, &channel);
                        lock(&running).remove(&id);
                        channel.say(&format!("end {id} {code}"));
                    });
                }
                Err(error) => {
                    channel.say(&format!("err {id} {}", encode(error.to_string().as_bytes())));
                    channel.say(&format!("end {id} 127"));
                }
            },
            ["input", id, hex] => {
                if let Some((_, Some(stdin))) = lock(&running).get_mut(id) {
                    // A command may stop reading its input.
                    let _ = stdin.write_all(&decode(hex));
                }
            }
            ["input", id] => {
                if let Some((_, stdin)) = lock(&running).get_mut(id) {
                    *stdin = None;
                }
            }
            ["kill", id] => {
                if let Some((pid, _)) = lock(&running).get(id) {
                    // The shell's own `kill`: a host that is no guest may have no other.
                    let kill = format!("kill -9 -{pid}");
                    Command::new("/bin/sh").args(["-c", &kill]).status()?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

fn start(command: &str) -> io::Result<Child> {
    // `kill` ends the whole process group, so the command's children end too.
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", command]).process_group(0);
    shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
}

/// Sends a command's output to the host until it ends. Returns its exit code.
fn follow(id: &str, mut child: Child, host: &Channel) -> i32 {
    // Each reader sends when it goes on, and drops its sender at the end of its stream.
    let (goes_on, readers) = channel();
    let streams = [
        ("out", child.stdout.take().map(OwnedFd::from)),
        ("err", child.stderr.take().map(OwnedFd::from)),
    ];
    let streams: Vec<Stream> = streams
        .into_iter()
        .filter_map(|(kind, stream)| Some(copy(kind, id, stream?, host, goes_on.clone())))
        .collect();
    drop(goes_on);
    let code = match child.wait() {
        Ok(status) => status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
        Err(_) => 255,
    };
    loop {
        match readers.recv_timeout(QUIET) {
            Ok(()) => {}
            // A reader may be slow on a busy machine. What the command has said is in its stream.
            Err(RecvTimeoutError::Timeout) if streams.iter().any(Stream::has_more) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return code,
        }
    }
}

/// A stream that is copied. Its reader has the lock from before it takes a piece until the host has
/// that piece.
#[derive(Clone)]
struct Stream(Arc<(File, Mutex<()>)>);

impl Stream {
    /// Whether there are bytes that the host does not have. It waits for a piece on its way.
    fn has_more(&self) -> bool {
        let (file, turn) = &*self.0;
        let _turn = lock(turn);
        ioctl_fionread(file).is_ok_and(|bytes| bytes > 0)
    }
}

/// Copies a stream to the host, in a thread of its own.
fn copy(
    kind: &'static str,
    id: &str,
    from: OwnedFd,
    host: &Channel,
    goes_on: Sender<()>,
) -> Stream {
    let (id, host) = (id.to_owned(), host.clone());
    let stream = Stream(Arc::new((File::from(from), Mutex::new(()))));
    let shared = stream.clone();
    thread::spawn(move || {
        let (file, turn) = &*shared.0;
        let mut piece = [0; PIECE];
        loop {
            // Without the lock.
            if poll(&mut [PollFd::new(file, PollFlags::IN)], None).is_err() {
                continue;
            }
            let _turn = lock(turn);
            let mut from = file;
            let Ok(length @ 1..) = from.read(&mut piece) else { return };
            // Nobody listens after the end of the command.
            let _ = goes_on.send(());
            host.say(&format!("{kind} {id} {}", encode(&piece[..length])));
        }
    });
    stream
}

fn encode(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

fn decode(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2);
    digits.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn a_command_has_not_ended_before_the_host_has_its_output() {
        let (ours, host) = UnixStream::pair().unwrap();
        let channel = Channel(Arc::new(Mutex::new(File::from(OwnedFd::from(ours)))));
        let (ends, end) = std::sync::mpsc::channel();
        // The reader gets no further than to the channel, as on a machine that has no time for it.
        let busy = lock(&channel.0);
        let follows = channel.clone();
        thread::spawn(move || {
            let code = follow("7", start("echo text; sleep 0").unwrap(), &follows);
            follows.say(&format!("end 7 {code}"));
            ends.send(code).unwrap();
        });
        assert!(end.recv_timeout(2 * QUIET).is_err(), "it ended without its output");
        drop(busy);
        assert_eq!(end.recv(), Ok(0));
        let frames: Vec<String> =
            BufReader::new(host).lines().map_while(Result::ok).take(2).collect();
        assert_eq!(frames, ["out 7 746578740a", "end 7 0"]);
    }

    #[test]
    fn a_process_in_the_background_keeps_no_command_from_its_end() {
        let (ours, host) = UnixStream::pair().unwrap();
        let channel = Channel(Arc::new(Mutex::new(File::from(OwnedFd::from(ours)))));
        let child = start("sleep 1000 & echo $!").unwrap();
        let group = child.id();
        assert_eq!(follow("8", child, &channel), 0);
        Command::new("/bin/sh").args(["-c", &format!("kill -9 -{group}")]).status().unwrap();
        drop((host, channel));
    }
}
