//! The not-authenticated state once more, from RFC 3501 and DESIGN's table alone: an octet at a time, with nothing shared with
//! `src/imap` but the words that are said.
//!
//! It knows none of the limits that an input of the fuzzer's is too short for: lines, held input, commands under `optional`.

use super::naive_capability::rewrite;

/// Who is between whom.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Setting {
    Required,
    Optional,
    Implicit,
    StartTls,
    StartTlsKept,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum State {
    Greeting,
    Commands,
    StartTls,
    Opaque,
    Closed,
}

/// A command that the backend has, and what the client's next octets are.
struct Outstanding {
    tag: Vec<u8>,
    name: String,
    next: Next,
}

#[derive(Clone, Copy)]
enum Next {
    /// Nothing before the backend answers.
    Nothing,
    /// A literal that is not invited yet; whether the client waits for that.
    Announced(u64, bool),
    Octets(u64),
    RestOfLine,
    /// So many lines of SASL data.
    Lines(u32),
}

/// What a refused command still has to come, and what is said at its end.
struct Refused {
    octets: u64,
    answer: Option<Answer>,
}

struct Answer {
    text: Vec<u8>,
    then: Then,
}

#[derive(Clone, Copy, Eq, PartialEq)]
enum Then {
    GoOn,
    CountBad,
    End,
    EndWithoutTls,
    StartTls,
}

/// What a line of the backend belongs to.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Response {
    New,
    Octets(u64),
    Rest,
}

/// The session, and what has come of it since it was last looked at.
pub struct Naive {
    setting: Setting,
    state: State,
    outstanding: Option<Outstanding>,
    refused: Option<Refused>,
    response: Response,
    /// The end that the backend has announced.
    farewell: Option<&'static str>,
    client: Vec<u8>,
    client_has_ended: bool,
    backend: Vec<u8>,
    bad_left: u32,
    commands_left: u32,
    octets_left: u64,
    can_do_tls: bool,
    pub to_client: Vec<u8>,
    pub to_backend: Vec<u8>,
    pub end: Option<String>,
    /// First lines of commands, as they were read.
    pub commands: Vec<Vec<u8>>,
}

const NO_SERVER: &str = "[UNAVAILABLE] The mail server is not available";

impl Naive {
    pub fn new(setting: Setting) -> Self {
        let is_required = setting == Setting::Required;
        Self {
            setting,
            state: match setting {
                Setting::Required | Setting::StartTlsKept => State::Commands,
                Setting::Optional | Setting::Implicit | Setting::StartTls => State::Greeting,
            },
            outstanding: None,
            refused: None,
            response: Response::New,
            farewell: None,
            client: Vec::new(),
            client_has_ended: false,
            backend: Vec::new(),
            bad_left: 10,
            commands_left: if is_required { 1_000 } else { 10_000 },
            octets_left: if is_required { 1 << 20 } else { 16 << 20 },
            can_do_tls: true,
            to_client: if is_required {
                b"* OK [CAPABILITY IMAP4rev1 ID STARTTLS LOGINDISABLED] imap-tls ready\r\n".to_vec()
            } else {
                Vec::new()
            },
            to_backend: Vec::new(),
            end: None,
            commands: Vec::new(),
        }
    }

    pub fn client_octet(&mut self, octet: u8) {
        match self.state {
            State::Closed => {}
            _ if self.client_has_ended => {}
            State::Opaque => self.to_backend.push(octet),
            State::StartTls => self.client.push(octet),
            State::Greeting | State::Commands => {
                self.client.push(octet);
                self.read_client();
            }
        }
    }

    pub fn backend_octet(&mut self, octet: u8) {
        match self.state {
            State::Closed => return,
            State::Opaque => return self.to_client.push(octet),
            _ if self.setting == Setting::Required => return,
            State::StartTls | State::Greeting | State::Commands => {}
        }
        if self.state == State::StartTls {
            return;
        }
        if let Response::Octets(left) = self.response {
            self.to_client.push(octet);
            self.response = if left > 1 {
                Response::Octets(left - 1)
            } else {
                Response::Rest
            };
            return self.read_client();
        }
        self.backend.push(octet);
        if octet == b'\n' {
            let line = std::mem::take(&mut self.backend);
            self.backend_line(&line);
            self.read_client();
        }
    }

    pub fn client_end(&mut self) {
        self.client_has_ended = true;
        self.read_client();
    }

    pub fn backend_end(&mut self) {
        match self.state {
            State::Greeting => self.close_with("BackendSilent", NO_SERVER),
            State::Commands if self.setting != Setting::Required => {
                let rest = std::mem::take(&mut self.backend);
                self.to_client.extend(rest);
                self.close(self.farewell.unwrap_or("BackendEnded"));
            }
            _ => {}
        }
    }

    pub fn tls_unavailable(&mut self) {
        self.can_do_tls = false;
    }

    pub fn unread(self) -> Vec<u8> {
        self.client
    }

    /// Not while a login goes on: what is said then may be for after it.
    fn is_offered(&self) -> bool {
        let outstanding = self.outstanding.as_ref();
        let is_login = |asked: &Outstanding| ["AUTHENTICATE", "LOGIN"].contains(&asked.name.as_str());
        self.setting == Setting::Optional && self.can_do_tls && !outstanding.is_some_and(is_login)
    }

    fn close(&mut self, why: &str) {
        self.state = State::Closed;
        self.client.clear();
        self.backend.clear();
        self.end = Some(why.to_owned());
    }

    fn close_with(&mut self, why: &str, text: &str) {
        // Not into the middle of what the backend is saying.
        if self.response == Response::New {
            self.to_client.extend(format!("* BYE {text}\r\n").bytes());
        }
        self.close(why);
    }

    fn opaque(&mut self, why: &str) {
        self.state = State::Opaque;
        self.to_backend.append(&mut self.client);
        self.end = Some(why.to_owned());
    }

    // The client's side.

    fn read_client(&mut self) {
        while self.state == State::Commands && self.read_client_once() {}
        let is_alive = matches!(self.state, State::Commands | State::Greeting);
        if is_alive && self.client_has_ended && !self.waits_for_backend() {
            self.client.clear();
            if self.setting == Setting::Required {
                self.close("ClientEnded");
            }
        }
    }

    fn is_in_response(&self) -> bool {
        !self.backend.is_empty() || self.response != Response::New
    }

    fn waits_for_backend(&self) -> bool {
        let next = self
            .outstanding
            .as_ref()
            .map(|outstanding| outstanding.next);
        match next {
            _ if self.state == State::Greeting => true,
            Some(Next::Nothing | Next::Announced(..)) => true,
            Some(_) => false,
            None => self.refused.as_ref().is_none_or(|refused| refused.octets == 0) && self.is_in_response(),
        }
    }

    /// Takes one thing that the client has sent; false if there is none to take.
    fn read_client_once(&mut self) -> bool {
        if let Some(refused) = &mut self.refused {
            let count = take_count(&self.client, refused.octets);
            refused.octets -= count as u64;
            self.client.drain(..count);
            return refused.octets == 0 && !self.is_in_response() && self.read_end_of_refused();
        }
        let Some(outstanding) = &mut self.outstanding else {
            return self.read_command();
        };
        match outstanding.next {
            Next::Nothing | Next::Announced(..) => false,
            Next::Octets(left) => {
                let count = take_count(&self.client, left);
                let left = left - count as u64;
                outstanding.next = if left > 0 {
                    Next::Octets(left)
                } else {
                    Next::RestOfLine
                };
                self.to_backend.extend(self.client.drain(..count));
                left == 0
            }
            Next::RestOfLine => {
                let Some(line) = self.text_line() else {
                    return false;
                };
                self.forward(&line);
                true
            }
            Next::Lines(lines) => {
                let Some(line) = self.text_line() else {
                    return false;
                };
                self.to_backend.extend(line);
                self.to_backend.extend(b"\r\n");
                self.set_next(if lines > 1 {
                    Next::Lines(lines - 1)
                } else {
                    Next::Nothing
                });
                true
            }
        }
    }

    fn set_next(&mut self, next: Next) {
        if let Some(outstanding) = &mut self.outstanding {
            outstanding.next = next;
        }
    }

    /// A line without its end, which is counted.
    fn line(&mut self) -> Option<Vec<u8>> {
        let end = self.client.iter().position(|&byte| byte == b'\n')?;
        let mut line: Vec<u8> = self.client.drain(..=end).collect();
        if !self.spend(line.len() as u64) {
            return None;
        }
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Some(line)
    }

    fn text_line(&mut self) -> Option<Vec<u8>> {
        let line = self.line()?;
        if line.contains(&0) || line.contains(&b'\r') {
            self.close_with("ClientMalformed", "Invalid characters");
            return None;
        }
        Some(line)
    }

    fn spend(&mut self, octets: u64) -> bool {
        match self.octets_left.checked_sub(octets) {
            Some(left) => self.octets_left = left,
            None => self.close_with("ClientLimit(Bytes)", "Too much before login"),
        }
        self.state == State::Commands
    }

    /// A literal that will be read.
    fn accept(&mut self, size: u64) -> bool {
        if size > 65_536 {
            self.close_with("ClientLimit(Literal)", "Literal too big");
            return false;
        }
        self.spend(size)
    }

    fn read_command(&mut self) -> bool {
        if self.farewell.is_some() {
            self.client.clear();
            return false;
        }
        if self.is_in_response() {
            return false;
        }
        let Some(line) = self.line() else {
            return false;
        };
        match self.commands_left.checked_sub(1) {
            Some(left) => self.commands_left = left,
            None => {
                self.close_with("ClientLimit(Commands)", "Too much before login");
                return false;
            }
        }
        self.commands.push(line.clone());
        match self.judge(&line) {
            Some(answer) => match literal(&line) {
                Some((size, false)) => {
                    if self.accept(size) {
                        self.refused = Some(Refused {
                            octets: size,
                            answer: Some(answer),
                        });
                    }
                }
                _ => self.give(answer),
            },
            None => {
                let (tag, name, _) = words(&line);
                self.outstanding = Some(Outstanding {
                    tag: tag.to_vec(),
                    name: String::from_utf8_lossy(name.unwrap_or_default()).to_uppercase(),
                    next: Next::Nothing,
                });
                self.forward(&line);
                if self.state == State::Closed {
                    self.outstanding = None;
                }
            }
        }
        true
    }

    /// Sends a line on, with its literal made one that waits to be invited.
    fn forward(&mut self, line: &[u8]) {
        let mut line = line.to_vec();
        let mut next = Next::Nothing;
        if let Some((size, is_synchronizing)) = literal(&line) {
            if !self.accept(size) {
                return;
            }
            next = Next::Announced(size, is_synchronizing);
            if !is_synchronizing {
                line.truncate(line.len() - 2);
                line.push(b'}');
            }
        }
        self.to_backend.extend(line);
        self.to_backend.extend(b"\r\n");
        self.set_next(next);
    }

    fn read_end_of_refused(&mut self) -> bool {
        let Some(line) = self.line() else {
            return false;
        };
        let answer = self.refused.take().and_then(|refused| refused.answer);
        match (literal(&line), answer) {
            (Some((size, false)), answer) => {
                if self.accept(size) {
                    self.refused = Some(Refused {
                        octets: size,
                        answer,
                    });
                }
            }
            (_, Some(answer)) => self.give(answer),
            (_, None) => {}
        }
        true
    }

    fn count_bad(&mut self) {
        self.bad_left -= 1;
        if self.bad_left == 0 {
            self.close_with("TooManyBadCommands", "Too many bad commands");
        }
    }

    fn give(&mut self, answer: Answer) {
        self.to_client.extend(answer.text);
        match answer.then {
            Then::GoOn => {}
            Then::CountBad => self.count_bad(),
            Then::End => self.close("Logout"),
            Then::EndWithoutTls => self.close("TlsUnavailable"),
            Then::StartTls => {
                self.state = State::StartTls;
                self.end = Some("StartTls".to_owned());
            }
        }
    }

    /// What is answered without a backend; nothing where the backend is to answer.
    fn judge(&self, line: &[u8]) -> Option<Answer> {
        let bad = |tag: &[u8], why: &str| Some(say(tag, &format!("BAD {why}"), Then::CountBad));
        let (tag, name, arguments) = words(line);
        let is_tag = (1..=64).contains(&tag.len())
            && tag
                .iter()
                .all(|&byte| is_atom_character(byte) && byte != b'+' || byte == b']');
        if !is_tag {
            return bad(b"*", "Invalid tag");
        }
        if line.contains(&0) || line.contains(&b'\r') {
            return bad(tag, "Invalid characters");
        }
        let Some(name) = name else {
            return bad(b"*", "Invalid command");
        };
        if name.is_empty() || !name.iter().all(|&byte| is_atom_character(byte)) {
            return bad(tag, "Invalid command");
        }
        let name = String::from_utf8_lossy(name).to_uppercase();
        let literal = literal(line);
        match (name.as_str(), self.setting) {
            ("STARTTLS", Setting::Required | Setting::Optional) => match arguments {
                Some(_) => bad(tag, "STARTTLS has no arguments"),
                None if self.can_do_tls => {
                    Some(say(tag, "OK Begin TLS negotiation now", Then::StartTls))
                }
                None => {
                    let refusal = "NO [UNAVAILABLE] TLS is not available now";
                    let mut answer = say(tag, refusal, Then::GoOn);
                    if self.setting == Setting::Required {
                        answer.text.extend(b"* BYE [UNAVAILABLE] Try again later\r\n");
                        answer.then = Then::EndWithoutTls;
                    }
                    Some(answer)
                }
            },
            ("STARTTLS", _) => bad(tag, "TLS is active already"),
            ("CAPABILITY", Setting::Required) if arguments.is_none() && !self.can_do_tls => {
                let mut answer = say(tag, "OK CAPABILITY completed", Then::GoOn);
                let capabilities = "* CAPABILITY IMAP4rev1 ID LOGINDISABLED\r\n";
                answer.text.splice(0..0, capabilities.bytes());
                Some(answer)
            }
            (name, Setting::Required) => Some(server(tag, name, arguments, literal.is_some())),
            ("COMPRESS", _) => Some(say(tag, "NO [CANNOT] Log in first", Then::GoOn)),
            ("AUTHENTICATE", _) if literal.is_some() => bad(tag, "AUTHENTICATE takes no literal"),
            _ if literal.is_some_and(|(size, _)| size > 65_536) => {
                Some(say(tag, "NO [TOOBIG] Literal too big", Then::CountBad))
            }
            _ => None,
        }
    }

    // The backend's side.

    fn pass(&mut self, line: &[u8], is_offered: bool) {
        let (content, end) = split_end(line);
        self.to_client.extend(rewrite(content, is_offered, false));
        self.to_client.extend(end);
    }

    fn backend_line(&mut self, line: &[u8]) {
        let (content, _) = split_end(line);
        let offered = self.is_offered();
        if self.response == Response::Rest {
            return self.pass_data(line, literal(content));
        }
        let (first, second) = backend_words(content);
        let is_condition = ["OK", "NO", "BAD", "BYE", "PREAUTH"].contains(&second.as_str());
        let is_status = first == b"*" && is_condition;
        if self.state == State::Greeting {
            let is_swallowed = self.setting == Setting::StartTls;
            return match second.as_str() {
                "OK" if is_status => {
                    self.state = State::Commands;
                    if !is_swallowed {
                        self.pass(line, offered);
                    }
                }
                "BYE" if is_status => {
                    self.pass(line, false);
                    self.close("BackendBye");
                }
                "PREAUTH" if is_status && is_swallowed => {
                    self.close_with("BackendPreauth", NO_SERVER);
                }
                "PREAUTH" if is_status => {
                    self.pass(line, false);
                    self.opaque("Preauthenticated");
                }
                _ => self.close_with("BackendGarbage", NO_SERVER),
            };
        }
        if first.starts_with(b"+") {
            self.continuation(line);
        } else if is_status {
            self.pass(line, offered);
            if second == "BYE" {
                let is_logout = self
                    .outstanding
                    .as_ref()
                    .is_some_and(|asked| asked.name == "LOGOUT");
                let why = if is_logout { "Logout" } else { "BackendBye" };
                self.farewell = self.farewell.or(Some(why));
            }
        } else if first == b"*" {
            let literal = literal(content).filter(|_| second != "CAPABILITY");
            self.pass_data(line, literal);
        } else {
            let is_answer = ["OK", "NO", "BAD"].contains(&second.as_str());
            match self.outstanding.take() {
                Some(asked) if is_answer && asked.tag == first => {
                    self.answered(asked, &second, line)
                }
                other => {
                    self.outstanding = other;
                    self.pass(line, offered);
                }
            }
        }
    }

    fn pass_data(&mut self, line: &[u8], literal: Option<(u64, bool)>) {
        // A literal of a server's always waits for nobody, and is announced without a plus.
        let literal = literal.filter(|(_, is_synchronizing)| *is_synchronizing);
        if literal.is_some_and(|(size, _)| size == u64::MAX) {
            return self.close_with("BackendLimit", NO_SERVER);
        }
        if self.response == Response::New {
            self.pass(line, self.is_offered());
        } else {
            self.to_client.extend(line);
        }
        self.response = match literal {
            Some((0, _)) => Response::Rest,
            Some((size, _)) => Response::Octets(size),
            None => Response::New,
        };
    }

    fn continuation(&mut self, line: &[u8]) {
        let mut is_for_client = true;
        if let Some(outstanding) = &mut self.outstanding {
            outstanding.next = match outstanding.next {
                Next::Announced(size, is_synchronizing) => {
                    is_for_client = is_synchronizing;
                    Next::Octets(size)
                }
                Next::Nothing => Next::Lines(1),
                Next::Lines(lines) => Next::Lines(lines + 1),
                next => next,
            };
        }
        if is_for_client {
            self.pass(line, self.is_offered());
        }
    }

    fn answered(&mut self, asked: Outstanding, how: &str, line: &[u8]) {
        let beyond = match asked.name.as_str() {
            _ if how != "OK" => None,
            "AUTHENTICATE" | "LOGIN" => Some("Authenticated"),
            _ => None,
        };
        if let Some(why) = beyond {
            self.pass(line, false);
            return self.opaque(why);
        }
        self.pass(line, self.is_offered());
        if asked.name == "LOGOUT" && how == "OK" {
            self.farewell = Some("Logout");
        }
        match asked.next {
            Next::Announced(size, false) => {
                if self.accept(size) {
                    self.refused = Some(Refused {
                        octets: size,
                        answer: None,
                    });
                }
            }
            Next::Octets(_) | Next::RestOfLine => {
                return self.close_with("BackendOutOfStep", NO_SERVER);
            }
            Next::Nothing | Next::Announced(..) | Next::Lines(_) => {}
        }
        if how == "BAD" && self.end.is_none() {
            self.count_bad();
        }
    }
}

/// The server that stands there before TLS under `required`.
fn server(tag: &[u8], name: &str, arguments: Option<&[u8]>, has_literal: bool) -> Answer {
    let with = |before: &str, text: &str, then| {
        let mut answer = say(tag, text, then);
        answer.text.splice(0..0, before.bytes());
        answer
    };
    match name {
        "CAPABILITY" if arguments.is_none() => with(
            "* CAPABILITY IMAP4rev1 ID STARTTLS LOGINDISABLED\r\n",
            "OK CAPABILITY completed",
            Then::GoOn,
        ),
        "NOOP" if arguments.is_none() => say(tag, "OK NOOP completed", Then::GoOn),
        "LOGOUT" if arguments.is_none() => {
            with("* BYE Logging out\r\n", "OK LOGOUT completed", Then::End)
        }
        "ID" if is_parameter(arguments) && !has_literal => {
            with("* ID NIL\r\n", "OK ID completed", Then::GoOn)
        }
        "LOGIN" | "AUTHENTICATE" => say(tag, "NO [PRIVACYREQUIRED] Use STARTTLS first", Then::GoOn),
        "CAPABILITY" | "NOOP" | "LOGOUT" | "ID" => {
            say(tag, "BAD Invalid arguments", Then::CountBad)
        }
        _ => say(
            tag,
            "BAD Unknown command, or use STARTTLS first",
            Then::CountBad,
        ),
    }
}

fn is_parameter(arguments: Option<&[u8]>) -> bool {
    let text = arguments.unwrap_or_default();
    text.eq_ignore_ascii_case(b"NIL") || text.starts_with(b"(") && text.ends_with(b")")
}

fn say(tag: &[u8], text: &str, then: Then) -> Answer {
    Answer {
        text: [tag, b" ", text.as_bytes(), b"\r\n"].concat(),
        then,
    }
}

fn take_count(bytes: &[u8], most: u64) -> usize {
    usize::try_from(most).unwrap_or(usize::MAX).min(bytes.len())
}

/// Tag, name, and what follows a space after it.
fn words(line: &[u8]) -> (&[u8], Option<&[u8]>, Option<&[u8]>) {
    let mut parts = line.splitn(3, |&byte| byte == b' ');
    (parts.next().unwrap_or_default(), parts.next(), parts.next())
}

fn backend_words(content: &[u8]) -> (&[u8], String) {
    let mut words = content.split(|&byte| byte == b' ');
    let first = words.next().unwrap_or_default();
    let second = words.find(|word| !word.is_empty()).unwrap_or_default();
    // Octets that are no ASCII stay what they are, and are no word that is known.
    let second = second
        .iter()
        .map(|&byte| char::from(byte).to_ascii_uppercase());
    (first, second.collect())
}

fn split_end(line: &[u8]) -> (&[u8], &[u8]) {
    let end = if line.ends_with(b"\r\n") { 2 } else { 1 };
    line.split_at(line.len() - end)
}

/// RFC 3501 section 9: any CHAR but atom-specials.
fn is_atom_character(byte: u8) -> bool {
    (0x21..0x7f).contains(&byte) && !b"(){%*\"\\]".contains(&byte) || byte == b'}'
}

/// `{n}`, `{n+}` or `{n-}` at the end of a line: the size, and whether the sender waits to be invited.
pub fn literal(line: &[u8]) -> Option<(u64, bool)> {
    let open = line.iter().rposition(|&byte| byte == b'{')?;
    let inside = line[open + 1..].strip_suffix(b"}")?;
    let (digits, is_synchronizing) = match inside.split_last() {
        Some((b'+' | b'-', digits)) => (digits, false),
        _ => (inside, true),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let text = std::str::from_utf8(digits).ok()?;
    Some((text.parse().unwrap_or(u64::MAX), is_synchronizing))
}
