//! The keeper as a service of its own (`--keep`): it signs for all whom superservers start, who then need not be able to read a key,
//! and do not pay for a keeper each.
//!
//! ```text
//! imap-tls --keep          keeps its rights; reads files anew, starts keepers, waits; answers nobody
//!   +--fork--> opener      with --cert-dir only
//!   +--fork--> keeper      reads certificates and keys; enters its sandbox; lets network processes in at the socket
//! ```
//! When files are read anew there is another keeper. The one before it lets nobody in any more, and ends with the last handshake
//! that it began.

use std::collections::BTreeSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;

use crate::cli::{self, CommonOptions, Request, Task};
use crate::error::Error;
use crate::keeper::{self, SharedKeeper};
use crate::listener::{KEEPER_INTERVAL, KILL_LIMIT, Sockets, retry_after, watch_signals};
use crate::log::Log;
use crate::notify::Notifier;
use crate::sandbox::{Features, forbid_tracing};
use crate::setup::{Plans, start_keeper_service};
use crate::sys;

/// The way to the end; each stage has a time when the next one begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Keeping,
    /// Nobody is let in any more; handshakes that have begun go on.
    Draining(Instant),
    Killed(Instant),
}

struct Keeping<'a> {
    /// The one that lets network processes in; none is left when one has died and another finds fault with its files.
    keeper: Option<SharedKeeper>,
    log: &'a mut Log,
    notifier: Notifier,
    options: CommonOptions,
    renew_at: Instant,
    /// Those before it that are not over.
    retired: BTreeSet<Pid>,
    signals: SignalFd,
    /// One.
    sockets: Sockets,
    source: cli::Source,
    stage: Stage,
    /// When the last keeper was to begin.
    started: Instant,
}

/// Keeps keys until it is told to end and the last handshake is over. `inherited` is the socket, where systemd made it.
///
/// # Errors
/// Whatever is wrong with options, files and socket; `System` if waiting is impossible.
pub(crate) fn keep(
    options: Box<CommonOptions>,
    source: cli::Source,
    log: &mut Log,
    inherited: Vec<OwnedFd>,
) -> Result<(), Error> {
    // Else another service's root, whom its unit shows no key, would find them by this process's root directory (proc(5)).
    forbid_tracing()?;
    let mut sockets = Sockets::of_keeper(options.keeper.as_deref(), inherited)?;
    let keeper = match start(&options, &sockets, log) {
        Ok(keeper) => keeper,
        Err(error) => {
            sockets.close();
            return Err(error);
        }
    };
    for lack in Features::of_kernel().lacking() {
        log.warning(lack);
    }
    let signals = watch_signals()?;
    let mut keeping = Keeping {
        keeper: Some(keeper),
        log,
        notifier: Notifier::new(),
        renew_at: Instant::now() + options.listening.renewal,
        options: *options,
        retired: BTreeSet::new(),
        signals,
        sockets,
        source,
        stage: Stage::Keeping,
        started: Instant::now(),
    };
    let sockets = &keeping.sockets;
    keeping
        .log
        .info(format_args!("keeping keys for those who come to {sockets}"));
    keeping.notifier.ready(keeping.log);
    keeping.run()
}

fn start(options: &CommonOptions, sockets: &Sockets, log: &Log) -> Result<SharedKeeper, Error> {
    let mut plan = Plans::look_up(options, log)?.keeper()?;
    let most = options.listening.max_connections;
    plan.limits.descriptors = keeper::descriptors(most);
    let room = keeper::room(plan.limits.descriptors);
    if room < most {
        log.warning(format_args!(
            "there is room for {room} at a time, not for {most} (--max-connections): the limit on open files is too low (ulimit -n, LimitNOFILE=)"
        ));
    }
    let (keeper, offer) = start_keeper_service(options, plan, sockets.first()?)?;
    for warning in &offer.warnings {
        log.warning(warning);
    }
    Ok(keeper)
}

impl Keeping<'_> {
    fn run(&mut self) -> Result<(), Error> {
        // The keeper may have ended before anybody watched.
        self.reap();
        loop {
            self.tend(Instant::now());
            if self.is_over(Instant::now()) {
                return Ok(());
            }
            self.wait()?;
            self.read_signals();
        }
    }

    fn wait(&self) -> Result<(), Error> {
        let stage = match self.stage {
            Stage::Keeping => self.renew_at,
            Stage::Draining(until) | Stage::Killed(until) => until,
        };
        let next = self.notifier.next(|| self.status());
        let next = next.map_or(stage, |next| next.min(stage));
        let timeout = next.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        match nix::poll::ppoll(&mut polled, Some(timeout.into()), None) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(Error::system("cannot wait for signals", error.desc())),
        }
    }

    /// Does what is due.
    fn tend(&mut self, now: Instant) {
        match self.stage {
            Stage::Keeping if self.renew_at <= now => self.renew(),
            Stage::Draining(until) if until <= now => {
                self.log.warning(format_args!(
                    "{} keepers are killed: clients that are not inside TLS have not let go of them",
                    self.retired.len()
                ));
                for keeper in &self.retired {
                    // It has not been reaped, so that the number is no other's by now.
                    let _ = kill(*keeper, Signal::SIGKILL);
                }
                self.stage = Stage::Killed(now + KILL_LIMIT);
            }
            _ => {}
        }
        let status = self.status();
        self.notifier.tend(now, || status, self.log);
    }

    fn is_over(&self, now: Instant) -> bool {
        match self.stage {
            Stage::Keeping => false,
            Stage::Draining(_) => self.retired.is_empty(),
            Stage::Killed(until) => self.retired.is_empty() || until <= now,
        }
    }

    /// As the supervisor shows it.
    fn status(&self) -> String {
        let keeper = match &self.keeper {
            Some(keeper) => format!("keeper {}", keeper.process),
            None => "no keeper".to_owned(),
        };
        format!("{keeper}; {} before it are not over", self.retired.len())
    }

    /// Certificates may have been renewed, ticket keys have to be, and a keeper that has died is replaced.
    fn renew(&mut self) {
        self.log.find_again();
        let result = start(&self.options, &self.sockets, self.log);
        self.take(result);
    }

    fn reload(&mut self) {
        self.log.find_again();
        self.notifier.reloading(self.log);
        let (sockets, log) = (&self.sockets, &*self.log);
        let result = self.source.read_again(|request| {
            let Request::Run(Task::Keep(options)) = request else {
                return Err(Error::Usage("there is nothing to keep any more".to_owned()));
            };
            if sockets.would_move_to(options.keeper.as_deref()) {
                log.warning("--keeper has changed, which takes a restart");
            }
            log.note_destination(options.destination);
            Ok((start(&options, sockets, log)?, options))
        });
        let result = result.map(|(keeper, options)| {
            self.log.set_verbosity(options.verbosity);
            self.options = *options;
            self.log.info("reloaded");
            keeper
        });
        self.take(result);
        self.notifier.ready(self.log);
    }

    /// The new keeper lets network processes in from now on; where there is none, everything stays as it was.
    fn take(&mut self, started: Result<SharedKeeper, Error>) {
        self.started = Instant::now();
        let interval = self.options.listening.renewal;
        let next = match started {
            Ok(keeper) => {
                self.retire();
                self.keeper = Some(keeper);
                interval
            }
            Err(error) => {
                let fate = match self.keeper {
                    Some(_) => "the keeper stays as it was",
                    None => "there is no keeper",
                };
                self.log
                    .error(format_args!("nothing was renewed, and {fate}: {error}"));
                retry_after(interval, self.keeper.is_some())
            }
        };
        self.renew_at = Instant::now() + next;
    }

    /// Lets the keeper go: it ends when its last handshake is over.
    fn retire(&mut self) {
        if let Some(before) = self.keeper.take() {
            self.retired.insert(before.process);
            before.let_go();
        }
    }

    fn read_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
                Ok(Ok(Signal::SIGHUP)) if self.stage == Stage::Keeping => self.reload(),
                Ok(Ok(Signal::SIGINT | Signal::SIGTERM)) => self.end_sooner(),
                Ok(Ok(Signal::SIGCHLD)) => self.reap(),
                _ => {}
            }
        }
    }

    /// Takes note of all that have ended. A signal may stand for several.
    fn reap(&mut self) {
        while let Ok(Some((process, end))) = sys::reap(None) {
            self.retired.remove(&process);
            let is_current = |keeper: &SharedKeeper| keeper.process == process;
            if self.keeper.as_ref().is_some_and(is_current) {
                self.keeper = None;
                self.log.error(format_args!(
                    "keeper {process}: {}: another is started",
                    end.how()
                ));
                self.renew_at = self.started + KEEPER_INTERVAL;
            }
        }
    }

    /// The first signal has nobody let in any more, the second one ends handshakes.
    fn end_sooner(&mut self) {
        let now = Instant::now();
        self.stage = match self.stage {
            Stage::Keeping => {
                self.sockets.close();
                self.retire();
                self.notifier.stopping(self.log);
                Stage::Draining(now + self.options.listening.drain_timeout)
            }
            Stage::Draining(_) => Stage::Draining(now),
            stage @ Stage::Killed(_) => stage,
        };
    }
}
