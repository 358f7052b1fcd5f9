//! The client's bytes: one command at a time, each part of it forwarded, answered or thrown away.

use super::{DiscardedPart, Phase, Preauth, Reading, Stage, Step, send_to_backend};
use crate::imap::answer::Answer;
use crate::imap::command::{self, Command, CommandName};
use crate::imap::framer::{Line, Literal, Synchronization, Taken, with_synchronizing_marker};
use crate::imap::limits::{self, ClientLimit};
use crate::imap::{Action, CloseReason};

/// Whether there was something to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Progress {
    Made,
    /// Nothing more without more input.
    Stalled,
}

/// What a command's first line leads to.
enum Verdict {
    Answer(Answer),
    Forward,
}

impl Preauth {
    /// Reads what can be read of the client's input.
    pub(super) fn read_client(&mut self, actions: &mut Vec<Action>) {
        while self.stage == Stage::Commands && self.read_client_once(actions) == Progress::Made {}
        if !matches!(self.stage, Stage::Commands | Stage::Greeting(_)) {
            return;
        }
        if self.client.len() > limits::HELD_INPUT_MAXIMUM {
            self.close_over_limit(ClientLimit::HeldInput, actions);
        } else if self.client_ended && !self.waits_for_backend() {
            self.end_client(actions);
        }
    }

    /// The client has ended and what is left of its input is half a line: no command.
    fn end_client(&mut self, actions: &mut Vec<Action>) {
        self.client.clear();
        if self.phase == Phase::Required {
            self.close(CloseReason::ClientEnded, actions);
        }
    }

    fn read_client_once(&mut self, actions: &mut Vec<Action>) -> Progress {
        match &self.reading {
            Reading::Command => self.read_command(actions),
            Reading::Forwarded { step, .. } => match *step {
                Step::Answer | Step::Invitation(_) => Progress::Stalled,
                Step::Literal(remaining) => self.forward_literal(remaining, actions),
                Step::Rest => self.forward_rest(actions),
                Step::Data(lines) => self.forward_data(lines, actions),
            },
            Reading::Discarding { part, .. } => match *part {
                DiscardedPart::Literal(remaining) => self.discard_literal(remaining),
                DiscardedPart::Rest => self.discard_rest(actions),
            },
        }
    }

    fn read_command(&mut self, actions: &mut Vec<Action>) -> Progress {
        if self.farewell.is_some() {
            self.client.clear();
            return Progress::Stalled;
        }
        if self.backend_mid_response() {
            return Progress::Stalled;
        }
        let Some(line) = self.client_line(actions) else {
            return Progress::Stalled;
        };
        if let Err(limit) = self.budget.spend_command() {
            self.close_over_limit(limit, actions);
            return Progress::Stalled;
        }
        let literal = Literal::announced_by(&line.content);
        match command::parse(&line.content) {
            Err(malformed) => self.refuse(Answer::malformed(&malformed), literal, actions),
            Ok(command) => match self.judge(&command) {
                Verdict::Answer(answer) => self.refuse(answer, literal, actions),
                Verdict::Forward => self.forward_command(&line, command, actions),
            },
        }
        Progress::Made
    }

    /// Decides who answers a command (the table of the not-authenticated state).
    fn judge(&self, command: &Command<'_>) -> Verdict {
        let tag = &command.tag;
        match (self.phase, command.name) {
            (Phase::Required, _) => Verdict::Answer(Answer::required(command, self.tls_service)),
            (Phase::Optional, CommandName::StartTls) => {
                Verdict::Answer(Answer::starttls(command, self.tls_service))
            }
            // RFC 9051 section 6.2.1: BAD when TLS is up.
            (Phase::Secured, CommandName::StartTls) => {
                Verdict::Answer(Answer::bad(tag, "TLS is active already"))
            }
            // RFC 4978 allows it here. Then nobody could tell any more when the client has logged in, and its limits would be over.
            (_, CommandName::Compress) => Verdict::Answer(Answer::too_early(tag)),
            // No argument of AUTHENTICATE is a string (RFC 3501 section 9, RFC 4959 section 3): with a literal here, "+"
            // could not be told to invite the literal or SASL data.
            (_, CommandName::Authenticate) if command.literal.is_some() => {
                Verdict::Answer(Answer::bad(tag, "AUTHENTICATE takes no literal"))
            }
            _ => match command.literal {
                Some(literal) if literal.size > limits::LITERAL => {
                    Verdict::Answer(Answer::too_big(tag))
                }
                _ => Verdict::Forward,
            },
        }
    }

    /// Answers a command whose first line announces this literal. An uninvited synchronizing literal never comes
    /// (RFC 3501 section 7.5); a non-synchronizing one comes anyway and is data, whatever it looks like (RFC 7888
    /// section 4).
    fn refuse(&mut self, answer: Answer, literal: Option<Literal>, actions: &mut Vec<Action>) {
        self.reading = Reading::Command;
        match literal {
            Some(literal) if literal.synchronization == Synchronization::NonSynchronizing => {
                self.discard(literal.size, Some(answer), actions);
            }
            _ => self.give(answer, actions),
        }
    }

    /// Throws away a literal and the rest of its command.
    pub(super) fn discard(&mut self, size: u64, answer: Option<Answer>, actions: &mut Vec<Action>) {
        if self.accept_literal(size, actions) {
            let part = DiscardedPart::Literal(size);
            self.reading = Reading::Discarding { part, answer };
        }
    }

    fn discard_literal(&mut self, remaining: u64) -> Progress {
        let taken = self.client.take(remaining).len();
        let (next, progress) = after_octets(remaining, taken);
        if let Reading::Discarding { part, .. } = &mut self.reading {
            *part = next.map_or(DiscardedPart::Rest, DiscardedPart::Literal);
        }
        progress
    }

    fn discard_rest(&mut self, actions: &mut Vec<Action>) -> Progress {
        // At its end is the place of the answer.
        if self.backend_mid_response() {
            return Progress::Stalled;
        }
        let Some(line) = self.client_line(actions) else {
            return Progress::Stalled;
        };
        let Reading::Discarding { answer, .. } =
            std::mem::replace(&mut self.reading, Reading::Command)
        else {
            return Progress::Made;
        };
        let literal = Literal::announced_by(&line.content);
        match (literal, answer) {
            (Some(literal), answer)
                if literal.synchronization == Synchronization::NonSynchronizing =>
            {
                self.discard(literal.size, answer, actions);
            }
            (_, Some(answer)) => self.give(answer, actions),
            (_, None) => {}
        }
        Progress::Made
    }

    fn forward_command(&mut self, line: &Line, command: Command<'_>, actions: &mut Vec<Action>) {
        let Command {
            tag, name, literal, ..
        } = command;
        let Some(step) = self.forward_line(line, literal, actions) else {
            return;
        };
        self.reading = Reading::Forwarded { tag, name, step };
    }

    /// Sends a line of a command to the backend and says what comes next.
    ///
    /// A literal is always announced as a synchronizing one: then the backend says itself whether it will take the
    /// octets for data, and one that has never heard of LITERAL+ cannot read commands out of them.
    fn forward_line(
        &mut self,
        line: &Line,
        literal: Option<Literal>,
        actions: &mut Vec<Action>,
    ) -> Option<Step> {
        if let Some(literal) = literal {
            if !self.accept_literal(literal.size, actions) {
                return None;
            }
        }
        send_to_backend(
            match literal {
                Some(_) => with_synchronizing_marker(&line.content),
                // What only ends like one is text: of a password, for one.
                None => line.content.clone(),
            },
            actions,
        );
        send_to_backend(b"\r\n".to_vec(), actions);
        Some(literal.map_or(Step::Answer, Step::Invitation))
    }

    fn forward_literal(&mut self, remaining: u64, actions: &mut Vec<Action>) -> Progress {
        let octets = self.client.take(remaining);
        let (next, progress) = after_octets(remaining, octets.len());
        self.set_step(next.map_or(Step::Rest, Step::Literal));
        send_to_backend(octets, actions);
        progress
    }

    fn forward_rest(&mut self, actions: &mut Vec<Action>) -> Progress {
        let Some(line) = self.client_text_line(actions) else {
            return Progress::Stalled;
        };
        let literal = Literal::announced_by(&line.content);
        if let Some(step) = self.forward_line(&line, literal, actions) {
            self.set_step(step);
        }
        Progress::Made
    }

    fn forward_data(&mut self, lines: u32, actions: &mut Vec<Action>) -> Progress {
        let Some(line) = self.client_text_line(actions) else {
            return Progress::Stalled;
        };
        send_to_backend(line.content, actions);
        send_to_backend(b"\r\n".to_vec(), actions);
        self.set_step(if lines > 1 {
            Step::Data(lines - 1)
        } else {
            Step::Answer
        });
        Progress::Made
    }

    pub(super) fn set_step(&mut self, next: Step) {
        if let Reading::Forwarded { step, .. } = &mut self.reading {
            *step = next;
        }
    }

    /// Counts a literal that is going to be read; false if it is too much, and the session over.
    fn accept_literal(&mut self, size: u64, actions: &mut Vec<Action>) -> bool {
        let accepted = match size {
            0..=limits::LITERAL => self.budget.spend_bytes(size),
            _ => Err(ClientLimit::Literal),
        };
        if let Err(limit) = accepted {
            self.close_over_limit(limit, actions);
        }
        accepted.is_ok()
    }

    /// The client's next line in the middle of a command, where a line that is no text cannot be refused any more.
    fn client_text_line(&mut self, actions: &mut Vec<Action>) -> Option<Line> {
        let line = self.client_line(actions)?;
        if command::is_text(&line.content) {
            return Some(line);
        }
        self.close_with(CloseReason::ClientMalformed, "Invalid characters", actions);
        None
    }

    /// The client's next line; none also when it is too long, and the session over.
    fn client_line(&mut self, actions: &mut Vec<Action>) -> Option<Line> {
        let line = match self.client.take_line(self.budget.line) {
            Taken::Incomplete => return None,
            Taken::TooLong => Err(ClientLimit::Line),
            Taken::Line(line) => {
                let length = line.content.len() + line.end.bytes().len();
                let spent = self
                    .budget
                    .spend_bytes(u64::try_from(length).unwrap_or(u64::MAX));
                spent.map(|()| line)
            }
        };
        line.map_err(|limit| self.close_over_limit(limit, actions))
            .ok()
    }
}

/// What remains of a literal after so many of its octets: none when it is over.
fn after_octets(remaining: u64, taken: usize) -> (Option<u64>, Progress) {
    let left = remaining.saturating_sub(u64::try_from(taken).unwrap_or(u64::MAX));
    match left {
        0 => (None, Progress::Made),
        _ => (Some(left), Progress::Stalled),
    }
}
