// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver's use of an interrupt controller. The driver registers and drops processors, and makes,
//! moves and ends routes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use vbus_core::shm::abi::pic::{
    CALL_MOVE, CALL_ROUTE, CALL_UNROUTE, NAME_OFFSET, NO_ROUTE, ROUTE_BYTES, ROUTES_MAX,
};
use vbus_core::{Connection, ErrorCode, Region, Route, Router};

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
}

struct Routed {
    line: u16,
    cpu: Arc<Cpu>,
    cpu_number: u32,
    route: Route,
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
        self.routes.insert(
            request.what,
            Routed { line: request.line, cpu, cpu_number: request.cpu, route },
        );
        Ok(0)
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
        let Routed { line, cpu, route, .. } =
            self.routes.remove(what).ok_or(ErrorCode(NO_ROUTE))?;
        // Dropping the route makes the other device send its own interrupt once, so the line need
        // not stay pending.
        drop(route);
        if !self.is_shared(&cpu, line) {
            cpu.take_back(line);
        }
        Ok(0)
    }

    /// Whether another route leads to this line.
    fn is_shared(&self, cpu: &Arc<Cpu>, line: u16) -> bool {
        self.routes.values().any(|routed| routed.line == line && Arc::ptr_eq(&routed.cpu, cpu))
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
