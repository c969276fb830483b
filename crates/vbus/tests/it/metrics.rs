// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The metrics of a bus, over its UNIX socket and over a port, in the sandbox.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;

use crate::support::{Served, TIMEOUT, vbus, wait_until};

const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// One device of each class that needs nothing outside, and a port that the kernel chooses.
const ALL: &str = r#"
[metrics]
listen = "127.0.0.1:0"

[[device]]
name = "net0"
class = "venet"
backend = "switch"
queue-pairs = 2

[[device]]
name = "net1"
class = "venet"
backend = "null"

[[device]]
name = "values"
class = "state"
pages = [{ name = "setpoint", bytes = 64, owner = "device" }]

[[device]]
name = "pic0"
class = "pic"
"#;

/// An uplink whose other end is not there.
const UPLINK: &str = r#"
[[device]]
name = "up"
class = "uplink"
switch = "lab"
backend = "stream"
connect = "/nonexistent/vbus-test"
"#;

fn exchange(mut socket: impl Read + Write, request: &[u8]) -> String {
    let _ = socket.write_all(request);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    String::from_utf8(answer).unwrap()
}

/// The whole answer to a scrape of this socket. On a slow machine a scrape may take longer than the
/// server lets it: then it is repeated.
fn answer<S: Read + Write>(connect: impl Fn() -> S) -> String {
    let mut answer = String::new();
    wait_until("a whole answer", || {
        answer = exchange(connect(), GET);
        answer.ends_with("# EOF\n")
    });
    answer
}

fn scrape(path: &Path) -> String {
    answer(|| {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket
    })
}

/// The port that the log names.
fn port(bus: &Served) -> SocketAddr {
    let log = std::fs::read_to_string(&bus.log).unwrap();
    let (_, rest) = log.split_once("http://").expect("the log names the port");
    let (address, _) = rest.split_once("/metrics").unwrap();
    address.parse().unwrap()
}

#[test]
fn a_bus_in_its_sandbox_serves_metrics_on_both_sockets() {
    let bus = Served::start(ALL);
    let path = bus.dir.join("metrics.sock");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let address = port(&bus);
    assert!(address.ip().is_loopback());
    let tcp = || {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket
    };
    for answer in [scrape(&path), answer(tcp)] {
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(answer.contains("\nvbus_devices 4\n"), "{answer}");
        let doorbells = "vbus_device_doorbells_total{device=\"net0\",class=\"venet\"} 0\n";
        assert!(answer.contains(doorbells), "{answer}");
    }
    // The numbers are those of `stats`, and a device that comes is there.
    bus.good(&["device", "add", "net2", "--class", "venet", "--set", "backend=null"]);
    wait_until("the metrics know the new device", || {
        scrape(&path).contains("vbus_device_open{device=\"net2\",class=\"venet\"} 0\n")
    });
    // Hostile scrapers: silent, deaf, gone early. The bus still answers everybody.
    let silent: Vec<_> = (0..40).map(|_| UnixStream::connect(&path).unwrap()).collect();
    let deaf: Vec<_> = (0..40)
        .map(|_| {
            let mut socket = tcp();
            socket.write_all(GET).unwrap();
            socket
        })
        .collect();
    for _ in 0..40 {
        let _ = tcp().write_all(&GET[..9]);
    }
    scrape(&path);
    assert_eq!(bus.json(&["stats"]).as_array().unwrap().len(), 5);
    drop((silent, deaf));
}

#[test]
fn the_table_decides_where_the_socket_is_and_a_bad_one_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.sock");
    let config = format!("[metrics]\nsocket = {{ path = {path:?}, mode = \"0606\" }}\n{ALL}")
        .replace("\n[metrics]\nlisten = \"127.0.0.1:0\"\n", "");
    let bus = Served::start(&config);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o606);
    scrape(&path);
    assert!(!bus.dir.join("metrics.sock").exists());
    drop(bus);
    wait_until("the socket has been removed", || !path.exists());
    for (text, expected) in [
        ("listen = \"0.0.0.0:9464\"", ":2:1: \"listen\" is \"0.0.0.0:9464\", which other machines"),
        ("lisen = 1", ":2:1: \"lisen\" is no setting here; did you mean \"listen\"?"),
        ("socket = { mode = \"x\" }", ":2:12: \"socket.mode\" is \"x\"; use an octal number"),
    ] {
        let file = dir.path().join("bad.toml");
        std::fs::write(&file, format!("[metrics]\n{text}\n")).unwrap();
        let done = vbus().args(["config", "check"]).arg(&file).output().unwrap();
        let said = String::from_utf8(done.stderr).unwrap();
        assert!(!done.status.success() && said.contains(expected), "{said}");
    }
}

/// The names of metrics in an expression of the dashboard.
fn names(expression: &str) -> impl Iterator<Item = &str> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    expression.split(move |c| !is_part(c)).filter(|word| word.starts_with("vbus_"))
}

/// The values of the key `expr` and of `query`, wherever they are.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(text) if matches!(&**key, "expr" | "query" | "definition") => {
                        found.push(text.clone());
                    }
                    value => expressions(value, found),
                }
            }
        }
        Value::Array(list) => list.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[test]
fn the_dashboard_names_only_metrics_that_there_are() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging/grafana-dashboard.json");
    let dashboard: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let mut found = Vec::new();
    expressions(&dashboard, &mut found);
    let wanted: BTreeSet<&str> = found.iter().flat_map(|text| names(text)).collect();
    assert!(wanted.len() > 10, "{wanted:?}");
    let bus = Served::start(&format!("{ALL}{UPLINK}"));
    let text = scrape(&bus.dir.join("metrics.sock"));
    let have: BTreeSet<&str> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split(['{', ' ']).next())
        .collect();
    for name in wanted {
        assert!(have.contains(name), "the dashboard names {name}, and the bus has {have:?}");
    }
}
