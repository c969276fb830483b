// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vbus-guest net show` and `vbus-guest net set`. A device has one driver at a time, so these
//! commands ask the running `vbus-guest net`, at an abstract socket for each interface.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use vbus_cli::output::{emit, emit_json, flatten, plain, table};
use vbus_control::{Client, Connection, Handler, Limits, Peer, Server, Share};

/// How long the driver may take to answer.
const TIMEOUT: Duration = Duration::from_secs(5);
const LIMITS: Limits = Limits { clients: 4, line: 4096 };

/// Commands to a running `vbus-guest net`.
#[derive(clap::Subcommand, Clone, Debug)]
pub enum Command {
    /// Show a NIC that a running `vbus-guest net` drives, and its settings
    Show {
        /// The name of the interface
        #[arg(value_name = "IFACE")]
        interface: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Change settings of a NIC that a running `vbus-guest net` drives
    ///
    /// The settings stay when the NIC is opened again. What the kernel does by itself needs no
    /// setting here: `ethtool -K IFACE tso off` for frames to the NIC, `ip link set IFACE mtu N`.
    Set {
        /// The name of the interface
        #[arg(value_name = "IFACE")]
        interface: String,
        #[command(flatten)]
        changes: Changes,
    },
}

/// Settings of a NIC. `None`: as before.
#[derive(clap::Args, Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Changes {
    /// Use this many queue pairs, at most as many as were made at the start (as `ethtool -L`)
    #[arg(long = "use-queue-pairs", value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub use_queue_pairs: Option<u16>,
    /// Whether received frames may lack checksums and be larger than the MTU; switch it off for a
    /// program of XDP (as `ethtool -K IFACE rx off lro off`) [default: true]
    #[arg(long, value_name = "BOOL")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_offload: Option<bool>,
    /// The device holds an interrupt back for this many microseconds (as `ethtool -C`) [default: 0]
    #[arg(long, value_name = "US")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_usecs: Option<u32>,
    /// An interrupt comes after this many frames at the latest; 0: any number [default: 0]
    #[arg(long, value_name = "N")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_frames: Option<u32>,
    /// Whether the device drops frames of VLANs that have no interface on top of this one, while
    /// this one is not promiscuous (as `ethtool -K IFACE rx-vlan-filter on`) [default: false]
    #[arg(long, value_name = "BOOL")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan_filter: Option<bool>,
}

impl Changes {
    /// These settings, and those of `before` where these have none.
    pub fn over(&self, before: &Changes) -> Changes {
        Changes {
            use_queue_pairs: self.use_queue_pairs.or(before.use_queue_pairs),
            rx_offload: self.rx_offload.or(before.rx_offload),
            rx_usecs: self.rx_usecs.or(before.rx_usecs),
            rx_frames: self.rx_frames.or(before.rx_frames),
            vlan_filter: self.vlan_filter.or(before.vlan_filter),
        }
    }
}

/// A request of a client.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Describes the NIC.
    Show,
    /// Changes settings, and describes the NIC.
    Set(Changes),
}

/// A request, and where its answer goes.
pub type Asked = (Request, Sender<Result<Value>>);

/// The driver's end: takes the requests of clients.
pub struct Control {
    server: Server<Asker>,
    /// Becomes readable when a request has come.
    news: OwnedFd,
    requests: Receiver<Asked>,
}

struct Asker {
    news: OwnedFd,
    requests: Sender<Asked>,
}

impl Handler for Asker {
    type Request = Request;

    fn admit(&self, peer: &Peer) -> Result<Share> {
        let own = rustix::process::geteuid().as_raw();
        ensure!(
            peer.uid == 0 || peer.uid == own,
            "only root and the user of `vbus-guest net` may ask it"
        );
        Ok(Share::WHOLE)
    }

    fn handle(&self, request: Request, _client: &Client<'_>) -> Result<Value> {
        let (answer, answers) = channel();
        self.requests.send((request, answer)).map_err(|_| anyhow!("the driver ends"))?;
        rustix::io::retry_on_intr(|| rustix::io::write(&self.news, &1u64.to_ne_bytes()))?;
        answers
            .recv_timeout(TIMEOUT)
            .map_err(|_| anyhow!("the NIC is not open now: its bus has gone, or is busy"))?
    }
}

fn address(interface: &str) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("vbus-guest-net-{interface}"))
}

impl Control {
    /// Listens for clients that name `interface`. `None`: it cannot; the log says why.
    pub fn listen(interface: &str) -> Option<Control> {
        let make = || -> Result<Control> {
            let listener = UnixListener::bind_addr(&address(interface)?)?;
            let news = super::nic::event()?;
            let (sender, requests) = channel();
            let asker = Asker { news: news.try_clone()?, requests: sender };
            Ok(Control { server: Server::new(listener, LIMITS, asker)?, news, requests })
        };
        make()
            .inspect_err(|error| {
                tracing::warn!("{interface}: `vbus-guest net set` will get no answer: {error:#}");
            })
            .ok()
    }

    /// The descriptors that become readable when there is something to do.
    pub fn fds(&self) -> [BorrowedFd<'_>; 2] {
        [self.server.as_fd(), self.news.as_fd()]
    }

    /// Accepts a client, and returns the requests that have come.
    pub fn requests(&self) -> impl Iterator<Item = Asked> + '_ {
        if let Err(error) = self.server.accept() {
            tracing::warn!(%error, "cannot accept a client");
        }
        let _ = rustix::io::read(&self.news, &mut [0; 8]);
        self.requests.try_iter()
    }
}

/// Runs a command.
pub fn run(command: &Command) -> Result<()> {
    let (interface, request, json) = match command {
        Command::Show { interface, json } => (interface, json!({ "op": "show" }), *json),
        Command::Set { interface, changes } => {
            let mut request = serde_json::to_value(changes)?;
            if request.as_object().is_none_or(serde_json::Map::is_empty) {
                bail!("nothing to set; `vbus-guest net set --help` shows what there is");
            }
            request["op"] = "set".into();
            (interface, request, false)
        }
    };
    let socket = UnixStream::connect_addr(&address(interface)?).with_context(|| {
        format!("no `vbus-guest net` on this machine drives an interface {interface:?}")
    })?;
    socket.set_read_timeout(Some(2 * TIMEOUT))?;
    let answer = Connection::new(socket, "vbus-guest net").stream(&request, &mut drop)?;
    if json {
        emit_json(&answer);
    } else {
        let rows = flatten(&answer).into_iter().map(|(key, value)| vec![key, plain(value)]);
        emit(&table(&rows.collect::<Vec<_>>()));
    }
    Ok(())
}

/// The ids of the VLANs on top of `interface`, by the text of /proc/net/vlan/config.
pub fn vlans_of(interface: &str, config: &str) -> Vec<u16> {
    let ids = config.lines().filter_map(|line| {
        let mut fields = line.split('|').map(str::trim);
        let (id, parent) = (fields.nth(1)?, fields.next()?);
        if parent == interface { id.parse().ok().filter(|id| *id < 4096) } else { None }
    });
    ids.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlans_are_those_of_the_interface() {
        let config = "VLAN Dev name\t | VLAN ID\nName-Type: VLAN_NAME_TYPE_RAW_PLUS_VID_NO_PAD\n\
                      vbus0.5        | 5  | vbus0\nvbus0.4095     | 4095  | vbus0\n\
                      other          | 7  | vbus1\nbad | x | vbus0\nshort | 9\n";
        assert_eq!(vlans_of("vbus0", config), [5, 4095]);
        assert_eq!(vlans_of("vbus1", config), [7]);
        assert!(vlans_of("vbus", config).is_empty() && vlans_of("vbus0", "").is_empty());
    }

    #[test]
    fn changes_keep_what_they_do_not_name() {
        let before = Changes { rx_usecs: Some(50), vlan_filter: Some(true), ..Changes::default() };
        let now = Changes { rx_usecs: Some(0), rx_offload: Some(false), ..Changes::default() };
        let both = now.over(&before);
        assert_eq!((both.rx_usecs, both.rx_offload), (Some(0), Some(false)));
        assert_eq!((both.vlan_filter, both.rx_frames), (Some(true), None));
        let request: Request =
            serde_json::from_value(json!({ "op": "set", "rx-usecs": 7 })).unwrap();
        assert!(matches!(request, Request::Set(Changes { rx_usecs: Some(7), .. })));
    }
}
