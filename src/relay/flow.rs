//! What the bytes mean: the phases of a session, and what each byte, end and action does to them.

use std::time::Instant;

use super::deadlines::Deadlines;
use super::ending::Direction;
use super::report::Report;
use super::{BackendSource, HANDSHAKE_TIMEOUT, LINGER_OCTETS, Relay};
use crate::backend::Backend;
use crate::buffer::Buffer;
use crate::error::EXIT_TEMPORARY;
use crate::imap::{Action, CloseReason, Entry, Policy, Preauth};
use crate::log::Escaped;
use crate::tls::{Facts, Progress, Start};

/// The parts of a session, each with only its own data.
pub(super) enum Phase {
    /// Before TLS: STARTTLS may come.
    Cleartext(Box<Preauth>),
    /// The client's bytes are for the TLS engine alone.
    Handshake,
    /// Inside TLS, before login.
    Secured(Box<Preauth>),
    /// Logged in: bytes pass as they are.
    Opaque,
}

impl<'a> Relay<'a> {
    /// On the heap, by a frame of its own: an idle connection keeps each page of its stack.
    #[inline(never)]
    pub(super) fn new(parts: super::Parts<'a>) -> Box<Self> {
        let report = Report::new(parts.policy, parts.proxy.clone());
        let handshake =
            (parts.policy == Policy::Implicit).then(|| report.start + parts.handshake_timeout);
        if let Some(deadline) = handshake {
            parts.keeper.expect_answers_until(deadline);
        }
        let deadlines = Deadlines {
            handshake,
            login: Some(report.start + parts.login_timeout),
            ..Deadlines::default()
        };
        let phase = match parts.policy {
            Policy::Implicit => Phase::Handshake,
            Policy::Optional | Policy::Required => {
                Phase::Cleartext(Box::new(Preauth::cleartext(parts.policy)))
            }
        };
        Box::new(Self {
            is_tls: matches!(phase, Phase::Handshake),
            parts,
            phase,
            backend: None,
            connecting: None,
            remote: None,
            ended: Vec::new(),
            backend_unread: Vec::new(),
            backend_unsent: super::Queue::default(),
            to_client: super::Queue::default(),
            to_backend: super::Queue::default(),
            scratch: Vec::new(),
            plaintext: Buffer::default(),
            client_input: Direction::Open,
            client_output: Direction::Open,
            backend_input: Direction::Absent,
            backend_output: Direction::Absent,
            is_backend_running: false,
            is_closing: false,
            is_tls_broken: false,
            is_terminated: false,
            discarded: 0,
            is_close_notify_sent: false,
            deadlines,
            report,
        })
    }

    /// What happens before the first byte: under `optional` the backend starts, and under `required` we greet.
    pub(super) fn begin(&mut self) {
        if self.parts.policy == Policy::Optional {
            let told = self.parts.told_addresses();
            match &mut self.parts.backend {
                BackendSource::Connectors {
                    cleartext, remote, ..
                } => {
                    let remote = remote.clone();
                    if let Some(connector) = cleartext.take() {
                        self.reach(connector, remote);
                    }
                }
                BackendSource::Launchers { cleartext, .. } => {
                    let backend = cleartext
                        .take()
                        .map(|launcher| launcher.go(None, told.as_ref()));
                    self.connect(backend);
                }
                BackendSource::Descriptor(backend) => {
                    let backend = backend.take();
                    self.connect(Some(backend));
                }
            }
        }
        self.with_preauth(|preauth, actions| preauth.start(actions));
    }

    pub(super) fn connect(&mut self, backend: Option<Backend>) {
        self.is_backend_running = backend
            .as_ref()
            .is_some_and(|backend| backend.process.is_some());
        let direction = if backend.is_some() {
            Direction::Open
        } else {
            Direction::Absent
        };
        self.backend_input = direction;
        self.backend_output = direction;
        self.backend = backend;
        self.note_backend_end();
    }

    /// Asks the protocol core, where there is one, and does what it says.
    pub(super) fn with_preauth(&mut self, ask: impl FnOnce(&mut Preauth, &mut Vec<Action>)) {
        let mut actions = Vec::new();
        match &mut self.phase {
            Phase::Cleartext(preauth) | Phase::Secured(preauth) => {
                let before = preauth.refused_logins();
                ask(preauth, &mut actions);
                self.report.failed_logins += u64::from(preauth.refused_logins() - before);
            }
            Phase::Handshake | Phase::Opaque => return,
        }
        for action in actions {
            self.perform(action);
        }
    }

    fn perform(&mut self, action: Action) {
        if self.is_closing {
            return;
        }
        match action {
            Action::SendToClient(bytes) => self.send_to_client(&bytes),
            Action::SendToBackend(bytes) => self.send_to_backend(&bytes),
            Action::StartTls => self.start_tls(),
            Action::Opaque(reason) => {
                self.parts.log.debug(format!("beyond STARTTLS: {reason:?}"));
                self.phase = Phase::Opaque;
                self.report.login = Some(reason);
                self.deadlines.login = None;
                if !self.is_tls {
                    drop(self.end_handshakes());
                }
            }
            Action::Close(reason) => self.close_for(reason),
        }
    }

    /// No handshake is to come any more: the keeper is let go. Returns where the backend inside TLS comes from; after a login in clear
    /// there is none, and whoever would have started it is let go as well.
    fn end_handshakes(&mut self) -> BackendSource {
        self.parts.keeper.release();
        std::mem::replace(
            &mut self.parts.backend,
            BackendSource::Descriptor(Backend::gone()),
        )
    }

    fn close_for(&mut self, reason: CloseReason) {
        match reason {
            CloseReason::BackendGarbage => self.note_garbage(),
            CloseReason::BackendPreauth => self.parts.log.error("the backend greets PREAUTH, which no client expects after STARTTLS: --tls implicit serves it"),
            CloseReason::BackendSilent => self.note_silence(),
            _ => {}
        }
        self.close(&reason.to_string(), None);
    }

    /// `count` octets were read: to where the TLS engine wants them, or to the scratch buffer.
    pub(super) fn client_sent(&mut self, count: usize) {
        if self.discards_client() {
            self.discarded += count;
            if self.discarded > LINGER_OCTETS {
                self.client_input = Direction::Ended;
            }
        } else if self.is_tls {
            self.client_sent_records(count);
        } else {
            let scratch = std::mem::take(&mut self.scratch);
            self.client_said(scratch.get(..count).unwrap_or_default());
            self.scratch = scratch;
        }
    }

    fn client_sent_records(&mut self, count: usize) {
        // Once logged in there is nothing to look at, so it is decrypted to where it is going.
        let is_opaque = matches!(self.phase, Phase::Opaque);
        let mut plaintext = std::mem::take(&mut self.plaintext);
        let queued = self.to_backend.tail().len();
        let progress = self.parts.tls.receive(
            count,
            if is_opaque {
                self.to_backend.tail()
            } else {
                &mut plaintext
            },
            self.to_client.tail(),
        );
        if is_opaque {
            self.report.bytes_in += (self.to_backend.tail().len() - queued) as u64;
        }
        let is_secure = matches!(self.phase, Phase::Handshake)
            && matches!(progress, Ok(Progress::Open | Progress::PeerClosed));
        let progress = match progress {
            Ok(_) if is_secure => self.parts.tls.examine_client().and(progress),
            progress => progress,
        };
        match progress {
            Ok(progress) => {
                if is_secure {
                    self.secure();
                }
                if !plaintext.is_empty() {
                    self.client_said(plaintext.filled());
                }
                if progress == Progress::PeerClosed {
                    self.client_ended();
                }
            }
            Err(error) => self.tls_failed(&error),
        }
        plaintext.clear();
        self.plaintext = plaintext;
    }

    fn client_said(&mut self, bytes: &[u8]) {
        match &self.phase {
            Phase::Opaque => self.send_to_backend(bytes),
            Phase::Cleartext(_) | Phase::Secured(_) => {
                self.with_preauth(|preauth, actions| preauth.client_input(bytes, actions));
            }
            Phase::Handshake => {}
        }
    }

    pub(super) fn client_ended(&mut self) {
        if self.client_input == Direction::Ended {
            return;
        }
        self.client_input = Direction::Ended;
        self.deadlines.begin_ending(self.is_closing);
        if self.is_closing {
            return;
        }
        if matches!(self.phase, Phase::Handshake) {
            return self.close("client closed during the handshake", None);
        }
        self.with_preauth(Preauth::client_end);
        self.report.settle("client closed".to_owned());
        // A backend that is still being connected to gets what the client has sent before.
        if self.backend.is_none() && self.connecting.is_none() {
            self.close("client closed", None);
        }
    }

    pub(super) fn backend_sent(&mut self, bytes: &[u8]) {
        if self.is_closing {
            return;
        }
        match &self.phase {
            Phase::Opaque => self.send_to_client(bytes),
            // Also for a client that is gone: answers let go of the commands that are held until they come.
            Phase::Cleartext(_) | Phase::Secured(_) => {
                self.with_preauth(|preauth, actions| preauth.backend_input(bytes, actions));
            }
            Phase::Handshake => {}
        }
    }

    pub(super) fn backend_ended(&mut self) {
        self.backend_output = Direction::Ended;
        self.deadlines.begin_ending(self.is_closing);
        if !self.is_closing {
            self.with_preauth(Preauth::backend_end);
            self.report.ended("backend ended".to_owned());
        }
    }

    pub(super) fn keeper_is_gone(&mut self) {
        if self.parts.keeper.is_gone() {
            self.parts
                .log
                .error("the keeper has ended: no TLS can be started on this connection");
            self.parts.keeper.release();
            self.report.fault = Some(EXIT_TEMPORARY);
            if let Phase::Cleartext(preauth) = &mut self.phase {
                preauth.tls_unavailable();
            }
        }
    }

    /// The boundary: the cleartext phase is consumed, and with it its backend; what the client sent after its STARTTLS line is
    /// for the TLS engine, where anything but a ClientHello is an error (RFC 9051 section 6.2.1, CVE-2011-0411).
    fn start_tls(&mut self) {
        let Phase::Cleartext(mut preauth) = std::mem::replace(&mut self.phase, Phase::Handshake)
        else {
            return;
        };
        let late = preauth.take_backend_unread();
        let unread = preauth.into_unread();
        self.is_tls = true;
        let deadline = Instant::now() + self.parts.handshake_timeout;
        self.deadlines.handshake = Some(deadline);
        self.parts.keeper.expect_answers_until(deadline);
        let unsent = std::mem::take(&mut self.to_backend);
        match (&mut self.parts.backend, self.backend.take()) {
            (BackendSource::Descriptor(kept), Some(backend)) => {
                *kept = backend;
                self.backend_unread = late;
                self.backend_unsent = unsent;
            }
            // Its socket is closed: it sees end of file, and is reaped when it ends. What it still said goes with it: inside TLS
            // it would be taken for the greeting of the backend there, whose own would then reach the client.
            (BackendSource::Connectors { .. } | BackendSource::Launchers { .. }, cleartext) => {
                drop(cleartext);
            }
            (BackendSource::Descriptor(_), None) => {}
        }
        self.connect(None);
        self.forget_cleartext();
        if !unread.is_empty() {
            self.parts.tls.room(unread.len()).copy_from_slice(&unread);
            self.client_sent_records(unread.len());
        }
        // Its end came while the command waited for the answers to those before it.
        if self.client_input == Direction::Ended {
            self.close("client closed during the handshake", None);
        }
    }

    /// The backend of the cleartext phase may have ended already, with a reason that is none inside TLS.
    fn forget_cleartext(&mut self) {
        if self.client_input == Direction::Open {
            self.report.begin_anew();
            self.deadlines.ending = None;
        }
    }

    /// TLS stands: the keeper is let go, and the backend starts.
    fn secure(&mut self) {
        self.deadlines.handshake = None;
        let source = self.end_handshakes();
        // A client that waits for this before it sends its next command (Nagle's algorithm) waits 40 ms without.
        self.parts.client.acknowledge_now();
        self.note_passed_over();
        let facts = self.parts.tls.facts();
        self.parts.tls.end_handshake();
        self.parts.log.debug(format!("secure: {facts}"));
        let is_kept =
            matches!(source, BackendSource::Descriptor(_)) && self.parts.policy == Policy::Optional;
        let is_known = self.start_secured(source, &facts) && facts.client().is_some();
        self.report.facts = Some(facts);
        let entry = match self.parts.policy {
            Policy::Implicit => Entry::Implicit,
            Policy::Optional | Policy::Required if is_kept => Entry::StartTlsKept,
            Policy::Optional | Policy::Required => Entry::StartTls,
        };
        let preauth = Preauth::secured(entry);
        self.phase = Phase::Secured(Box::new(if is_known {
            preauth.keeping_external_auth()
        } else {
            preauth
        }));
        let late = std::mem::take(&mut self.backend_unread);
        self.with_preauth(|preauth, actions| {
            preauth.start(actions);
            preauth.backend_input(&late, actions);
        });
    }

    /// Starts the backend of the TLS phase, or has it connected to; whether it is told what is known about TLS.
    fn start_secured(&mut self, source: BackendSource, facts: &Facts) -> bool {
        match source {
            BackendSource::Connectors {
                secured, remote, ..
            } => {
                let is_told = remote.tells_facts();
                self.reach(secured, remote);
                is_told
            }
            BackendSource::Descriptor(backend) => {
                self.to_backend = std::mem::take(&mut self.backend_unsent);
                self.connect(Some(backend));
                false
            }
            BackendSource::Launchers { secured, .. } => {
                let told = self.parts.told_addresses();
                self.connect(Some(secured.go(Some(facts), told.as_ref())));
                true
            }
        }
    }

    /// A file that cannot be read may have been meant for the name, and its client be shown another certificate now.
    fn note_passed_over(&self) {
        let tls = &self.parts.tls;
        if let Some(why) = tls.passed_over() {
            let name = tls.server_name().unwrap_or("none");
            let line = format!("passed over for a name below its own: {why} (sni={name})");
            self.parts.log.warning(line);
        }
    }

    fn tls_failed(&mut self, error: &rustls::Error) {
        self.note_passed_over();
        let tls = &self.parts.tls;
        let (what, keepers) = if matches!(self.phase, Phase::Handshake) {
            ("handshake failed", self.parts.keeper.fault())
        } else {
            ("TLS failed", None)
        };
        let name = tls.server_name().unwrap_or("none");
        if keepers.is_some() {
            self.report.fault = Some(EXIT_TEMPORARY);
        } else if self.deadlines.is_handshake_over(Instant::now()) {
            // Whatever is wrong is so for want of time.
            return self.close(HANDSHAKE_TIMEOUT, None);
        }
        match keepers.as_deref().or(tls.fault()) {
            Some(fault) => self
                .parts
                .log
                .error(format!("{what}: {fault} (sni={name})")),
            None => {
                let start = match self.parts.policy {
                    Policy::Implicit => Start::Implicit,
                    Policy::Optional | Policy::Required => Start::StartTls,
                };
                let why = tls.explain(error, start);
                let line = format!("{what}: {why} (sni={name})");
                self.parts.log.info(Escaped(line.as_bytes()));
            }
        }
        if !matches!(self.phase, Phase::Opaque) {
            return self.close(what, None);
        }
        // What was decrypted before is the client's own, whole, and may be the backend's work half done.
        self.report.settle(what.to_owned());
        self.is_tls_broken = true;
        self.deadlines.begin_ending(self.is_closing);
    }

    fn send_to_client(&mut self, bytes: &[u8]) {
        if self.client_output == Direction::Ended || self.is_tls_broken {
            return;
        }
        self.report.bytes_out += bytes.len() as u64;
        if !self.is_tls {
            self.to_client.push(bytes);
        } else if let Err(error) = self.parts.tls.send(bytes, self.to_client.tail()) {
            self.tls_failed(&error);
        }
    }

    fn send_to_backend(&mut self, bytes: &[u8]) {
        self.report.bytes_in += bytes.len() as u64;
        self.to_backend.push(bytes);
    }

    /// The server is going down: a client that has not logged in is told. After login the words are the backend's; at the end of
    /// its input it says them, or what it was about to say.
    pub(super) fn terminate(&mut self) {
        if self.is_closing || !matches!(self.phase, Phase::Opaque) {
            return self.close("terminated", Some("the server is going down"));
        }
        self.report.settle("terminated".to_owned());
        self.is_terminated = true;
        self.deadlines.end_finally();
    }

    /// We decide to end, with a goodbye where the protocol has a place for one.
    pub(super) fn close(&mut self, end: &str, goodbye: Option<&str>) {
        if self.is_closing {
            return;
        }
        let text = match &self.phase {
            Phase::Cleartext(preauth) | Phase::Secured(preauth) => {
                goodbye.and_then(|text| preauth.goodbye(text))
            }
            Phase::Handshake | Phase::Opaque => None,
        };
        if let Some(text) = text {
            self.send_to_client(&text);
        }
        self.report.settle(end.to_owned());
        self.is_closing = true;
        self.to_backend.clear();
        // The connector notices, and ends.
        self.connecting = None;
        self.deadlines.begin_closing();
    }
}
