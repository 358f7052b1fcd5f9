//! The relay: one poll loop that carries a session through cleartext phase, handshake, TLS phase and ending.
//!
//! This file moves bytes between descriptors and queues and watches the clock; `flow` decides what the bytes mean, `ending`
//! what follows when a side closes.

mod buffer;
mod children;
mod connecting;
mod deadlines;
#[cfg(any(test, fuzzing))]
pub mod driven;
mod ending;
mod flow;
mod polling;
mod report;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::unistd::Pid;

pub(crate) use children::Children;
pub(crate) use report::Report;

use crate::activation::Addresses;
use crate::backend::{Backend, Launcher};
use crate::buffer::Buffer;
use crate::channel::{Channel, Received};
use crate::connector::{Connecting, Connector};
use crate::error::{EXIT_TEMPORARY, reason};
use crate::imap::Policy;
use crate::keeper::KeeperClient;
use crate::log::Log;
use crate::sandbox::Sandboxed;
use crate::sys::{self, ChildEnd};
use crate::tls::Tls;
use buffer::Queue;
pub(crate) use connecting::Remote;
use deadlines::Deadlines;
use ending::{Direction, Situation, Step};
use flow::Phase;
use polling::Source;

/// Who will speak IMAP, and when.
#[derive(Debug)]
pub(crate) enum BackendSource {
    /// `--connect`: two connectors for the same reasons as two launchers.
    Connectors {
        cleartext: Option<Connector>,
        secured: Connector,
        remote: Remote,
    },
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
    /// The client's: the socket's, or those in a PROXY header.
    pub(crate) addresses: Option<Addresses>,
    pub(crate) backend: BackendSource,
    pub(crate) children: &'a Children,
    pub(crate) client: &'a mut Channel,
    pub(crate) handshake_timeout: Duration,
    pub(crate) keeper: &'a KeeperClient,
    pub(crate) log: &'a Log,
    pub(crate) login_timeout: Duration,
    pub(crate) policy: Policy,
    /// The balancer as log lines name it, where its PROXY header has the addresses.
    pub(crate) proxy: Option<String>,
    pub(crate) tls: Tls,
}

impl Parts<'_> {
    /// The addresses that a launcher cannot know: it was forked before the header was read.
    fn told_addresses(&self) -> Option<Addresses> {
        self.proxy.as_ref().and(self.addresses)
    }
}

impl BackendSource {
    /// The descriptors that the network process keeps.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Connectors {
                cleartext, secured, ..
            } => cleartext
                .iter()
                .chain([secured])
                .flat_map(Connector::descriptors)
                .collect(),
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
/// How much it may still send meanwhile, to be thrown away; one that floods us may lose our last words to the reset.
const LINGER_OCTETS: usize = 1024 * 1024;
/// How a session ended, in the log.
const HANDSHAKE_TIMEOUT: &str = "handshake timeout";

/// Whether the peer has closed its end: no fault of ours or of the system's.
fn is_reset(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// One connection, from the first byte to the last.
struct Relay<'a> {
    parts: Parts<'a>,
    phase: Phase,
    /// Whether what passes between the client and us is TLS.
    is_tls: bool,
    backend: Option<Backend>,
    /// A backend that is being connected to; there is none until then.
    connecting: Option<Connecting>,
    /// Where the backend is, if it is one that is connected to.
    remote: Option<Remote>,
    /// Child processes that have been reaped.
    ended: Vec<(Pid, ChildEnd)>,
    /// What a backend that is kept across STARTTLS wrote too late for the cleartext phase.
    backend_unread: Vec<u8>,
    /// What such a backend has not taken yet of commands that it has answered already. It would take the first octets inside TLS for
    /// their rest.
    backend_unsent: Queue,
    to_client: Queue,
    to_backend: Queue,
    /// Where bytes are read into; empty while idle.
    scratch: Vec<u8>,
    /// What the client said inside TLS, before login.
    plaintext: Buffer,
    client_input: Direction,
    client_output: Direction,
    backend_input: Direction,
    backend_output: Direction,
    is_backend_running: bool,
    is_closing: bool,
    /// TLS failed after login: what the client sends and the backend says passes no more.
    is_tls_broken: bool,
    /// SIGTERM came after login.
    is_terminated: bool,
    /// Octets from the client that were thrown away since any of them.
    discarded: usize,
    is_close_notify_sent: bool,
    deadlines: Deadlines,
    report: Report,
}

/// Serves the client to the end of the session.
pub(crate) fn relay(parts: Parts<'_>, _: &Sandboxed) -> Report {
    let mut relay = Relay::new(parts);
    relay.begin();
    relay.run();
    relay.report
}

impl Relay<'_> {
    fn run(&mut self) {
        while self.advance() {
            if self.wait().is_err() {
                return;
            }
        }
    }

    /// Goes as far as that is possible without waiting; returns whether there is anything to wait for.
    fn advance(&mut self) -> bool {
        loop {
            self.flush_to_client();
            self.flush_to_backend();
            match self.situation().next() {
                Step::EndBackendInput => self.end_backend_input(),
                Step::EndClientOutput => self.end_client_output(),
                Step::Leave => return false,
                Step::Relay => return true,
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
            is_client_broken: self.is_tls_broken,
            is_terminated: self.is_terminated,
            is_queued_for_backend: !self.to_backend.is_empty() || self.is_client_input_held(),
            is_queued_for_client: !self.to_client.is_empty(),
        }
    }

    /// Whether what the client says concerns nobody. It is read all the same: with octets unread, the end would be a reset, which eats
    /// what the client has not read yet.
    fn discards_client(&self) -> bool {
        self.is_closing || self.is_terminated || self.is_tls_broken
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
                self.report.fault = Some(EXIT_TEMPORARY);
                self.close("cannot wait", Some("the server cannot go on"));
                self.flush_to_client();
                return Err(error.into());
            }
        };
        self.attend_to(&sources);
        Ok(())
    }

    fn attend_to(&mut self, sources: &[Source]) {
        if sources.is_empty() {
            self.check_deadlines();
        }
        for source in sources {
            match source {
                Source::Connector => self.hear_connector(),
                Source::Keeper => self.keeper_is_gone(),
                Source::Signals => self.read_signals(),
                Source::BackendEnd => self.deadlines.begin_ending(self.is_closing),
                Source::ClientEnd => {
                    self.report.client_is_ending();
                    self.deadlines.begin_ending(self.is_closing);
                }
                Source::ClientInput => self.read_client(),
                Source::BackendInput => self.read_backend(),
                // Written at the start of the next round.
                Source::ClientOutput | Source::BackendOutput => {}
            }
        }
        self.check_deadlines();
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
                    self.note_client_break(&error);
                    self.client_output_ended();
                }
            }
        }
        // Nobody hears it any more, so there is nothing to wait for: its socket would say at once that it can be written to.
        if self.client_output == Direction::Ended {
            self.to_client.clear();
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
                Err(error) => {
                    self.note_break(&error);
                    self.to_backend.clear();
                    self.end_backend_input();
                }
            }
        }
    }

    fn read_client(&mut self) {
        let received = if self.is_tls {
            self.parts.client.receive(self.parts.tls.room(READ_SIZE))
        } else {
            let mut scratch = self.take_scratch();
            let received = self.parts.client.receive(&mut scratch);
            self.scratch = scratch;
            received
        };
        match received {
            Ok(Received::Later) => {}
            Ok(Received::Bytes(count)) => {
                self.deadlines.postpone_linger(self.backend_input);
                self.client_sent(count);
            }
            Ok(Received::End) => {
                if self.is_tls && !matches!(self.phase, Phase::Handshake) {
                    // Whoever is on the way may have cut it (RFC 8446 section 6.1).
                    self.report
                        .settle("client closed without close_notify".to_owned());
                }
                self.client_ended();
            }
            Err(error) => {
                self.note_client_break(&error);
                self.to_client.clear();
                self.client_output = Direction::Ended;
                self.client_ended();
            }
        }
    }

    fn read_backend(&mut self) {
        let mut scratch = self.take_scratch();
        let Some(backend) = &self.backend else { return };
        match backend.channel.receive(&mut scratch) {
            // Its process is gone, and what it wrote was read; a grandchild that holds the socket is no backend.
            Ok(Received::Later)
                if self.report.backend_end.is_some() && backend.channel.is_silent() =>
            {
                self.backend_ended();
            }
            Ok(Received::Later) => {}
            Ok(Received::Bytes(count)) => {
                self.backend_sent(scratch.get(..count).unwrap_or_default())
            }
            Ok(Received::End) => self.backend_ended(),
            Err(error) => {
                self.note_break(&error);
                self.backend_ended();
            }
        }
        self.scratch = scratch;
    }

    /// A client may close as soon as it has had the last answer, which breaks the connection for our last words. Another reason
    /// than that is worth a line even when the session had ended.
    fn note_client_break(&mut self, error: &io::Error) {
        let reason = reason(error);
        if self.report.has_ended() && !is_reset(error) {
            self.parts
                .log
                .warning(format!("the end did not reach the client: {reason}"));
        }
        self.report.settle(format!("client gone: {reason}"));
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
        self.plaintext = Buffer::default();
        self.parts.tls.give_back_memory();
        self.to_client.give_back();
        self.to_backend.give_back();
        sys::give_back_free_memory();
    }

    fn read_signals(&mut self) {
        let news = self.parts.children.news();
        self.ended.extend(news.ended);
        self.note_backend_end();
        if news.is_terminated {
            self.terminate();
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
        self.deadlines.begin_linger();
    }

    fn check_deadlines(&mut self) {
        let now = Instant::now();
        let is_over = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        if self.deadlines.is_handshake_over(now) {
            self.deadlines.handshake = None;
            self.close(HANDSHAKE_TIMEOUT, None);
        }
        if is_over(self.deadlines.connect) {
            self.give_up_connecting();
        }
        if is_over(self.deadlines.login) {
            self.deadlines.login = None;
            self.close("login timeout", Some("too long without login"));
        }
        if is_over(self.deadlines.linger) {
            // Of a client that is not read, for the backend has no room, there may be more than an end to come.
            let is_unread = self.client_input == Direction::Open && !self.wants_client();
            self.deadlines.linger = self.deadlines.ending.filter(|_| is_unread);
            if !is_unread {
                self.client_ended();
            }
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
        self.report.gave_up(!self.to_client.is_empty());
        self.to_client.clear();
        self.to_backend.clear();
        self.client_input = Direction::Ended;
        self.client_output = Direction::Ended;
        self.backend_input = Direction::Ended;
        self.backend_output = Direction::Ended;
    }
}
