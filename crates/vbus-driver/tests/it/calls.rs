// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Calls that take time. The class answers from a thread of its own. Neither the device's worker
//! nor the access to the register waits for it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use vbus_core::{
    Bus, Call, Connection, Device, ErrorCode, Executor, Identity, Open, Region, Tuning,
};
use vbus_driver::{Error, Function, Hal};
use vbus_shm::abi::{command, error_code, event, reg};

use crate::fake::Fake;
use crate::local::{Local, until};

/// Passes its calls to the test.
struct Slow(Mutex<Sender<Call>>);
struct Opened(Sender<Call>);

impl Device for Slow {
    fn identity(&self) -> Identity {
        Identity::user("slow")
    }

    fn open(&self, _: Open) -> Result<Box<dyn Connection>, ErrorCode> {
        Ok(Box::new(Opened(self.0.lock().unwrap().clone())))
    }
}

impl Connection for Opened {
    fn region_added(&mut self, _: Region) -> Result<(), ErrorCode> {
        Ok(())
    }

    fn start_call(&mut self, call: Call) {
        self.0.send(call).unwrap();
    }
}

fn rig() -> (Bus, Local, Receiver<Call>) {
    let executor = Executor::start(Tuning { workers: 1, ..Tuning::default() }).unwrap();
    let bus = Bus::new(executor, Vec::new());
    let (sender, calls) = channel();
    bus.add("slow", Arc::new(Slow(Mutex::new(sender)))).unwrap();
    let local = Local::attach(&bus, "slow", 0);
    (bus, local, calls)
}

/// A driver that cancels calls cannot fill the memory of a class that works on them for long. Each
/// call keeps a buffer of up to 64 KiB, so their number is limited.
#[test]
fn a_class_holds_a_bounded_number_of_calls() {
    let (_bus, local, calls) = rig();
    let mut function = local.probe();
    let mut in_progress = 0;
    for _ in 0..40 {
        function.open(0).unwrap();
        start(&local, 0, 0);
        match local.read32(reg::RESULT) {
            error_code::IN_PROGRESS => in_progress += 1,
            other => assert_eq!(other, error_code::LIMIT),
        }
        function.close();
    }
    assert_eq!(in_progress, 16);
    // The class drops the cancelled calls, and the driver can call again.
    let held: Vec<Call> = calls.try_iter().collect();
    assert_eq!(held.len(), 16);
    assert!(held.iter().all(Call::is_cancelled));
    drop(held);
    function.open(0).unwrap();
    start(&local, 0, 0);
    assert_eq!(local.read32(reg::RESULT), error_code::IN_PROGRESS);
    calls.recv().unwrap().finish(Ok(0));
    assert_eq!(local.read32(reg::RESULT), error_code::OK);
}

#[test]
fn a_driver_waits_for_a_call_that_takes_time() {
    let (_bus, local, calls) = rig();
    let class = std::thread::spawn(move || {
        for mut call in calls {
            match call.function() {
                0 => {
                    call.buffer().reverse();
                    call.finish(Ok(7));
                }
                1 => call.finish(Err(ErrorCode(0x105))),
                _ => drop(call),
            }
        }
    });
    let mut function = local.probe();
    function.set_class_errors(&[(ErrorCode(0x105), "the tape is at its end")]);
    function.open(0).unwrap();
    for _ in 0..100 {
        let mut buffer = *b"abcde";
        assert_eq!(function.call(0, 0, &mut buffer), Ok(7));
        assert_eq!(&buffer, b"edcba");
    }
    let error = function.call(1, 0, &mut []).unwrap_err();
    let code = ErrorCode(0x105);
    let text = "the tape is at its end";
    assert_eq!(error, Error::Class { command: "CALL", code, text });
    assert_eq!(error.to_string(), "CALL was refused: the tape is at its end");
    // A call that the class drops fails.
    let failed = Error::Refused { command: "CALL", code: ErrorCode::FAILED };
    assert_eq!(function.call(2, 0, &mut []), Err(failed));
    drop((function, local, _bus));
    class.join().unwrap();
}

/// Writes the arguments of a call of `bytes` at `addr`, and the command.
fn start(local: &Local, addr: u64, bytes: u64) {
    for (at, argument) in (reg::ARGUMENT..).step_by(8).zip([0, addr, bytes, 0]) {
        local.write64(at, argument);
    }
    local.write32(reg::COMMAND, command::CALL);
}

#[test]
fn the_register_says_that_a_command_is_in_progress_and_an_event_that_it_has_ended() {
    use vbus_driver::Dma;
    let (bus, local, calls) = rig();
    let mut function = local.probe();
    function.open(0).unwrap();
    let memory = local.alloc(4096).unwrap();
    memory.copy_in(0, b"abc");
    start(&local, memory.address(0), 3);
    assert_eq!(local.read32(reg::RESULT), error_code::IN_PROGRESS);
    assert_eq!(local.read64(reg::VALUE), 0);
    let mut call = calls.recv().unwrap();
    // The device ignores other commands meanwhile.
    local.write32(reg::COMMAND, command::CALL);
    local.write32(reg::COMMAND, command::OPEN);
    assert!(calls.try_recv().is_err());
    assert_eq!(local.read32(reg::RESULT), error_code::IN_PROGRESS);
    assert!(!local.interrupted());
    call.buffer().reverse();
    call.finish(Ok(9));
    local.wait_interrupt();
    assert_eq!(local.read32(reg::EVENTS), event::COMMAND);
    assert_eq!((local.read32(reg::RESULT), local.read64(reg::VALUE)), (0, 9));
    let mut bytes = [0; 3];
    memory.copy_out(0, &mut bytes);
    assert_eq!(&bytes, b"cba");

    // CLOSE ends the call. The class may go on, but does not touch the driver's memory.
    start(&local, memory.address(0), 3);
    let mut call = calls.recv().unwrap();
    assert!(!call.is_cancelled());
    local.write32(reg::COMMAND, command::CLOSE);
    assert_eq!(local.read32(reg::RESULT), error_code::OK);
    assert!(call.is_cancelled());
    call.buffer().fill(b'x');
    call.finish(Ok(1));
    memory.copy_out(0, &mut bytes);
    assert_eq!((&bytes, local.read32(reg::RESULT)), (b"cba", error_code::OK));

    // The end of the connection by the device also ends the call, and the driver learns of it.
    function.open(0).unwrap();
    while local.interrupted() {}
    start(&local, memory.address(0), 3);
    let call = calls.recv().unwrap();
    bus.remove("slow").unwrap();
    local.wait_interrupt();
    assert_eq!(local.read32(reg::RESULT), error_code::REMOVED);
    until("the events", || {
        (local.read32(reg::EVENTS) == event::REMOVED | event::COMMAND).then_some(())
    });
    drop(call);
}

#[test]
fn an_answer_whose_place_was_unmapped_meanwhile_is_an_error() {
    use vbus_driver::Dma;
    let (_bus, local, calls) = rig();
    let mut function = local.probe();
    function.open(0).unwrap();
    let memory = local.alloc(4096).unwrap();
    start(&local, memory.address(0), 3);
    let call = calls.recv().unwrap();
    local.unmap();
    call.finish(Ok(9));
    assert_eq!(local.read32(reg::RESULT), error_code::REVOKED);
}

#[test]
fn a_driver_gives_up_in_the_end_and_the_device_has_let_go_by_then() {
    // The commands of this fake never end. Its environment gives up after three reads.
    let fake = Fake::default();
    let mut function = Function::probe(fake.clone()).unwrap();
    function.open(0).unwrap();
    fake.refuse(command::CALL, error_code::IN_PROGRESS);
    assert_eq!(function.call(0, 0, &mut [1]), Err(Error::TimedOut("CALL")));
    assert_eq!(fake.commands().last(), Some(&command::CLOSE));
}

#[test]
fn commands_have_a_budget_together() {
    // Each command takes two reads more, after which the environment would not have given up.
    let slow = [error_code::IN_PROGRESS, error_code::IN_PROGRESS, error_code::OK];
    let call = |fake: &Fake, function: &mut Function<Fake>| {
        fake.script(reg::RESULT, &slow);
        function.call(0, 0, &mut [1])
    };
    let fake = Fake::default();
    let mut function = Function::probe(fake.clone()).unwrap();
    function.open(0).unwrap();
    for _ in 0..3 {
        assert_eq!(call(&fake, &mut function), Ok(0));
    }
    function.set_budget(Some(3));
    assert_eq!(call(&fake, &mut function), Ok(0));
    assert_eq!(call(&fake, &mut function), Err(Error::TimedOut("CALL")));
    assert_eq!(fake.commands().last(), Some(&command::CLOSE));
    // Nothing is left for another command: the device does not see it.
    let before = fake.commands();
    assert_eq!(function.call(0, 0, &mut [1]), Err(Error::TimedOut("CALL")));
    assert_eq!(fake.commands()[before.len()..], [command::CLOSE]);
    // A device that closes is believed.
    fake.script(reg::RESULT, &[]);
    function.close();
    assert!(function.has_let_go());
    function.set_budget(Some(3));
    function.open(0).unwrap();
    assert_eq!(call(&fake, &mut function), Ok(0));
    // Its memory is lost if it does not end CLOSE either.
    fake.refuse(command::CLOSE, error_code::IN_PROGRESS);
    function.close();
    assert_eq!((function.has_let_go(), fake.lost()), (false, 1));
}
