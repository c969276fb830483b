// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sources of functions: the PCI bus of this machine, or vfio-user sockets.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbus_driver::{Error, Function, Hal};
use vbus_process::Patience;

/// A function that a source has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// Its address on the PCI bus, or the path of its socket.
    pub id: String,
    /// The number of its class, if the source knows it without an access to the function.
    pub class: Option<u16>,
}

/// A function that another driver uses, as the source knows it without an access to the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InUse {
    /// As in [`Found`].
    pub id: String,
    /// The name of its device.
    pub name: String,
    /// The name of its class.
    pub class: String,
    /// The state of its connection: `closed`, `open` or `broken`.
    pub state: String,
}

/// A claimed function: its Hal and its interrupt.
pub type Claimed<H> = (H, Box<dyn Interrupt>);

/// A place that has functions.
pub trait Source {
    /// The Hal of the functions.
    type Hal: Hal<Dma: Send + Sync> + Send + Sync + 'static;

    /// The functions that exist now, in a fixed order.
    fn scan(&self) -> Result<Vec<Found>>;

    /// The functions of which the source knows that other drivers use them. There may be more.
    fn in_use(&self) -> Vec<InUse> {
        Vec::new()
    }

    /// Gives access to the registers of the function without claiming it. The caller only reads.
    fn look(&self, id: &str) -> Result<Self::Hal>;

    /// Claims the function for this process, until the last clone of the Hal is dropped.
    fn claim(&self, id: &str) -> Result<Claimed<Self::Hal>>;

    /// A descriptor that becomes readable when functions may have come or gone, if the source has
    /// one. The caller reads it until it is empty.
    fn changes(&self) -> Option<OwnedFd>;

    /// Whether the function `id`, which a scan did not find, has left for good. False: what makes
    /// the functions is not there now, and may bring this one back.
    fn has_left(&self, id: &str) -> bool {
        let _ = id;
        true
    }

    /// Whether a function that does not answer can come back under the same id.
    fn comes_back(&self) -> bool;
}

/// The interrupt of a claimed function. It is disabled at first, and becomes disabled each time it
/// comes. [`enable`](Self::enable) enables it.
pub trait Interrupt: Send {
    /// A descriptor that becomes readable when the interrupt comes.
    fn fd(&self) -> BorrowedFd<'_>;

    /// A descriptor that hangs up when the function has gone. Use it for nothing else.
    fn lifeline(&self) -> BorrowedFd<'_>;

    /// Takes the interrupt that has come. Afterwards the driver acknowledges it at the function,
    /// looks at the signals, and calls `enable`, in this order.
    ///
    /// # Errors
    /// The function has gone.
    fn take(&mut self) -> Result<()>;

    /// Enables the interrupt. A pending interrupt comes at once.
    fn enable(&mut self) -> Result<()>;

    /// Sets how long an access to the function waits for a device that does not answer, if the
    /// source decides that. On a PCI bus the virtual machine does.
    fn set_patience(&self, patience: Patience) {
        let _ = patience;
    }
}

/// Sleeps until the interrupt comes, at most for `bound`, and takes it. Returns false if none came.
/// The driver arms the signals that it waits for before this call, and acknowledges the interrupt
/// at the function afterwards.
///
/// # Errors
/// The function has gone.
pub fn wait(interrupt: &mut dyn Interrupt, bound: Duration) -> Result<bool> {
    interrupt.enable()?;
    let mut fds = [
        PollFd::from_borrowed_fd(interrupt.fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(interrupt.lifeline(), PollFlags::RDHUP),
    ];
    let end = Instant::now().checked_add(bound).context("the bound is too long")?;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match poll(&mut fds, Some(&Timespec::try_from(left)?)) {
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("poll"),
        }
    }
    let (came, gone) = (fds[0].revents().contains(PollFlags::IN), !fds[1].revents().is_empty());
    if came {
        interrupt.take()?;
    } else if gone {
        return Err(Error::Gone.into());
    }
    Ok(came)
}

/// Whether `wanted`, given by a person, names the function `found`, whose device has the name
/// `name`. It can be the function's address, the whole path of its socket, or that name.
pub fn is_meant(found: &Found, name: &str, wanted: &str) -> bool {
    found.id == wanted || found.id.strip_prefix("0000:") == Some(wanted) || name == wanted
}

/// Claims the function of `class` and `class_name` that `wanted` names (see [`is_meant`]). Without
/// `wanted`, it claims the first free function of the class.
///
/// # Errors
/// There is no such function, or none can be claimed. The text gives the reason.
pub fn claim<S: Source>(
    source: &S,
    class: u16,
    class_name: &str,
    wanted: Option<&str>,
) -> Result<(Found, Claimed<S::Hal>)> {
    let mut reason = None;
    for found in source.scan()?.into_iter().filter(|found| found.class.is_none_or(|c| c == class)) {
        let probed = source.look(&found.id).and_then(|hal| Ok(Function::probe(hal)?));
        let claimed = match probed {
            Ok(function) => {
                let name = function.info().name;
                let info = function.info();
                let is_class =
                    info.class == u32::from(class) && info.class_name.as_str() == class_name;
                if !is_class
                    || wanted.is_some_and(|wanted| !is_meant(&found, name.as_str(), wanted))
                {
                    continue;
                }
                // A socket takes one client at a time.
                drop(function);
                source.claim(&found.id)
            }
            Err(error) => Err(error),
        };
        match claimed {
            Ok(claimed) => return Ok((found, claimed)),
            Err(error) => reason = Some(error.context(found.id)),
        }
    }
    let which = wanted.map(|wanted| format!(" {wanted:?}")).unwrap_or_default();
    match reason {
        Some(reason) => Err(reason.context(format!("no {class_name} device{which} can be driven"))),
        None => bail!(
            "there is no {class_name} device{which} here; `vbus-guest list` shows what there is"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_a_path_or_a_name_names_a_function() {
        let found = |id: &str| Found { id: id.into(), class: None };
        let pci = found("0000:01:00.0");
        assert!(
            ["0000:01:00.0", "01:00.0", "nic"].iter().all(|wanted| is_meant(&pci, "nic", wanted))
        );
        assert!(
            ["0001:01:00.0", "1:00.0", "ni", ""]
                .iter()
                .all(|wanted| !is_meant(&pci, "nic", wanted))
        );
        assert!(is_meant(&found("/run/vbus/a.sock"), "a", "/run/vbus/a.sock"));
        assert!(!is_meant(&found("/run/vbus/a.sock"), "a", "a.sock"));
    }
}
