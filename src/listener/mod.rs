//! The listener: accepts clients and gives each a process of its own, without a superserver and without exec.
//!
//! This process keeps its privileges, so it touches not one byte from the network: it accepts, counts, forks and waits. What
//! serves the clients is the business of [`Service`].

mod clients;
mod refusals;
mod sockets;
mod table;

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, kill};
use nix::sys::signalfd::SignalFd;
use nix::unistd::Pid;

pub(crate) use sockets::{Sockets, can_be_bound, examine_keepers};

use crate::admission::Application;
use crate::cli::Listening;
use crate::error::{EXIT_TEMPORARY, Error};
use crate::log::Log;
use crate::notify::Notifier;
use crate::sys::{self, ChildEnd};
use refusals::Refusals;
use table::Table;

/// What is served, and by what means.
pub(crate) trait Service {
    /// How much is taken on.
    fn listening(&self) -> &Listening;

    /// What a client is told for whom there is no room.
    fn refusal(&self) -> &'static [u8];

    /// What a client is told who cannot be served, through a fault of ours.
    fn goodbye(&self) -> &'static [u8];

    /// Whether clients come by balancers, so that who they are is known only later.
    fn has_balancers(&self) -> bool;

    /// The keeper of new connections.
    fn keeper(&self) -> Pid;

    /// Reads options and files anew. Connections that there are stay as they are.
    ///
    /// # Errors
    /// Whatever is wrong with them: everything stays as it was then.
    fn reload(&mut self, log: &mut Log) -> Result<(), Error>;

    /// The same with the options that there are; begins a new keeper.
    ///
    /// # Errors
    /// As above.
    fn renew(&mut self, log: &Log) -> Result<(), Error>;

    /// Serves a client in a process of its own, which takes it; here it stays where it is. The process ends with [`EXIT_TEMPORARY`] if
    /// the system is short of something.
    ///
    /// # Errors
    /// `System` if there is no process or descriptor to be had, or no keeper.
    fn start(&self, client: &mut Option<OwnedFd>, log: &Log) -> Result<Started, Error>;
}

/// A connection's process.
pub(crate) struct Started {
    /// Where it will tell who its client is, if it has to find out.
    pub(crate) application: Option<Application>,
    pub(crate) process: Pid,
}

/// How soon what failed to be renewed is tried again.
const RETRY: Duration = Duration::from_secs(60);
/// The same while nobody can be served: what was wanting may have been memory.
const URGENT_RETRY: Duration = Duration::from_secs(5);
/// A keeper that ends as soon as it has begun would have this done without end: they begin at intervals of at least this.
pub(crate) const KEEPER_INTERVAL: Duration = Duration::from_secs(1);
/// How long a connection may take to say goodbye: longer than the relay's own limit for it.
const GOODBYE_LIMIT: Duration = Duration::from_secs(15);
/// How long a killed process may take to end.
pub(crate) const KILL_LIMIT: Duration = Duration::from_secs(5);
/// To ask for any child that has ended, the kernel looks at each that there is (wait(2)). With more than these ...
const FEW: usize = 64;
/// ... it is not asked more often than so.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);

/// SIGCHLD for processes that have ended, SIGHUP to reload, SIGTERM and SIGINT to end.
const WATCHED: &[Signal] = &[
    Signal::SIGCHLD,
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGTERM,
];

/// The way to the end; each stage has a time when the next one begins.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    Serving,
    /// No new clients; those that there are go on.
    Draining(Instant),
    /// They have been told to end.
    Ending(Instant),
    /// They have been killed.
    Killed(Instant),
}

struct Listener<'a, S> {
    /// Connections whose client is not known yet.
    applications: Vec<(Pid, Application)>,
    /// What was wrong the last time, so that it is said once.
    fault: Option<String>,
    /// None is left when one has died and another finds fault with its certificates.
    has_keeper: bool,
    /// When the last keeper was to begin.
    keeper_started: Instant,
    log: &'a mut Log,
    /// A client that was accepted and has no process yet.
    next_client: Option<OwnedFd>,
    notifier: Notifier,
    paused_until: Option<Instant>,
    refusals: Refusals,
    renew_at: Instant,
    service: S,
    signals: SignalFd,
    sockets: Sockets,
    stage: Stage,
    /// When all children are asked whether they have ended.
    sweep_at: Option<Instant>,
    table: Table,
}

/// Serves until it is told to end and the last connection is gone.
///
/// # Errors
/// `System` if waiting is impossible.
pub(crate) fn listen<S: Service>(sockets: Sockets, service: S, log: &mut Log) -> Result<(), Error> {
    let signals = watch_signals()?;
    let now = Instant::now();
    let renew_at = now + service.listening().renewal;
    let mut listener = Listener {
        applications: Vec::new(),
        fault: None,
        has_keeper: true,
        keeper_started: now,
        log,
        next_client: None,
        notifier: Notifier::new(),
        paused_until: None,
        refusals: Refusals::default(),
        renew_at,
        service,
        signals,
        sockets,
        stage: Stage::Serving,
        // The keeper may have ended before anybody watched.
        sweep_at: Some(now),
        table: Table::default(),
    };
    listener
        .log
        .info(format_args!("listening on {}", listener.sockets));
    listener.notifier.ready(listener.log);
    listener.run()
}

/// How soon what failed to be renewed is tried again, where it is every `interval` otherwise.
pub(crate) fn retry_after(interval: Duration, has_keeper: bool) -> Duration {
    interval.min(if has_keeper { RETRY } else { URGENT_RETRY })
}

/// Where the signals are read that a service is told something with.
///
/// # Errors
/// `System` if the kernel refuses.
pub(crate) fn watch_signals() -> Result<SignalFd, Error> {
    sys::watch_signals(WATCHED).map_err(cannot_watch)
}

/// A SIGHUP that comes before we serve is answered when we do, and no reason to end.
///
/// # Errors
/// `System` if the kernel refuses.
pub(crate) fn expect_reload() -> Result<(), Error> {
    let held = sys::hold_signals(&[Signal::SIGHUP]);
    held.map(drop).map_err(cannot_watch)
}

fn cannot_watch(error: Errno) -> Error {
    Error::system("cannot watch for signals", error.desc())
}

impl<S: Service> Listener<'_, S> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            let ready = self.wait()?;
            self.read_signals();
            self.answer_applications();
            let now = Instant::now();
            self.tend(now);
            if self.is_over(now) {
                return Ok(());
            }
            if self.is_accepting(now) {
                self.start_next_client();
                for number in ready {
                    self.accept_from(number);
                }
            }
        }
    }

    /// Waits for a signal, a client or a time; returns which sockets have clients.
    fn wait(&self) -> Result<Vec<usize>, Error> {
        let now = Instant::now();
        let timeout = self
            .next_time()
            .map(|next| next.saturating_duration_since(now));
        let poll = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut polled = vec![poll(self.signals.as_fd())];
        let applications = self.applications.iter();
        polled.extend(applications.map(|(_, application)| poll(application.descriptor())));
        let others = polled.len();
        if self.is_accepting(now) && self.next_client.is_none() {
            polled.extend(self.sockets.descriptors().map(poll));
        }
        match nix::poll::ppoll(&mut polled, timeout.map(Into::into), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Error::system("cannot wait for clients", error.desc())),
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let sockets = polled.iter().skip(others).enumerate();
        Ok(sockets
            .filter(|(_, fd)| is_ready(fd))
            .map(|(number, _)| number)
            .collect())
    }

    /// When something is to be done without a signal or a client.
    fn next_time(&self) -> Option<Instant> {
        let stage = match self.stage {
            Stage::Serving => Some(self.renew_at),
            Stage::Draining(until) | Stage::Ending(until) | Stage::Killed(until) => Some(until),
        };
        let notify = self.notifier.next(|| self.table.to_string());
        let refusals = self.refusals.next();
        [stage, self.paused_until, self.sweep_at, notify, refusals]
            .into_iter()
            .flatten()
            .min()
    }

    fn is_accepting(&self, now: Instant) -> bool {
        self.stage == Stage::Serving && self.paused_until.is_none_or(|until| until <= now)
    }

    /// Does what is due.
    fn tend(&mut self, now: Instant) {
        if self.paused_until.is_some_and(|until| until <= now) {
            self.paused_until = None;
        }
        if self.stage == Stage::Serving && self.renew_at <= now {
            self.renew();
        }
        self.advance(now);
        let table = &self.table;
        self.notifier.tend(now, || table.to_string(), self.log);
        self.refusals.tell(now, self.log);
    }

    fn is_over(&self, now: Instant) -> bool {
        let is_out_of_patience = matches!(self.stage, Stage::Killed(until) if until <= now);
        self.stage != Stage::Serving && (self.table.len() == 0 || is_out_of_patience)
    }

    /// Certificates may have been renewed, ticket keys have to be, and a keeper that has died is replaced.
    fn renew(&mut self) {
        self.log.find_again();
        let result = self.service.renew(self.log);
        self.note_renewal(result);
    }

    fn note_renewal(&mut self, result: Result<(), Error>) {
        let interval = self.service.listening().renewal;
        self.keeper_started = Instant::now();
        self.renew_at = self.keeper_started
            + match result {
                Ok(()) => {
                    self.has_keeper = true;
                    interval
                }
                Err(error) => {
                    let fate = if self.has_keeper {
                        "served as before"
                    } else {
                        "refused"
                    };
                    self.log.error(format_args!(
                        "nothing was renewed, and new connections are {fate}: {error}"
                    ));
                    retry_after(interval, self.has_keeper)
                }
            };
    }

    fn reload(&mut self) {
        self.log.find_again();
        self.notifier.reloading(self.log);
        let result = self.service.reload(self.log);
        if result.is_ok() {
            self.log.info("reloaded");
        }
        self.note_renewal(result);
        self.notifier.ready(self.log);
    }

    fn read_signals(&mut self) {
        let mut has_lost_child = false;
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
                Ok(Ok(Signal::SIGHUP)) if self.stage == Stage::Serving => self.reload(),
                Ok(Ok(Signal::SIGINT | Signal::SIGTERM)) => self.end_sooner(),
                Ok(Ok(Signal::SIGCHLD)) => {
                    self.reap(i32::try_from(signal.ssi_pid).map(Pid::from_raw).ok());
                    has_lost_child = true;
                }
                _ => {}
            }
        }
        let now = Instant::now();
        if has_lost_child {
            // A signal may stand for several children, and names one.
            let is_cheap = self.table.len() <= FEW;
            let soon = if is_cheap { now } else { now + SWEEP_INTERVAL };
            self.sweep_at.get_or_insert(soon);
        }
        if self.sweep_at.is_some_and(|at| at <= now) {
            self.sweep_at = None;
            while self.reap(None) {}
        }
    }

    /// Takes note of a child's end, or of any child's; returns whether there was one.
    fn reap(&mut self, child: Option<Pid>) -> bool {
        let Ok(Some((process, end))) = sys::reap(child) else {
            return false;
        };
        let how = end.how();
        if self.table.remove(process) {
            // Ended by us, or by something that should not have happened.
            if matches!(end, ChildEnd::Signalled(_)) && !matches!(self.stage, Stage::Killed(_)) {
                self.log
                    .error(format_args!("process {process} of a connection: {how}"));
            }
            if end == ChildEnd::Exited(EXIT_TEMPORARY) {
                self.pause_briefly();
            }
        } else if process == self.service.keeper() && self.stage == Stage::Serving {
            self.log
                .error(format_args!("keeper {process}: {how}: another is started"));
            self.has_keeper = false;
            self.renew_at = self.keeper_started + KEEPER_INTERVAL;
            // Till then clients wait where they are.
            self.paused_until = Some(self.renew_at);
        }
        true
    }

    /// The first signal ends accepting, the second one patience.
    fn end_sooner(&mut self) {
        let now = Instant::now();
        self.stage = match self.stage {
            Stage::Serving => {
                self.sockets.close();
                self.next_client = None;
                self.notifier.stopping(self.log);
                let limit = self.service.listening().drain_timeout;
                self.log.info(format_args!(
                    "ending: {} connections have {} s",
                    self.table.len(),
                    limit.as_secs()
                ));
                Stage::Draining(now + limit)
            }
            Stage::Draining(_) => Stage::Draining(now),
            stage => stage,
        };
    }

    fn advance(&mut self, now: Instant) {
        self.stage = match self.stage {
            Stage::Draining(until) if until <= now => {
                self.signal_all(Signal::SIGTERM);
                Stage::Ending(now + GOODBYE_LIMIT)
            }
            Stage::Ending(until) if until <= now => {
                self.signal_all(Signal::SIGKILL);
                Stage::Killed(now + KILL_LIMIT)
            }
            stage => stage,
        };
    }

    /// None of them has been reaped, so that no number can be another process's by now.
    fn signal_all(&self, signal: Signal) {
        let results = self.table.processes().map(|process| kill(process, signal));
        let faults: Vec<Errno> = results
            .filter_map(Result::err)
            // One that has just ended is reaped next.
            .filter(|error| *error != Errno::ESRCH)
            .collect();
        // Whom we may not tell to end we cannot kill either, so it is said once.
        if let (Signal::SIGTERM, Some(error)) = (signal, faults.first()) {
            self.log.warning(format_args!(
                "{} connections cannot be told to end: {} (CAP_KILL is needed)",
                faults.len(),
                error.desc()
            ));
        }
    }
}
