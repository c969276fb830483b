//! Where functions come from: the PCI bus of this machine, or vfio-user sockets.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vbus_driver::{Error, Function, Hal};

/// A function that a source has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Found {
    /// Its address on the PCI bus, or the path of its socket.
    pub id: String,
    /// Its class, where that can be known without touching it.
    pub class: Option<u16>,
}

/// A function that was claimed: how to drive it, and its interrupt.
pub type Claimed<H> = (H, Box<dyn Interrupt>);

/// A place that has functions.
pub trait Source {
    /// How they are driven.
    type Hal: Hal<Dma: Send + Sync> + Send + Sync + 'static;

    /// The functions that are there now, in a fixed order.
    fn scan(&self) -> Result<Vec<Found>>;

    /// Registers of the function, for looking only.
    fn look(&self, id: &str) -> Result<Self::Hal>;

    /// Takes the function for this process. It is given back when the last clone of the Hal has
    /// gone.
    fn claim(&self, id: &str) -> Result<Claimed<Self::Hal>>;

    /// A descriptor that becomes readable when functions may have come or gone, if there can be
    /// such a thing. To be drained by reading.
    fn changes(&self) -> Option<OwnedFd>;

    /// Whether a function that has gone can come back under the same id.
    fn comes_back(&self) -> bool;
}

/// The interrupt of a claimed function. It is off until [`enable`](Self::enable)d, and again from
/// when it comes.
pub trait Interrupt: Send {
    /// Becomes readable when it comes.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Hangs up when the function has gone. Nothing else is to be made of it.
    fn lifeline(&self) -> BorrowedFd<'_>;

    /// Takes note of one that has come. The function's own acknowledgement has to follow, then a
    /// look at the signals, then `enable`. An error means that the function has gone.
    fn take(&mut self) -> Result<()>;

    /// Lets it come. One that is pending comes at once.
    fn enable(&mut self) -> Result<()>;
}

/// Sleeps until the interrupt comes, at most for `bound`, and takes it. False: none came. What the
/// driver waits for must be armed before; the function's own acknowledgement must follow.
///
/// # Errors
/// The function has gone.
pub fn wait(interrupt: &mut dyn Interrupt, bound: Duration) -> Result<bool> {
    interrupt.enable()?;
    let mut fds = [
        PollFd::from_borrowed_fd(interrupt.fd(), PollFlags::IN),
        PollFd::from_borrowed_fd(interrupt.lifeline(), PollFlags::RDHUP),
    ];
    match poll(&mut fds, Some(&Timespec::try_from(bound)?)) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(error) => return Err(error).context("poll"),
    }
    let (came, gone) = (fds[0].revents().contains(PollFlags::IN), !fds[1].revents().is_empty());
    if came {
        interrupt.take()?;
    } else if gone {
        return Err(Error::Gone.into());
    }
    Ok(came)
}

/// Whether the function `found`, which calls itself `name`, is the one that a person means by
/// `wanted`: its address, the whole path of its socket, or its name.
pub fn is_meant(found: &Found, name: &str, wanted: &str) -> bool {
    found.id == wanted || found.id.strip_prefix("0000:") == Some(wanted) || name == wanted
}

/// Claims the function of `class` and `class_name` that is meant by `wanted`; without `wanted`, the
/// first that is free.
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
    fn functions_are_meant_by_address_path_or_name() {
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
