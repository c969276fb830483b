// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask docs` checks the documents: each link has a target, the README is short, and no
//! line of prose or comment is too long.

use std::collections::HashMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use testkit::workspace;

/// The most words in the README. A reader needs five minutes for it.
const README_WORDS: usize = 1000;

/// The most columns in a line of prose or comment.
const COLUMNS: usize = 100;

#[derive(clap::Args)]
pub struct Args {
    /// First wrap the lines of prose and comments that are too long
    #[arg(long)]
    wrap: bool,
}

/// Checks all files of the tree. Prints each fault, and returns false if there is one.
pub fn run(args: &Args) -> Result<bool> {
    let root = workspace::root();
    let files = files(root)?;
    let mut faults = Vec::new();
    let mut documents = HashMap::new();
    for path in &files {
        // A file that is not text has no links and no lines.
        let Ok(mut text) = fs::read_to_string(root.join(path)) else { continue };
        let Some(kind) = Kind::of(path, &text) else { continue };
        if args.wrap {
            let wrapped = wrap(&text, kind);
            if wrapped != text {
                fs::write(root.join(path), &wrapped)
                    .with_context(|| format!("cannot write {}", path.display()))?;
                text = wrapped;
            }
        }
        if kind == Kind::Markdown {
            documents.insert(path.clone(), Document::parse(&text));
        }
        let long = kind.long_lines(&text).into_iter();
        faults.extend(
            long.map(|line| format!("{}:{line}: longer than {COLUMNS} columns", path.display())),
        );
    }
    for (path, document) in &documents {
        for (line, link) in &document.links {
            if let Some(why) = broken(root, path, link, &documents) {
                faults.push(format!(
                    "{}:{line}: the link {link} leads nowhere: {why}",
                    path.display()
                ));
            }
        }
    }
    if let Some(readme) = documents.get(Path::new("README.md")) {
        if readme.words > README_WORDS {
            faults.push(format!("README.md: {} words, of at most {README_WORDS}", readme.words));
        }
    }
    faults.sort();
    faults.iter().for_each(|fault| println!("{fault}"));
    let links: usize = documents.values().map(|document| document.links.len()).sum();
    eprintln!(
        "docs: {} documents with {links} links, {} files; {} faults",
        documents.len(),
        files.len(),
        faults.len()
    );
    Ok(faults.is_empty())
}

/// The files of the tree, relative to its root: those in git, and new ones.
pub fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let output = std::process::Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .context("cannot run git")?;
    ensure!(
        output.status.success(),
        "git ls-files failed: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut files: Vec<PathBuf> =
        text.split('\0').filter(|path| !path.is_empty()).map(PathBuf::from).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// The kind of a file.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Markdown,
    /// Code. Its comments begin with this text.
    Code(&'static str),
}

impl Kind {
    /// The kind by the file's name or first line; none if nothing is checked in it.
    fn of(path: &Path, text: &str) -> Option<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("md") => Some(Self::Markdown),
            Some("rs") => Some(Self::Code("//")),
            Some("toml" | "sh" | "yml") => Some(Self::Code("#")),
            None if text.starts_with("#!") => Some(Self::Code("#")),
            _ => None,
        }
    }

    /// The numbers, from 1, of the lines of prose and comments that are too long.
    fn long_lines(self, text: &str) -> Vec<usize> {
        match self {
            Self::Markdown => Document::parse(text).long_lines,
            Self::Code(mark) => long_comments(text, mark),
        }
    }

    /// The beginning of a line before its words: the indentation and the mark of a comment.
    fn margin(self, line: &str) -> &str {
        let words = match self {
            Self::Markdown => line.trim_start(),
            Self::Code(_) => line.trim_start().trim_start_matches(['/', '!', '#']).trim_start(),
        };
        &line[..line.len() - words.len()]
    }
}

/// The length of the mark of a list item, or none if the words begin with no mark.
fn item(words: &str) -> Option<usize> {
    let (mark, _) = words.split_once(' ')?;
    let number = mark.strip_suffix('.').is_some_and(|n| n.parse::<u32>().is_ok());
    (number || matches!(mark, "-" | "*" | "+")).then_some(mark.len() + 1)
}

/// Breaks the long lines of a text. The rest of a line goes to the next line of its paragraph.
fn wrap(text: &str, kind: Kind) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    // A line with such a beginning is no plain line of a paragraph.
    let special = |words: &str| {
        item(words).is_some() || words.starts_with(['#', '|', '>']) || words.starts_with("```")
    };
    let mut done = 0;
    loop {
        let long = kind.long_lines(&(lines.join("\n") + "\n"));
        let Some(number) = long.into_iter().find(|number| *number > done) else { break };
        done = number;
        let line = lines[number - 1].clone();
        let margin = kind.margin(&line);
        let hang = item(&line[margin.len()..]).unwrap_or(0);
        let next_margin = format!("{margin}{}", " ".repeat(hang));
        let end = line.char_indices().nth(COLUMNS + 1).map_or(line.len(), |(at, _)| at);
        let mut spaces = line[..end].rmatch_indices(' ').map(|(at, _)| at);
        let at = spaces.find(|at| *at > next_margin.len() && !special(&line[at + 1..]));
        let Some(at) = at else { continue };
        let rest = &line[at + 1..];
        let next = lines.get(number).filter(|next| {
            let words = next.strip_prefix(&next_margin).unwrap_or_default();
            kind.margin(next) == next_margin && !words.is_empty() && !special(words)
        });
        match next {
            Some(next) => {
                lines[number] = format!("{next_margin}{rest} {}", &next[next_margin.len()..]);
            }
            None => lines.insert(number, format!("{next_margin}{rest}")),
        }
        lines[number - 1].truncate(at);
    }
    lines.join("\n") + if text.ends_with('\n') { "\n" } else { "" }
}

/// Whether a line is too long. A single word, such as an address, cannot be broken and passes.
fn is_long(line: &str) -> bool {
    line.chars().count() > COLUMNS && line.split_whitespace().filter(|w| w.len() > 3).count() > 1
}

/// The line numbers of comments that are too long. Tables and code in comments do not count.
fn long_comments(text: &str, mark: &str) -> Vec<usize> {
    let mut code = false;
    let mut found = Vec::new();
    for (n, line) in text.lines().enumerate() {
        let Some(comment) = line.trim_start().strip_prefix(mark) else {
            code = false;
            continue;
        };
        let comment = comment.trim_start_matches(['/', '!', '#']).trim_start();
        if comment.starts_with("```") {
            code = !code;
        } else if !code && !comment.starts_with('|') && is_long(line) {
            found.push(n + 1);
        }
    }
    found
}

/// The checked parts of a Markdown file.
#[derive(Default)]
struct Document {
    /// The number of words outside of code blocks.
    words: usize,
    /// The lines that are too long, outside of code blocks and tables.
    long_lines: Vec<usize>,
    /// The names of its headings in links.
    anchors: Vec<String>,
    /// Its links: the target and the line number of each.
    links: Vec<(usize, String)>,
}

impl Document {
    fn parse(text: &str) -> Self {
        let mut document = Self::default();
        let mut fence: Option<String> = None;
        for (n, line) in text.lines().enumerate() {
            let trimmed = line.trim_start();
            let ticks: String = trimmed.chars().take_while(|c| *c == '`' || *c == '~').collect();
            if let Some(open) = &fence {
                if ticks.len() >= open.len() && ticks == trimmed.trim_end() {
                    fence = None;
                }
                continue;
            }
            if ticks.len() >= 3 {
                fence = Some(ticks);
                continue;
            }
            let is_table = trimmed.starts_with('|');
            document.words +=
                line.split_whitespace().filter(|w| w.chars().any(char::is_alphanumeric)).count();
            if !is_table && is_long(line) {
                document.long_lines.push(n + 1);
            }
            let level = trimmed.chars().take_while(|c| *c == '#').count();
            if (1..=6).contains(&level) && trimmed[level..].starts_with(' ') {
                document.add_anchor(&trimmed[level..]);
            }
            document.links.extend(links(line).into_iter().map(|link| (n + 1, link)));
        }
        document
    }

    /// A heading's name in links, by GitHub's rule. A second heading with a name gets a number.
    fn add_anchor(&mut self, heading: &str) {
        let plain = without_targets(heading.trim().trim_end_matches('#').trim_end());
        let name: String = plain
            .to_lowercase()
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c })
            .collect();
        let mut unique = name.clone();
        let mut number = 0;
        while self.anchors.contains(&unique) {
            number += 1;
            unique = format!("{name}-{number}");
        }
        self.anchors.push(unique);
    }
}

/// A heading without the targets of the links in it.
fn without_targets(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("](") {
        out.push_str(before);
        rest = after.split_once(')').map_or("", |(_, end)| end);
    }
    out + rest
}

/// The targets of the links and pictures in a line, `[text](target)` and `[name]: target`. Code
/// does not count.
fn links(line: &str) -> Vec<String> {
    let mut found = Vec::new();
    // Every second piece between backticks is code.
    let prose: String = line.split('`').step_by(2).collect::<Vec<_>>().join("code");
    let mut rest = prose.as_str();
    while let Some((_, after)) = rest.split_once("](") {
        let target = after.split([')', ' ']).next().unwrap_or_default();
        found.push(target.trim_matches(['<', '>']).to_owned());
        rest = after;
    }
    if let Some((_, target)) = prose.strip_prefix('[').and_then(|rest| rest.split_once("]: ")) {
        found.extend(
            target.split_whitespace().next().map(|t| t.trim_matches(['<', '>']).to_owned()),
        );
    }
    found
}

/// Why a link of the file `from` has no target; none if it has one. Web addresses are not checked.
fn broken(
    root: &Path,
    from: &Path,
    link: &str,
    documents: &HashMap<PathBuf, Document>,
) -> Option<String> {
    if link.contains("://") || link.starts_with("mailto:") {
        return None;
    }
    let (path, anchor) = link.split_once('#').map_or((link, None), |(p, a)| (p, Some(a)));
    let target = if path.is_empty() {
        from.to_owned()
    } else {
        let folder = from.parent().unwrap_or(Path::new(""));
        match normal(&folder.join(path)) {
            Some(target) => target,
            None => return Some("that is outside of the tree".into()),
        }
    };
    if !root.join(&target).exists() {
        return Some(format!("there is no {}", target.display()));
    }
    // Only Markdown has headings. An anchor in another file is a line.
    let (anchor, document) = (anchor?, documents.get(&target)?);
    (!document.anchors.iter().any(|known| known == anchor))
        .then(|| format!("{} has no heading #{anchor}", target.display()))
}

/// The path without `.` and `..`; none if it leaves the tree.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::ParentDir => {
                if !out.pop() {
                    return None;
                }
            }
            Component::Normal(part) => out.push(part),
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# A title: `code` & more\n\
See [one](other.md#part-1), ![two](docs/a.svg) and `[no](link)`.\n\
[name]: <ref.md>\n\
```\n\
[no](fence.md) # no heading\n\
```\n\
## Part [1](x.md)\n\
## Part 1\n\
| a | [t](table.md) |\n";

    #[test]
    fn headings_and_links_are_found_outside_of_code() {
        let document = Document::parse(TEXT);
        assert_eq!(document.anchors, ["a-title-code--more", "part-1", "part-1-1"]);
        let links: Vec<_> = document.links.iter().map(|(_, link)| link.as_str()).collect();
        assert_eq!(links, ["other.md#part-1", "docs/a.svg", "ref.md", "x.md", "table.md"]);
        assert_eq!(document.links[0].0, 2);
    }

    #[test]
    fn a_link_needs_a_file_and_a_heading() {
        let root = workspace::root();
        let from = PathBuf::from("docs/x.md");
        let readme = PathBuf::from("README.md");
        let documents = HashMap::from([(readme, Document::parse("# Here\n"))]);
        let broken = |link: &str| broken(root, &from, link, &documents);
        for good in ["../README.md", "../README.md#here", "../Cargo.toml#L3", "https://a.b/c"] {
            assert_eq!(broken(good), None, "{good}");
        }
        for bad in ["nowhere.md", "../README.md#there", "../../README.md", "/README.md"] {
            assert!(broken(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn long_lines_are_found_but_for_tables_and_code() {
        let long = "word ".repeat(30);
        let text = format!("{long}\n| {long} |\n```\n{long}\n```\n{}\n", "x".repeat(200));
        assert_eq!(Document::parse(&text).long_lines, [1]);
        let code =
            format!("// {long}\n/// | {long}\n/// ```\n/// {long}\n/// ```\nlet a = \"{long}\";\n");
        assert_eq!(long_comments(&code, "//"), [1]);
    }

    #[test]
    fn long_lines_are_wrapped_into_their_paragraph() {
        let long = "word ".repeat(21);
        let text = format!(
            "    /// - {long}end\n    ///   and more\n    ///\n    /// {long}end\nfn x() {{}}\n"
        );
        let wrapped = wrap(&text, Kind::Code("//"));
        let lines: Vec<_> = wrapped.lines().collect();
        assert!(lines.iter().all(|line| line.chars().count() <= COLUMNS), "{wrapped}");
        assert!(lines[0].starts_with("    /// - word") && lines[1].starts_with("    ///   word"));
        assert!(lines[1].ends_with("end and more") && lines[2] == "    ///", "{wrapped}");
        assert_eq!((lines.len(), lines[5]), (6, "fn x() {}"));
        let words = |text: &str| text.split_whitespace().filter(|w| *w != "///").count();
        assert_eq!(words(&wrapped), words(&text));
        // A short line stays as it is.
        assert_eq!(wrap(TEXT, Kind::Markdown), TEXT);
    }
}
