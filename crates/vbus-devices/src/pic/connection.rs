// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's use of an interrupt controller. The driver registers and drops processors, and makes,
//! moves and ends routes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_core::shm::abi::pic::{
    CALL_MOVE, CALL_ROUTE, CALL_UNROUTE, NAME_OFFSET, NO_ROUTE, ROUTE_BYTES, ROUTES_MAX,
};
use vbus_core::{Connection, ErrorCode, InterruptSink, Region, Route, Router, state as data};

use super::page::{Cpu, Line};
use vbus_core::lock;

/// The processors and routes of a connection. A route that has ended stays here until the next
/// ROUTE or MOVE removes it.
#[derive(Default)]
pub struct PicState {
    /// The processors that the driver has registered, by number.
    cpus: BTreeMap<u32, Arc<Cpu>>,
    /// The routes, by device and vector.
    routes: BTreeMap<(String, u16), Routed>,
    /// Routes of a device that this one goes on for, whose devices were not there yet.
    wanted: Vec<RouteState>,
}

struct Routed {
    line: u16,
    cpu: Arc<Cpu>,
    cpu_number: u32,
    route: Route,
    /// Where the interrupts go while the device is quiesced.
    parked: Option<Arc<Parked>>,
}

/// Takes the interrupts of a route without touching the driver's page.
#[derive(Default)]
struct Parked {
    /// One has come. Relaxed: it is read when the route leads elsewhere, and whoever redirects a
    /// route waits for those who use it.
    triggered: AtomicBool,
}

impl InterruptSink for Parked {
    fn trigger(&self, _vector: u16) {
        self.triggered.store(true, Ordering::Relaxed);
    }
}

/// A connection as plain data (spec/state-format.md, "pic").
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPic {
    /// The counts of each registered page.
    pages: Vec<PageState>,
    routes: Vec<RouteState>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PageState {
    cpu: u32,
    raised: u64,
    messages: u64,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RouteState {
    device: String,
    vector: u16,
    line: u16,
    cpu: u32,
}

/// The buffer of ROUTE, UNROUTE and MOVE.
struct Request {
    what: (String, u16),
    line: u16,
    cpu: u32,
}

impl Request {
    fn parse(buffer: &[u8]) -> Result<Request, ErrorCode> {
        let buffer = buffer.first_chunk::<ROUTE_BYTES>().ok_or(ErrorCode::BAD_LENGTH)?;
        let u16_at = |at: usize| u16::from_le_bytes([buffer[at], buffer[at + 1]]);
        let cpu = u32::from_le_bytes([buffer[4], buffer[5], buffer[6], buffer[7]]);
        let name = buffer[NAME_OFFSET..].split(|b| *b == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).map_err(|_| ErrorCode::BAD_ARGUMENT)?;
        Ok(Request { what: (name.to_owned(), u16_at(0)), line: u16_at(2), cpu })
    }
}

impl PicState {
    /// The line that a request names.
    fn line(&self, request: &Request) -> Result<Arc<Line>, ErrorCode> {
        let cpu = self.cpus.get(&request.cpu).ok_or(ErrorCode::NO_REGION)?;
        if request.line >= cpu.lines() {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        Ok(Arc::new(Line { cpu: cpu.clone(), number: request.line }))
    }

    fn route(&mut self, router: &Router, request: Request) -> Result<u64, ErrorCode> {
        let line = self.line(&request)?;
        self.routes.retain(|_, routed| routed.route.is_alive());
        if self.routes.len() >= ROUTES_MAX {
            return Err(ErrorCode::LIMIT);
        }
        let (device, vector) = &request.what;
        let cpu = line.cpu.clone();
        let route = router.route(device, *vector, line)?;
        let (line, cpu_number, parked) = (request.line, request.cpu, None);
        self.routes.insert(request.what, Routed { line, cpu, cpu_number, route, parked });
        Ok(0)
    }

    /// Lets interrupts wait without touching a page, until [`go_on`](Self::go_on).
    pub fn park(&mut self) {
        for routed in self.routes.values_mut() {
            let parked = Arc::new(Parked::default());
            if routed.route.redirect(parked.clone()) {
                routed.parked = Some(parked);
            }
        }
    }

    /// Undoes [`park`](Self::park), and raises the lines of the interrupts that came meanwhile.
    pub fn go_on(&mut self, router: Option<&Router>) {
        for saved in std::mem::take(&mut self.wanted) {
            let (device, vector) = (saved.device.clone(), saved.vector);
            let made = router.map_or(Err(ErrorCode::NOT_OPEN), |router| self.make(router, saved));
            if let Err(error) = made {
                tracing::warn!(device, vector, %error, "a route of interrupts cannot be made again");
            }
        }
        for routed in self.routes.values_mut() {
            let Some(parked) = routed.parked.take() else { continue };
            let line = Arc::new(Line { cpu: routed.cpu.clone(), number: routed.line });
            if routed.route.redirect(line) && parked.triggered.load(Ordering::Relaxed) {
                routed.cpu.raise(routed.line);
            }
        }
    }

    /// Makes a route of the state. Its first interrupt may have been lost, so the line is raised
    /// when the device goes on.
    fn make(&mut self, router: &Router, saved: RouteState) -> Result<(), ErrorCode> {
        let RouteState { device, vector, line, cpu: cpu_number } = saved;
        let request = Request { what: (device, vector), line, cpu: cpu_number };
        let cpu = self.line(&request)?.cpu.clone();
        if self.routes.len() >= ROUTES_MAX || self.routes.contains_key(&request.what) {
            return Err(ErrorCode::LIMIT);
        }
        let parked = Arc::new(Parked::default());
        let route = router.route(&request.what.0, vector, parked.clone())?;
        let parked = Some(parked);
        self.routes.insert(request.what, Routed { line, cpu, cpu_number, route, parked });
        Ok(())
    }

    fn save(&self) -> SavedPic {
        let page = |(cpu, of): (&u32, &Arc<Cpu>)| PageState {
            cpu: *cpu,
            raised: of.raised.get(),
            messages: of.messages.get(),
        };
        let alive = self.routes.iter().filter(|(_, routed)| routed.route.is_alive());
        let route = |((device, vector), routed): (&(String, u16), &Routed)| RouteState {
            device: device.clone(),
            vector: *vector,
            line: routed.line,
            cpu: routed.cpu_number,
        };
        let wanted = self.wanted.iter().cloned();
        SavedPic {
            pages: self.cpus.iter().map(page).collect(),
            routes: alive.map(route).chain(wanted).collect(),
        }
    }

    /// Goes on from what [`save`](Self::save) returned, with the pages registered.
    fn restore(&mut self, router: &Router, saved: SavedPic) -> Result<(), String> {
        for PageState { cpu, raised, messages } in saved.pages {
            let page = self.cpus.get(&cpu).ok_or_else(|| format!("there is no page {cpu}"))?;
            data::check_count("raised", raised)?;
            data::check_count("messages", messages)?;
            page.raised.add(raised);
            page.messages.add(messages);
        }
        if saved.routes.len() > ROUTES_MAX {
            return Err(format!("there are {} routes", saved.routes.len()));
        }
        for route in saved.routes {
            let name = format!("the route of vector {} of {:?}", route.vector, route.device);
            match self.make(router, route.clone()) {
                // Its device may be restored later.
                Err(ErrorCode::NOT_OPEN | ErrorCode::DENIED) => self.wanted.push(route),
                made => made.map_err(|error| format!("{name}: {error}"))?,
            }
        }
        Ok(())
    }

    /// Serves MOVE. The driver changes nothing in the pages for this. If the old line is pending,
    /// the device clears it and raises the new line, unless the driver takes the old line first.
    fn relocate(&mut self, request: Request) -> Result<u64, ErrorCode> {
        let line = self.line(&request)?;
        let routed = self.routes.get_mut(&request.what).ok_or(ErrorCode(NO_ROUTE))?;
        if !routed.route.redirect(line.clone()) {
            self.routes.remove(&request.what);
            return Err(ErrorCode(NO_ROUTE));
        }
        if Arc::ptr_eq(&routed.cpu, &line.cpu) && routed.line == request.line {
            return Ok(0);
        }
        // From here on this vector does not raise the old line.
        let (old, old_line) = (std::mem::replace(&mut routed.cpu, line.cpu.clone()), routed.line);
        (routed.line, routed.cpu_number) = (request.line, request.cpu);
        // If several routes share the old line, the device cannot tell which of them raised it. The
        // old line then stays pending, and the device raises the new line in any case.
        let moved = self.is_shared(&old, old_line) || old.take_back(old_line);
        if moved {
            line.cpu.raise(request.line);
        }
        Ok(u64::from(moved))
    }

    fn unroute(&mut self, what: &(String, u16)) -> Result<u64, ErrorCode> {
        let routed = self.routes.remove(what).filter(|routed| routed.route.is_alive());
        let Routed { line, cpu, route, .. } = routed.ok_or(ErrorCode(NO_ROUTE))?;
        // Dropping the route makes the other device send its own interrupt once, so the line need
        // not stay pending.
        drop(route);
        if !self.is_shared(&cpu, line) {
            cpu.take_back(line);
        }
        Ok(0)
    }

    /// Whether a route leads to this line. One that has ended raises it no more.
    fn is_shared(&self, cpu: &Arc<Cpu>, line: u16) -> bool {
        let leads = |routed: &Routed| routed.line == line && Arc::ptr_eq(&routed.cpu, cpu);
        self.routes.values().any(|routed| leads(routed) && routed.route.is_alive())
    }

    pub fn inspect(&self) -> Value {
        let pages = self.cpus.iter().map(|(number, cpu)| {
            let (raised, messages) = (&cpu.raised, &cpu.messages);
            json!({ "cpu": number, "lines": cpu.lines(), "raised": raised, "messages": messages })
        });
        let alive = self.routes.iter().filter(|(_, routed)| routed.route.is_alive());
        let routes = alive.map(|((device, vector), routed)| {
            let (line, cpu) = (routed.line, routed.cpu_number);
            json!({ "device": device, "vector": vector, "line": line, "cpu": cpu })
        });
        json!({ "pages": pages.collect::<Vec<_>>(), "routes": routes.collect::<Vec<_>>() })
    }
}

/// A connection.
pub struct PicConnection {
    state: Arc<Mutex<PicState>>,
    cpus: u16,
    router: Router,
}

impl PicConnection {
    pub fn new(state: Arc<Mutex<PicState>>, cpus: u16, router: Router) -> PicConnection {
        PicConnection { state, cpus, router }
    }

    /// The connection of a driver that had these regions with a device that this one goes on for.
    pub fn again(
        state: Arc<Mutex<PicState>>,
        cpus: u16,
        router: Router,
        regions: Vec<Region>,
        saved: &Value,
    ) -> Result<PicConnection, String> {
        let saved: SavedPic = data::read_part(saved)?;
        let mut this = PicConnection::new(state, cpus, router);
        for region in regions {
            let number = region.id;
            this.region_added(region).map_err(|error| format!("page {number}: {error}"))?;
        }
        lock(&this.state).restore(&this.router, saved)?;
        Ok(this)
    }
}

impl Connection for PicConnection {
    fn check_region(&mut self, id: u32, _: u64) -> Result<(), ErrorCode> {
        if id >= u32::from(self.cpus) {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        if lock(&self.state).cpus.contains_key(&id) { Err(ErrorCode::EXISTS) } else { Ok(()) }
    }

    fn region_added(&mut self, region: Region) -> Result<(), ErrorCode> {
        let number = region.id;
        self.check_region(number, 0)?;
        let mut state = lock(&self.state);
        state.cpus.insert(number, Arc::new(Cpu::new(region)?));
        Ok(())
    }

    fn save(&mut self) -> Result<Value, String> {
        data::part(&lock(&self.state).save())
    }

    fn region_dropped(&mut self, handle: u32) -> Result<(), ErrorCode> {
        let mut state = lock(&self.state);
        state.routes.retain(|_, routed| routed.cpu.handle != handle);
        state.cpus.retain(|_, cpu| cpu.handle != handle);
        Ok(())
    }

    fn call(&mut self, function: u32, flags: u32, buffer: &mut [u8]) -> Result<u64, ErrorCode> {
        if ![CALL_ROUTE, CALL_UNROUTE, CALL_MOVE].contains(&function) {
            return Err(ErrorCode::BAD_FUNCTION);
        }
        if flags != 0 {
            return Err(ErrorCode::BAD_ARGUMENT);
        }
        let request = Request::parse(buffer)?;
        let mut state = lock(&self.state);
        match function {
            CALL_ROUTE => state.route(&self.router, request),
            CALL_UNROUTE => state.unroute(&request.what),
            _ => state.relocate(request),
        }
    }
}

impl Drop for PicConnection {
    fn drop(&mut self) {
        *lock(&self.state) = PicState::default();
    }
}
