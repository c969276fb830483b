// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Draws the screen.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line as Text, Span};
use ratatui::widgets::{Cell, Paragraph, Row, Table, TableState};

use super::state::{Line, Order, Top, View};
use crate::telemetry::{Flow, State, short};

/// A column of the list.
struct Column {
    title: &'static str,
    width: u16,
    /// A narrow screen leaves out the columns with the highest number.
    rank: u8,
    /// The order that this column shows.
    order: Option<Order>,
    cell: fn(&Line<'_, '_>) -> String,
}

const fn column(
    title: &'static str,
    width: u16,
    rank: u8,
    order: Option<Order>,
    cell: fn(&Line<'_, '_>) -> String,
) -> Column {
    Column { title, width, rank, order, cell }
}

const COLUMNS: [Column; 13] = [
    column("DEVICE", 16, 0, Some(Order::Name), |(device, _)| device.name.clone()),
    column("CLASS", 7, 5, Some(Order::Class), |(device, _)| device.class.clone()),
    column("STATE", 19, 0, Some(Order::State), |(device, _)| device.words().into()),
    column("TASKS", 14, 4, None, |(_, rates)| {
        rates.as_ref().map_or_else(|| "...".into(), |rates| rates.activity())
    }),
    column("OUT f/s", 8, 0, None, |line| flow(line, |(out, _)| out.frames)),
    column("OUT B/s", 8, 2, Some(Order::Out), |line| flow(line, |(out, _)| out.bytes)),
    column("IN f/s", 8, 0, None, |line| flow(line, |(_, into)| into.frames)),
    column("IN B/s", 8, 2, Some(Order::In), |line| flow(line, |(_, into)| into.bytes)),
    column("RINGS", 9, 7, None, |(device, _)| match device.has_frames {
        true => format!("{} {}", device.out.fill, device.into.fill),
        false => "-".into(),
    }),
    column("BELLS/s", 8, 6, Some(Order::Doorbells), |(_, rates)| {
        rates.as_ref().map_or_else(|| "...".into(), |rates| short(rates.doorbells))
    }),
    column("INTRS/s", 8, 6, Some(Order::Interrupts), |(_, rates)| {
        rates.as_ref().map_or_else(|| "...".into(), |rates| short(rates.interrupts))
    }),
    column("SAVED", 11, 3, None, |(device, rates)| {
        let share =
            |share: Option<f64>| share.map_or("-".into(), |share| format!("{:.1}", share * 100.0));
        let [bells, interrupts] = device.saved(rates.as_ref()).map(share);
        format!("{bells} {interrupts}")
    }),
    column("DROPPED", 16, 1, Some(Order::Drops), |(device, rates)| {
        if !device.has_frames {
            return "-".into();
        }
        let now = rates.as_ref().map_or(0.0, |rates| rates.out.drops + rates.into.drops);
        match now {
            0.0 => device.drops().to_string(),
            now => format!("{} +{}/s", device.drops(), short(now)),
        }
    }),
];

/// The explanation, on a screen of its own.
const HELP: &[&str] = &[
    "Columns",
    "  STATE    open: a driver uses the device",
    "           connected, not open: a VMM or a process is there, and no driver uses the device",
    "           broken: a fault ended the connection; the log of the bus says which",
    "  TASKS    asleep; polling: the device's tasks ran and never slept; or how often they were",
    "           woken each second",
    "  OUT, IN  frames (f) and bytes (B) from the driver, and to the driver, each second",
    "  RINGS    entries in the transmit rings, and buffers in the receive rings",
    "  BELLS    doorbells that the driver rang",
    "  INTRS    interrupts that the driver got",
    "  SAVED    of 100 frames, those for which the driver rang no doorbell; of 100 posts to the",
    "           driver, those that needed no interrupt",
    "  DROPPED  frames since the device was made, and now; Enter shows why",
    "",
    "Keys",
    "  arrows, PgUp, PgDn, Home, End   choose a device; scroll",
    "  Enter    one device, with its queues, its drops and all its counters; Esc goes back",
    "  s, S     the next order, the one before; r reverses it",
    "  p        pause, and go on",
    "  q        end",
];

/// Draws all.
pub fn draw(frame: &mut Frame<'_>, top: &mut Top<'_>) {
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(2), Constraint::Min(1), Constraint::Length(1)])
            .areas(frame.area());
    top.page = body.height.saturating_sub(1).max(1);
    draw_head(frame, head, top);
    let keys = match top.view {
        View::List => {
            draw_list(frame, body, top);
            "q end  Enter device  s order  r reverse  p pause  ? help"
        }
        View::Device => {
            draw_device(frame, body, top);
            "q end  Esc back  arrows scroll  p pause  ? help"
        }
        View::Help(_) => {
            let lines: Vec<_> = HELP.iter().map(|line| Text::from(*line)).collect();
            frame.render_widget(Paragraph::new(lines), body);
            "any key goes back  q end"
        }
    };
    frame.render_widget(Paragraph::new(keys).style(quiet(top)), foot);
}

fn styled(top: &Top<'_>, colour: Color) -> Style {
    if top.colour { Style::new().fg(colour) } else { Style::new() }
}

fn quiet(top: &Top<'_>) -> Style {
    styled(top, Color::DarkGray)
}

fn bold() -> Style {
    Style::new().add_modifier(Modifier::BOLD)
}

/// Two lines: the bus, and what is special now.
fn draw_head(frame: &mut Frame<'_>, area: Rect, top: &Top<'_>) {
    let devices = top.devices();
    let open = devices.iter().filter(|device| device.state == State::Open).count();
    let count = match devices.len() {
        1 => "1 device".to_owned(),
        count => format!("{count} devices"),
    };
    let about = match top.is_read() {
        true => format!(
            ": {count}, {open} open; every {} s, by {}",
            seconds(top.interval),
            top.order.name()
        ),
        false => String::new(),
    };
    let title = Text::from(vec![
        Span::styled("vbus top", bold()),
        Span::raw(format!("  {}{about}", top.dir)),
    ]);
    let news = match (&top.gone, top.silence()) {
        (Some((since, reason)), _) => {
            let text = format!(
                "The bus has not answered for {} s ({reason}). Waiting for it.",
                since.elapsed().as_secs()
            );
            Text::styled(text, styled(top, Color::Red).add_modifier(Modifier::BOLD))
        }
        (None, Some(silence)) => {
            let seconds = silence.as_secs();
            let text = format!("The bus stands still: no answer for {seconds} s");
            Text::styled(text, styled(top, Color::Red).patch(bold()))
        }
        (None, None) if top.paused => {
            Text::styled("Paused; p goes on", styled(top, Color::Yellow).patch(bold()))
        }
        (None, None) if !top.is_read() => Text::from("Reading the bus ..."),
        (None, None) => Text::default(),
    };
    frame.render_widget(Paragraph::new(vec![title, news]), area);
}

fn seconds(time: Duration) -> String {
    let text = format!("{:.1}", time.as_secs_f64());
    text.strip_suffix(".0").map_or(text.clone(), str::to_owned)
}

fn flow(line: &Line<'_, '_>, number: fn(&(Flow<f64>, Flow<f64>)) -> f64) -> String {
    match line {
        (device, _) if !device.has_frames => "-".into(),
        (_, None) => "...".into(),
        (_, Some(rates)) => short(number(&(rates.out, rates.into))),
    }
}

/// The columns that fit on a screen of this width.
fn fitting(width: u16) -> Vec<&'static Column> {
    let mut columns: Vec<_> = COLUMNS.iter().collect();
    let needs = |columns: &[&Column]| columns.iter().map(|column| column.width + 1).sum::<u16>();
    while needs(&columns) > width + 1 {
        let rank = columns.iter().map(|column| column.rank).max().unwrap_or(0);
        if rank == 0 {
            break;
        }
        columns.retain(|column| column.rank < rank);
    }
    columns
}

fn draw_list(frame: &mut Frame<'_>, area: Rect, top: &Top<'_>) {
    let lines = top.lines();
    if top.is_read() && lines.is_empty() {
        frame.render_widget(Paragraph::new("no devices; `vbus device add` adds one"), area);
        return;
    }
    let columns = fitting(area.width);
    let heading = columns.iter().map(|column| {
        let mark = match (column.order == Some(top.order), top.reversed) {
            (false, _) => "",
            (true, false) => "*",
            (true, true) => "^",
        };
        Cell::from(format!("{}{mark}", column.title))
    });
    let rows = lines.iter().map(|line| {
        let style = match &line.0.state {
            _ if top.gone.is_some() => quiet(top),
            State::Broken(_) => styled(top, Color::Red),
            _ if line.1.as_ref().is_some_and(|r| r.out.drops + r.into.drops > 0.0) => {
                styled(top, Color::Yellow)
            }
            State::Open => styled(top, Color::Green),
            _ => Style::new(),
        };
        Row::new(columns.iter().map(|column| (column.cell)(line))).style(style)
    });
    let widths = columns.iter().map(|column| Constraint::Length(column.width));
    let table = Table::new(rows, widths)
        .header(Row::new(heading).style(bold()))
        .row_highlight_style(Style::new().add_modifier(Modifier::REVERSED));
    let mut place = TableState::new().with_selected(top.place(&lines));
    frame.render_stateful_widget(table, area, &mut place);
}

/// One device: its queues, what it lost and why, and all its counters.
fn draw_device(frame: &mut Frame<'_>, area: Rect, top: &mut Top<'_>) {
    let (text, length) = {
        let lines = top.lines();
        let Some(place) = top.place(&lines) else {
            frame.render_widget(Paragraph::new("the device has gone"), area);
            return;
        };
        let text = device(top, &lines[place]);
        let length = u16::try_from(text.len()).unwrap_or(u16::MAX);
        (text, length)
    };
    top.scroll = top.scroll.min(length.saturating_sub(area.height));
    frame.render_widget(Paragraph::new(text).scroll((top.scroll, 0)), area);
}

fn device(top: &Top<'_>, line: &Line<'_, '_>) -> Vec<Text<'static>> {
    let (device, rates) = line;
    let tasks = rates.as_ref().map_or("...".into(), |rates| rates.activity());
    let fault = match &device.state {
        State::Broken(fault) => format!(": {fault}"),
        _ => String::new(),
    };
    let mut text = vec![
        Text::from(vec![
            Span::styled(device.name.clone(), bold()),
            Span::raw(format!("  {}, {}{fault}; tasks: {tasks}", device.class, device.words())),
        ]),
        Text::default(),
    ];
    if let Some(rates) = rates.as_ref().filter(|rates| !rates.queues.is_empty()) {
        let heading = format!(
            "{:<8}{:<5}{:>9}{:>10}{:>8}{:>10}{:>10}",
            "QUEUE", "WAY", "FRAMES/s", "BYTES/s", "RING", "DROPS/s", "DROPPED"
        );
        text.push(Text::styled(heading, bold()));
        for (number, (out, into)) in &rates.queues {
            let (out_ever, into_ever) = device.queues.get(number).copied().unwrap_or_default();
            for (way, flow, ever) in [("out", out, out_ever), ("in", into, into_ever)] {
                text.push(Text::from(format!(
                    "{number:<8}{way:<5}{:>9}{:>10}{:>8}{:>10}{:>10}",
                    short(flow.frames),
                    short(flow.bytes),
                    ever.fill,
                    short(flow.drops),
                    ever.drops,
                )));
            }
        }
        text.push(Text::default());
    }
    let losses: Vec<_> = device.losses().collect();
    if !losses.is_empty() {
        text.push(Text::styled("DROPPED, OR WRONG, AND WHY", bold()));
        for loss in losses {
            let metric = &loss.row.metric;
            let advice = match metric.advice {
                "" => String::new(),
                advice => format!("; {advice}"),
            };
            let line = format!("{:>12}  {}: {}{advice}", loss.value, loss.path, metric.help);
            text.push(Text::styled(line, styled(top, Color::Yellow)));
        }
        text.push(Text::default());
    }
    let heading = format!("{:<34}{:>20}{:>12}  {}", "COUNTER", "NUMBER", "EACH SECOND", "MEANING");
    text.push(Text::styled(heading, bold()));
    let earlier = top.earlier(device);
    // The state is in the first line.
    for reading in device.readings.iter().filter(|reading| !reading.row.part.is_empty()) {
        let rate = earlier.and_then(|(old, time)| {
            let change = reading.value.checked_sub(old.same(reading)?)?;
            let rate = change as f64 / time.as_secs_f64().max(1e-3);
            (change > 0).then(|| short(rate))
        });
        text.push(Text::from(format!(
            "{:<34}{:>20}{:>12}  {}",
            reading.path,
            reading.value,
            rate.unwrap_or_default(),
            reading.row.metric.help
        )));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
    use serde_json::{Value, json};

    use super::*;
    use crate::classes;
    use crate::command::top::state::Action;
    use crate::telemetry;

    /// The screen as text, one line for each row.
    fn screen(top: &mut Top<'_>, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, top)).unwrap();
        let buffer = terminal.backend().buffer();
        let row = |y: u16| {
            let row: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
            row.trim_end().to_owned()
        };
        (0..height).map(row).collect()
    }

    fn devices(frames: u64) -> Vec<Value> {
        let net = |name: &str, frames: u64, lost: u64| {
            let pair = json!({
                "tx": { "frames": frames, "bytes": frames * 1000, "ring_fill": 9, "drops": {} },
                "rx": { "frames": 0, "bytes": 0, "ring_fill": 256, "drops": { "no_buffers": lost } },
            });
            json!({
                "name": name, "class": "venet", "state": "open", "connected": true,
                "counters": {
                    "doorbells": frames / 100, "interrupts": 0, "interrupts_suppressed": 0,
                    "polls": frames, "wakeups": 0,
                },
                "device": { "link": true, "pairs": [pair] },
            })
        };
        vec![
            net("net0", frames, 0),
            net("net1", frames * 2, frames),
            json!({ "name": "values", "class": "state", "state": "closed", "connected": false }),
        ]
    }

    fn with<R>(test: impl FnOnce(&mut Top<'_>, Instant) -> R) -> R {
        let classes = classes::unserved(Vec::new()).unwrap();
        let table = telemetry::Table::new(classes.iter().map(|class| &**class));
        let mut top = Top::new(&table, "/run/bus".into(), Duration::from_secs(1), true);
        let at = Instant::now();
        test(&mut top, at)
    }

    fn press(top: &mut Top<'_>, code: KeyCode) -> Action {
        top.key(KeyEvent::new(code, KeyModifiers::NONE))
    }

    fn words(line: &str) -> Vec<&str> {
        line.split_whitespace().collect()
    }

    #[test]
    fn the_list_shows_rates_and_follows_the_keys() {
        with(|top, at| {
            assert!(screen(top, 160, 8)[1].contains("Reading the bus"));
            top.news(at, Ok(devices(1000)));
            assert!(screen(top, 160, 8)[3].contains("..."), "no rates yet");
            top.news(at + Duration::from_secs(1), Ok(devices(2000)));
            let lines = screen(top, 160, 8);
            assert_eq!(lines[0], "vbus top  /run/bus: 3 devices, 2 open; every 1 s, by device");
            assert!(lines[2].starts_with("DEVICE*"), "{lines:#?}");
            assert_eq!(
                words(&lines[3]),
                [
                    "net0", "venet", "open", "polling", "1.00", "k", "1.00", "M", "0", "0", "9",
                    "256", "10", "0", "99.0", "-", "0"
                ]
            );
            assert!(lines[4].ends_with("2000 +1.00 k/s"), "{lines:#?}");
            assert!(lines[5].starts_with("values") && lines[5].contains("not connected"));
            assert!(lines[7].starts_with("q end"));
            // By class, by state, and by bytes out.
            for _ in 0..3 {
                press(top, KeyCode::Char('s'));
            }
            let lines = screen(top, 160, 8);
            assert!(lines[2].contains("OUT B/s*") && lines[3].starts_with("net1"), "{lines:#?}");
            press(top, KeyCode::Char('r'));
            assert!(screen(top, 160, 8)[5].starts_with("net1"));
            press(top, KeyCode::Char('S'));
            assert_eq!(top.order.name(), "state");
        });
    }

    #[test]
    fn narrow_and_tiny_screens_lose_columns_and_nothing_else() {
        with(|top, at| {
            top.news(at, Ok(devices(1000)));
            top.news(at + Duration::from_secs(1), Ok(devices(2000)));
            let lines = screen(top, 80, 8);
            assert_eq!(
                words(&lines[2]),
                ["DEVICE*", "STATE", "OUT", "f/s", "IN", "f/s", "DROPPED"]
            );
            assert!(lines[4].contains("2000 +1.00 k/s"), "{lines:#?}");
            for (width, height) in [(1, 1), (20, 2), (79, 3), (300, 100)] {
                for view in [View::List, View::Device, View::Help(false)] {
                    top.view = view;
                    screen(top, width, height);
                }
            }
        });
    }

    #[test]
    fn a_device_shows_its_queues_and_why_it_drops() {
        with(|top, at| {
            top.news(at, Ok(devices(1000)));
            top.news(at + Duration::from_secs(1), Ok(devices(2000)));
            press(top, KeyCode::Down);
            press(top, KeyCode::Enter);
            let text = screen(top, 140, 40).join("\n");
            assert!(text.contains("net1  venet, open; tasks: polling"), "{text}");
            let out: Vec<_> =
                text.lines().map(words).filter(|w| w.get(1) == Some(&"out")).collect();
            assert_eq!(out, [["0", "out", "2.00", "k", "2.00", "M", "9", "0", "0"]], "{text}");
            assert!(text.contains("2000  pairs.0.rx.drops.no_buffers: Frames while"), "{text}");
            assert!(text.contains("interrupts_suppressed"), "{text}");
            // It stays chosen when the order changes, and scrolling ends at the end.
            press(top, KeyCode::End);
            let end = screen(top, 140, 10).join("\n");
            assert!(end.contains("rx.drops.no_buffers") && !end.contains("QUEUE"), "{end}");
            press(top, KeyCode::Home);
            assert!(screen(top, 140, 10)[2].starts_with("net1"));
            top.news(at + Duration::from_secs(2), Ok(devices(2000)[..1].to_vec()));
            assert!(screen(top, 140, 10)[2].starts_with("net0"), "net1 has gone");
            top.news(at + Duration::from_secs(3), Ok(Vec::new()));
            assert!(screen(top, 140, 10)[2].starts_with("the device has gone"));
            press(top, KeyCode::Esc);
            assert!(screen(top, 140, 10)[2].starts_with("no devices"));
        });
    }

    #[test]
    fn a_bus_that_goes_is_told_and_comes_back() {
        with(|top, at| {
            top.news(at, Ok(devices(1000)));
            top.news(at + Duration::from_secs(1), Err("the bus has gone".into()));
            let lines = screen(top, 160, 8);
            assert!(lines[1].starts_with("The bus has not answered for"), "{lines:#?}");
            assert!(lines[1].contains("(the bus has gone)"));
            assert!(lines[3].starts_with("net0"), "the last numbers stay");
            top.news(at + Duration::from_secs(9), Ok(devices(10)));
            let lines = screen(top, 160, 8);
            assert_eq!(lines[1], "");
            assert!(lines[3].contains("..."), "it has counted anew: {lines:#?}");
            press(top, KeyCode::Char('p'));
            top.news(at + Duration::from_secs(10), Ok(Vec::new()));
            let lines = screen(top, 160, 8);
            assert!(lines[1].starts_with("Paused") && lines[3].starts_with("net0"));
        });
    }

    #[test]
    fn a_bus_that_stands_still_is_told() {
        with(|top, at| {
            let Some(earlier) = at.checked_sub(Duration::from_secs(60)) else { return };
            top.news(earlier, Ok(devices(1000)));
            let lines = screen(top, 160, 8);
            assert!(lines[1].starts_with("The bus stands still: no answer for 6"), "{lines:#?}");
            top.news(Instant::now() + Duration::from_secs(60), Ok(devices(1000)));
            assert_eq!(screen(top, 160, 8)[1], "");
        });
    }

    #[test]
    fn keys_end_and_help() {
        with(|top, _| {
            press(top, KeyCode::Char('?'));
            assert!(screen(top, 100, 30).join("\n").contains("DROPPED  frames since"));
            assert!(HELP.iter().all(|line| line.chars().count() <= 100));
            press(top, KeyCode::Char('x'));
            assert_eq!(top.view, View::List);
            assert_eq!(press(top, KeyCode::Enter), Action::Go);
            assert_eq!(top.view, View::List, "there is no device to show");
            assert_eq!(press(top, KeyCode::Char('q')), Action::End);
            assert_eq!(press(top, KeyCode::Esc), Action::End);
            let control = |letter| KeyEvent::new(KeyCode::Char(letter), KeyModifiers::CONTROL);
            assert_eq!(top.key(control('c')), Action::End);
            assert_eq!(top.key(control('z')), Action::Suspend);
        });
    }
}
