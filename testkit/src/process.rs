// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Child processes that end with this process, and the folder of their sockets and logs.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// A child process. It is killed when this is dropped, and when this process dies in any way.
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command`. Its output goes to `log`.
    ///
    /// Call it on a thread that lives at least as long as the process: when the thread that started
    /// a process ends, the kernel kills the process.
    pub fn start(mut command: Command, name: &str, log: &Path) -> Result<Self> {
        command.stdout(log_file(log)?);
        Self::spawn(command, name, log)
    }

    /// Like [`start`](Self::start), but its standard output comes line by line from the receiver.
    pub fn start_with_lines(
        mut command: Command,
        name: &str,
        log: &Path,
    ) -> Result<(Self, Receiver<String>)> {
        command.stdout(Stdio::piped());
        let mut process = Self::spawn(command, name, log)?;
        let output = process.child.stdout.take().context("no output")?;
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok((process, lines))
    }

    fn spawn(mut command: Command, name: &str, log: &Path) -> Result<Self> {
        command.stdin(Stdio::null()).stderr(log_file(log)?);
        // Control-C at the terminal is for this process alone, which ends its children in its way.
        command.process_group(0);
        die_with_parent(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {name} ({:?})", command.get_program()))?;
        Ok(Self { child, name: name.to_owned(), log: log.to_owned() })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How the process ended, if it has.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > until {
                return Err(self.complaint(&format!("did not end within {} s", limit.as_secs())));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the process to end (SIGTERM) and waits for its end.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::TERM)?;
        self.wait(limit)
    }

    /// Ends the process at once (SIGKILL).
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let id = Pid::from_child(&self.child);
        kill_process(id, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// An error about this process, with the end of its log.
    pub fn complaint(&self, what: &str) -> anyhow::Error {
        anyhow::anyhow!("{} {what}{}", self.name, tail(&self.log))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn log_file(log: &Path) -> Result<File> {
    File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot write {}", log.display()))
}

// Between fork and exec only calls that are safe in a signal handler are allowed.
#[allow(unsafe_code)]
fn die_with_parent(command: &mut Command) {
    // SAFETY: the closure makes one system call and neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
}

/// A command as one line for a shell, with the environment variables that it sets.
pub fn command_line(command: &Command) -> String {
    let quoted = |text: &OsStr| {
        let text = text.to_string_lossy().into_owned();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%".contains(c);
        if !text.is_empty() && text.chars().all(plain) {
            text
        } else {
            format!("'{}'", text.replace('\'', "'\\''"))
        }
    };
    let mut words = Vec::new();
    let set: Vec<_> = command.get_envs().filter_map(|(name, value)| Some((name, value?))).collect();
    if !set.is_empty() {
        words.push("env".to_owned());
        words.extend(
            set.iter().map(|(name, value)| format!("{}={}", name.to_string_lossy(), quoted(value))),
        );
    }
    words.push(quoted(command.get_program()));
    words.extend(command.get_args().map(quoted));
    words.join(" ")
}

/// The last lines of a log, indented, for an error message. Empty if the log is empty.
pub fn tail(log: &Path) -> String {
    let text = String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(20)..];
    if last.is_empty() {
        String::new()
    } else {
        format!("; the end of {}:\n    {}", log.display(), last.join("\n    "))
    }
}

/// A folder for sockets and logs. Only this user can read it, and it is removed when this is
/// dropped.
///
/// It is in the system's folder for temporary files, because the path of a socket has at most 107
/// bytes.
pub struct RunDir {
    path: PathBuf,
}

const PREFIX: &str = "vbus-xtask-";

impl RunDir {
    /// Makes the folder. Also removes the folders of runs that were killed.
    pub fn new() -> Result<Self> {
        let parent = std::env::temp_dir();
        sweep(&parent);
        let own = |n: u32| parent.join(format!("{PREFIX}{}-{n}", std::process::id()));
        for path in (0..).map(own) {
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self { path }),
                // Another test of this process has this one.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot make {}", path.display()));
                }
            }
        }
        bail!("no name is left in {}", parent.display())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes the folders of this run when SIGINT, SIGTERM or SIGHUP ends it. The kernel ends its
/// child processes in any case.
pub fn clean_up_on_signals() -> Result<()> {
    on_signals(|_| true).map(drop)
}

/// As [`clean_up_on_signals`], but the first of these signals only sets the flag that this returns.
/// The next one ends the run at once.
pub fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    on_signals(|stop| stop.swap(true, Ordering::SeqCst))
}

/// Waits for signals in a thread of its own. `ends` gets the flag that this returns, and says
/// whether a signal ends the run.
fn on_signals(ends: fn(&AtomicBool) -> bool) -> Result<Arc<AtomicBool>> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])
        .context("cannot wait for signals")?;
    let flag = Arc::<AtomicBool>::default();
    let stop = Arc::clone(&flag);
    thread::spawn(move || {
        for signal in &mut signals {
            if !ends(&stop) {
                continue;
            }
            let own = std::process::id().to_string();
            for (path, process) in all_run_dirs(&std::env::temp_dir()) {
                if process == own {
                    let _ = fs::remove_dir_all(path);
                }
            }
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    });
    Ok(flag)
}

/// The folders of all runs, each with the id of the process that made it.
fn all_run_dirs(parent: &Path) -> Vec<(PathBuf, String)> {
    let mut dirs = Vec::new();
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name: OsString = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
        let process = rest.split('-').next().unwrap_or_default().to_owned();
        dirs.push((entry.path(), process));
    }
    dirs
}

/// The folders of the runs whose process is alive.
pub fn run_dirs() -> Vec<PathBuf> {
    let dirs = all_run_dirs(&std::env::temp_dir());
    dirs.into_iter().filter(|(_, process)| is_alive(process)).map(|(path, _)| path).collect()
}

/// Whether a process with this id exists.
fn is_alive(process: &str) -> bool {
    !process.is_empty() && Path::new("/proc").join(process).exists()
}

/// Removes the folders of runs whose process is gone.
fn sweep(parent: &Path) {
    for (path, process) in all_run_dirs(parent) {
        if !is_alive(&process) {
            let _ = fs::remove_dir_all(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests of one process run at once: each needs a folder of its own.
    #[test]
    fn folders_that_are_made_at_once_are_different() {
        let make = || {
            (0..8).map(|_| thread::spawn(|| RunDir::new().unwrap())).collect::<Vec<_>>().into_iter()
        };
        for _ in 0..50 {
            let folders: Vec<RunDir> = make().map(|thread| thread.join().unwrap()).collect();
            let paths: std::collections::HashSet<_> = folders.iter().map(RunDir::path).collect();
            assert_eq!(paths.len(), 8);
        }
    }
}
