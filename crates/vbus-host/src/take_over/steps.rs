// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The steps of a hand-over (spec/take-over.md, "Steps"), for both sides, without what is handed
//! over.
//!
//! 1. The leaving bus sends an *offer*. It goes on serving.
//! 2. The new bus prepares everything that takes time, and says that it is *ready*.
//! 3. The leaving bus stops and sends its *state*.
//! 4. The new bus makes its devices of the state, and says that it has *taken* over. Only then it
//!    lets them go on.
//!
//! The word *taken* decides: the leaving bus ends if it gets that word, and goes on if it does not.
//! It closes the connection before it goes on, so that a new bus that is late cannot say the word
//! any more: its send fails, and it ends. So there is one bus at any time, whoever dies when.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use vbus_vfio_user::Closer;

use super::wire::{Frame, Wire};

/// The kinds of frames.
mod kind {
    pub const OFFER: u8 = 1;
    pub const READY: u8 = 2;
    pub const STATE: u8 = 3;
    pub const TAKEN: u8 = 4;
    /// One side cannot go on. The body is a text for people.
    pub const FAILED: u8 = 5;
}

/// Bytes and descriptors.
#[derive(Debug, Default)]
pub struct Parcel {
    /// JSON.
    pub body: Vec<u8>,
    /// What the JSON counts.
    pub descriptors: Vec<OwnedFd>,
}

/// How long the steps may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// From the offer until the new bus is ready. The leaving bus serves meanwhile.
    pub prepare: Duration,
    /// From the moment when the leaving bus stops until it knows that the other has taken over.
    /// VMMs wait for it: QEMU for 5 seconds.
    pub pause: Duration,
}

/// The limits of `vbus serve`.
pub const LIMITS: Limits =
    Limits { prepare: Duration::from_secs(60), pause: Duration::from_secs(3) };

/// The limits after the death of a bus: nobody goes on if the new one is slow.
pub const AFTER_DEATH: Limits =
    Limits { prepare: Duration::from_secs(60), pause: Duration::from_secs(30) };

/// How long before the end of the pause the new bus begins no device any more. To resume a ring, it
/// writes to the driver's memory: it must not do so when the leaving bus goes on.
pub const RESERVE: Duration = Duration::from_millis(500);

/// The bus that leaves.
pub trait Leaves {
    /// What the new bus needs to prepare.
    ///
    /// # Errors
    /// The bus cannot be handed over now.
    fn offer(&mut self) -> Result<Parcel>;

    /// Stops and returns the state. It must end before `by`.
    ///
    /// # Errors
    /// Something cannot stop, or cannot be saved. [`go_on`](Self::go_on) follows.
    fn stop(&mut self, by: Instant) -> Result<Parcel>;

    /// Goes on as if nobody had asked. Called after each [`stop`](Self::stop) that leads to
    /// nothing.
    fn go_on(&mut self);
}

/// The part of the leaving bus. Returns once the other bus has taken over.
///
/// # Errors
/// It has not, for this reason. The leaving bus goes on.
pub fn leave(socket: BorrowedFd<'_>, bus: &mut impl Leaves, limits: &Limits) -> Result<()> {
    let wire = Wire::new(socket);
    let by = Instant::now() + limits.prepare;
    let offer = bus.offer().inspect_err(|error| tell(&wire, error, by))?;
    send(&wire, kind::OFFER, &offer, by).context("the offer could not be sent")?;
    let ready = expect(&wire, kind::READY, by);
    // It has none, if it is a bus.
    Closer::let_go(ready.context("the other bus did not get ready")?.descriptors);
    let by = Instant::now() + limits.pause;
    // A class that panics must not leave all devices standing still.
    let state = catch_unwind(AssertUnwindSafe(|| bus.stop(by)))
        .unwrap_or_else(|_| Err(anyhow!("a device panicked; see the log")));
    let taken = state.and_then(|state| {
        let sent = send(&wire, kind::STATE, &state, by).context("the state could not be sent");
        // A client may have sent some, and the devices stand still until this bus goes on.
        Closer::let_go(state.descriptors);
        sent?;
        let taken = expect(&wire, kind::TAKEN, by).context("the other bus did not take over")?;
        Closer::let_go(taken.descriptors);
        Ok(())
    });
    let Err(error) = taken else { return Ok(()) };
    tell(&wire, &error, Instant::now() + GOODBYE);
    // From here on the other cannot say that it has taken over. It may have said it just now.
    wire.close();
    if has_come(&wire, kind::TAKEN) {
        return Ok(());
    }
    bus.go_on();
    Err(error)
}

/// The part of the new bus. Each method is a step. If one fails, the other bus goes on.
pub struct Taking<'a> {
    wire: Wire<'a>,
    limits: Limits,
}

impl<'a> Taking<'a> {
    /// Over this connection.
    pub fn new(socket: BorrowedFd<'a>, limits: Limits) -> Taking<'a> {
        Taking { wire: Wire::new(socket), limits }
    }

    /// Waits for the offer. The new bus then prepares everything that takes time.
    ///
    /// # Errors
    /// There is none, for this reason.
    pub fn offer(&self) -> Result<Parcel> {
        let by = Instant::now() + self.limits.prepare;
        expect(&self.wire, kind::OFFER, by).context("the other bus sent no offer")
    }

    /// Says that everything is prepared, and waits for the state. The new bus then makes its
    /// devices, and lets none of them go on.
    ///
    /// # Errors
    /// There is none, for this reason.
    pub fn ready(&self) -> Result<Parcel> {
        let by = Instant::now() + self.limits.pause;
        send(&self.wire, kind::READY, &Parcel::default(), by).context("the other bus has gone")?;
        let by = Instant::now() + self.limits.pause + GOODBYE;
        expect(&self.wire, kind::STATE, by).context("the other bus sent no state")
    }

    /// Says that this bus has taken over. When it returns, this bus is the only one, and lets its
    /// devices go on.
    ///
    /// # Errors
    /// The other bus did not wait, and goes on.
    pub fn taken(&self) -> Result<()> {
        let by = Instant::now() + self.limits.pause;
        send(&self.wire, kind::TAKEN, &Parcel::default(), by)
            .context("the other bus did not wait any longer, and goes on")
    }

    /// Says why this bus does not take over.
    pub fn fail(&self, error: &anyhow::Error) {
        tell(&self.wire, error, Instant::now() + GOODBYE);
    }
}

/// How long one side tries to tell the other why it does not go on.
const GOODBYE: Duration = Duration::from_millis(100);

fn send(wire: &Wire<'_>, kind: u8, parcel: &Parcel, by: Instant) -> io::Result<()> {
    let descriptors: Vec<_> = parcel.descriptors.iter().map(AsFd::as_fd).collect();
    wire.send(kind, &parcel.body, &descriptors, by)
}

/// Tells the other side why this one does not go on.
fn tell(wire: &Wire<'_>, error: &anyhow::Error, by: Instant) {
    let by = by.min(Instant::now() + GOODBYE);
    // The other may have gone, and finds out by itself.
    let _ = wire.send(kind::FAILED, format!("{error:#}").as_bytes(), &[], by);
}

/// Receives the frame of this kind.
fn expect(wire: &Wire<'_>, kind: u8, by: Instant) -> Result<Parcel> {
    let frame = match wire.receive(by) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut => bail!("it did not answer in time"),
        received => received?,
    };
    let Frame { kind: found, body, descriptors } = frame.ok_or_else(|| anyhow!("it has ended"))?;
    if found == kind {
        return Ok(Parcel { body, descriptors });
    }
    Closer::let_go(descriptors);
    match found {
        kind::FAILED => {
            let text: String = String::from_utf8_lossy(&body).chars().take(TEXT_MAX).collect();
            bail!("it says: {text}")
        }
        found => bail!("it sent message {found} in the place of {kind}"),
    }
}

/// The longest text of the other side that this one shows, in characters.
const TEXT_MAX: usize = 4096;

/// Whether the frame of this kind is among those that have come. Nothing more can come.
fn has_come(wire: &Wire<'_>, kind: u8) -> bool {
    let by = Instant::now() + GOODBYE;
    while let Ok(Some(frame)) = wire.receive(by) {
        Closer::let_go(frame.descriptors);
        if frame.kind == kind {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};

    use super::*;

    /// A bus that leaves, and what became of it.
    #[derive(Default)]
    struct Old {
        events: Vec<&'static str>,
        fails: Option<&'static str>,
    }

    impl Leaves for Old {
        fn offer(&mut self) -> Result<Parcel> {
            self.events.push("offer");
            match self.fails {
                Some("offer") => bail!("as the test wants"),
                _ => Ok(Parcel { body: b"offer".to_vec(), ..Parcel::default() }),
            }
        }

        fn stop(&mut self, _: Instant) -> Result<Parcel> {
            self.events.push("stop");
            match self.fails {
                Some("stop") => bail!("as the test wants"),
                Some("panic") => panic!("as the test wants"),
                _ => Ok(Parcel { body: vec![7; 3 << 20], ..Parcel::default() }),
            }
        }

        fn go_on(&mut self) {
            self.events.push("go on");
        }
    }

    #[derive(Default)]
    struct New {
        fails: Option<&'static str>,
        /// It waits before it says that it has taken over.
        slow: Option<Duration>,
    }

    impl New {
        fn run(self, socket: &UnixStream, limits: Limits) -> Result<()> {
            let taking = Taking::new(socket.as_fd(), limits);
            let steps = || {
                assert_eq!(taking.offer()?.body, b"offer");
                self.fail_at("prepare")?;
                assert_eq!(taking.ready()?.body.len(), 3 << 20);
                self.slow.into_iter().for_each(std::thread::sleep);
                self.fail_at("take")?;
                taking.taken()
            };
            steps().inspect_err(|error| taking.fail(error))
        }

        fn fail_at(&self, step: &str) -> Result<()> {
            if self.fails == Some(step) { bail!("as the test wants") } else { Ok(()) }
        }
    }

    const LONG: Limits =
        Limits { prepare: Duration::from_secs(60), pause: Duration::from_secs(60) };
    const SHORT: Limits =
        Limits { prepare: Duration::from_millis(50), pause: Duration::from_millis(50) };

    /// Runs both sides. Returns what happened to the old one, and what each says.
    fn both(mut old: Old, new: New, limits: Limits) -> (Vec<&'static str>, [Result<()>; 2]) {
        let (one, other) = UnixStream::pair().unwrap();
        let taking = std::thread::spawn(move || new.run(&other, LONG));
        let left = leave(one.as_fd(), &mut old, &limits);
        drop(one);
        (old.events, [left, taking.join().unwrap()])
    }

    /// Whoever may ask for the bus may send along a descriptor whose close waits for it. The
    /// devices stand still until the old bus goes on.
    #[test]
    fn descriptors_of_the_other_bus_make_nobody_wait() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (fd, peer) = vbus_test_driver::lingering();
        let wire = Wire::new(theirs.as_fd());
        let by = Instant::now() + Duration::from_secs(60);
        // It gets ready, and does not say that it has taken over.
        wire.send(kind::READY, b"", &[fd.as_fd()], by).unwrap();
        wire.send(kind::READY, b"", &[fd.as_fd()], by).unwrap();
        drop(fd);
        let mut old = Old::default();
        let error = std::thread::scope(|scope| {
            // The state is larger than the socket's buffer.
            scope.spawn(|| while wire.receive(by).is_ok_and(|frame| frame.is_some()) {});
            let left = leave(ours.as_fd(), &mut old, &LONG);
            ours.shutdown(std::net::Shutdown::Both).unwrap();
            left.unwrap_err()
        });
        assert!(format!("{error:#}").contains("in the place of"), "{error:#}");
        assert_eq!(old.events, ["offer", "stop", "go on"]);
        drop(peer);
    }

    #[test]
    fn the_new_bus_takes_over() {
        let (events, [left, taken]) = both(Old::default(), New::default(), LONG);
        left.unwrap();
        taken.unwrap();
        assert_eq!(events, ["offer", "stop"]);
    }

    #[test]
    fn a_side_that_cannot_says_so_and_the_old_bus_goes_on() {
        for (step, events) in [
            ("offer", &["offer"][..]),
            ("prepare", &["offer"]),
            ("stop", &["offer", "stop", "go on"]),
            ("take", &["offer", "stop", "go on"]),
        ] {
            let (old, new) = (Old { fails: Some(step), ..Old::default() }, New::default());
            let new = New { fails: Some(step), ..new };
            let (happened, results) = both(old, new, LONG);
            assert_eq!(happened, events, "{step}");
            for result in results {
                let text = format!("{:#}", result.unwrap_err());
                assert!(text.contains("as the test wants"), "{step}: {text}");
            }
        }
    }

    #[test]
    fn a_device_that_panics_does_not_keep_the_old_bus_from_going_on() {
        let old = Old { fails: Some("panic"), ..Old::default() };
        let (happened, results) = both(old, New::default(), LONG);
        assert_eq!(happened, ["offer", "stop", "go on"]);
        for result in results {
            assert!(format!("{:#}", result.unwrap_err()).contains("a device panicked"));
        }
    }

    /// There is never none, and never two.
    #[test]
    fn a_new_bus_that_is_late_does_not_take_over() {
        let mut seen = [0; 2];
        for delay in [0, 30, 45, 48, 50, 52, 55, 70, 200] {
            let new = New { slow: Some(Duration::from_millis(delay)), ..New::default() };
            let limits = Limits { pause: Duration::from_millis(50), ..LONG };
            let (events, [left, taken]) = both(Old::default(), new, limits);
            assert_eq!(left.is_ok(), taken.is_ok(), "after {delay} ms");
            assert_eq!(left.is_err(), events.contains(&"go on"));
            seen[usize::from(left.is_ok())] += 1;
        }
        assert!(seen[0] > 0, "200 ms are too late");
    }

    /// A new bus that follows the protocol up to a step, and then does something else. A loaded
    /// machine may be too slow for it to get there before the old bus gives up: it has more time
    /// then.
    fn strange(steps: usize, then: fn(&UnixStream)) -> Vec<&'static str> {
        let mut limit = SHORT.pause;
        loop {
            let limits = Limits { prepare: limit, pause: limit };
            let events = strange_within(&limits, steps, then);
            let may_be_late = limit < LONG.pause;
            match events {
                // The old bus may have given up between this step and the next.
                Some(events) if steps < 2 || events.contains(&"stop") || !may_be_late => {
                    return events;
                }
                _ => limit *= 2,
            }
        }
    }

    /// The same. `None`: the old bus gave up before the new one was there.
    fn strange_within(
        limits: &Limits,
        steps: usize,
        then: fn(&UnixStream),
    ) -> Option<Vec<&'static str>> {
        let (one, other) = UnixStream::pair().unwrap();
        let ended = Arc::new(Mutex::new(()));
        let holds = ended.clone();
        let running = ended.lock().unwrap();
        let thread = std::thread::spawn(move || {
            let wire = Wire::new(other.as_fd());
            let by = Instant::now() + LONG.prepare;
            let in_time = (0..steps).all(|step| match step {
                0 => expect(&wire, kind::OFFER, by).is_ok(),
                1 => send(&wire, kind::READY, &Parcel::default(), by).is_ok(),
                _ => expect(&wire, kind::STATE, by).is_ok(),
            });
            then(&other);
            // A process that hangs keeps its socket.
            drop(holds.lock());
            in_time
        });
        let mut old = Old::default();
        leave(one.as_fd(), &mut old, limits).unwrap_err();
        drop(running);
        thread.join().unwrap().then_some(old.events)
    }

    /// Killed, hanging, half a message, a wrong message, nonsense: at every step.
    #[test]
    fn whatever_the_new_bus_does_the_old_one_goes_on() {
        use std::io::{Read as _, Write as _};
        type Then = fn(&UnixStream);
        let things: [(&str, Then); 6] = [
            ("it is killed", |socket| socket.shutdown(std::net::Shutdown::Both).unwrap()),
            ("it hangs", |_| {}),
            ("half a message", |mut socket| drop(socket.write_all(b"vbto\x02"))),
            ("another message", |socket| {
                let by = Instant::now() + LONG.prepare;
                let _ = Wire::new(socket.as_fd()).send(kind::STATE, b"{}", &[], by);
            }),
            ("nonsense", |mut socket| drop(socket.write_all(&[0xff; 4096]))),
            ("it reads a part and is killed", |mut socket| {
                let _ = socket.set_read_timeout(Some(Duration::from_millis(10)));
                let _ = socket.read(&mut [0; 100]);
                socket.shutdown(std::net::Shutdown::Both).unwrap();
            }),
        ];
        for (what, then) in things {
            for steps in 0..=3 {
                let events = strange(steps, then);
                let stopped = events.contains(&"stop");
                assert_eq!(stopped, events.ends_with(&["go on"]), "{what}, step {steps}");
                assert!(steps < 2 || stopped, "{what}, step {steps}");
            }
        }
    }

    /// As above, the other way round.
    #[test]
    fn a_new_bus_ends_whatever_the_old_one_does() {
        use std::io::Write as _;
        for steps in 0..=1 {
            for what in ["killed", "silent", "nonsense"] {
                let (one, other) = UnixStream::pair().unwrap();
                let mut one = Some(one);
                if let Some(one) = one.as_mut().filter(|_| steps > 0) {
                    let offer = Parcel { body: b"offer".to_vec(), ..Parcel::default() };
                    let by = Instant::now() + LONG.prepare;
                    send(&Wire::new(one.as_fd()), kind::OFFER, &offer, by).unwrap();
                }
                match what {
                    "killed" => drop(one.take()),
                    "nonsense" => {
                        one.as_mut().unwrap().write_all(&[9; 64]).unwrap();
                    }
                    _ => {}
                }
                let taken = New::default().run(&other, SHORT);
                assert!(taken.is_err(), "{what}, step {steps}");
            }
        }
    }
}
