//! A backend that is connected to (`--connect`): waiting for the connection, what is said there first, and how it can fail.

use std::io;

use super::Relay;
use super::ending::Direction;
use super::flow::Phase;
use super::is_reset;
use crate::backend::Backend;
use crate::channel::Channel;
use crate::connector::{Answer, CONNECT_LIMIT, Connector, Target};
use crate::error::{EXIT_TEMPORARY, reason};
use crate::imap::Preauth;
use crate::log::Escaped;
use crate::proxy_header::outgoing::{Version, header};

/// Where the backend is, and what it is told.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    pub(crate) header: Option<Version>,
    pub(crate) target: Target,
}

impl Remote {
    /// Whether it learns what is known about TLS, the client's certificate included.
    pub(super) fn tells_facts(&self) -> bool {
        self.header == Some(Version::V2)
    }
}

impl Relay<'_> {
    /// Has the connector connect. Meanwhile there is no backend, and the protocol core, which waits for a greeting, keeps what the
    /// client sends.
    pub(super) fn reach(&mut self, connector: Connector, remote: Remote) {
        self.remote = Some(remote);
        self.deadlines.begin_connecting();
        self.connecting = Some(connector.go());
    }

    pub(super) fn hear_connector(&mut self) {
        let Some(connecting) = self.connecting.take() else {
            return;
        };
        match connecting.answer() {
            Answer::Connected(channel, address) => self.reached(channel, &address),
            Answer::Failed {
                exit_status,
                reason,
            } => self.not_reached(exit_status, &reason),
            Answer::Later(connecting) => self.connecting = Some(connecting),
        }
    }

    /// The connector answers in time, unless a resolver holds it.
    pub(super) fn give_up_connecting(&mut self) {
        let seconds = CONNECT_LIMIT.as_secs();
        self.not_reached(EXIT_TEMPORARY, &format!("no connection within {seconds} s"));
    }

    fn reached(&mut self, channel: Channel, address: &str) {
        self.deadlines.connect = None;
        let address = Escaped(address.as_bytes());
        self.parts
            .log
            .debug(format!("connected to the backend at {address}"));
        self.connect(Some(Backend {
            channel,
            process: None,
        }));
        let Some(version) = self.remote.as_ref().and_then(|remote| remote.header) else {
            return;
        };
        // Only now: what is said is true at this moment. Before TLS nothing is known, and nothing said.
        let facts = self.report.facts.as_ref();
        let tls = facts.map(|facts| (facts, self.parts.tls.alpn()));
        match header(version, self.parts.addresses, tls) {
            // Not counted: it is no IMAP.
            Ok(header) => self.to_backend.push(&header),
            Err(error) => self.not_reached(EXIT_TEMPORARY, &reason(&error)),
        }
    }

    /// The client is told in its protocol (RFC 5530 section 3), as when a backend ends before it has greeted.
    fn not_reached(&mut self, exit_status: u8, reason: &str) {
        self.connecting = None;
        self.deadlines.connect = None;
        self.fail(exit_status, "cannot be connected to", reason);
        self.backend = None;
        self.report.ended("backend not reached".to_owned());
        self.with_preauth(Preauth::backend_end);
    }

    /// A connection that broke. A backend that we started has its exit status to tell, and its socket breaks when it has ended: what
    /// else the system has against that socket is told here.
    ///
    /// One that closes with something unread resets the connection, and a client can have it do so, by a command behind LOGOUT. That is
    /// no failure then. Before its greeting it has had nothing to read but the header.
    pub(super) fn note_break(&mut self, error: &io::Error) {
        let is_open = self.backend_output == Direction::Open && !self.is_closing;
        if !is_open || self.backend.is_none() {
            return;
        }
        if self.remote.is_none() {
            if !is_reset(error) {
                let reason = reason(error);
                self.parts
                    .log
                    .error(format!("the backend's socket is of no use: {reason}"));
                self.report.ended(format!("backend gone: {reason}"));
            }
            return;
        }
        let is_greeted = match &self.phase {
            Phase::Cleartext(preauth) | Phase::Secured(preauth) => !preauth.awaits_greeting(),
            Phase::Handshake | Phase::Opaque => true,
        };
        let reason = reason(error);
        if is_reset(error) && (is_greeted || self.has_client_left()) {
            self.parts.log.info(self.fault("is gone", &reason));
        } else {
            self.fail(EXIT_TEMPORARY, "is gone", &reason);
        }
        self.report.ended(format!("backend gone: {reason}"));
    }

    /// A backend need not greet whom it has seen leave.
    fn has_client_left(&self) -> bool {
        self.client_input == Direction::Ended
    }

    /// A connection that ended before there was a greeting.
    pub(super) fn note_silence(&mut self) {
        if self.report.fault.is_none() && !self.has_client_left() {
            self.fail(
                EXIT_TEMPORARY,
                "is of no use",
                "it closed before its greeting",
            );
        }
    }

    /// What answers there is no IMAP server, or has something else to say.
    pub(super) fn note_garbage(&mut self) {
        let greeting = match &self.phase {
            Phase::Cleartext(preauth) | Phase::Secured(preauth) => preauth.odd_greeting(),
            Phase::Handshake | Phase::Opaque => &[],
        };
        let reason = format!(
            "it greets with '{}', which is not IMAP",
            String::from_utf8_lossy(greeting)
        );
        self.fail(EXIT_TEMPORARY, "is of no use", &reason);
    }

    fn fail(&mut self, exit_status: u8, what: &str, reason: &str) {
        self.report.fault = Some(exit_status);
        self.parts.log.error(self.fault(what, reason));
    }

    fn fault(&self, what: &str, reason: &str) -> String {
        let backend = match &self.remote {
            Some(remote) => format!("the backend '{}' (--connect)", remote.target),
            None => "the backend".to_owned(),
        };
        format!("{backend} {what}: {}", Escaped(reason.as_bytes()))
    }
}
