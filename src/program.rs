//! What one run of the program is: a connection, the listener, the keeper service, or something to show.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};

use crate::activation::{self, Activation, Stderr};
use crate::check::{self, check};
use crate::cli::{self, CommonOptions, Options, Request, Task};
use crate::error::{EXIT_SETUP, Error, reason};
use crate::imap::Policy;
use crate::keeping;
use crate::listener::{self, Sockets};
use crate::log::{Destination, Log, Verbosity};
use crate::relay::Children;
use crate::service::Serving;
use crate::session::{conclude, goodbye, is_welcome, session};
use crate::sys;
use crate::tls::examine_processor;

/// Runs the program; returns its exit status.
pub(crate) fn run() -> u8 {
    // First of all, before anything can be printed: under inetd, fd 2 is the client's socket.
    let stderr = activation::secure_stderr().unwrap_or(Stderr::Unusable);
    if let Err(error) = sys::protect_relocated_data() {
        let fault = "cannot make the program's tables read-only";
        return refuse(&Error::system(fault, reason(&error.into())), stderr);
    }
    let mut source = cli::Source::new(std::env::args_os(), nix::unistd::geteuid().is_root());
    match source.read() {
        Ok(Request::Run(Task::Serve(options))) => serve(options, source, stderr),
        Ok(Request::Run(Task::Keep(options))) => keep(options, source, stderr),
        Ok(Request::Check(task, format)) => {
            let report =
                task.map_or_else(|error| check::Report::of_usage(&error), |task| check(&task));
            show(&report.write(format)).max(report.exit_status())
        }
        Ok(Request::Show(text)) => show(&text),
        Err(error) => refuse(&error, stderr),
    }
}

/// Help and report are for a terminal, a pager or the journal, never for a client.
fn show(text: &str) -> u8 {
    let mut stdout = std::io::stdout();
    let is_shown = !activation::may_be_clients(stdout.as_fd(), std::io::stdin().as_fd())
        && stdout
            .write_all(text.as_bytes())
            .and_then(|()| stdout.flush())
            .is_ok();
    if is_shown { 0 } else { EXIT_SETUP }
}

/// The options make no sense, so the policy is not known either; port 993 is guessed by the word.
fn refuse(error: &Error, stderr: Stderr) -> u8 {
    let log = Log::open(
        Destination::Auto,
        Verbosity::Normal,
        stderr == Stderr::Usable,
    );
    let mut words = std::env::args_os().chain(std::env::var_os("IMAP_TLS_TLS"));
    let goodbye = goodbye(
        if words.any(|word| word.to_string_lossy().contains("implicit")) {
            Policy::Implicit
        } else {
            Policy::Required
        },
    );
    if let Ok(Activation::Connection(mut connection)) = Activation::take(false, goodbye) {
        log.set_subject(&connection);
        connection.part(goodbye);
    }
    log.error(error);
    error.exit_status()
}

fn open_log(options: &CommonOptions, stderr: Stderr) -> Log {
    Log::open(
        options.destination,
        options.verbosity,
        stderr == Stderr::Usable,
    )
}

fn serve(options: Box<Options>, source: cli::Source, stderr: Stderr) -> u8 {
    let mut log = open_log(&options.common, stderr);
    let listens = !options.common.listening.addresses.is_empty();
    let result = Activation::take(listens, goodbye(options.policy));
    let result = result.and_then(|activation| match activation {
        Activation::Connection(mut connection) => {
            // Only the listener reads its options again.
            drop(source);
            log.set_subject(&connection);
            if listens {
                let result = Err(Error::Usage(
                    "--listen (IMAP_TLS_LISTEN), but a superserver has handed over a client's connection: one or the other"
                        .to_owned(),
                ));
                return Ok(conclude(result, &options, &log, &mut connection));
            }
            if !is_welcome(&connection, &options.proxy_from, &log) {
                connection.part(b"");
                return Ok(0);
            }
            let result = session(&options, &log, &mut connection);
            Ok(conclude(result, &options, &log, &mut connection))
        }
        Activation::Listening(inherited) => {
            listen(options, source, &mut log, inherited).map(|()| 0)
        }
    });
    end(result, &log)
}

fn keep(options: Box<CommonOptions>, source: cli::Source, stderr: Stderr) -> u8 {
    let mut log = open_log(&options, stderr);
    // What a client would be told who has been handed over by mistake: the policy is not known here.
    let result = Activation::take(true, b"").and_then(|activation| match activation {
        Activation::Connection(_) => Err(Error::Usage(
            "--keep, but a superserver has handed over a client's connection: keepers serve no clients"
                .to_owned(),
        )),
        Activation::Listening(inherited) => {
            Children::expect()?;
            listener::expect_reload()?;
            examine_processor();
            keeping::keep(options, source, &mut log, inherited)
        }
    });
    end(result.map(|()| 0), &log)
}

/// The exit status of what has a status of its own, or has failed.
fn end(result: Result<u8, Error>, log: &Log) -> u8 {
    result.unwrap_or_else(|error| {
        log.error(&error);
        error.exit_status()
    })
}

/// Sockets, what all connections have in common, then the connections, each with a process of its own.
fn listen(
    options: Box<Options>,
    source: cli::Source,
    log: &mut Log,
    inherited: Vec<OwnedFd>,
) -> Result<(), Error> {
    Children::expect()?;
    listener::expect_reload()?;
    let sockets = Sockets::open(&options.common.listening.addresses, inherited)?;
    examine_processor();
    let serving = Serving::prepare(options, source, log)?;
    listener::listen(sockets, serving, log)
}
