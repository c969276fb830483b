// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection that has ended for a sleep, for a shutdown or for good is opened only by who may.

use vbus_driver::{Error, Events};

use crate::connection::Connection;

fn look(connection: &Connection<()>) -> Result<Events, Error> {
    connection.look(|()| unreachable!("it is not open"))
}

fn reopen(connection: &mut Connection<()>) -> bool {
    let mut opened = false;
    connection
        .reopen(|| {
            opened = true;
            Ok(())
        })
        .unwrap();
    opened
}

#[test]
fn a_look_that_began_before_a_sleep_opens_nothing_after_it() {
    let mut connection = Connection::Open(());
    // The watch has found the connection lost, and the system falls asleep or goes down before the
    // watch comes to open it.
    connection = match connection {
        Connection::Open(()) => Connection::Asleep,
        other => other,
    };
    assert!(!reopen(&mut connection));
    assert!(matches!(connection, Connection::Asleep));
    connection.lose();
    assert!(matches!(connection, Connection::Asleep), "a device that goes ends no sleep");
    // There is nothing to open while it sleeps.
    assert!(matches!(look(&connection), Ok(events) if events == Events::default()));

    connection.wake();
    assert!(look(&connection).is_err(), "the watch has to find it lost");
    assert!(reopen(&mut connection));
    assert!(matches!(connection, Connection::Open(())));
}

#[test]
fn a_device_that_the_driver_has_left_is_not_opened_again() {
    let mut connection = Connection::<()>::Left;
    assert!(!reopen(&mut connection));
    connection.wake();
    connection.lose();
    assert!(!reopen(&mut connection));
    assert!(matches!(connection, Connection::Left));
    assert!(matches!(look(&connection), Ok(events) if events == Events::default()));
}

#[test]
fn the_former_connection_ends_before_the_next_is_opened() {
    struct Noted<'a>(&'a std::cell::Cell<u32>);
    impl Drop for Noted<'_> {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    let ended = std::cell::Cell::new(0);
    let mut connection = Connection::Open(Noted(&ended));
    let result = connection.reopen(|| {
        assert_eq!(ended.get(), 1);
        Err(Error::Gone)
    });
    assert_eq!(result, Err(Error::Gone));
    assert!(matches!(connection, Connection::Lost(Error::Gone)));
    connection.reopen(|| Ok(Noted(&ended))).unwrap();
    connection.lose();
    assert_eq!(ended.get(), 2);
}
