//! The listener: accepts clients and gives each a process of its own, without a superserver and without exec.
//!
//! This process keeps its privileges, so it touches not one byte from the network: it accepts, counts, forks and waits. What
//! serves the clients is the business of [`Service`].

mod notify;
mod sockets;
mod table;

use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{MsgFlags, SockaddrStorage, getpeername, send};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

pub(crate) use sockets::Sockets;

use crate::activation::inet;
use crate::cli::Listening;
use crate::error::Error;
use crate::log::Log;
use notify::Notifier;
use sockets::accept;
use table::{Full, Source, Table};

/// What is served, and by what means.
pub(crate) trait Service {
    /// How much is taken on.
    fn listening(&self) -> &Listening;

    /// What a client is told for whom there is no room.
    fn refusal(&self) -> &'static [u8];

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

    /// Serves a client in a process of its own, which takes it; here it stays where it is.
    ///
    /// # Errors
    /// `System` if there is no process or descriptor to be had, or no keeper.
    fn start(&self, client: &mut Option<OwnedFd>, log: &Log) -> Result<Pid, Error>;
}

/// How many clients are accepted before something else is looked at.
const ACCEPTS: usize = 32;
/// How long accepting pauses when the system has nothing to give.
const PAUSE: Duration = Duration::from_millis(100);
/// How soon what failed to be renewed is tried again.
const RETRY: Duration = Duration::from_secs(60);
/// How long a connection may take to say goodbye: longer than the relay's own limit for it.
const GOODBYE_LIMIT: Duration = Duration::from_secs(15);
/// How long a killed process may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);
/// How often refusals are logged: a flood must not fill the disk.
const REFUSAL_INTERVAL: Duration = Duration::from_secs(1);

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
    /// What was wrong the last time, so that it is said once.
    fault: Option<String>,
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
    table: Table,
}

/// Refusals that were not logged yet.
#[derive(Debug)]
struct Refusals {
    count: u64,
    logged_at: Option<Instant>,
}

/// Serves until it is told to end and the last connection is gone.
///
/// # Errors
/// `System` if waiting is impossible.
pub(crate) fn listen<S: Service>(sockets: Sockets, service: S, log: &mut Log) -> Result<(), Error> {
    let signals = watch_signals()?;
    let renew_at = Instant::now() + service.listening().renewal;
    let mut listener = Listener {
        fault: None,
        log,
        next_client: None,
        notifier: Notifier::new(),
        paused_until: None,
        refusals: Refusals {
            count: 0,
            logged_at: None,
        },
        renew_at,
        service,
        signals,
        sockets,
        stage: Stage::Serving,
        table: Table::default(),
    };
    listener
        .log
        .info(format_args!("listening on {}", listener.sockets));
    listener.notifier.ready();
    listener.run()
}

/// SIGCHLD for processes that have ended, SIGHUP to reload, SIGTERM and SIGINT to end: as a descriptor to poll.
fn watch_signals() -> Result<SignalFd, Error> {
    let failed = |error: nix::Error| Error::system("cannot watch for signals", error.desc());
    let mut mask = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGTERM,
    ] {
        mask.add(signal);
    }
    mask.thread_block().map_err(failed)?;
    SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC).map_err(failed)
}

impl<S: Service> Listener<'_, S> {
    fn run(&mut self) -> Result<(), Error> {
        loop {
            let ready = self.wait()?;
            self.read_signals();
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
        let mut polled = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if self.is_accepting(now) && self.next_client.is_none() {
            let sockets = self.sockets.descriptors();
            polled.extend(sockets.map(|socket| PollFd::new(socket, PollFlags::POLLIN)));
        }
        match nix::poll::ppoll(&mut polled, timeout.map(Into::into), None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(Error::system("cannot wait for clients", error.desc())),
        }
        let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let sockets = polled.iter().skip(1).enumerate();
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
        [stage, self.paused_until, notify, refusals]
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
        self.notifier.tend(now, || table.to_string());
        self.refusals.tell(now, self.log);
    }

    fn is_over(&self, now: Instant) -> bool {
        let is_out_of_patience = matches!(self.stage, Stage::Killed(until) if until <= now);
        self.stage != Stage::Serving && (self.table.len() == 0 || is_out_of_patience)
    }

    /// Certificates may have been renewed, ticket keys have to be, and a keeper that has died is replaced.
    fn renew(&mut self) {
        let result = self.service.renew(self.log);
        self.note_renewal(result);
    }

    fn note_renewal(&mut self, result: Result<(), Error>) {
        let interval = self.service.listening().renewal;
        self.renew_at = Instant::now()
            + match result {
                Ok(()) => interval,
                Err(error) => {
                    self.log.error(format_args!(
                        "nothing was renewed, and new connections are served as before: {error}"
                    ));
                    interval.min(RETRY)
                }
            };
    }

    fn reload(&mut self) {
        self.notifier.reloading();
        let result = self.service.reload(self.log);
        if result.is_ok() {
            self.log.info("reloaded");
        }
        self.note_renewal(result);
        self.notifier.ready();
    }

    fn read_signals(&mut self) {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match i32::try_from(signal.ssi_signo).map(Signal::try_from) {
                Ok(Ok(Signal::SIGHUP)) if self.stage == Stage::Serving => self.reload(),
                Ok(Ok(Signal::SIGINT | Signal::SIGTERM)) => self.end_sooner(),
                _ => {}
            }
        }
        self.reap();
    }

    /// One SIGCHLD may stand for several children.
    fn reap(&mut self) {
        loop {
            let (process, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(process, _)) => (process, None),
                Ok(WaitStatus::Signaled(process, signal, _)) => (process, Some(signal)),
                Err(Errno::EINTR) => continue,
                Ok(_) | Err(_) => return,
            };
            let how = signal.map_or("ended", Signal::as_str);
            if self.table.remove(process) {
                // Ended by us, or by something that should not have happened.
                if signal.is_some() && !matches!(self.stage, Stage::Killed(_)) {
                    let line = format_args!("process {process} of a connection: {how}");
                    self.log.error(line);
                }
            } else if process == self.service.keeper() && self.stage == Stage::Serving {
                self.log
                    .error(format_args!("keeper {process}: {how}: another is started"));
                self.renew();
            }
        }
    }

    /// The first signal ends accepting, the second one patience.
    fn end_sooner(&mut self) {
        let now = Instant::now();
        self.stage = match self.stage {
            Stage::Serving => {
                self.sockets.close();
                self.next_client = None;
                self.notifier.stopping();
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
        for process in self.table.processes() {
            // One that has just ended is reaped next.
            let _ = kill(process, signal);
        }
    }

    fn accept_from(&mut self, number: usize) {
        for _ in 0..ACCEPTS {
            if self.paused_until.is_some() {
                return;
            }
            let Some(socket) = self.sockets.descriptors().nth(number) else {
                return;
            };
            match accept(socket) {
                Ok(client) => {
                    self.next_client = Some(client);
                    self.start_next_client();
                }
                Err(Errno::EAGAIN) => return,
                // The client's network had something to say, or it has gone (accept(2)).
                Err(
                    Errno::ECONNABORTED
                    | Errno::EHOSTDOWN
                    | Errno::EHOSTUNREACH
                    | Errno::EINTR
                    | Errno::ENETDOWN
                    | Errno::ENETUNREACH
                    | Errno::ENONET
                    | Errno::ENOPROTOOPT
                    | Errno::EOPNOTSUPP
                    | Errno::EPROTO,
                ) => {}
                Err(error) => self.pause(format!("cannot accept a client: {}", error.desc())),
            }
        }
    }

    /// Gives the client a process, or refuses it. Where there is none to be had it waits, and those behind it at the socket.
    fn start_next_client(&mut self) {
        let Some(client) = &self.next_client else {
            return;
        };
        let limits = self.service.listening();
        let source = address(client.as_fd()).map(|address| Source::of(address, limits.prefixes));
        if let Err(full) = self.table.admit(source, limits) {
            self.refuse(source, full);
            return;
        }
        match self.service.start(&mut self.next_client, self.log) {
            Ok(process) => {
                self.next_client = None;
                self.table.add(process, source);
                if self.fault.take().is_some() {
                    self.log.info("accepting clients again");
                }
            }
            Err(error) => self.pause(error.to_string()),
        }
    }

    fn pause(&mut self, fault: String) {
        if self.fault.as_ref() != Some(&fault) {
            self.log
                .error(format_args!("{fault}: accepting clients more slowly"));
            self.fault = Some(fault);
        }
        self.paused_until = Some(Instant::now() + PAUSE);
    }

    fn refuse(&mut self, source: Option<Source>, full: Full) {
        if let Some(client) = self.next_client.take() {
            // Nothing was read, so nothing is known of it; it may be gone.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let _ = send(client.as_raw_fd(), self.service.refusal(), flags);
        }
        self.table.refused += 1;
        let source = source.map_or_else(|| "unix".to_owned(), |source| source.to_string());
        let why = match full {
            Full::Altogether => "there is no room (--max-connections)",
            Full::Source => "there are too many from there (--max-per-source)",
        };
        self.refusals
            .note(self.log, format_args!("refused {source}: {why}"));
    }
}

impl Refusals {
    fn note(&mut self, log: &Log, line: std::fmt::Arguments<'_>) {
        let now = Instant::now();
        if self.next().is_none_or(|next| next <= now) && self.count == 0 {
            log.warning(line);
            self.logged_at = Some(now);
        } else {
            self.count += 1;
        }
    }

    fn next(&self) -> Option<Instant> {
        self.logged_at.map(|logged_at| logged_at + REFUSAL_INTERVAL)
    }

    fn tell(&mut self, now: Instant, log: &Log) {
        if self.next().is_some_and(|next| next <= now) {
            self.logged_at = None;
            if self.count > 0 {
                log.warning(format_args!("refused {} more", self.count));
                self.logged_at = Some(now);
                self.count = 0;
            }
        }
    }
}

/// Where the client is, as far as the kernel knows; none for a unix socket.
fn address(client: BorrowedFd<'_>) -> Option<IpAddr> {
    let address = getpeername::<SockaddrStorage>(client.as_raw_fd()).ok()?;
    inet(&address).map(|address| address.ip())
}
