// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The measures of vbus against their peers, in one run: see [`USAGE`].
//!
//! Every group of measures runs in several processes, since where a process's memory lies has its
//! part in what it costs; and within a process in several rounds, each of which has a run of every
//! contender.

mod ablation;
mod chart;
mod duel;
mod lines;
mod pages;
mod region;
mod report;
mod rings;
mod samples;
mod signals;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use samples::{Figures, Samples};

const USAGE: &str = "\
usage: vbus-bench [--json] [--quick] [--realtime] [--only GROUP] [--out DIRECTORY]
  --json           close with one line of JSON
  --quick          fewer processes and rounds
  --realtime       measure with real-time priority (chrt), for a machine with other work
  --only GROUP     rings, pages, signals, lines, sizes, readers, devices or engine
  --out DIRECTORY  where the charts go";

/// A group of measures.
type Group = (&'static str, fn(&mut Samples));

const GROUPS: [Group; 8] = [
    ("rings", rings::sample),
    ("pages", pages::sample),
    ("signals", signals::sample),
    ("lines", lines::sample),
    ("sizes", pages::by_size),
    ("readers", pages::by_readers),
    ("devices", rings::by_devices),
    ("engine", rings::by_engine),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--sample") => return sample(&arguments[1], &arguments[2]),
        Some("--peer") => {
            signals::peer(&arguments[1..]);
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let (mut json, mut quick, mut realtime, mut only) = (false, false, false, None);
    let mut directory = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bench"));
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), &mut arguments) {
            ("--json", _) => json = true,
            ("--quick", _) => quick = true,
            ("--realtime", _) => realtime = true,
            ("--only", rest) => only = rest.next(),
            ("--out", rest) => directory = rest.next().unwrap_or_default().into(),
            _ => {
                eprintln!("{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    let (processes, rounds) = if quick { (3, 3) } else { (9, 7) };
    let mut samples = Samples::new(rounds);
    for process in 1..=processes {
        for (group, _) in
            GROUPS.iter().filter(|(group, _)| only.as_ref().is_none_or(|only| only == group))
        {
            eprintln!("process {process} of {processes}: {group}");
            match run(group, rounds, realtime) {
                Ok(figures) => samples.extend(figures),
                Err(error) => {
                    eprintln!("the measures of {group} failed: {error}");
                    return ExitCode::FAILURE;
                }
            }
        }
    }
    let report = report::report(&samples);
    if let Err(error) = chart::write(&samples, &directory) {
        eprintln!("could not write charts to {}: {error}", directory.display());
        return ExitCode::FAILURE;
    }
    println!("\ncharts: {}", directory.display());
    if json {
        println!("{report}");
    }
    ExitCode::SUCCESS
}

/// Takes the samples of one group in this process, and prints them for the one that gathers them.
fn sample(group: &str, rounds: &str) -> ExitCode {
    let mut samples = Samples::new(rounds.parse().unwrap_or(1));
    let Some((_, take)) = GROUPS.iter().find(|(name, _)| *name == group) else {
        return ExitCode::from(2);
    };
    take(&mut samples);
    println!("{}", serde_json::json!(samples.figures));
    ExitCode::SUCCESS
}

/// Takes the samples of one group in a process of its own.
fn run(group: &str, rounds: usize, realtime: bool) -> Result<Figures, Box<dyn std::error::Error>> {
    let program = std::env::current_exe()?;
    let mut command = Command::new(if realtime { Path::new("chrt") } else { &program });
    if realtime {
        command.args(["--fifo", "50"]).arg(&program);
    }
    command.args(["--sample", group, &rounds.to_string()]).stdout(Stdio::piped());
    let child = command.spawn().map_err(|error| match realtime {
        true => format!("cannot run chrt, which --realtime needs (package util-linux): {error}"),
        false => error.to_string(),
    })?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let hint = if realtime { " (--realtime needs root or CAP_SYS_NICE)" } else { "" };
        return Err(format!("the process ended with {}{hint}", output.status).into());
    }
    let text = String::from_utf8(output.stdout)?;
    Ok(serde_json::from_str(text.lines().last().unwrap_or_default())?)
}
