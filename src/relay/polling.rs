//! What the loop waits for: which descriptors are worth polling, and for how long.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags};

use super::Relay;
use super::ending::Direction;
use super::flow::Phase;
use crate::channel::Channel;
use crate::connector::Connecting;

/// The peer has ended its output, even if that is not all read (poll(2)). nix has no name for it.
const POLLRDHUP: PollFlags = PollFlags::from_bits_retain(libc::POLLRDHUP);

/// After this long without a byte, memory is given back.
const IDLE: Duration = Duration::from_millis(200);

/// A descriptor in the poll set, and whose it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Source {
    /// Its end, behind what cannot be read yet.
    BackendEnd,
    BackendInput,
    BackendOutput,
    /// The same.
    ClientEnd,
    ClientInput,
    ClientOutput,
    Connector,
    Keeper,
    Signals,
}

impl Relay<'_> {
    /// The descriptors that have something for us; none when a deadline came first.
    pub(super) fn poll(&mut self) -> nix::Result<Vec<Source>> {
        let deadline = self.deadlines.next();
        let until = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let holds_memory = !self.scratch.is_empty() || self.parts.tls.holds_memory();
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

    pub(super) fn poll_for(&self, timeout: Option<Duration>) -> nix::Result<Vec<Source>> {
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
            // Events that nix does not know are events.
            let is_ready = |fd: &PollFd<'_>| fd.revents().is_none_or(|events| !events.is_empty());
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
        let connector = self.connecting.as_ref().map(Connecting::descriptor);
        wanted.extend(connector.map(|fd| (Source::Connector, fd, PollFlags::POLLIN)));
        let backend = self.backend.as_ref().map(|backend| &backend.channel);
        let mut want = |source, fd: Option<BorrowedFd<'b>>, event, is_wanted: bool| {
            wanted.extend(fd.filter(|_| is_wanted).map(|fd| (source, fd, event)));
        };
        let client = &*self.parts.client;
        let (wants_client, wants_backend) = (self.wants_client(), self.wants_backend());
        want(
            Source::ClientInput,
            client.input(),
            PollFlags::POLLIN,
            wants_client,
        );
        want(
            Source::ClientEnd,
            client.input(),
            POLLRDHUP,
            self.wants_end(self.client_input, wants_client),
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
            wants_backend,
        );
        want(
            Source::BackendEnd,
            backend.and_then(Channel::input),
            POLLRDHUP,
            self.wants_end(self.backend_output, wants_backend),
        );
        want(
            Source::BackendOutput,
            backend.and_then(Channel::output),
            PollFlags::POLLOUT,
            !self.to_backend.is_empty(),
        );
        wanted
    }

    /// Backpressure: a side is read only while there is room for what it causes; before login that may be on both sides.
    pub(super) fn wants_client(&self) -> bool {
        let is_taken = match &self.phase {
            Phase::Cleartext(preauth) | Phase::Secured(preauth) => {
                preauth.wants_client_input() && self.to_client.has_room()
            }
            Phase::Handshake => self.to_client.has_room(),
            // It may have to say all of something before it reads. What TLS answers by itself is little: rustls keeps one key update,
            // and counts alerts.
            Phase::Opaque => true,
        };
        let is_welcome = is_taken && self.to_backend.has_room();
        self.client_input == Direction::Open && (self.discards_client() || is_welcome)
    }

    /// Whoever leaves behind it what the other side does not take is not waited for longer than one whose end was read.
    fn wants_end(&self, input: Direction, is_read: bool) -> bool {
        input == Direction::Open && !is_read && self.deadlines.ending.is_none()
    }

    pub(super) fn wants_backend(&self) -> bool {
        let is_discarded = self.client_output == Direction::Ended || self.is_tls_broken;
        self.backend_output == Direction::Open
            && (is_discarded || (self.to_client.has_room() && !self.is_closing))
    }
}
