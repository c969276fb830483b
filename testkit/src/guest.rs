// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Commands in a guest, through its agent (`testkit/agent`) on a serial port of its own.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long a command may take if the caller sets no limit. Most take milliseconds.
const LIMIT: Duration = Duration::from_secs(120);

/// How often the watch pings a guest.
const PING: Duration = Duration::from_secs(5);

/// The result of a command.
#[derive(Clone, Debug, Default)]
pub struct Output {
    /// Its exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

/// A guest. It runs commands through its agent.
#[derive(Clone)]
pub struct Guest {
    name: String,
    port: Arc<Mutex<UnixStream>>,
    state: Arc<(Mutex<State>, Condvar)>,
    patience: u32,
}

#[derive(Default)]
struct State {
    /// How often the agent has started.
    boots: u32,
    closed: bool,
    /// Whether the agent has stopped answering; see [`Guest::watch`].
    silent: bool,
    /// How many frames have come.
    frames: u64,
    commands: HashMap<u64, Heard>,
}

#[derive(Default)]
struct Heard {
    out: Vec<u8>,
    err: Vec<u8>,
    code: Option<i32>,
}

impl Guest {
    /// A guest whose agent is at the other end of `port`.
    pub fn new(name: &str, port: UnixStream) -> Result<Self> {
        let reader = BufReader::new(port.try_clone()?);
        let state: Arc<(Mutex<State>, Condvar)> = Arc::default();
        let guest = Self {
            name: name.to_owned(),
            port: Arc::new(Mutex::new(port)),
            state: Arc::clone(&state),
            patience: 1,
        };
        thread::spawn(move || {
            for line in reader.split(b'\n').map_while(std::result::Result::ok) {
                lock(&state.0).hear(&String::from_utf8_lossy(&line));
                state.1.notify_all();
            }
            lock(&state.0).closed = true;
            state.1.notify_all();
        });
        Ok(guest)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same guest, but every wait for something in it may take this many times as long as its
    /// caller says.
    #[must_use]
    pub fn with_patience(self, patience: u32) -> Self {
        Self { patience, ..self }
    }

    /// A time within which something happens in the guest, as long as it may take.
    pub fn at_most(&self, limit: Duration) -> Duration {
        limit.saturating_mul(self.patience)
    }

    /// Watches the guest from now on. If its agent does not answer pings for `silence`, the guest
    /// counts as hung.
    ///
    /// Every wait for a hung guest fails at once.
    pub fn watch(&self, silence: Duration) {
        let guest = self.clone();
        thread::spawn(move || {
            let (mut frames, mut heard) = (0, Instant::now());
            loop {
                let _ = guest.frame("ping\n");
                let state = lock(&guest.state.0);
                let (mut state, _) = guest
                    .state
                    .1
                    .wait_timeout_while(state, PING.min(silence / 8), |state| !state.closed)
                    .unwrap_or_else(PoisonError::into_inner);
                if state.closed {
                    return;
                }
                if state.frames != frames {
                    (frames, heard) = (state.frames, Instant::now());
                } else if heard.elapsed() > silence {
                    (state.closed, state.silent) = (true, true);
                    guest.state.1.notify_all();
                    return;
                }
            }
        });
    }

    /// Whether [`Guest::watch`] has found that the guest hangs.
    pub fn hung(&self) -> bool {
        lock(&self.state.0).silent
    }

    /// Waits until the agent sends any frame, and returns whether it did. A caller whose wait for
    /// something else has failed learns so whether the guest hangs. [`Guest::watch`] bounds the
    /// wait, so the guest must be watched.
    pub fn answers(&self) -> bool {
        let before = lock(&self.state.0).frames;
        self.frame("ping\n").is_ok()
            && self.wait(Duration::MAX, |state| (state.frames > before).then_some(())).is_ok()
    }

    /// Starts a command and returns its standard input and output as a stream. A test reaches an L2
    /// in this way.
    ///
    /// The stream ends when the command ends.
    pub fn tunnel(&self, command: &str) -> Result<UnixStream> {
        let running = Arc::new(self.start(command)?);
        let (ours, theirs) = UnixStream::pair()?;
        let (mut from, writer) = (ours.try_clone()?, Arc::clone(&running));
        thread::spawn(move || {
            let mut piece = [0; 1024];
            while let Ok(length @ 1..) = from.read(&mut piece) {
                if writer.input(&piece[..length]).is_err() {
                    break;
                }
            }
            let _ = writer.input(&[]);
        });
        thread::spawn(move || {
            let mut to = &ours;
            let _ = running.stream(Duration::MAX, |out, _| to.write_all(out).is_ok());
            let _ = ours.shutdown(Shutdown::Both);
        });
        Ok(theirs)
    }

    /// How often the guest has booted so far.
    pub fn boots(&self) -> u32 {
        lock(&self.state.0).boots
    }

    /// Waits until the guest has booted `times` times.
    pub fn wait_boot(&self, times: u32, limit: Duration) -> Result<()> {
        self.wait(limit, |state| (state.boots >= times).then_some(()))
            .with_context(|| format!("guest {} does not come up", self.name))
    }

    /// Starts a shell command and returns at once.
    ///
    /// If it leaves a process in the background that has its output, it counts as ended some
    /// seconds after its own end. Redirect the output of such a process, or it still appears
    /// afterwards.
    pub fn start(&self, command: &str) -> Result<Running> {
        // A guest that is restored or moved goes on with its agent and that agent's commands, but
        // is another value here. So no two commands of this process have the same number.
        static LAST: AtomicU64 = AtomicU64::new(0);
        let id = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        lock(&self.state.0).commands.insert(id, Heard::default());
        let running = Running { guest: self.clone(), id, command: command.to_owned() };
        running.say("run", command.as_bytes())?;
        Ok(running)
    }

    /// Runs a shell command to its end. It may take two minutes.
    pub fn run(&self, command: &str) -> Result<Output> {
        self.run_for(command, LIMIT)
    }

    /// Runs a shell command to its end. It may take `limit`.
    pub fn run_for(&self, command: &str, limit: Duration) -> Result<Output> {
        self.start(command)?.wait(limit)
    }

    /// Runs a shell command that must succeed, and returns its standard output.
    pub fn ok(&self, command: &str) -> Result<String> {
        self.start(command)?.ok(LIMIT)
    }

    fn frame(&self, line: &str) -> Result<()> {
        let mut port = lock(&self.port);
        port.write_all(line.as_bytes())
            .with_context(|| format!("the machine of guest {} is gone", self.name))
    }

    /// Waits until `check` of the state returns a value, or until the channel closes.
    fn wait<T>(
        &self,
        limit: Duration,
        mut check: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T> {
        let (began, limit) = (Instant::now(), self.at_most(limit));
        let mut state = lock(&self.state.0);
        loop {
            if let Some(found) = check(&mut state) {
                return Ok(found);
            }
            ensure!(!state.silent, "guest {} hangs: its agent answers no more", self.name);
            ensure!(!state.closed, "the machine of guest {} is gone", self.name);
            let left = limit.saturating_sub(began.elapsed());
            ensure!(!left.is_zero(), "nothing within {:.0} s", limit.as_secs_f32());
            state =
                self.state.1.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    fn hear(&mut self, line: &str) {
        self.frames += 1;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["hello"] => {
                self.boots += 1;
                // A command from before a reboot sends nothing more.
                for heard in self.commands.values_mut() {
                    heard.code.get_or_insert(255);
                }
            }
            [kind, id, rest] => {
                let Some(heard) = id.parse().ok().and_then(|id: u64| self.commands.get_mut(&id))
                else {
                    return;
                };
                match kind {
                    "out" => heard.out.extend(decode(rest)),
                    "err" => heard.err.extend(decode(rest)),
                    "end" => heard.code = rest.parse().ok().or(Some(255)),
                    _ => {}
                }
            }
            _ => {}
        }
    }
}

/// A command that runs in a guest. It continues to run if this is dropped.
pub struct Running {
    guest: Guest,
    id: u64,
    command: String,
}

impl Running {
    /// Waits for the end of the command. If it takes longer than `limit`, it is killed, and that is
    /// an error.
    pub fn wait(&self, limit: Duration) -> Result<Output> {
        self.guest.wait(limit, |state| self.ended(state)).map_err(|error| self.give_up(error))
    }

    /// Waits for the end of the command. If it prints nothing for `silence`, that is an error:
    /// `silent` is called, and the command is killed.
    pub fn wait_talking(&self, silence: Duration, silent: impl FnOnce()) -> Result<Output> {
        let mut heard = 0;
        loop {
            let news = self.guest.wait(silence, |state| {
                let ended = self.ended(state);
                let said = state
                    .commands
                    .get(&self.id)
                    .map_or(0, |heard| heard.out.len() + heard.err.len());
                (ended.is_some() || said > heard).then_some((ended, said))
            });
            match news {
                Ok((Some(output), _)) => return Ok(output),
                Ok((None, said)) => heard = said,
                Err(error) => {
                    silent();
                    return Err(self.give_up(error));
                }
            }
        }
    }

    fn ended(&self, state: &State) -> Option<Output> {
        let heard = state.commands.get(&self.id)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        heard.code.map(|code| Output { code, stdout: text(&heard.out), stderr: text(&heard.err) })
    }

    /// Kills the command because of `error`. Returns the error with the command's output.
    fn give_up(&self, error: anyhow::Error) -> anyhow::Error {
        let _ = self.kill();
        let (out, err) = self.said();
        error.context(format!("guest {}: {}\n{out}{err}", self.guest.name, self.command))
    }

    /// Waits until the command succeeds, and returns its standard output.
    pub fn ok(&self, limit: Duration) -> Result<String> {
        let output = self.wait(limit)?;
        if output.code != 0 {
            bail!(
                "guest {}: {} ended with {}:\n{}{}",
                self.guest.name,
                self.command,
                output.code,
                output.stdout,
                output.stderr
            );
        }
        Ok(output.stdout)
    }

    /// The command's standard output and error so far.
    pub fn said(&self) -> (String, String) {
        let state = lock(&self.guest.state.0);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        state
            .commands
            .get(&self.id)
            .map(|heard| (text(&heard.out), text(&heard.err)))
            .unwrap_or_default()
    }

    /// Passes the command's standard output and error to `sink` as they come. Returns the exit
    /// code.
    ///
    /// The output is not kept. If `sink` returns false, this ends early with the code 255.
    pub fn stream(
        &self,
        limit: Duration,
        mut sink: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<i32> {
        let began = Instant::now();
        loop {
            let (out, err, code) =
                self.guest.wait(limit.saturating_sub(began.elapsed()), |state| {
                    let heard = state.commands.get_mut(&self.id)?;
                    let news =
                        !heard.out.is_empty() || !heard.err.is_empty() || heard.code.is_some();
                    news.then(|| {
                        (std::mem::take(&mut heard.out), std::mem::take(&mut heard.err), heard.code)
                    })
                })?;
            let goes_on = sink(&out, &err);
            match code {
                Some(code) => return Ok(code),
                None if !goes_on => return Ok(255),
                None => {}
            }
        }
    }

    /// Waits until the command has printed `text`, on either output.
    pub fn wait_for(&self, text: &str, limit: Duration) -> Result<()> {
        let ended = self.guest.wait(limit, |state| {
            let heard = state.commands.get(&self.id)?;
            let seen = [&heard.out, &heard.err]
                .iter()
                .any(|bytes| String::from_utf8_lossy(bytes).contains(text));
            (seen || heard.code.is_some()).then_some(seen)
        });
        match ended {
            Ok(true) => Ok(()),
            Ok(false) => {
                let (out, err) = self.said();
                bail!(
                    "guest {}: {} ended without saying {text:?}:\n{out}{err}",
                    self.guest.name,
                    self.command
                )
            }
            Err(error) => {
                let (out, err) = self.said();
                let (name, command) = (&self.guest.name, &self.command);
                Err(error
                    .context(format!("guest {name}: {command} does not say {text:?}:\n{out}{err}")))
            }
        }
    }

    /// Whether the command still runs.
    pub fn runs(&self) -> bool {
        lock(&self.guest.state.0).commands.get(&self.id).is_some_and(|heard| heard.code.is_none())
    }

    /// Kills the command and its children (SIGKILL).
    pub fn kill(&self) -> Result<()> {
        self.say("kill", &[])
    }

    /// Writes to the command's standard input.
    pub fn input(&self, bytes: &[u8]) -> Result<()> {
        self.say("input", bytes)
    }

    fn say(&self, verb: &str, data: &[u8]) -> Result<()> {
        let hex: Vec<_> = data.iter().map(|byte| format!("{byte:02x}")).collect();
        self.guest.frame(&format!("{verb} {} {}\n", self.id, hex.concat()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn decode(hex: &str) -> Vec<u8> {
    let digits = hex.as_bytes().chunks_exact(2);
    digits.filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    /// An agent that answers a number of pings and then hangs.
    fn agent(port: UnixStream, mut pings: u32) -> thread::JoinHandle<()> {
        thread::spawn(move || {
            let mut writer = port.try_clone().unwrap();
            writer.write_all(b"hello\n").unwrap();
            for line in BufReader::new(port).lines().map_while(std::result::Result::ok) {
                if line == "ping" && pings > 0 {
                    pings -= 1;
                    writer.write_all(b"pong\n").unwrap();
                }
            }
        })
    }

    #[test]
    fn a_guest_that_hangs_is_found_out_and_one_that_works_is_not() {
        const SILENCE: Duration = Duration::from_millis(400);
        for (pings, hangs) in [(u32::MAX, false), (3, true)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let closer = theirs.try_clone().unwrap();
            let agent = agent(theirs, pings);
            let guest = Guest::new("test", ours).unwrap();
            guest.wait_boot(1, LIMIT).unwrap();
            guest.watch(SILENCE);
            let began = Instant::now();
            // The command does not end. Only the watch can find that the agent is silent.
            let limit = if hangs { LIMIT } else { SILENCE * 3 };
            let error = guest.run_for("sleep 1000", limit).unwrap_err();
            assert_eq!(guest.hung(), hangs, "{error:#}");
            assert_eq!(guest.answers(), !hangs);
            assert_eq!(format!("{error:#}").contains("hangs"), hangs, "{error:#}");
            assert!(began.elapsed() < LIMIT / 2);
            closer.shutdown(Shutdown::Both).unwrap();
            agent.join().unwrap();
        }
    }

    #[test]
    fn who_waited_too_short_to_know_can_ask_whether_a_guest_hangs() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let closer = theirs.try_clone().unwrap();
        let agent = agent(theirs, 0);
        let guest = Guest::new("test", ours).unwrap();
        guest.wait_boot(1, LIMIT).unwrap();
        guest.watch(Duration::from_millis(400));
        guest.run_for("true", Duration::from_millis(1)).unwrap_err();
        assert!(!guest.answers() && guest.hung());
        closer.shutdown(Shutdown::Both).unwrap();
        agent.join().unwrap();
    }

    #[test]
    fn a_tunnel_carries_bytes_both_ways_and_ends_with_its_command() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let guest = Guest::new("test", ours).unwrap();
        let mut tunnel = guest.tunnel("cat").unwrap();
        let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
        let run = lines.next().unwrap().unwrap();
        let id = run.split(' ').nth(1).unwrap().to_owned();
        tunnel.write_all(b"to it").unwrap();
        let input = lines.next().unwrap().unwrap();
        assert_eq!(decode(input.strip_prefix(&format!("input {id} ")).unwrap()), b"to it");
        (&theirs).write_all(format!("out {id} 66726f6d\nend {id} 0\n").as_bytes()).unwrap();
        let mut said = String::new();
        tunnel.read_to_string(&mut said).unwrap();
        assert_eq!(said, "from");
    }
}
