//! Test support: a session played with its input cut in any way, and what came of it.

use super::{Action, CloseReason, Entry, OpaqueReason, Policy, Preauth};

/// What a peer does.
#[derive(Clone, Debug)]
pub(super) enum Input {
    Client(Vec<u8>),
    Backend(Vec<u8>),
    ClientEnd,
    BackendEnd,
    TlsUnavailable,
}

/// What came out, with neighbours of one direction made one.
#[derive(Clone, Eq, PartialEq)]
pub(super) enum Event {
    ToClient(Vec<u8>),
    ToBackend(Vec<u8>),
    StartTls,
    Opaque(OpaqueReason),
    Close(CloseReason),
}

impl std::fmt::Debug for Event {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::ToClient(bytes) => {
                write!(formatter, "ToClient {:?}", String::from_utf8_lossy(bytes))
            }
            Self::ToBackend(bytes) => {
                write!(formatter, "ToBackend {:?}", String::from_utf8_lossy(bytes))
            }
            Self::StartTls => formatter.write_str("StartTls"),
            Self::Opaque(reason) => write!(formatter, "Opaque {reason:?}"),
            Self::Close(reason) => write!(formatter, "Close {reason:?}"),
        }
    }
}

/// How input is cut.
#[derive(Clone, Copy, Debug)]
pub(super) enum Cut {
    Whole,
    Bytes,
    /// Once, after so many bytes.
    At(usize),
    /// In pieces of pseudo-random sizes.
    Random(u64),
}

impl Cut {
    pub(super) fn pieces(self, bytes: &[u8]) -> Vec<&[u8]> {
        match self {
            Self::Whole => vec![bytes],
            Self::Bytes => bytes.chunks(1).collect(),
            Self::At(position) => {
                let (head, tail) = bytes.split_at(position.min(bytes.len()));
                vec![head, tail]
            }
            Self::Random(seed) => {
                let mut numbers = Numbers(seed);
                let mut pieces = Vec::new();
                let mut rest = bytes;
                while !rest.is_empty() {
                    let (head, tail) = rest.split_at(numbers.below(rest.len().min(9) + 1));
                    pieces.push(head);
                    rest = tail;
                }
                pieces
            }
        }
    }
}

/// Which session is played.
#[derive(Clone, Copy, Debug)]
pub(super) enum Setting {
    Cleartext(Policy),
    Secured(Entry),
}

pub(super) struct Session {
    pub(super) preauth: Preauth,
    cut: Cut,
    events: Vec<Event>,
}

impl Session {
    pub(super) fn new(setting: Setting, cut: Cut) -> Self {
        let mut preauth = match setting {
            Setting::Cleartext(policy) => Preauth::cleartext(policy),
            Setting::Secured(entry) => Preauth::secured(entry),
        };
        let mut actions = Vec::new();
        preauth.start(&mut actions);
        let mut session = Self {
            preauth,
            cut,
            events: Vec::new(),
        };
        session.record(actions);
        session
    }

    pub(super) fn play(&mut self, input: &Input) {
        let mut actions = Vec::new();
        match input {
            Input::Client(bytes) => {
                for piece in self.cut.pieces(bytes) {
                    self.preauth.client_input(piece, &mut actions);
                }
            }
            Input::Backend(bytes) => {
                for piece in self.cut.pieces(bytes) {
                    self.preauth.backend_input(piece, &mut actions);
                }
            }
            Input::ClientEnd => self.preauth.client_end(&mut actions),
            Input::BackendEnd => self.preauth.backend_end(&mut actions),
            Input::TlsUnavailable => self.preauth.tls_unavailable(),
        }
        self.record(actions);
    }

    pub(super) fn client(&mut self, text: &str) -> &mut Self {
        self.play(&Input::Client(text.as_bytes().to_vec()));
        self
    }

    pub(super) fn backend(&mut self, text: &str) -> &mut Self {
        self.play(&Input::Backend(text.as_bytes().to_vec()));
        self
    }

    /// What happened since the last call.
    pub(super) fn events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    /// Where `Opaque` stands among what is relayed as it is anyway does depend on the cuts: it is put behind it.
    fn record(&mut self, actions: Vec<Action>) {
        let mut opaque = None;
        for action in actions {
            match action {
                Action::SendToClient(bytes) => match self.events.last_mut() {
                    Some(Event::ToClient(sent)) => sent.extend(bytes),
                    _ => self.events.push(Event::ToClient(bytes)),
                },
                Action::SendToBackend(bytes) => match self.events.last_mut() {
                    Some(Event::ToBackend(sent)) => sent.extend(bytes),
                    _ => self.events.push(Event::ToBackend(bytes)),
                },
                Action::StartTls => self.events.push(Event::StartTls),
                Action::Opaque(reason) => opaque = Some(reason),
                Action::Close(reason) => self.events.push(Event::Close(reason)),
            }
        }
        self.events.extend(opaque.map(Event::Opaque));
    }
}

/// A small deterministic generator (splitmix64): test runs repeat.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % u64::try_from(limit).unwrap()).unwrap()
    }

    pub(super) fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }
}
