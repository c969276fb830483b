// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The commands that the documents show. Each must be one that its program takes.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testkit::workspace;

use crate::docs;

/// The name under which the commands of `cargo xtask` are found.
const XTASK: &str = "cargo xtask";

/// Words that may stand before a command.
const BEFORE: [&str; 8] = ["do", "eval", "exec", "if", "sudo", "then", "until", "while"];

/// Checks that each command in the documents is one that its program takes: its subcommands, its
/// options and their values. It adds `--help` to the command, so the program parses the command
/// and does nothing. `programs` are the names and paths of the programs, without xtask itself.
///
/// # Errors
/// A command is not taken. The error names the file, the line and the program's own words.
pub fn check(programs: &[(&str, PathBuf)]) -> Result<()> {
    let root = workspace::root();
    // cargo may have replaced the file of this process meanwhile. This link still leads to it.
    let xtask = PathBuf::from(format!("/proc/{}/exe", std::process::id()));
    let (mut seen, mut faults) = (BTreeSet::new(), Vec::new());
    for file in docs::files(root)? {
        // The log of changes also names commands that are no more.
        let is_document = file.extension().is_some_and(|extension| extension == "md");
        if !is_document || file == Path::new("CHANGELOG.md") {
            continue;
        }
        // A file that git lists may have been removed.
        let Ok(text) = fs::read_to_string(root.join(&file)) else { continue };
        for (line, words) in commands(&text) {
            let own = programs.iter().find(|(name, _)| *name == words[0]).map(|(_, path)| path);
            let path = if words[0] == XTASK { Some(&xtask) } else { own };
            let path = path.with_context(|| format!("there is no program {}", words[0]))?;
            if !seen.insert(words.clone()) {
                continue;
            }
            if let Some(why) = refused(path, &words[1..])? {
                faults.push(format!("{}:{line}: {}: {why}", file.display(), words.join(" ")));
            }
        }
    }
    // The summary of the tests shows the first line.
    ensure!(faults.is_empty(), "commands are not taken: {}", faults.join("\n"));
    ensure!(seen.len() > 50, "the documents have only {} commands", seen.len());
    eprintln!("{} different commands in the documents", seen.len());
    Ok(())
}

/// What the program says against the arguments; none if it takes them.
fn refused(program: &Path, args: &[String]) -> Result<Option<String>> {
    // What stands after `--` is for another program.
    let own = args.iter().position(|word| word == "--").unwrap_or(args.len());
    let output = Command::new(program)
        .args(&args[..own])
        // `help` is a command of its own, and does nothing but print.
        .args(if args.first().is_some_and(|word| word == "help") { None } else { Some("--help") })
        .output()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let why = said.lines().next().unwrap_or("it says nothing").to_owned();
    Ok((!output.status.success()).then_some(why))
}

/// The commands of our programs in the code of a Markdown text, each with its line number. The
/// first word is the program's name.
fn commands(text: &str) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    // The prose since the last blank line, and where it begins.
    let mut prose = (1, String::new());
    while let Some((n, line)) = lines.next() {
        let fence = line.trim_start().strip_prefix("```");
        if fence.is_none() && !line.trim().is_empty() {
            prose.1 += &format!("{line}\n");
            continue;
        }
        found.extend(in_prose(&prose.1, prose.0));
        prose = (n + 2, String::new());
        let Some(language) = fence else { continue };
        let block = lines.by_ref().take_while(|(_, line)| !line.trim_start().starts_with("```"));
        let block: Vec<_> = block.collect();
        prose.0 += block.len() + 1;
        if matches!(language.trim(), "" | "sh" | "bash" | "console") {
            found.extend(in_block(&block));
        }
    }
    found.extend(in_prose(&prose.1, prose.0));
    found
}

/// The commands in the code spans of a paragraph that begins at line `first`.
fn in_prose(text: &str, first: usize) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut line = first;
    for (n, piece) in text.split('`').enumerate() {
        // Every second piece is code. A name alone is no command.
        if n % 2 == 1 {
            let commands = ours(&piece.replace('\n', " ")).into_iter();
            found.extend(commands.filter(|words| words.len() > 1).map(|words| (line, words)));
        }
        line += piece.matches('\n').count();
    }
    found
}

/// The commands in the lines of a code block.
fn in_block(lines: &[(usize, &str)]) -> Vec<(usize, Vec<String>)> {
    let mut found = Vec::new();
    let mut lines = lines.iter();
    while let Some((n, line)) = lines.next() {
        let mut line = line.trim_start().trim_start_matches("$ ").to_owned();
        while line.ends_with('\\') {
            line.pop();
            let Some((_, next)) = lines.next() else { break };
            line += next;
        }
        found.extend(ours(&line).into_iter().map(|words| (n + 1, words)));
        // The lines of a here-document are no commands.
        if let Some((_, end)) = line.split_once("<<") {
            let end = end.trim().trim_matches(['\'', '"']).to_owned();
            lines.by_ref().find(|(_, line)| line.trim() == end);
        }
    }
    found
}

/// The commands of our programs in a line of shell, also those within other words of it.
fn ours(line: &str) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    for words in simple_commands(line) {
        let inner = words.iter().filter(|word| word.contains(' ')).flat_map(|word| ours(word));
        found.extend(inner);
        let begin = words.iter().position(|word| {
            let is_setting = word.split_once('=').is_some_and(|(name, _)| {
                name.chars().all(|c| c.is_ascii_uppercase() || c == '_') && !name.is_empty()
            });
            !is_setting && !BEFORE.contains(&word.as_str())
        });
        let Some(begin) = begin else { continue };
        let name = words[begin].rsplit('/').next().unwrap_or_default();
        let (name, begin) = match name {
            "cargo" if words.get(begin + 1).is_some_and(|word| word == "xtask") => {
                (XTASK, begin + 1)
            }
            "vbus" | "vbus-guest" | "vbus-vmm" => (name, begin),
            // The program of a device's author is all of `vbus`, with one more class.
            _ if name.ends_with("-host") => ("vbus", begin),
            _ => continue,
        };
        let args = words[begin + 1..].iter().filter_map(|word| argument(word));
        found.push(std::iter::once(name.to_owned()).chain(args).collect());
    }
    found
}

/// A word of a document as an argument: `[--json]` is an option, a word in capital letters stands
/// for a value, and `...` for nothing.
fn argument(word: &str) -> Option<String> {
    let word = word.trim_start_matches('[').trim_end_matches(']').trim_end_matches("...");
    let is_value = word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase());
    match word {
        "" => None,
        _ if is_value => Some("1".to_owned()),
        _ => Some(word.to_owned()),
    }
}

/// Splits a line of shell into simple commands, and each into words. This knows quotes, command
/// substitutions, operators, redirections and comments, and not much more.
fn simple_commands(line: &str) -> Vec<Vec<String>> {
    let mut commands = vec![Vec::new()];
    let mut substituted = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let substitution = c == '$' && chars.peek() == Some(&'(') && quote != Some('\'');
        match (c, quote) {
            _ if substitution => {
                chars.next();
                let mut depth = 1;
                let inner = chars.by_ref().take_while(|c| {
                    depth += i32::from(*c == '(') - i32::from(*c == ')');
                    depth > 0
                });
                substituted.extend(simple_commands(&inner.collect::<String>()));
                // The output of the inner command is some word.
                word.get_or_insert_default().push('1');
            }
            (c, Some(open)) if c == open => quote = None,
            (c, Some(_)) => word.get_or_insert_default().push(c),
            ('\'' | '"', None) => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            ('#', None) if word.is_none() => break,
            (';' | '&' | '|' | '(' | ')' | '<' | '>', None) => {
                // The number before a redirection is a descriptor.
                let is_number = |text: &String| text.chars().all(|c| c.is_ascii_digit());
                let word = word.take().filter(|word| !(matches!(c, '<' | '>') && is_number(word)));
                commands.last_mut().into_iter().for_each(|words| words.extend(word.clone()));
                commands.push(Vec::new());
            }
            (c, None) if c.is_whitespace() => {
                commands.last_mut().into_iter().for_each(|words| words.extend(word.take()));
            }
            (c, None) => word.get_or_insert_default().push(c),
        }
    }
    commands.last_mut().into_iter().for_each(|words| words.extend(word.take()));
    commands.retain(|words| !words.is_empty());
    commands.extend(substituted);
    commands
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Run `vbus device\nlist` and not `vbus` or `cargo test`.\n\
\n\
```\n\
./vbus serve --config a.toml 2> bus.log & # a comment\n\
cat > bus.toml <<END\n\
vbus nonsense\n\
END\n\
eval qemu -m 1 \"$(vbus qemu-args --dir /tmp/bus)\"\n\
RUSTFLAGS='-C x' cargo xtask guest --put \"$(command -v a)\" \\\n\
    --run 'vbus-guest list; vbus-guest net'\n\
```\n\
`block-host device request NAME '{\"op\": 1}'`, `vbus stats [NAME ...] [--json]`\n\
```toml\n\
vbus = 1\n\
```\n";

    #[test]
    fn commands_are_found_in_prose_and_in_blocks() {
        let found = commands(TEXT);
        let found: Vec<_> = found.iter().map(|(line, words)| (*line, words.join(" "))).collect();
        let expected = [
            (1, "vbus device list"),
            (5, "vbus serve --config a.toml"),
            (9, "vbus qemu-args --dir /tmp/bus"),
            (10, "vbus-guest list"),
            (10, "vbus-guest net"),
            (10, "cargo xtask guest --put 1 --run vbus-guest list; vbus-guest net"),
            (13, "vbus device request 1 {\"op\": 1}"),
            (13, "vbus stats 1 --json"),
        ];
        let expected: Vec<_> =
            expected.iter().map(|(line, words)| (*line, (*words).to_owned())).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn a_command_that_is_not_taken_is_told() {
        // `cargo` stands for a program: it takes `build --help`, and not `build --nonsense`.
        let cargo = PathBuf::from(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(refused(&cargo, &words("run -- --nonsense")).unwrap(), None);
        let why = refused(&cargo, &words("build --nonsense")).unwrap().unwrap();
        assert!(why.contains("--nonsense"), "{why}");
    }
}
