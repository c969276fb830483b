// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the screen shows, and what keys and readings change.

use std::cmp::Ordering;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde_json::Value;

use crate::telemetry::{DeviceSample, Rates, Sample, Table};

/// How long a bus may take to answer.
const SILENCE: Duration = Duration::from_secs(3);

/// What the rest of the program has to do after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Go on.
    Go,
    /// End.
    End,
    /// Stop the process until the shell lets it go on.
    Suspend,
}

/// What fills the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// All devices.
    List,
    /// The chosen device.
    Device,
    /// The explanation of columns and keys. The value is the view below it.
    Help(bool),
}

/// The order of the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Name,
    Class,
    State,
    Out,
    In,
    Doorbells,
    Interrupts,
    Drops,
}

impl Order {
    /// All of them, in the order of the columns.
    pub const ALL: [Order; 8] = [
        Order::Name,
        Order::Class,
        Order::State,
        Order::Out,
        Order::In,
        Order::Doorbells,
        Order::Interrupts,
        Order::Drops,
    ];

    /// The name of the order, for people.
    pub fn name(self) -> &'static str {
        match self {
            Order::Name => "device",
            Order::Class => "class",
            Order::State => "state",
            Order::Out => "bytes out",
            Order::In => "bytes in",
            Order::Doorbells => "doorbells",
            Order::Interrupts => "interrupts",
            Order::Drops => "drops",
        }
    }
}

/// A device with its rates. There are none until it was read twice.
pub type Line<'a, 't> = (&'a DeviceSample<'t>, Option<Rates>);

/// The whole state.
pub struct Top<'t> {
    table: &'t Table,
    /// The directory of the bus.
    pub dir: String,
    /// The time between two readings.
    pub interval: Duration,
    /// Whether the terminal has colours.
    pub colour: bool,
    before: Option<Sample<'t>>,
    now: Option<Sample<'t>>,
    /// Since when the bus has refused to answer, and why.
    pub gone: Option<(Instant, String)>,
    /// When there was news of the bus last, or this began.
    heard: Instant,
    /// Whether new readings are left out.
    pub paused: bool,
    /// What fills the screen.
    pub view: View,
    /// The order of the devices.
    pub order: Order,
    /// Whether the order is the other way round.
    pub reversed: bool,
    /// The name of the chosen device.
    chosen: Option<String>,
    /// How many lines the view of a device is scrolled down.
    pub scroll: u16,
    /// How many lines a page has; the drawing sets it.
    pub page: u16,
}

impl<'t> Top<'t> {
    /// The state before the first reading.
    pub fn new(table: &'t Table, dir: String, interval: Duration, colour: bool) -> Top<'t> {
        Top {
            table,
            dir,
            interval,
            colour,
            before: None,
            now: None,
            gone: None,
            heard: Instant::now(),
            paused: false,
            view: View::List,
            order: Order::Name,
            reversed: false,
            chosen: None,
            scroll: 0,
            page: 1,
        }
    }

    /// Takes a reading of the bus, or the reason why there is none.
    pub fn news(&mut self, at: Instant, news: Result<Vec<Value>, String>) {
        self.heard = at;
        match news {
            Err(reason) => {
                let since = self.gone.take().map_or(at, |(since, _)| since);
                self.gone = Some((since, reason));
            }
            Ok(devices) => {
                // A bus that comes back has counted from 0.
                if self.gone.take().is_some() {
                    (self.before, self.now) = (None, None);
                }
                if !self.paused {
                    let now = Sample::new(self.table, at, &devices);
                    self.before = self.now.replace(now);
                }
            }
        }
    }

    /// How long nothing came from the bus, if that is longer than a bus takes that works.
    pub fn silence(&self) -> Option<Duration> {
        let silence = self.heard.elapsed();
        (silence > self.interval + SILENCE).then_some(silence)
    }

    /// Whether the bus has been read.
    pub fn is_read(&self) -> bool {
        self.now.is_some()
    }

    /// The devices, in the order of the bus.
    pub fn devices(&self) -> &[DeviceSample<'t>] {
        self.now.as_ref().map_or(&[], |now| &now.devices)
    }

    /// The devices in their order.
    pub fn lines(&self) -> Vec<Line<'_, 't>> {
        let Some(now) = &self.now else { return Vec::new() };
        let rates = |device| now.rates(device, self.before.as_ref()?);
        let mut lines: Vec<_> = now.devices.iter().map(|device| (device, rates(device))).collect();
        lines.sort_by(|a, b| {
            let order = compare(self.order, a, b).then_with(|| a.0.name.cmp(&b.0.name));
            if self.reversed { order.reverse() } else { order }
        });
        lines
    }

    /// The earlier reading of a device.
    pub fn earlier(&self, device: &DeviceSample<'t>) -> Option<(&DeviceSample<'t>, Duration)> {
        let (now, before) = (self.now.as_ref()?, self.before.as_ref()?);
        Some((before.device(&device.name)?, now.at.duration_since(before.at)))
    }

    /// The place of the chosen device in `lines`. If it has gone, the first one is chosen.
    pub fn place(&self, lines: &[Line<'_, 't>]) -> Option<usize> {
        let chosen = self.chosen.as_deref();
        let place = lines.iter().position(|(device, _)| Some(device.name.as_str()) == chosen);
        place.or(if lines.is_empty() { None } else { Some(0) })
    }

    /// Does what a key says.
    pub fn key(&mut self, key: KeyEvent) -> Action {
        if key.kind == KeyEventKind::Release {
            return Action::Go;
        }
        if key.modifiers.contains(KeyModifiers::CONTROL) {
            return match key.code {
                KeyCode::Char('c') => Action::End,
                KeyCode::Char('z') => Action::Suspend,
                _ => Action::Go,
            };
        }
        match (self.view, key.code) {
            (_, KeyCode::Char('q')) => return Action::End,
            (View::Help(of_device), _) => {
                self.view = if of_device { View::Device } else { View::List };
            }
            (view, KeyCode::Char('?' | 'h')) => self.view = View::Help(view == View::Device),
            (_, KeyCode::Char('p' | ' ')) => self.paused = !self.paused,
            (View::List, KeyCode::Esc) => return Action::End,
            (View::Device, KeyCode::Esc | KeyCode::Enter | KeyCode::Backspace | KeyCode::Left) => {
                self.view = View::List;
            }
            (View::List, KeyCode::Enter | KeyCode::Right) => self.enter(),
            (_, KeyCode::Up | KeyCode::Char('k')) => self.step(-1),
            (_, KeyCode::Down | KeyCode::Char('j')) => self.step(1),
            (_, KeyCode::PageUp) => self.step(-i32::from(self.page)),
            (_, KeyCode::PageDown) => self.step(i32::from(self.page)),
            (_, KeyCode::Home) => self.step(i32::MIN),
            (_, KeyCode::End) => self.step(i32::MAX),
            (View::List, KeyCode::Char('s')) => self.turn_order(1),
            (View::List, KeyCode::Char('S')) => self.turn_order(Order::ALL.len() - 1),
            (View::List, KeyCode::Char('r')) => self.reversed = !self.reversed,
            _ => {}
        }
        Action::Go
    }

    fn enter(&mut self) {
        let lines = self.lines();
        let chosen = self.place(&lines).map(|place| lines[place].0.name.clone());
        if chosen.is_some() {
            (self.chosen, self.view, self.scroll) = (chosen, View::Device, 0);
        }
    }

    fn turn_order(&mut self, by: usize) {
        let at = Order::ALL.iter().position(|order| *order == self.order).unwrap_or(0);
        self.order = Order::ALL[(at + by) % Order::ALL.len()];
        self.reversed = false;
    }

    /// Chooses another device, or scrolls.
    fn step(&mut self, by: i32) {
        if self.view == View::Device {
            let to = i32::from(self.scroll).saturating_add(by).clamp(0, i32::from(u16::MAX));
            self.scroll = u16::try_from(to).unwrap_or(0);
            return;
        }
        let lines = self.lines();
        let Some(place) = self.place(&lines) else { return };
        let last = i32::try_from(lines.len() - 1).unwrap_or(i32::MAX);
        let to = i32::try_from(place).unwrap_or(0).saturating_add(by).clamp(0, last);
        let chosen = lines[usize::try_from(to).unwrap_or(0)].0.name.clone();
        self.chosen = Some(chosen);
    }
}

/// Names ascend, numbers descend.
fn compare(order: Order, a: &Line<'_, '_>, b: &Line<'_, '_>) -> Ordering {
    let number = |of: fn(&Rates) -> f64| {
        let of = |line: &Line<'_, '_>| line.1.as_ref().map_or(0.0, of);
        of(b).total_cmp(&of(a))
    };
    match order {
        Order::Name => Ordering::Equal,
        Order::Class => a.0.class.cmp(&b.0.class),
        Order::State => a.0.state.cmp(&b.0.state),
        Order::Out => number(|rates| rates.out.bytes),
        Order::In => number(|rates| rates.into.bytes),
        Order::Doorbells => number(|rates| rates.doorbells),
        Order::Interrupts => number(|rates| rates.interrupts),
        Order::Drops => b.0.drops().cmp(&a.0.drops()),
    }
}
