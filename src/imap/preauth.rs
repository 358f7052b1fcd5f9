//! The not-authenticated state: bytes of both peers in, [`Action`]s out, the same for every cut of the bytes.
//!
//! The client's commands are taken one at a time: while the backend owes an answer, what the client sent ahead is
//! held. So a line is a command or data by what the backend really said (RFC 3501 sections 4.3, 6.2.2 and 7.5), and
//! STARTTLS waits for the answers to the commands before it (CVE-2022-28220).

mod backend_side;
mod client_side;

use super::answer::{self, Answer, Effect, TlsService};
use super::capability::ExternalAuth;
use super::command::{CommandName, Tag};
use super::framer::{Framer, Literal};
use super::limits::{self, Budget, ClientLimit};
use super::{Action, CloseReason, Entry, OpaqueReason, Policy};

/// A session until it is beyond STARTTLS: in clear ([`Preauth::cleartext`]) or inside TLS ([`Preauth::secured`]).
///
/// The two are different values: nothing of one survives into the other (CVE-2011-0411, CVE-2021-37845).
pub struct Preauth {
    phase: Phase,
    stage: Stage,
    reading: Reading,
    /// The beginning of a greeting that is none.
    odd_greeting: Vec<u8>,
    /// The backend said BYE, or agreed to LOGOUT: no command is taken any more, the end is the backend's.
    farewell: Option<CloseReason>,
    response: ResponsePart,
    /// The backend has begun a line and not ended it.
    backend_mid_line: bool,
    client: Framer,
    client_ended: bool,
    backend: Framer,
    budget: Budget,
    refused_logins: u32,
    external: ExternalAuth,
    tls_service: TlsService,
}

/// Where in a connection this is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Required,
    Optional,
    Secured,
}

/// How far the session is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Stage {
    /// The backend has not greeted yet; the client's input is held.
    Greeting(Greeting),
    Commands,
    StartTls,
    Opaque,
    Closed,
}

/// What becomes of the backend's greeting.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Greeting {
    Forwarded,
    Swallowed,
}

/// What the client's next bytes are.
enum Reading {
    Command,
    /// More of a command that the backend has, or nothing until it answers.
    Forwarded {
        tag: Tag,
        name: CommandName,
        step: Step,
    },
    /// The rest of a command that nobody wants, up to its end; then the answer, if it is ours to give.
    Discarding {
        part: DiscardedPart,
        answer: Option<Answer>,
    },
}

/// How far a forwarded command is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Step {
    /// All of it is with the backend, which owes the tagged response or a continuation request.
    Answer,
    /// The backend is to invite this literal, or to refuse it.
    Invitation(Literal),
    /// Octets of an invited literal, this many still to come.
    Literal(u64),
    /// The line that follows a literal.
    Rest,
    /// Lines that the backend invited, this many: SASL data, in which nothing is a command (RFC 3501 section 6.2.2).
    Data(u32),
}

/// What is thrown away next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum DiscardedPart {
    Literal(u64),
    Rest,
}

/// What the backend's next bytes are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum ResponsePart {
    /// The beginning of a response: here something of ours may be put.
    Start,
    Literal(u64),
    Rest,
}

impl Preauth {
    /// Before TLS. Under `Required` there is no backend; [`Policy::Implicit`] has no such phase and is taken for
    /// `Required`, which gives nothing away.
    #[must_use]
    pub fn cleartext(policy: Policy) -> Self {
        match policy {
            Policy::Optional => Self::new(Phase::Optional, Stage::Greeting(Greeting::Forwarded)),
            Policy::Required | Policy::Implicit => Self::new(Phase::Required, Stage::Commands),
        }
    }

    /// Inside TLS.
    #[must_use]
    pub fn secured(entry: Entry) -> Self {
        let stage = match entry {
            Entry::Implicit => Stage::Greeting(Greeting::Forwarded),
            Entry::StartTls => Stage::Greeting(Greeting::Swallowed),
            Entry::StartTlsKept => Stage::Commands,
        };
        Self::new(Phase::Secured, stage)
    }

    /// The client is known by its certificate: what the backend offers for that stays.
    #[must_use]
    pub fn keeping_external_auth(self) -> Self {
        Self {
            external: ExternalAuth::Kept,
            ..self
        }
    }

    fn new(phase: Phase, stage: Stage) -> Self {
        Self {
            external: ExternalAuth::Withdrawn,
            phase,
            stage,
            reading: Reading::Command,
            odd_greeting: Vec::new(),
            farewell: None,
            response: ResponsePart::Start,
            backend_mid_line: false,
            client: Framer::default(),
            client_ended: false,
            backend: Framer::default(),
            budget: match phase {
                Phase::Required => Budget::required(),
                Phase::Optional => Budget::optional(),
                Phase::Secured => Budget::secured(),
            },
            refused_logins: 0,
            tls_service: TlsService::Available,
        }
    }

    /// What is to be said before anything is read.
    pub fn start(&mut self, actions: &mut Vec<Action>) {
        if self.phase == Phase::Required {
            send_to_client(answer::GREETING.to_vec(), actions);
        }
    }

    /// Takes bytes of the client.
    pub fn client_input(&mut self, bytes: &[u8], actions: &mut Vec<Action>) {
        match self.stage {
            Stage::Closed => {}
            _ if self.client_ended => {}
            Stage::Opaque => send_to_backend(bytes.to_vec(), actions),
            Stage::StartTls => keep_bounded(&mut self.client, bytes),
            Stage::Commands | Stage::Greeting(_) => {
                self.client.push(bytes);
                self.read_client(actions);
            }
        }
    }

    /// Takes bytes of the backend.
    pub fn backend_input(&mut self, bytes: &[u8], actions: &mut Vec<Action>) {
        match self.stage {
            Stage::Closed => {}
            Stage::Opaque => send_to_client(bytes.to_vec(), actions),
            _ if self.phase == Phase::Required => {}
            Stage::StartTls => keep_bounded(&mut self.backend, bytes),
            Stage::Commands | Stage::Greeting(_) => {
                self.backend.push(bytes);
                self.read_backend(actions);
            }
        }
    }

    /// Whether the relay is to read from the client. While the backend owes an answer a bounded amount is held; after
    /// STARTTLS everything belongs to the TLS engine.
    #[must_use]
    pub fn wants_client_input(&self) -> bool {
        match self.stage {
            Stage::Closed | Stage::StartTls => false,
            Stage::Opaque => true,
            Stage::Commands | Stage::Greeting(_) => {
                !self.waits_for_backend() || self.client.len() < limits::HELD_INPUT
            }
        }
    }

    /// End of file from the client. What is complete is still carried out; half a command is dropped, since it must
    /// not be run. Once [`Preauth::client_finished`] the relay ends its sending to the backend.
    pub fn client_end(&mut self, actions: &mut Vec<Action>) {
        self.client_ended = true;
        self.read_client(actions);
    }

    /// Whether the client has ended and nothing that it sent is still to be forwarded.
    #[must_use]
    pub fn client_finished(&self) -> bool {
        self.client_ended && self.client.is_empty()
    }

    /// Whether the backend has not greeted yet. It has had nothing of the client's then.
    #[must_use]
    pub fn awaits_greeting(&self) -> bool {
        matches!(self.stage, Stage::Greeting(_))
    }

    /// How many times the backend said NO to LOGIN or AUTHENTICATE, for a reason that may be the client's.
    #[must_use]
    pub fn refused_logins(&self) -> u32 {
        self.refused_logins
    }

    /// How the backend began, where that was no greeting.
    #[must_use]
    pub fn odd_greeting(&self) -> &[u8] {
        &self.odd_greeting
    }

    /// End of file from the backend. Half a line that it wrote is passed on, but not half a greeting.
    pub fn backend_end(&mut self, actions: &mut Vec<Action>) {
        match self.stage {
            Stage::Greeting(_) => self.close_with(CloseReason::BackendSilent, NO_SERVER, actions),
            Stage::Commands if self.phase != Phase::Required => {
                send_to_client(self.backend.take_all(), actions);
                self.close(self.farewell.unwrap_or(CloseReason::BackendEnded), actions);
            }
            Stage::Commands | Stage::StartTls | Stage::Opaque | Stage::Closed => {}
        }
    }

    /// From now on STARTTLS is answered with NO (RFC 3501 section 6.2.1, RFC 5530 section 3).
    pub fn tls_unavailable(&mut self) {
        self.tls_service = TlsService::Unavailable;
    }

    /// A BYE with this text, if an untagged response may be put here: not inside a response of the backend's, not
    /// between the OK to STARTTLS and the handshake, not where we have stopped looking.
    #[must_use]
    pub fn goodbye(&self, text: &str) -> Option<Vec<u8>> {
        let between_responses = self.response == ResponsePart::Start;
        let still_ours = matches!(self.stage, Stage::Commands | Stage::Greeting(_));
        (between_responses && still_ours).then(|| answer::bye(text))
    }

    /// What the client sent after its STARTTLS line: the beginning of the handshake, or the end of the connection
    /// (RFC 9051 section 6.2.1).
    #[must_use]
    pub fn into_unread(mut self) -> Vec<u8> {
        self.client.take_all()
    }

    /// What a backend that is kept across STARTTLS (`--backend-fd`) wrote behind its last answer: it goes into the
    /// TLS phase, as input of the [`Preauth`] there, for in clear it would stand between OK and handshake.
    pub fn take_backend_unread(&mut self) -> Vec<u8> {
        self.backend.take_all()
    }

    /// Whether nothing that the client sends can be looked at before the backend has said something.
    fn waits_for_backend(&self) -> bool {
        match &self.reading {
            _ if matches!(self.stage, Stage::Greeting(_)) => true,
            Reading::Command => self.backend_mid_response(),
            Reading::Forwarded { step, .. } => matches!(step, Step::Answer | Step::Invitation(_)),
            Reading::Discarding { part, .. } => {
                *part == DiscardedPart::Rest && self.backend_mid_response()
            }
        }
    }

    /// Whether the backend has begun a response and not ended it. Nothing of ours may then go to the client.
    fn backend_mid_response(&self) -> bool {
        self.backend_mid_line || self.response != ResponsePart::Start
    }

    fn start_tls(&mut self, actions: &mut Vec<Action>) {
        self.stage = Stage::StartTls;
        actions.push(Action::StartTls);
    }

    /// Lets go of the stream: what is held goes out as it is.
    fn become_opaque(&mut self, reason: OpaqueReason, actions: &mut Vec<Action>) {
        self.stage = Stage::Opaque;
        send_to_backend(std::mem::take(&mut self.client).take_all(), actions);
        send_to_client(std::mem::take(&mut self.backend).take_all(), actions);
        actions.push(Action::Opaque(reason));
    }

    /// Ends the connection, with a BYE where one can be given.
    fn close_with(&mut self, reason: CloseReason, text: &str, actions: &mut Vec<Action>) {
        send_to_client(self.goodbye(text).unwrap_or_default(), actions);
        self.close(reason, actions);
    }

    fn close(&mut self, reason: CloseReason, actions: &mut Vec<Action>) {
        self.stage = Stage::Closed;
        self.client = Framer::default();
        self.backend = Framer::default();
        actions.push(Action::Close(reason));
    }

    fn close_over_limit(&mut self, limit: ClientLimit, actions: &mut Vec<Action>) {
        let text = match limit {
            ClientLimit::Bytes | ClientLimit::Commands => "Too much before login",
            ClientLimit::HeldInput => "Too much sent ahead of the answers",
            ClientLimit::Line => "Line too long",
            ClientLimit::Literal => "Literal too big",
        };
        self.close_with(CloseReason::ClientLimit(limit), text, actions);
    }

    /// Sends an answer of ours and does what follows from it.
    fn give(&mut self, answer: Answer, actions: &mut Vec<Action>) {
        send_to_client(answer.bytes, actions);
        match answer.effect {
            Effect::Continue => {}
            Effect::CountBad => self.count_bad_command(actions),
            Effect::Logout => self.close(CloseReason::Logout, actions),
            Effect::StartTls => self.start_tls(actions),
            Effect::TlsUnavailable => self.close(CloseReason::TlsUnavailable, actions),
        }
    }

    fn count_bad_command(&mut self, actions: &mut Vec<Action>) {
        if !self.budget.spend_bad_command() {
            self.close_with(
                CloseReason::TooManyBadCommands,
                "Too many bad commands",
                actions,
            );
        }
    }
}

/// The text of BYE when there is no backend to speak for (RFC 5530 section 3).
const NO_SERVER: &str = "[UNAVAILABLE] The mail server is not available";

/// Keeps what arrives after STARTTLS for the TLS phase. The relay is not to read then; should it, what is too much is
/// lost, and the handshake fails.
fn keep_bounded(framer: &mut Framer, bytes: &[u8]) {
    let room = limits::HELD_INPUT_MAXIMUM.saturating_sub(framer.len());
    framer.push(bytes.get(..room).unwrap_or(bytes));
}

fn send_to_client(bytes: Vec<u8>, actions: &mut Vec<Action>) {
    match actions.last_mut() {
        _ if bytes.is_empty() => {}
        Some(Action::SendToClient(sent)) => sent.extend_from_slice(&bytes),
        _ => actions.push(Action::SendToClient(bytes)),
    }
}

fn send_to_backend(bytes: Vec<u8>, actions: &mut Vec<Action>) {
    match actions.last_mut() {
        _ if bytes.is_empty() => {}
        Some(Action::SendToBackend(sent)) => sent.extend_from_slice(&bytes),
        _ => actions.push(Action::SendToBackend(bytes)),
    }
}

#[cfg(test)]
mod tests;
