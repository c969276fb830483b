// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Migration: the states of a device, and the arcs between them.
//!
//! A client reads the state of a device from one server and writes it to another one:
//!
//! | source | destination |
//! |---|---|
//! | `RUNNING` to `PRE_COPY`; reads what is there | |
//! | starts logging; copies the memory; asks again and again which pages the device has written, and copies them | |
//! | `PRE_COPY` to `STOP_COPY`; reads to the end of the stream | `RUNNING` to `RESUMING`; writes the stream |
//! | asks for the last pages, and copies them | `RESUMING` to `RUNNING` |
//!
//! The device goes from one state to the next along an *arc*. A client may ask for a state that is
//! several arcs away ([`next`]).

use rustix::io::Errno;

use crate::message::MigrationState;

/// The most ranges of `DMA_LOGGING_START`. The kernel's VFIO has the same limit.
pub const MAX_LOGGING_RANGES: usize = 256;

/// A step from one state of a migration to the next: what the device has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationArc {
    /// `RUNNING` to `STOP`: the device stops. When the call returns, it writes no memory and
    /// triggers no interrupt.
    Stop,
    /// `STOP` to `RUNNING`: the device runs.
    Start,
    /// `RUNNING` to `PRE_COPY`: the device goes on, and a stream of its state begins.
    BeginPreCopy,
    /// `PRE_COPY` to `RUNNING`: the stream is given up.
    EndPreCopy,
    /// `PRE_COPY` to `STOP_COPY`: the device stops, and the stream goes on.
    StopInPreCopy,
    /// `STOP` to `STOP_COPY`: a stream of the device's state begins.
    BeginSaving,
    /// `STOP_COPY` to `STOP`: the stream ends, or is given up.
    EndSaving,
    /// `STOP` to `RESUMING`: the device gets a new state, as a stream.
    BeginRestoring,
    /// `RESUMING` to `STOP`: the stream has ended, and the device takes the new state.
    EndRestoring,
}

/// A device has not gone along an arc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArcFailure {
    /// It is in the state in which it was. The client gets this errno.
    Unchanged(Errno),
    /// It is in the state `ERROR`, until it is reset. The client gets this errno.
    Failed(Errno),
}

/// The next state on the way from one state to another, and the arc to it. It is the shortest way
/// that does not pass through `PRE_COPY` or `STOP_COPY`. `None`: there is no way.
///
/// There is none to or from `ERROR`, none from `STOP_COPY` to `PRE_COPY`, and none to or from the
/// states `*_P2P`, which vfio-user does not use. `pre_copy`: the device has the state `PRE_COPY`.
#[must_use]
pub fn next(
    from: MigrationState,
    to: MigrationState,
    pre_copy: bool,
) -> Option<(MigrationState, MigrationArc)> {
    use MigrationArc as Arc;
    use MigrationState::{PreCopy, Resuming, Running, Stop, StopCopy};
    let reachable =
        matches!(to, Stop | Running | StopCopy | Resuming) || (to == PreCopy && pre_copy);
    if !reachable || from == to {
        return None;
    }
    match (from, to) {
        (Running, PreCopy) => Some((PreCopy, Arc::BeginPreCopy)),
        (Running, _) => Some((Stop, Arc::Stop)),
        (Stop, StopCopy) => Some((StopCopy, Arc::BeginSaving)),
        (Stop, Resuming) => Some((Resuming, Arc::BeginRestoring)),
        (Stop, _) => Some((Running, Arc::Start)),
        (PreCopy, StopCopy) => Some((StopCopy, Arc::StopInPreCopy)),
        (PreCopy, _) => Some((Running, Arc::EndPreCopy)),
        (StopCopy, PreCopy) => None,
        (StopCopy, _) => Some((Stop, Arc::EndSaving)),
        (Resuming, _) => Some((Stop, Arc::EndRestoring)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use MigrationState::*;

    use super::*;

    /// The arcs of the document.
    const ARCS: [(MigrationState, MigrationState, MigrationArc); 9] = [
        (Running, Stop, MigrationArc::Stop),
        (StopCopy, Stop, MigrationArc::EndSaving),
        (Resuming, Stop, MigrationArc::EndRestoring),
        (PreCopy, Running, MigrationArc::EndPreCopy),
        (Stop, Running, MigrationArc::Start),
        (Running, PreCopy, MigrationArc::BeginPreCopy),
        (Stop, StopCopy, MigrationArc::BeginSaving),
        (PreCopy, StopCopy, MigrationArc::StopInPreCopy),
        (Stop, Resuming, MigrationArc::BeginRestoring),
    ];

    /// The shortest way by the document's rule, found by a search: the states after `from`.
    fn way(
        from: MigrationState,
        to: MigrationState,
        pre_copy: bool,
    ) -> Option<Vec<MigrationState>> {
        let mut ways = VecDeque::from([vec![from]]);
        while let Some(way) = ways.pop_front() {
            let last = *way.last()?;
            if last == to {
                return Some(way[1..].to_vec());
            }
            // States of the saving group are the first or the last one of a way.
            if way.len() > 1 && matches!(last, PreCopy | StopCopy) {
                continue;
            }
            let steps = ARCS.iter().filter(|(a, b, _)| {
                *a == last && !way.contains(b) && (pre_copy || ![*a, *b].contains(&PreCopy))
            });
            ways.extend(steps.map(|(_, b, _)| [&way[..], &[*b]].concat()));
        }
        None
    }

    #[test]
    fn each_way_is_the_shortest_one_that_the_document_allows() {
        let mut ways = 0;
        for pre_copy in [false, true] {
            for from in MigrationState::ALL {
                for to in MigrationState::ALL.into_iter().filter(|to| *to != from) {
                    let expected = match (from, to) {
                        (StopCopy, PreCopy) | (Error, _) | (_, Error) => None,
                        (PreCopy, _) if !pre_copy => continue,
                        _ => way(from, to, pre_copy),
                    };
                    let mut found = Vec::new();
                    let mut at = from;
                    while at != to {
                        let Some((after, arc)) = next(at, to, pre_copy) else { break };
                        assert!(ARCS.contains(&(at, after, arc)), "{at:?} to {after:?}: {arc:?}");
                        found.push(after);
                        at = after;
                        assert!(found.len() < 5, "no end from {from:?} to {to:?}: {found:?}");
                    }
                    assert_eq!((at == to).then_some(found), expected, "{from:?} to {to:?}");
                    ways += usize::from(expected.is_some());
                }
            }
        }
        // With PRE_COPY 5 states reach each other but one pair; without it 4 do.
        assert_eq!(ways, 5 * 4 - 1 + 4 * 3);
    }
}
