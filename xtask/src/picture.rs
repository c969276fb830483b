// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Draws the output of a command, or its screen, as a picture of a terminal, in an SVG file.

use std::cell::RefCell;
use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

/// The lines that a command prints to the user, kept for the picture.
#[derive(Default)]
pub struct Transcript(RefCell<Vec<String>>);

impl Transcript {
    /// Prints a text to standard error, and keeps it.
    pub fn say(&self, text: &str) {
        eprintln!("{text}");
        self.keep(text);
    }

    /// Keeps a text that other code has printed.
    pub fn keep(&self, text: &str) {
        self.0.borrow_mut().extend(text.lines().map(str::to_owned));
    }

    /// Draws all lines below the command.
    pub fn save(&self, command: &str, file: &Path) -> Result<()> {
        std::fs::write(file, svg(command, &self.0.borrow()))
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// The size of a character on the picture, and the edge around all of them, in pixels.
const WIDTH: f64 = 8.4;
const HEIGHT: usize = 20;
const EDGE: usize = 20;
/// The height of the bar with the three buttons.
const BAR: usize = 32;
/// The most columns. Longer lines wrap, as in a terminal.
const COLUMNS: usize = 100;
const BACKGROUND: &str = "#1b1f27";

/// A terminal with `command` after a prompt, and `lines` below it. The text before the first `: `
/// of a line is its topic, in another colour.
fn svg(command: &str, lines: &[String]) -> String {
    let wrapped: Vec<(bool, String)> = lines.iter().flat_map(|line| wrap(line)).collect();
    let columns = wrapped.iter().map(|(_, line)| line.chars().count()).max().unwrap_or(0);
    let columns = columns.max(command.chars().count() + 2);
    let mut out = begin(command, columns, wrapped.len() + 1);
    let first = BAR + HEIGHT - 4;
    text(&mut out, 0, first, "#7ee787", "$ ");
    text(&mut out, 2, first, "#ffffff", command);
    for (n, (begins, line)) in wrapped.iter().enumerate() {
        let y = first + (n + 1) * HEIGHT;
        // A topic has one or two words: "bus: ", "guest a: ".
        let topic = line.find(": ").map_or(line.len(), |at| at + 1);
        let topic = if *begins && topic <= 16 && line[..topic].ends_with(':') { topic } else { 0 };
        text(&mut out, 0, y, "#79c0ff", &line[..topic]);
        text(&mut out, line[..topic].chars().count(), y, "", &line[topic..]);
    }
    out.push_str("</g>\n</svg>\n");
    out
}

/// The begin of a picture for this number of columns and rows, up to the texts.
fn begin(command: &str, columns: usize, rows: usize) -> String {
    let width = (columns as f64 * WIDTH).ceil() + 2.0 * EDGE as f64;
    let height = BAR + EDGE + rows * HEIGHT;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" role=\"img\">\n\
         <title>What `{0}` says</title>\n\
         <rect width=\"{width}\" height=\"{height}\" rx=\"8\" fill=\"{BACKGROUND}\"/>\n",
        escaped(command)
    );
    for (n, colour) in ["#ff5f57", "#febc2e", "#28c840"].iter().enumerate() {
        let x = EDGE + n * 20;
        let _ = writeln!(out, "<circle cx=\"{x}\" cy=\"{}\" r=\"6\" fill=\"{colour}\"/>", BAR / 2);
    }
    out.push_str(
        "<g font-family=\"ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', \
         monospace\" font-size=\"14\" fill=\"#d6dbe5\" xml:space=\"preserve\">\n",
    );
    out
}

/// Draws the screen of a terminal in which `command` runs.
pub fn save_screen(command: &str, screen: &vt100::Screen, file: &Path) -> Result<()> {
    std::fs::write(file, svg_of_screen(command, screen))
        .with_context(|| format!("cannot write {}", file.display()))
}

fn svg_of_screen(command: &str, screen: &vt100::Screen) -> String {
    let (rows, columns) = screen.size();
    let mut out = begin(command, usize::from(columns), usize::from(rows));
    for row in 0..rows {
        let y = BAR + HEIGHT - 4 + usize::from(row) * HEIGHT;
        let mut column = 0;
        while column < columns {
            // A piece of one style.
            let Some(first) = screen.cell(row, column) else { break };
            let style = |cell: &vt100::Cell| (cell.fgcolor(), cell.bold(), cell.inverse());
            let begin = column;
            let mut piece = String::new();
            while let Some(cell) = screen.cell(row, column).filter(|c| style(c) == style(first)) {
                let text = cell.contents();
                piece.push_str(if text.is_empty() { " " } else { &text });
                column += 1;
            }
            let mut colour = colour(first);
            if first.inverse() {
                let (x, width) = (f64::from(begin) * WIDTH, f64::from(column - begin) * WIDTH);
                let _ = writeln!(
                    out,
                    "<rect x=\"{:.1}\" y=\"{}\" width=\"{width:.1}\" height=\"{HEIGHT}\" \
                     fill=\"{colour}\"/>",
                    EDGE as f64 + x,
                    y - 15
                );
                colour = BACKGROUND;
            }
            text(&mut out, usize::from(begin), y, colour, &piece);
        }
    }
    out.push_str("</g>\n</svg>\n");
    out
}

/// The colour of a cell's text.
fn colour(cell: &vt100::Cell) -> &'static str {
    match cell.fgcolor() {
        vt100::Color::Idx(1) => "#ff7b72",
        vt100::Color::Idx(2) => "#7ee787",
        vt100::Color::Idx(3) => "#f2cc60",
        vt100::Color::Idx(8) => "#8b949e",
        _ if cell.bold() => "#ffffff",
        _ => "#d6dbe5",
    }
}

/// A piece of text at a column. The SVG states its length, so every font keeps the columns.
fn text(out: &mut String, column: usize, y: usize, colour: &str, piece: &str) {
    let indent = piece.chars().take_while(|c| *c == ' ').count();
    let piece = piece.trim();
    if piece.is_empty() {
        return;
    }
    let x = EDGE as f64 + (column + indent) as f64 * WIDTH;
    let length = piece.chars().count() as f64 * WIDTH;
    let fill = if colour.is_empty() { String::new() } else { format!(" fill=\"{colour}\"") };
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y}\" textLength=\"{length:.1}\"{fill}>{}</text>",
        escaped(piece)
    );
}

/// Splits a line into pieces that fit, at spaces where possible. Each piece says whether it begins
/// the line.
fn wrap(line: &str) -> Vec<(bool, String)> {
    let mut pieces = Vec::new();
    let mut rest: Vec<char> = line.chars().collect();
    while rest.len() > COLUMNS {
        let at = rest[..COLUMNS].iter().rposition(|c| *c == ' ').filter(|at| *at > COLUMNS / 2);
        let (piece, more) = rest.split_at(at.unwrap_or(COLUMNS));
        let more: String = more.iter().collect();
        pieces.push(piece.iter().collect());
        rest = format!("    {}", more.trim_start()).chars().collect();
    }
    pieces.push(rest.into_iter().collect::<String>());
    pieces.into_iter().enumerate().map(|(n, piece)| (n == 0, piece)).collect()
}

/// Escapes text for XML.
fn escaped(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    // XML allows no control characters, and a terminal shows none.
    text.replace(|c: char| c.is_control(), "").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_screen_keeps_its_places_and_colours() {
        let mut terminal = vt100::Parser::new(3, 40, 0);
        terminal.process(
            b"plain\x1b[1m bold\x1b[0m\r\n\x1b[32mgr<en\x1b[0m   far\x1b[3;2H\x1b[7mchosen",
        );
        let picture = svg_of_screen("run", terminal.screen());
        let place = |column: f64| format!("<text x=\"{:.1}\"", EDGE as f64 + column * WIDTH);
        for (begin, end) in [
            (place(0.0), "fill=\"#d6dbe5\">plain</text>"),
            (place(6.0), "fill=\"#ffffff\">bold</text>"),
            (place(0.0), "fill=\"#7ee787\">gr&lt;en</text>"),
            (place(8.0), ">far</text>"),
            (place(1.0), "fill=\"#1b1f27\">chosen</text>"),
        ] {
            let found = picture.lines().any(|line| line.starts_with(&begin) && line.ends_with(end));
            assert!(found, "{begin} ... {end}\n{picture}");
        }
        assert_eq!(picture.matches("<rect ").count(), 2, "the screen, and what is chosen");
        assert!(picture.contains(&format!("height=\"{}\"", BAR + EDGE + 3 * HEIGHT)));
    }

    #[test]
    fn lines_are_escaped_wrapped_and_placed() {
        let lines = ["bus: a < b & c".to_owned(), "word ".repeat(30), String::new()];
        let picture = svg("run <it>", &lines);
        assert!(picture.contains(">bus:</text>"), "{picture}");
        assert!(picture.contains(">a &lt; b &amp; c</text>"), "{picture}");
        assert!(picture.contains("run &lt;it&gt;"), "{picture}");
        // Of 150 characters at most 100 stand in one line; the empty line has its room.
        assert_eq!(wrap(&lines[1]).len(), 2);
        assert!(wrap(&lines[1]).iter().all(|(_, piece)| piece.chars().count() <= COLUMNS));
        assert!(picture.contains(&format!("height=\"{}\"", BAR + EDGE + 5 * HEIGHT)), "{picture}");
    }
}
