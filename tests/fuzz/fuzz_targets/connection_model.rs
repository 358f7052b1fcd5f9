//! What must come out of a connection: who has which bytes when, and what an end means.

use crate::connection_peers::{Client, Peer};
use imap_tls::fuzzing::driven::{Setup, Source};
use imap_tls::imap::{Action, Entry, Policy, Preauth};

enum Phase {
    Clear(Box<Preauth>),
    Handshake,
    Secured(Box<Preauth>),
    Opaque,
}

/// The connection as it should be.
pub struct Model {
    policy: Policy,
    source: Source,
    phase: Phase,
    /// For the client, before TLS and in it.
    clear: Vec<u8>,
    inside: Vec<u8>,
    /// For the backends of the two phases; of one that is kept, all of it is in the first.
    to_backend: [Vec<u8>; 2],
    has_begun_tls: bool,
    /// Where the clear ends is known.
    is_split_known: bool,
    is_secure: bool,
    /// A ClientHello is due.
    needs_hello: bool,
    /// The last ClientHello that went for IMAP, or waits behind STARTTLS.
    hello: Vec<u8>,
    /// What the client said inside TLS before TLS stood.
    early: Vec<u8>,
    current: Option<usize>,
    connecting: Option<usize>,
    /// What a backend wrote that nobody listens to yet, and whether it has ended.
    pending: [Vec<u8>; 2],
    has_pending_end: [bool; 2],
    has_left: [bool; 2],
    has_exited: [bool; 2],
    /// What a backend that is kept wrote too late for the cleartext phase.
    late: Vec<u8>,
    has_client_ended: bool,
    has_backend_ended: bool,
    is_client_gone: bool,
    is_closed: bool,
    is_poisoned: bool,
    /// The last word may be a BYE of ours.
    may_say_bye: bool,
    /// Streams may have been cut off: what came must be right, but need not be all.
    pub is_cut: bool,
    /// The relay reads in the order in which things happened. Where it does not, only what holds for any order is looked at.
    pub is_in_order: bool,
    /// What was held was let go of at some time.
    pub became_opaque: bool,
    /// What the client has sent since the relay last ran.
    pub burst: usize,
}

/// The relay reads less than this at once, with the records around it.
const READ_SIZE: usize = 60 * 1024;

/// How our own last words begin.
const BYE: &[u8] = b"* BYE ";

impl Model {
    pub fn new(setup: &Setup) -> Self {
        let is_implicit = setup.policy == Policy::Implicit;
        let mut model = Self {
            policy: setup.policy,
            source: setup.source,
            phase: if is_implicit {
                Phase::Handshake
            } else {
                Phase::Clear(Box::new(Preauth::cleartext(setup.policy)))
            },
            clear: Vec::new(),
            inside: Vec::new(),
            to_backend: [Vec::new(), Vec::new()],
            has_begun_tls: is_implicit,
            is_split_known: true,
            is_secure: false,
            needs_hello: is_implicit,
            hello: Vec::new(),
            early: Vec::new(),
            current: None,
            connecting: None,
            pending: [Vec::new(), Vec::new()],
            has_pending_end: [false; 2],
            has_left: [false; 2],
            has_exited: [false; 2],
            late: Vec::new(),
            has_client_ended: false,
            has_backend_ended: false,
            is_client_gone: false,
            is_closed: false,
            is_poisoned: false,
            may_say_bye: false,
            is_cut: false,
            is_in_order: true,
            became_opaque: false,
            burst: 0,
        };
        if setup.policy == Policy::Optional {
            match setup.source {
                Source::Connectors => model.connecting = Some(0),
                Source::Descriptor | Source::Launchers => model.current = Some(0),
            }
        }
        model.ask(|preauth, actions| preauth.start(actions));
        model
    }

    pub fn is_clear(&self) -> bool {
        matches!(self.phase, Phase::Clear(_))
    }

    pub fn is_opaque(&self) -> bool {
        matches!(self.phase, Phase::Opaque)
    }

    pub fn needs_hello(&self) -> bool {
        self.needs_hello
    }

    pub fn speaks_tls(&self) -> bool {
        self.has_begun_tls && !self.needs_hello && !self.is_poisoned
    }

    pub fn is_poisoned(&self) -> bool {
        self.is_poisoned
    }

    pub fn has_begun_tls(&self) -> bool {
        self.has_begun_tls
    }

    pub fn awaits_tls(&self) -> bool {
        matches!(self.phase, Phase::Handshake) && !self.is_closed && self.is_in_order
    }

    pub fn has_begun_secured(&self) -> bool {
        self.is_secure || !self.is_in_order
    }

    /// How much of what the client gets is before TLS.
    pub fn clear_length(&self) -> Option<usize> {
        (self.has_begun_tls && self.is_split_known).then_some(self.clear.len())
    }

    /// Who is, will be or would be the backend.
    pub fn backend(&self) -> usize {
        let next = usize::from(self.source != Source::Descriptor);
        self.current.or(self.connecting).unwrap_or(next)
    }

    /// Whose process serves the connection, if there is one and it has not ended.
    pub fn process(&self) -> Option<usize> {
        let current = self.current.filter(|_| self.is_in_order)?;
        let is_running = self.source == Source::Launchers && !self.has_exited[current];
        is_running.then_some(current)
    }

    /// The process that ended was the last one.
    pub fn process_counts(&self) -> bool {
        self.is_in_order && self.current.is_some_and(|current| self.has_exited[current])
    }

    pub fn connecting(&self) -> Option<usize> {
        self.connecting
            .filter(|_| !self.is_closed && self.is_in_order)
    }

    fn ask(&mut self, ask: impl FnOnce(&mut Preauth, &mut Vec<Action>)) {
        let mut actions = Vec::new();
        match &mut self.phase {
            Phase::Clear(preauth) | Phase::Secured(preauth) => ask(preauth, &mut actions),
            Phase::Handshake | Phase::Opaque => return,
        }
        for action in actions {
            if self.is_closed {
                return;
            }
            match action {
                Action::SendToClient(bytes) => self.to_client(&bytes),
                Action::SendToBackend(bytes) => self.to_backend(&bytes),
                Action::StartTls => self.start_tls(),
                Action::Opaque(_) => {
                    self.phase = Phase::Opaque;
                    self.became_opaque = true;
                }
                Action::Close(_) => self.close(),
            }
        }
    }

    fn to_client(&mut self, bytes: &[u8]) {
        if self.has_begun_tls {
            self.inside.extend_from_slice(bytes);
        } else {
            self.clear.extend_from_slice(bytes);
        }
    }

    fn to_backend(&mut self, bytes: &[u8]) {
        if let Some(current) = self.current {
            self.to_backend[current].extend_from_slice(bytes);
        }
    }

    fn close(&mut self) {
        self.is_closed = true;
        self.connecting = None;
    }

    /// Nothing of the cleartext phase is left, and its backend is gone, unless it is kept.
    fn start_tls(&mut self) {
        let Phase::Clear(mut preauth) = std::mem::replace(&mut self.phase, Phase::Handshake) else {
            return;
        };
        if self.source == Source::Descriptor && self.current.is_some() {
            self.late = preauth.take_backend_unread();
        }
        self.current = None;
        self.has_begun_tls = true;
        self.is_split_known = self.is_in_order;
        let unread = preauth.into_unread();
        self.needs_hello = unread.is_empty();
        if !unread.is_empty() && unread != self.hello {
            self.poison();
        }
        if self.has_client_ended {
            self.close();
        }
    }

    /// TLS stands; whether for the client, too.
    pub fn secure(&mut self, is_client_done: bool) {
        self.is_secure = true;
        let is_descriptor = self.source == Source::Descriptor;
        match self.source {
            Source::Connectors => self.connecting = Some(1),
            Source::Descriptor => self.current = Some(0),
            Source::Launchers => self.current = Some(1),
        }
        // What the client said already may take several reads, and between them the backend is heard.
        let has_words = self.current.is_some_and(|current| !self.pending[current].is_empty());
        self.is_in_order &= self.early.is_empty() || is_client_done && !has_words;
        let entry = match self.policy {
            Policy::Implicit => Entry::Implicit,
            Policy::Optional if is_descriptor => Entry::StartTlsKept,
            Policy::Optional | Policy::Required => Entry::StartTls,
        };
        self.phase = Phase::Secured(Box::new(Preauth::secured(entry)));
        let late = std::mem::take(&mut self.late);
        self.ask(|preauth, actions| {
            preauth.start(actions);
            preauth.backend_input(&late, actions);
        });
        let early = std::mem::take(&mut self.early);
        self.client_says_inside(&early);
        self.listen_to_backend();
    }

    /// What the backend said before anybody listened.
    fn listen_to_backend(&mut self) {
        let Some(current) = self.current else { return };
        let pending = std::mem::take(&mut self.pending[current]);
        self.backend_says(current, &pending);
        if std::mem::take(&mut self.has_pending_end[current]) {
            self.backend_ends(current);
        }
    }

    /// Octets on the client's socket that are not of a TLS session, unless they begin one.
    pub fn client_sends(&mut self, bytes: &[u8], is_hello: bool) {
        if bytes.is_empty() || self.has_client_ended || self.is_closed {
            return;
        }
        match &self.phase {
            Phase::Clear(preauth) => {
                // The relay will read it in its own time, or a part of it.
                self.burst += bytes.len();
                self.is_in_order &= preauth.wants_client_input() && self.burst < READ_SIZE;
                if is_hello {
                    self.hello = bytes.to_vec();
                }
                self.ask(|preauth, actions| preauth.client_input(bytes, actions));
            }
            Phase::Handshake if self.needs_hello && is_hello => self.needs_hello = false,
            Phase::Opaque if !self.has_begun_tls => self.to_backend(bytes),
            Phase::Handshake | Phase::Secured(_) | Phase::Opaque => self.poison(),
        }
    }

    pub fn client_says_inside(&mut self, bytes: &[u8]) {
        if bytes.is_empty() || self.has_client_ended || self.is_closed || self.is_poisoned {
            return;
        }
        match &self.phase {
            Phase::Clear(_) => unreachable!("nobody speaks TLS yet"),
            Phase::Handshake => self.early.extend_from_slice(bytes),
            Phase::Secured(preauth) => {
                self.burst += bytes.len();
                self.is_in_order &= preauth.wants_client_input() && self.burst < READ_SIZE;
                self.ask(|preauth, actions| preauth.client_input(bytes, actions));
            }
            Phase::Opaque => self.to_backend(bytes),
        }
    }

    /// What the client sends from now on is no TLS session of anybody's: nothing of it may come out.
    pub fn poison(&mut self) {
        self.is_poisoned = true;
        self.is_cut = true;
    }

    pub fn client_ends(&mut self) {
        if std::mem::replace(&mut self.has_client_ended, true) || self.is_closed {
            return;
        }
        match &self.phase {
            Phase::Handshake => self.close(),
            Phase::Clear(_) | Phase::Secured(_) | Phase::Opaque => {
                self.ask(Preauth::client_end);
                if self.current.is_none() && self.connecting.is_none() {
                    self.close();
                }
            }
        }
    }

    pub fn client_leaves(&mut self) {
        self.is_client_gone = true;
        // What the backend says reaches nobody, the protocol core included.
        self.is_in_order &= self.is_opaque();
        self.client_ends();
    }

    pub fn backend_says(&mut self, index: usize, bytes: &[u8]) {
        if self.current != Some(index) {
            self.pending[index].extend_from_slice(bytes);
        } else if !self.is_closed && !bytes.is_empty() {
            match &self.phase {
                Phase::Opaque => self.to_client(bytes),
                Phase::Clear(_) | Phase::Secured(_) => {
                    self.ask(|preauth, actions| preauth.backend_input(bytes, actions));
                }
                Phase::Handshake => {}
            }
        }
    }

    pub fn backend_ends(&mut self, index: usize) {
        if self.current != Some(index) {
            self.has_pending_end[index] = true;
        } else if !std::mem::replace(&mut self.has_backend_ended, true) && !self.is_closed {
            self.ask(Preauth::backend_end);
        }
    }

    /// It ends with its words unwritten, maybe in the middle of a line, or before one was too long.
    pub fn backend_breaks_off(&mut self) {
        self.is_cut = true;
        self.is_in_order &= self.is_opaque();
    }

    pub fn backend_leaves(&mut self, index: usize) {
        self.has_left[index] = true;
    }

    pub fn backend_exits(&mut self, index: usize) {
        self.has_exited[index] = true;
        self.backend_ends(index);
    }

    pub fn keeper_ends(&mut self) {
        if let Phase::Clear(preauth) = &mut self.phase {
            preauth.tls_unavailable();
        }
    }

    pub fn terminate(&mut self) {
        if self.is_closed {
            return;
        }
        let goodbye = match &self.phase {
            Phase::Clear(preauth) | Phase::Secured(preauth) => {
                preauth.goodbye("the server is going down")
            }
            Phase::Handshake => None,
            Phase::Opaque => {
                // What it has sent and nobody has read is lost.
                self.is_cut = true;
                self.has_client_ended = true;
                return;
            }
        };
        self.to_client(&goodbye.unwrap_or_default());
        self.close();
    }

    /// A deadline closed the connection.
    pub fn time_is_up(&mut self) {
        self.may_say_bye = true;
        self.close();
    }

    pub fn connector_answers(&mut self, is_connected: bool) {
        let Some(index) = self.connecting.take() else {
            return;
        };
        if is_connected {
            self.current = Some(index);
            self.listen_to_backend();
        } else {
            self.ask(Preauth::backend_end);
        }
    }

    /// Everybody has ended, so there is nothing to wait for.
    pub fn must_be_over(&self) -> bool {
        let is_backend_done = match self.current {
            Some(current) => {
                self.has_backend_ended
                    && self.has_left[current]
                    && (self.source != Source::Launchers || self.has_exited[current])
            }
            None => self.connecting.is_none(),
        };
        self.is_in_order && self.has_client_ended && is_backend_done
    }

    pub fn compare_client(&self, client: &Client, is_over: bool) {
        if !self.is_in_order || self.is_client_gone {
            return;
        }
        let raw = &client.peer.inbox;
        let (clear, inside) = if self.has_begun_tls {
            let split = raw.len().min(self.clear.len());
            (&raw[..split], client.plaintext.as_slice())
        } else {
            (raw.as_slice(), &[][..])
        };
        self.compare_stream("before TLS", clear, &self.clear);
        self.compare_stream("inside TLS", inside, &self.inside);
        let is_attentive = !client.peer.is_lazy && !client.is_stepping && !client.is_poisoned;
        if !is_attentive || self.is_cut || self.is_poisoned {
            return;
        }
        assert!(clear.len() >= self.clear.len(), "held back before TLS");
        assert!(inside.len() >= self.inside.len(), "held back inside TLS");
        let must_end = self.is_closed || self.has_backend_ended;
        assert_eq!(
            client.peer.has_ended,
            must_end || is_over,
            "the client's end"
        );
        if client.peer.has_ended && self.is_secure {
            assert!(client.has_close_notify, "no close_notify");
        }
    }

    fn compare_stream(&self, name: &str, came: &[u8], expected: &[u8]) {
        // Where words were cut off, ours may follow any part of them. A comparison of slices is a call that sanitizers look into,
        // and with one for each octet an input took seconds.
        if self.is_cut && self.may_say_bye {
            let is_goodbye = |words: &[u8]| words.first() == BYE.first() && words == BYE;
            let goodbye = came.windows(BYE.len()).rposition(is_goodbye);
            let part = goodbye.and_then(|at| came.get(..at));
            if part.is_some_and(|part| expected.starts_with(part)) {
                return;
            }
        }
        match came.strip_prefix(expected) {
            Some([]) => {}
            Some(more) => assert!(
                // Of which a slow reader may have had a part.
                self.may_say_bye && (more.starts_with(BYE) || BYE.starts_with(more)),
                "too much for the client {name}: {:?}",
                String::from_utf8_lossy(more)
            ),
            None => assert!(
                expected.starts_with(came),
                "{name}: {:?} and not {:?}",
                String::from_utf8_lossy(came),
                String::from_utf8_lossy(expected)
            ),
        }
    }

    pub fn compare_backend(&self, index: usize, backend: &Peer) {
        // Whatever the order, no backend gets anything that was never for it.
        if index == 1 && !self.has_begun_secured() {
            assert!(backend.inbox.is_empty(), "a backend before its time");
        }
        if !self.is_in_order {
            return;
        }
        let expected = &self.to_backend[index];
        assert!(
            expected.starts_with(&backend.inbox),
            "backend {index}: {:?} and not {:?}",
            String::from_utf8_lossy(&backend.inbox),
            String::from_utf8_lossy(expected)
        );
        let is_served = self.current == Some(index) && !self.is_closed && !self.is_cut;
        if is_served && backend.is_there() && !backend.is_lazy {
            assert_eq!(
                backend.inbox.len(),
                expected.len(),
                "held back from the backend"
            );
            if self.is_opaque() {
                assert_eq!(
                    backend.has_ended, self.has_client_ended,
                    "the backend's end"
                );
            }
        }
    }
}
