//! The relay: one poll loop that carries a session through cleartext phase, handshake, TLS phase and ending.
//!
//! This file moves bytes between descriptors and queues and watches the clock; `flow` decides what the bytes mean, `ending`
//! what follows when a side closes.

mod buffer;
mod children;
mod ending;
mod flow;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use nix::unistd::Pid;

use children::BackendEnd;
pub(crate) use children::Children;
pub(crate) use flow::Report;

use crate::backend::{Backend, Launcher};
use crate::channel::{Channel, Received};
use crate::error::reason;
use crate::imap::Policy;
use crate::keeper::KeeperClient;
use crate::log::Log;
use crate::sandbox::Sandboxed;
use crate::tls::Tls;
use buffer::Queue;
use ending::{Direction, Situation, Step};
use flow::Phase;

/// Who will speak IMAP, and when.
#[derive(Debug)]
pub(crate) enum BackendSource {
    /// `--backend-fd`: there from the start, and kept.
    Descriptor(Backend),
    /// Launchers for the TLS phase and, in `optional`, for the cleartext phase: two, so that nothing a client said in
    /// clear has any effect after TLS (CVE-2021-37845 and its kin).
    Launchers {
        cleartext: Option<Launcher>,
        secured: Launcher,
    },
}

/// Everything a session needs, made while there were privileges.
pub(crate) struct Parts<'a> {
    pub(crate) backend: BackendSource,
    pub(crate) children: &'a Children,
    pub(crate) client: &'a mut Channel,
    pub(crate) handshake_timeout: Duration,
    pub(crate) keeper: &'a KeeperClient,
    pub(crate) log: &'a Log,
    pub(crate) login_timeout: Duration,
    pub(crate) policy: Policy,
    pub(crate) tls: Tls,
}

impl BackendSource {
    /// The descriptors that the network process keeps.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Descriptor(backend) => backend.channel.descriptors().collect(),
            Self::Launchers { cleartext, secured } => cleartext
                .iter()
                .chain([secured])
                .flat_map(Launcher::descriptors)
                .collect(),
        }
    }
}

/// How much is read at once: as much as a queue may hold.
const READ_SIZE: usize = buffer::QUEUE_LIMIT;
/// After this long without a byte, memory is given back.
const IDLE: Duration = Duration::from_millis(200);
/// How long a client may take to close after its last byte from us, so that our close is no reset that eats it.
const LINGER_LIMIT: Duration = Duration::from_secs(2);
/// How much it may still send meanwhile, to be thrown away; one that floods us may lose our last words to the reset.
const LINGER_OCTETS: usize = 1024 * 1024;
/// How long the rest may stand still once one side has ended: a backend that does not end, a client that does not read.
const ENDING_LIMIT: Duration = Duration::from_secs(60);
/// The same where we decided to end: there is a goodbye to deliver at most.
const CLOSING_LIMIT: Duration = Duration::from_secs(10);

/// One connection, from the first byte to the last.
struct Relay<'a> {
    parts: Parts<'a>,
    phase: Phase,
    /// Whether what passes between the client and us is TLS.
    is_tls: bool,
    backend: Option<Backend>,
    /// Child processes that have been reaped.
    ended: Vec<(Pid, BackendEnd)>,
    /// What a backend that is kept across STARTTLS wrote too late for the cleartext phase.
    backend_unread: Vec<u8>,
    to_client: Queue,
    to_backend: Queue,
    /// Where bytes are read into; empty while idle.
    scratch: Vec<u8>,
    client_input: Direction,
    client_output: Direction,
    backend_input: Direction,
    backend_output: Direction,
    is_backend_running: bool,
    is_closing: bool,
    /// Octets from the client that were thrown away since.
    discarded: usize,
    is_close_notify_sent: bool,
    deadlines: Deadlines,
    report: Report,
}

/// When patience ends.
#[derive(Debug, Default)]
struct Deadlines {
    ending: Option<Instant>,
    handshake: Option<Instant>,
    linger: Option<Instant>,
    login: Option<Instant>,
}

/// Serves the client to the end of the session.
pub(crate) fn relay(parts: Parts<'_>, _: &Sandboxed) -> Report {
    let mut relay = Relay::new(parts);
    relay.begin();
    relay.run();
    relay.finish()
}

/// A descriptor in the poll set, and whose it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Source {
    BackendInput,
    BackendOutput,
    ClientInput,
    ClientOutput,
    Keeper,
    Signals,
}

impl Relay<'_> {
    fn run(&mut self) {
        loop {
            self.flush_to_client();
            self.flush_to_backend();
            match self.situation().next() {
                Step::EndBackendInput => self.end_backend_input(),
                Step::EndClientOutput => self.end_client_output(),
                Step::Leave => return,
                Step::Relay => {
                    if self.wait().is_err() {
                        return;
                    }
                }
            }
        }
    }

    fn situation(&self) -> Situation {
        Situation {
            client_input: self.client_input,
            client_output: self.client_output,
            backend_input: self.backend_input,
            backend_output: self.backend_output,
            is_backend_running: self.is_backend_running,
            is_closing: self.is_closing,
            is_queued_for_backend: !self.to_backend.is_empty() || self.is_client_input_held(),
            is_queued_for_client: !self.to_client.is_empty(),
        }
    }

    /// Commands that a client sent before its end of file may still wait for the answers to earlier ones.
    fn is_client_input_held(&self) -> bool {
        match &self.phase {
            Phase::Cleartext(preauth) | Phase::Secured(preauth) => {
                !self.is_closing
                    && self.client_input == Direction::Ended
                    && !preauth.client_finished()
            }
            Phase::Handshake | Phase::Opaque => false,
        }
    }

    /// Waits for the next event and handles it. An error means that waiting itself is impossible.
    fn wait(&mut self) -> io::Result<()> {
        let sources = match self.poll() {
            Ok(sources) => sources,
            Err(nix::errno::Errno::EINTR) => return Ok(()),
            Err(error) => {
                self.parts.log.error(format!(
                    "cannot wait for the client and the backend: {}",
                    error.desc()
                ));
                return Err(error.into());
            }
        };
        if sources.is_empty() {
            self.check_deadlines();
        }
        for source in sources {
            match source {
                Source::Keeper => self.keeper_is_gone(),
                Source::Signals => self.read_signals(),
                Source::ClientInput => self.read_client(),
                Source::BackendInput => self.read_backend(),
                // Written at the start of the next round.
                Source::ClientOutput | Source::BackendOutput => {}
            }
        }
        self.check_deadlines();
        Ok(())
    }

    /// The descriptors that have something for us; none when a deadline came first.
    fn poll(&mut self) -> nix::Result<Vec<Source>> {
        let deadline = self.deadlines.next();
        let until = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let holds_memory = !self.scratch.is_empty();
        let timeout = if holds_memory {
            Some(until.unwrap_or(IDLE).min(IDLE))
        } else {
            until
        };
        let sources = self.poll_for(timeout)?;
        if sources.is_empty() && holds_memory {
            self.give_back_memory();
        }
        Ok(sources)
    }

    fn poll_for(&self, timeout: Option<Duration>) -> nix::Result<Vec<Source>> {
        let keeper = if self.is_tls {
            None
        } else {
            Some(self.parts.keeper)
        };
        let with_keeper = |keeper: Option<BorrowedFd<'_>>| {
            let wanted = self.wanted(keeper);
            let mut fds: Vec<_> = wanted
                .iter()
                .map(|(_, fd, events)| PollFd::new(*fd, *events))
                .collect();
            nix::poll::ppoll(&mut fds, timeout.map(Into::into), None)?;
            let is_ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
            Ok(wanted
                .iter()
                .zip(&fds)
                .filter(|(_, fd)| is_ready(fd))
                .map(|((source, ..), _)| *source)
                .collect())
        };
        match keeper.and_then(|keeper| keeper.with_descriptor(|fd| with_keeper(Some(fd)))) {
            Some(sources) => sources,
            None => with_keeper(None),
        }
    }

    /// What is worth waiting for. A descriptor without interest is left out: poll would report its end again and again.
    fn wanted<'b>(
        &'b self,
        keeper: Option<BorrowedFd<'b>>,
    ) -> Vec<(Source, BorrowedFd<'b>, PollFlags)> {
        let mut wanted = vec![(
            Source::Signals,
            self.parts.children.descriptor(),
            PollFlags::POLLIN,
        )];
        // Only its end is of interest. First, so that a STARTTLS in the same round is answered knowing it.
        wanted.extend(keeper.map(|fd| (Source::Keeper, fd, PollFlags::empty())));
        let backend = self.backend.as_ref().map(|backend| &backend.channel);
        let mut want = |source, fd: Option<BorrowedFd<'b>>, event, is_wanted: bool| {
            wanted.extend(fd.filter(|_| is_wanted).map(|fd| (source, fd, event)));
        };
        let client = &*self.parts.client;
        want(
            Source::ClientInput,
            client.input(),
            PollFlags::POLLIN,
            self.wants_client(),
        );
        want(
            Source::ClientOutput,
            client.output(),
            PollFlags::POLLOUT,
            !self.to_client.is_empty(),
        );
        want(
            Source::BackendInput,
            backend.and_then(Channel::input),
            PollFlags::POLLIN,
            self.wants_backend(),
        );
        want(
            Source::BackendOutput,
            backend.and_then(Channel::output),
            PollFlags::POLLOUT,
            !self.to_backend.is_empty(),
        );
        wanted
    }

    /// Backpressure: a side is read only while there is room for what it causes, on both sides.
    fn wants_client(&self) -> bool {
        let is_taken = match &self.phase {
            Phase::Cleartext(preauth) | Phase::Secured(preauth) => preauth.wants_client_input(),
            Phase::Handshake | Phase::Opaque => true,
        };
        let has_room = self.to_client.has_room() && self.to_backend.has_room();
        self.client_input == Direction::Open && (self.is_closing || (is_taken && has_room))
    }

    fn wants_backend(&self) -> bool {
        let is_discarded = self.client_output == Direction::Ended;
        self.backend_output == Direction::Open
            && (is_discarded || (self.to_client.has_room() && !self.is_closing))
    }

    fn flush_to_client(&mut self) {
        while self.client_output == Direction::Open && !self.to_client.is_empty() {
            match self.parts.client.send(self.to_client.front()) {
                Ok(0) => return,
                Ok(count) => {
                    self.to_client.consume(count);
                    self.deadlines.postpone_ending(self.is_closing);
                }
                Err(error) => {
                    // What it sent before it left may still be unread, and is the backend's.
                    self.report
                        .ended(format!("client gone: {}", reason(&error)));
                    self.to_client.clear();
                    self.client_output_ended();
                }
            }
        }
    }

    fn flush_to_backend(&mut self) {
        while !self.to_backend.is_empty() {
            let sent = match &self.backend {
                Some(backend) if self.backend_input == Direction::Open => {
                    backend.channel.send(self.to_backend.front())
                }
                _ => Err(nix::errno::Errno::EPIPE.into()),
            };
            match sent {
                Ok(0) => return,
                Ok(count) => {
                    self.to_backend.consume(count);
                    self.deadlines.postpone_ending(self.is_closing);
                }
                // It reads no more. What it still writes is the client's; its end of file tells the rest.
                Err(_) => {
                    self.to_backend.clear();
                    self.end_backend_input();
                }
            }
        }
    }

    fn read_client(&mut self) {
        let mut scratch = self.take_scratch();
        match self.parts.client.receive(&mut scratch) {
            Ok(Received::Later) => {}
            Ok(Received::Bytes(count)) => {
                self.deadlines.postpone_linger(self.backend_input);
                self.client_sent(scratch.get(..count).unwrap_or_default());
            }
            Ok(Received::End) => self.client_ended(),
            Err(error) => {
                self.report
                    .ended(format!("client gone: {}", reason(&error)));
                self.to_client.clear();
                self.client_output = Direction::Ended;
                self.client_ended();
            }
        }
        self.scratch = scratch;
    }

    fn read_backend(&mut self) {
        let mut scratch = self.take_scratch();
        let Some(backend) = &self.backend else { return };
        match backend.channel.receive(&mut scratch) {
            // Its process is gone, and what it wrote was read; a grandchild that holds the socket is no backend.
            Ok(Received::Later) if self.report.backend_end.is_some() => self.backend_ended(),
            Ok(Received::Later) => {}
            Ok(Received::Bytes(count)) => {
                self.backend_sent(scratch.get(..count).unwrap_or_default())
            }
            Ok(Received::End) | Err(_) => self.backend_ended(),
        }
        self.scratch = scratch;
    }

    fn take_scratch(&mut self) -> Vec<u8> {
        if self.scratch.is_empty() {
            // Not `resize`: zeroed memory from the system costs nothing until it is touched.
            self.scratch = vec![0; READ_SIZE];
        }
        std::mem::take(&mut self.scratch)
    }

    fn give_back_memory(&mut self) {
        self.scratch = Vec::new();
        self.to_client.give_back();
        self.to_backend.give_back();
    }

    fn read_signals(&mut self) {
        let news = self.parts.children.news();
        self.ended.extend(news.ended);
        self.note_backend_end();
        if news.is_terminated {
            self.close("terminated", Some("the server is going down"));
        }
    }

    /// The backend may have ended as a launcher, before it was told to start.
    fn note_backend_end(&mut self) {
        let process = self.backend.as_ref().and_then(|backend| backend.process);
        let end = self.ended.iter().find(|(ended, _)| Some(*ended) == process);
        if let Some((_, end)) = end {
            self.is_backend_running = false;
            self.report.backend_end = Some(*end);
            self.deadlines.begin_ending(self.is_closing);
        }
    }

    fn end_backend_input(&mut self) {
        if let Some(backend) = &mut self.backend {
            backend.channel.end_output();
        }
        self.backend_input = Direction::Ended;
        self.deadlines.begin_ending(self.is_closing);
    }

    fn end_client_output(&mut self) {
        if self.is_tls && !self.is_close_notify_sent {
            self.is_close_notify_sent = true;
            // Before the handshake is over, and after an alert, there is no close_notify to send.
            let _ = self.parts.tls.close(self.to_client.tail());
            // This step comes again when it was written.
            return;
        }
        self.parts.client.end_output();
        self.client_output_ended();
    }

    fn client_output_ended(&mut self) {
        self.client_output = Direction::Ended;
        self.deadlines.begin_ending(self.is_closing);
        self.deadlines.linger = Some(Instant::now() + LINGER_LIMIT);
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        let is_over = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        if is_over(self.deadlines.handshake) {
            self.deadlines.handshake = None;
            self.close("handshake timeout", None);
        }
        if is_over(self.deadlines.login) {
            self.deadlines.login = None;
            self.close("login timeout", Some("too long without login"));
        }
        if is_over(self.deadlines.linger) {
            self.deadlines.linger = None;
            self.client_input = Direction::Ended;
        }
        if is_over(self.deadlines.ending) {
            self.stop_waiting();
        }
        // Its output may be at its end without an event: a grandchild keeps the socket open and silent.
        if self.report.backend_end.is_some() && self.wants_backend() {
            self.read_backend();
        }
    }

    /// One side ended long ago and the other stands still: it is left behind.
    fn stop_waiting(&mut self) {
        self.deadlines.ending = None;
        if self.is_backend_running {
            self.parts
                .log
                .warning("the backend does not end with the connection: it is left behind");
        }
        self.is_backend_running = false;
        self.to_client.clear();
        self.to_backend.clear();
        self.client_input = Direction::Ended;
        self.client_output = Direction::Ended;
        self.backend_input = Direction::Ended;
        self.backend_output = Direction::Ended;
    }
}

impl Deadlines {
    fn next(&self) -> Option<Instant> {
        [self.ending, self.handshake, self.linger, self.login]
            .into_iter()
            .flatten()
            .min()
    }

    fn begin_ending(&mut self, is_closing: bool) {
        let limit = if is_closing {
            CLOSING_LIMIT
        } else {
            ENDING_LIMIT
        };
        self.ending.get_or_insert_with(|| Instant::now() + limit);
    }

    /// A client that still sends to a backend that still reads is no client that forgot to close.
    fn postpone_linger(&mut self, backend_input: Direction) {
        if backend_input == Direction::Open && self.linger.is_some() {
            self.linger = Some(Instant::now() + LINGER_LIMIT);
        }
    }

    /// Progress buys time, except where we decided to end.
    fn postpone_ending(&mut self, is_closing: bool) {
        if !is_closing && self.ending.is_some() {
            self.ending = Some(Instant::now() + ENDING_LIMIT);
        }
    }
}
