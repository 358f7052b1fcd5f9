//! End-to-end tests: the built program between real superservers, clients and IMAP servers, and between scripted ones.
//!
//! One test binary, so that it is linked once and its tests run in parallel. Started with `--play-backend` it is the scripted IMAP
//! server of its own tests. Run it as root to run everything: `tests/run` also installs the Debian packages that tests need.
//! Variables: E2E_PROGRAM (another built program), E2E_TOOLS (a tree of unpacked packages), E2E_BULK_MIB (size of bulk transfers),
//! E2E_IGNORE_NOTHING (a test that cannot run fails), E2E_LISTENER (the program's own listener wherever tests want tcpserver),
//! E2E_SOAK (seconds that the tests of load and of time last, `listener: hundreds` and `soak:`: choose one by its name), E2E_SEED (repeats the
//! soak's choices), E2E_RATE, E2E_IDLE and E2E_BACKEND (the load's connections a second, idle connections, and IMAP server).
#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    missing_docs,
    unreachable_pub,
    dead_code,
    unused_imports,
    reason = "these are tests: a panic is how they fail, and not every test file uses every part of the harness"
)]

mod activation;
mod attacks;
mod certificates;
mod check;
mod client_cert;
mod confinement;
mod connect;
mod connect_servers;
mod faults;
mod fleet;
mod handshake;
mod harness;
mod hostile;
mod interop;
mod keeper_service;
mod limits;
mod listener;
mod logging;
mod ocsp;
mod process;
mod proxy_in;
mod relay;
mod scanners;
mod setup;
mod soak;
mod starttls;
mod tickets;
mod time;
mod transcripts;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments
        .get(1)
        .is_some_and(|argument| argument == harness::backend::PLAY)
    {
        return harness::backend::play(&arguments[2..]);
    }
    let options = libtest_mimic::Arguments::from_args();
    harness::sys::reserve_low_descriptors();
    harness::sys::become_subreaper();
    let _run = harness::dir::begin_run();
    let tests = [
        activation::tests(),
        attacks::tests(),
        certificates::tests(),
        check::tests(),
        client_cert::tests(),
        confinement::tests(),
        connect::tests(),
        connect_servers::tests(),
        faults::tests(),
        fleet::tests(),
        handshake::tests(),
        hostile::tests(),
        interop::tests(),
        keeper_service::tests(),
        process::tests(),
        proxy_in::tests(),
        relay::tests(),
        ocsp::tests(),
        scanners::tests(),
        setup::tests(),
        soak::tests(),
        starttls::tests(),
        limits::tests(),
        listener::tests(),
        logging::tests(),
        tickets::tests(),
        time::tests(),
        transcripts::tests(),
    ];
    let conclusion = libtest_mimic::run(&options, tests.into_iter().flatten().collect());
    conclusion.exit_code()
}
