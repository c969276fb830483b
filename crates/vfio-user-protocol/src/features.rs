// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a session does with `DEVICE_FEATURE`, `MIG_DATA_READ` and `MIG_DATA_WRITE`.

use crate::failure::{Failure, Refusal};
use crate::message::{
    DmaRange, FEATURE_LEN, Feature, LoggingControl, LoggingReport, MigData, MigrationFlags,
    MigrationState, feature,
};
use crate::migration::{ArcFailure, MAX_LOGGING_RANGES, next};
use crate::target::Target;
use crate::version::MAX_TRANSFER;

/// What a session knows of the migration of its device.
#[derive(Debug, Default)]
pub(crate) struct Migration {
    state: MigrationState,
    /// While the log is on: what the client has asked for, and the size of a page that the device
    /// has chosen.
    logging: Option<(LoggingControl, u64)>,
}

impl Migration {
    /// The device has been reset.
    pub(crate) fn reset(&mut self) {
        self.state = MigrationState::Running;
    }

    /// Whether the device is not in the state `RUNNING`, or the log is on.
    pub(crate) fn is_under_way(&self) -> bool {
        self.state != MigrationState::Running || self.logging.is_some()
    }

    /// `DEVICE_FEATURE`. `transfer`: the most bytes of data that the client takes. Returns the body
    /// of the reply.
    pub(crate) fn feature<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        transfer: usize,
        body: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let (asked, data) = Feature::parse(body)?;
        let number = asked.feature;
        let flags = match number {
            feature::MIGRATION | feature::MIG_DEVICE_STATE => target.migration(),
            _ => None,
        };
        let flags = flags.filter(|flags| flags.stop_copy);
        let logs = (feature::DMA_LOGGING_START..=feature::DMA_LOGGING_REPORT).contains(&number)
            && target.logs_dma();
        let (get, set) = match number {
            feature::MIGRATION if flags.is_some() => (true, false),
            feature::MIG_DEVICE_STATE if flags.is_some() => (true, true),
            feature::DMA_LOGGING_START | feature::DMA_LOGGING_STOP if logs => (false, true),
            feature::DMA_LOGGING_REPORT if logs => (true, false),
            _ => return Err(Failure::Feature(number)),
        };
        if (asked.get && !get) || (asked.set && !set) {
            return Err(Refusal::Method(number).into());
        }
        // The reply repeats the request, and gets more data by a get.
        let fits = |len: usize| match asked.argsz as usize >= len {
            true => Ok(()),
            false => Err(Refusal::NoRoom { argsz: asked.argsz, need: len }),
        };
        fits(if asked.get && !asked.probe { FEATURE_LEN } else { body.len() })?;
        if asked.probe {
            return Ok(body.to_vec());
        }
        match number {
            feature::MIGRATION => {
                let flags = flags.unwrap_or_default();
                // Nobody goes to a state that vfio-user does not use.
                reply(asked, &MigrationFlags { p2p: false, ..flags }.data(), fits)
            }
            feature::MIG_DEVICE_STATE if asked.get => reply(asked, &self.state.data(), fits),
            feature::MIG_DEVICE_STATE => {
                let to = MigrationState::parse(data)?;
                self.go(target, to, flags.is_some_and(|flags| flags.pre_copy))?;
                Ok(body.to_vec())
            }
            feature::DMA_LOGGING_START => {
                let page_size = self.start_logging(target, LoggingControl::parse(data)?)?;
                let mut body = body.to_vec();
                body[FEATURE_LEN..FEATURE_LEN + 8].copy_from_slice(&page_size.to_ne_bytes());
                Ok(body)
            }
            feature::DMA_LOGGING_STOP => {
                if self.logging.take().is_some() {
                    target.dma_logging_stop();
                }
                Ok(body.to_vec())
            }
            _ => self.report(target, transfer, asked, data),
        }
    }

    /// Goes to the state `to`. After a failure the device is in the state that it has reached.
    fn go<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        to: MigrationState,
        pre_copy: bool,
    ) -> Result<(), Failure> {
        let begin = self.state;
        // Nobody may ask for this state, even if the device is in it.
        if to == MigrationState::Error {
            return Err(Refusal::NoWay(begin, to).into());
        }
        while self.state != to {
            let (next, arc) = next(self.state, to, pre_copy).ok_or(Refusal::NoWay(begin, to))?;
            match target.migrate(arc) {
                Ok(()) => self.state = next,
                Err(ArcFailure::Unchanged(errno)) => return Err(Refusal::Arc(arc, errno).into()),
                Err(ArcFailure::Failed(errno)) => {
                    self.state = MigrationState::Error;
                    return Err(Refusal::Arc(arc, errno).into());
                }
            }
        }
        Ok(())
    }

    /// Returns the size of a page that the device has chosen.
    fn start_logging<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        asked: LoggingControl,
    ) -> Result<u64, Failure> {
        if asked.ranges.len() > MAX_LOGGING_RANGES {
            return Err(Refusal::TooManyRanges(asked.ranges.len()).into());
        }
        if !asked.page_size.is_power_of_two() {
            return Err(Refusal::PageSize(asked.page_size).into());
        }
        let mut sorted = asked.ranges.clone();
        sorted.sort_unstable_by_key(|range| range.iova);
        let mut end = 0;
        for DmaRange { iova, length } in sorted {
            let bad = Failure::from(Refusal::Range(iova, length));
            match iova.checked_add(length).filter(|_| length > 0 && iova >= end) {
                Some(after) => end = after,
                None => return Err(bad),
            }
        }
        match &self.logging {
            // As often as the client likes, but not something else.
            Some((before, page_size)) if *before == asked => Ok(*page_size),
            Some(_) => Err(Refusal::Logging(true).into()),
            None => {
                let page_size = target.dma_logging_start(asked.page_size, &asked.ranges)?;
                self.logging = Some((asked, page_size));
                Ok(page_size)
            }
        }
    }

    fn report<T: Target + ?Sized>(
        &mut self,
        target: &mut T,
        transfer: usize,
        asked: Feature,
        data: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        let (report, _) = LoggingReport::parse(data)?;
        if self.logging.is_none() {
            return Err(Refusal::Logging(false).into());
        }
        let words = report.words().ok_or(Refusal::Range(report.iova, report.length))?;
        let bytes = words.saturating_mul(8);
        let len = usize::try_from(bytes).ok().filter(|len| *len <= transfer.min(MAX_TRANSFER));
        let Some(len) = len else { return Err(Failure::TooMuch(bytes)) };
        let need = FEATURE_LEN + LoggingReport::LEN + len;
        if (asked.argsz as usize) < need {
            // The client learns the necessary size and asks again. Its log is as it was.
            let argsz = u32::try_from(need).unwrap_or(u32::MAX);
            return Ok(Feature { argsz, ..asked }.body(&report.data(&[])));
        }
        let mut bitmap = vec![0; len / 8];
        target.dma_logging_report(report, &mut bitmap)?;
        let argsz = u32::try_from(need).unwrap_or(u32::MAX);
        Ok(Feature { argsz, ..asked }.body(&report.data(&bitmap)))
    }

    /// Refuses the stream of a device that has none.
    fn check_migration<T: Target + ?Sized>(&self, target: &mut T) -> Result<(), Failure> {
        // Otherwise it has gone along an arc, and so it has a migration.
        match self.state == MigrationState::Running && target.migration().is_none() {
            true => Err(Failure::Unsupported("migration")),
            false => Ok(()),
        }
    }

    /// `MIG_DATA_READ`. `transfer`: the most bytes of data that the client takes. Returns the body
    /// of the reply.
    pub(crate) fn read<T: Target + ?Sized>(
        &self,
        target: &mut T,
        transfer: usize,
        body: &[u8],
    ) -> Result<Vec<u8>, Failure> {
        self.check_migration(target)?;
        let asked = MigData::parse(body)?;
        let size = asked.size as usize;
        if size > transfer.min(MAX_TRANSFER) {
            return Err(Failure::TooMuch(asked.size.into()));
        }
        if !matches!(self.state, MigrationState::PreCopy | MigrationState::StopCopy) {
            return Err(Refusal::State("read", self.state).into());
        }
        let mut reply = vec![0; MigData::LEN + size];
        let read = target.migration_read(&mut reply[MigData::LEN..])?.min(size);
        reply.truncate(MigData::LEN + read);
        let read = u32::try_from(read).unwrap_or(asked.size);
        reply[..MigData::LEN].copy_from_slice(&MigData::of(read).body(&[]));
        Ok(reply)
    }

    /// `MIG_DATA_WRITE`.
    pub(crate) fn write<T: Target + ?Sized>(
        &self,
        target: &mut T,
        body: &[u8],
    ) -> Result<(), Failure> {
        self.check_migration(target)?;
        let (_, data) = MigData::parse_with_data(body)?;
        if data.len() > MAX_TRANSFER {
            return Err(Failure::TooMuch(data.len() as u64));
        }
        if self.state != MigrationState::Resuming {
            return Err(Refusal::State("written", self.state).into());
        }
        Ok(target.migration_write(data)?)
    }
}

/// The reply to a get of `data`.
fn reply(
    asked: Feature,
    data: &[u8],
    fits: impl Fn(usize) -> Result<(), Refusal>,
) -> Result<Vec<u8>, Failure> {
    let len = FEATURE_LEN + data.len();
    fits(len)?;
    Ok(Feature { argsz: u32::try_from(len).unwrap_or(u32::MAX), ..asked }.body(data))
}
