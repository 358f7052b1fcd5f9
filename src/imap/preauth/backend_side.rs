//! The backend's bytes: its greeting judged, its capabilities rewritten, its answers matched to the client's commands.

use super::{
    Greeting, NO_SERVER, Phase, Preauth, Reading, ResponsePart, Stage, Step, send_to_client,
};
use crate::imap::answer::TlsService;
use crate::imap::capability::{StartTlsOffer, rewrite_capabilities};
use crate::imap::command::CommandName;
use crate::imap::framer::{Line, Synchronization, Taken};
use crate::imap::limits;
use crate::imap::response::{self, Condition, Response};
use crate::imap::{Action, CloseReason, OpaqueReason};

impl Preauth {
    /// Reads what can be read of the backend's output. After each piece the client's turn comes, as it would if the
    /// pieces had come one by one.
    pub(super) fn read_backend(&mut self, actions: &mut Vec<Action>) {
        while self.reads_backend() && self.read_backend_once(actions) {
            self.backend_mid_line = false;
            self.read_client(actions);
        }
        self.backend_mid_line = !self.backend.is_empty();
    }

    fn reads_backend(&self) -> bool {
        matches!(self.stage, Stage::Commands | Stage::Greeting(_))
    }

    /// False when nothing is left but half a line.
    fn read_backend_once(&mut self, actions: &mut Vec<Action>) -> bool {
        if let ResponsePart::Literal(remaining) = self.response {
            return self.pass_literal(remaining, actions);
        }
        match self.backend.take_line(limits::BACKEND_LINE) {
            Taken::Incomplete => return false,
            Taken::TooLong => self.close_with(CloseReason::BackendLimit, NO_SERVER, actions),
            Taken::Line(line) => match (self.stage, self.response) {
                (Stage::Greeting(greeting), _) => self.read_greeting(greeting, &line, actions),
                (_, ResponsePart::Start) => self.read_response(line, actions),
                (_, _) => {
                    let literal = response::literal(&line.content);
                    self.pass_data(line, literal, actions);
                }
            },
        }
        true
    }

    fn pass_literal(&mut self, remaining: u64, actions: &mut Vec<Action>) -> bool {
        let octets = self.backend.take(remaining);
        let left = remaining.saturating_sub(u64::try_from(octets.len()).unwrap_or(u64::MAX));
        send_to_client(octets, actions);
        self.response = match left {
            0 => ResponsePart::Rest,
            _ => ResponsePart::Literal(left),
        };
        left == 0
    }

    /// RFC 3501 section 7.1: the greeting is OK, PREAUTH or BYE.
    fn read_greeting(&mut self, greeting: Greeting, line: &Line, actions: &mut Vec<Action>) {
        let Response::Status(condition) = response::parse(&line.content) else {
            return self.refuse_greeting(line, actions);
        };
        match (condition, greeting) {
            (Condition::Ok, Greeting::Swallowed) => self.stage = Stage::Commands,
            (Condition::Ok, Greeting::Forwarded) => {
                self.stage = Stage::Commands;
                self.pass_line(line, self.offer(), actions);
            }
            (Condition::Bye, _) => {
                self.pass_line(line, StartTlsOffer::Withdrawn, actions);
                self.close(CloseReason::BackendBye, actions);
            }
            // The client of STARTTLS has seen a greeting that was not PREAUTH and would log in, or believe itself
            // not logged in, on an authenticated session.
            (Condition::PreAuth, Greeting::Swallowed) => {
                self.close_with(CloseReason::BackendPreauth, NO_SERVER, actions);
            }
            (Condition::PreAuth, Greeting::Forwarded) => {
                self.pass_line(line, StartTlsOffer::Withdrawn, actions);
                self.become_opaque(OpaqueReason::Preauthenticated, actions);
            }
            (Condition::Bad | Condition::No, _) => self.refuse_greeting(line, actions),
        }
    }

    fn refuse_greeting(&mut self, line: &Line, actions: &mut Vec<Action>) {
        let begin = line.content.iter().take(limits::ODD_GREETING);
        self.odd_greeting = begin.copied().collect();
        self.close_with(CloseReason::BackendGarbage, NO_SERVER, actions);
    }

    fn read_response(&mut self, line: Line, actions: &mut Vec<Action>) {
        match response::parse(&line.content) {
            Response::Continuation => self.read_continuation(&line, actions),
            Response::Data { literal } => self.pass_data(line, literal, actions),
            Response::Status(condition) => {
                self.pass_line(&line, self.offer(), actions);
                if condition == Condition::Bye {
                    self.note_bye();
                }
            }
            Response::Tagged { tag, condition } => match self.outstanding(tag) {
                Some(outstanding) => self.complete(outstanding, condition, &line, actions),
                None => self.pass_line(&line, self.offer(), actions),
            },
            Response::Unknown => self.pass_line(&line, self.offer(), actions),
        }
    }

    /// Passes on a line of a response that may hold literals.
    fn pass_data(&mut self, line: Line, literal: Option<u64>, actions: &mut Vec<Action>) {
        if literal == Some(u64::MAX) {
            return self.close_with(CloseReason::BackendLimit, NO_SERVER, actions);
        }
        if self.response == ResponsePart::Start {
            self.pass_line(&line, self.offer(), actions);
        } else {
            send_to_client(line.content, actions);
            send_to_client(line.end.bytes().to_vec(), actions);
        }
        self.response = literal.map_or(ResponsePart::Start, ResponsePart::Literal);
    }

    /// RFC 3501 section 7.5. Only here a literal of the client's, or a line of data, begins.
    fn read_continuation(&mut self, line: &Line, actions: &mut Vec<Action>) {
        let Reading::Forwarded { step, .. } = &mut self.reading else {
            return self.pass_line(line, self.offer(), actions);
        };
        let mut awaited_by_client = true;
        match *step {
            Step::Invitation(literal) => {
                *step = Step::Literal(literal.size);
                awaited_by_client = literal.synchronization == Synchronization::Synchronizing;
            }
            Step::Answer => *step = Step::Data(1),
            Step::Data(lines) => *step = Step::Data(lines.saturating_add(1)),
            Step::Literal(_) | Step::Rest => {}
        }
        if awaited_by_client {
            self.pass_line(line, self.offer(), actions);
        }
    }

    /// The command that this tag answers.
    fn outstanding(&self, tag: &[u8]) -> Option<(CommandName, Step)> {
        match &self.reading {
            Reading::Forwarded {
                tag: asked,
                name,
                step,
            } if asked.as_bytes() == tag => Some((*name, *step)),
            _ => None,
        }
    }

    /// The tagged response of the outstanding command.
    fn complete(
        &mut self,
        (name, step): (CommandName, Step),
        condition: Condition,
        line: &Line,
        actions: &mut Vec<Action>,
    ) {
        let is_login = matches!(name, CommandName::Authenticate | CommandName::Login);
        if is_login && condition == Condition::Ok {
            self.pass_line(line, StartTlsOffer::Withdrawn, actions);
            return self.become_opaque(OpaqueReason::Authenticated, actions);
        }
        if is_login && condition == Condition::No && !response::is_servers_fault(&line.content) {
            self.refused_logins = self.refused_logins.saturating_add(1);
        }
        self.reading = Reading::Command;
        self.pass_line(line, self.offer(), actions);
        if name == CommandName::Logout && condition == Condition::Ok {
            self.farewell = Some(CloseReason::Logout);
        }
        self.after_answer(step, actions);
        // Another protocol's client gets no more of the backend's answers than of ours (ALPACA).
        if condition == Condition::Bad && self.stage == Stage::Commands {
            self.count_bad_command(actions);
        }
    }

    /// What the client still has to send of a command that is answered.
    fn after_answer(&mut self, step: Step, actions: &mut Vec<Action>) {
        match step {
            // A line that comes now is a command (RFC 3501 section 7.5), SASL data too late included.
            Step::Answer | Step::Data(_) => {}
            Step::Invitation(literal) => {
                if literal.synchronization == Synchronization::NonSynchronizing {
                    self.discard(literal.size, None, actions);
                }
            }
            // The backend invited the literal and did not wait for the command's end: whether it takes the rest for
            // data or for a command, nobody can tell.
            Step::Literal(_) | Step::Rest => {
                self.close_with(CloseReason::BackendOutOfStep, NO_SERVER, actions)
            }
        }
    }

    fn note_bye(&mut self) {
        let logout = matches!(
            &self.reading,
            Reading::Forwarded {
                name: CommandName::Logout,
                ..
            }
        );
        let reason = if logout {
            CloseReason::Logout
        } else {
            CloseReason::BackendBye
        };
        self.farewell.get_or_insert(reason);
    }

    /// What the client is to read of STARTTLS. What the backend says between a login and its tagged OK is for an authenticated
    /// session already: Dovecot sends its capabilities then (RFC 9051 section 6.2.1: STARTTLS is not among them).
    fn offer(&self) -> StartTlsOffer {
        let is_logging_in = matches!(
            self.reading,
            Reading::Forwarded {
                name: CommandName::Authenticate | CommandName::Login,
                ..
            }
        );
        match self.phase {
            Phase::Optional if is_logging_in || self.tls_service == TlsService::Unavailable => {
                StartTlsOffer::Withdrawn
            }
            Phase::Optional => StartTlsOffer::Offered,
            Phase::Required | Phase::Secured => StartTlsOffer::Withdrawn,
        }
    }

    fn pass_line(&mut self, line: &Line, offer: StartTlsOffer, actions: &mut Vec<Action>) {
        send_to_client(
            rewrite_capabilities(&line.content, offer, self.external).into_owned(),
            actions,
        );
        send_to_client(line.end.bytes().to_vec(), actions);
    }
}
