//! A small IMAP4rev1 server (RFC 3501) on stdin and stdout: all that `imap-tls` asks of a backend.
//!
//! One user (`demo`, password `demo`), one mailbox, everything in memory and gone with the connection. It has no TLS, no
//! socket of its own and no idea that anybody stands between it and the client. What it leaves out it refuses with BAD:
//! ENVELOPE and BODYSTRUCTURE, most search keys, every mailbox but INBOX.

mod mailbox;
mod selected;
mod stream;
mod syntax;

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Write};

use nix::unistd::{self, Gid, Uid};

use mailbox::{Mailbox, Numbers, UID_VALIDITY};
use stream::{Client, Command};
use syntax::Argument;

const USER: &str = "demo";
const PASSWORD: &str = "demo";

const CAPABILITIES: &str = "IMAP4rev1 AUTH=PLAIN SASL-IR ID IDLE LITERAL+ UIDPLUS";
const SYSTEM_FLAGS: [&str; 5] = [r"\Answered", r"\Deleted", r"\Draft", r"\Flagged", r"\Seen"];

/// Before login a literal is a name or a password.
const MAX_LITERAL_BEFORE_LOGIN: usize = 1024;
/// Afterwards it may be a message; the whole mailbox is in memory.
const MAX_LITERAL: usize = 32 * 1024 * 1024;
const MAX_MAILBOX: usize = 64 * 1024 * 1024;

/// Runs as the backend: serves on stdin and stdout, as the user `uid` if there is one to become.
pub(crate) fn run(uid: Option<u32>) -> io::Result<()> {
    if let Some(uid) = uid {
        // A real server needs root until somebody has logged in; this one never does.
        unistd::setgroups(&[])?;
        unistd::setgid(Gid::from_raw(uid))?;
        unistd::setuid(Uid::from_raw(uid))?;
    }
    let told = |name| std::env::var(name).unwrap_or_else(|_| "unknown".into());
    // No println! here: stdout is the client. A log that cannot be written must not end the session either.
    let _ = writeln!(
        io::stderr(),
        "backend: started for {} port {}, {} {}",
        told("TCPREMOTEIP"),
        told("TCPREMOTEPORT"),
        told("SSL_PROTOCOL"),
        told("SSL_CIPHER"),
    );
    let mut session = Session {
        client: Client::on_stdio(),
        inbox: Mailbox::inbox(),
        state: State::NotAuthenticated,
    };
    match session.run() {
        // The client hung up in the middle of something: its right.
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(()),
        ended => ended,
    }
}

/// The states of RFC 3501 section 3; a later one allows what the earlier ones allow, LOGIN excepted.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum State {
    NotAuthenticated,
    Authenticated,
    Selected(Access),
    Logout,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Access {
    ReadOnly,
    ReadWrite,
}

/// Why a command is not carried out.
enum Refusal {
    Bad(&'static str),
    Connection(io::Error),
    No(&'static str),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Connection(error)
    }
}

/// The text of the tagged OK, or the refusal.
type Outcome = Result<String, Refusal>;

const MALFORMED: Refusal = Refusal::Bad("Arguments missing or malformed");

struct Session {
    client: Client,
    inbox: Mailbox,
    state: State,
}

impl Session {
    fn run(&mut self) -> io::Result<()> {
        self.client.untagged(&format!(
            "OK [CAPABILITY {CAPABILITIES}] The demonstration's backend is ready"
        ))?;
        while self.state != State::Logout {
            let max_literal = match self.state {
                State::NotAuthenticated => MAX_LITERAL_BEFORE_LOGIN,
                _ => MAX_LITERAL,
            };
            let Command { tag, arguments } = self.client.read_command(max_literal)?;
            let outcome = arguments
                .ok_or(MALFORMED)
                .and_then(|arguments| self.obey(&arguments));
            let status = match outcome {
                Ok(text) => format!("OK {text}"),
                Err(Refusal::Bad(text)) => format!("BAD {text}"),
                Err(Refusal::Connection(error)) => return Err(error),
                Err(Refusal::No(text)) => format!("NO {text}"),
            };
            self.client.respond(&tag, &status)?;
        }
        self.client.flush()
    }

    fn obey(&mut self, words: &[Argument]) -> Outcome {
        let name = text_at(words, 0)?.to_ascii_uppercase();
        let arguments = words.get(1..).unwrap_or_default();
        match name.as_str() {
            "CAPABILITY" => self.capability(),
            "ID" => self.id(),
            "LOGOUT" => self.logout(),
            "NOOP" => Ok("Nothing done".into()),
            "AUTHENTICATE" | "LOGIN" if self.state > State::NotAuthenticated => {
                Err(Refusal::Bad("You are logged in already"))
            }
            "AUTHENTICATE" => self.authenticate(arguments),
            "LOGIN" => self.login(text_at(arguments, 0)?, text_at(arguments, 1)?),
            _ if self.state < State::Authenticated => {
                Err(Refusal::Bad("Log in first, or no such command"))
            }
            "APPEND" => self.append(arguments),
            "COPY" | "CREATE" | "DELETE" | "RENAME" => {
                Err(Refusal::No("[CANNOT] INBOX is all there is"))
            }
            "EXAMINE" => self.select(arguments, Access::ReadOnly),
            "IDLE" => self.idle(),
            "LIST" | "LSUB" => self.list(&name, arguments),
            "SELECT" => self.select(arguments, Access::ReadWrite),
            "STATUS" => self.status(arguments),
            "SUBSCRIBE" | "UNSUBSCRIBE" => Ok("Noted, and forgotten at logout".into()),
            _ if self.state < State::Selected(Access::ReadOnly) => {
                Err(Refusal::Bad("Select a mailbox first, or no such command"))
            }
            "CHECK" => Ok("Checked".into()),
            "CLOSE" => self.close(),
            "UID" => {
                let name = text_at(arguments, 0)?.to_ascii_uppercase();
                self.obey_numbered(&name, arguments.get(1..).unwrap_or_default(), Numbers::Uids)
            }
            _ => self.obey_numbered(&name, arguments, Numbers::Sequence),
        }
    }

    /// The commands that take sequence numbers, or UIDs after the word UID.
    fn obey_numbered(&mut self, name: &str, arguments: &[Argument], numbers: Numbers) -> Outcome {
        match (name, numbers) {
            ("EXPUNGE", Numbers::Sequence) => self.expunge(None),
            ("EXPUNGE", Numbers::Uids) => self.expunge(Some(text_at(arguments, 0)?)),
            ("FETCH", _) => self.fetch(arguments, numbers),
            ("SEARCH", _) => self.search(arguments, numbers),
            ("STORE", _) => self.store(arguments, numbers),
            _ => Err(Refusal::Bad("No such command")),
        }
    }

    // Any state.

    fn capability(&mut self) -> Outcome {
        self.client
            .untagged(&format!("CAPABILITY {CAPABILITIES}"))?;
        Ok("That is all".into())
    }

    fn id(&mut self) -> Outcome {
        self.client
            .untagged("ID (\"name\" \"imap-tls demonstration backend\")")?;
        Ok("Pleased to meet you".into())
    }

    fn logout(&mut self) -> Outcome {
        self.client.untagged("BYE Goodbye")?;
        self.state = State::Logout;
        Ok("Logged out".into())
    }

    // Not authenticated.

    fn login(&mut self, user: &str, password: &str) -> Outcome {
        if user != USER || password != PASSWORD {
            return Err(Refusal::No(
                "[AUTHENTICATIONFAILED] The user is demo, the password is demo",
            ));
        }
        self.state = State::Authenticated;
        Ok(format!("[CAPABILITY {CAPABILITIES}] Logged in"))
    }

    /// AUTHENTICATE PLAIN (RFC 4616), with an initial response (RFC 4959) or without.
    fn authenticate(&mut self, arguments: &[Argument]) -> Outcome {
        if !text_at(arguments, 0)?.eq_ignore_ascii_case("PLAIN") {
            return Err(Refusal::No("[CANNOT] The one mechanism here is PLAIN"));
        }
        let response = match arguments.get(1) {
            Some(initial) => initial.text().ok_or(MALFORMED)?.as_bytes().to_vec(),
            None => {
                self.client.invite("")?;
                self.client.read_line()?
            }
        };
        if response == b"*" {
            return Err(Refusal::Bad("Given up"));
        }
        let message = syntax::decode_base64(&response).ok_or(Refusal::Bad("That is not base64"))?;
        let parts: Option<Vec<&str>> = message
            .split(|&octet| octet == 0)
            .map(|part| std::str::from_utf8(part).ok())
            .collect();
        match parts.as_deref() {
            Some(["" | USER, user, password]) => self.login(user, password),
            _ => Err(Refusal::No(
                "[AUTHENTICATIONFAILED] That is no PLAIN message for this user",
            )),
        }
    }

    // Authenticated.

    fn append(&mut self, arguments: &[Argument]) -> Outcome {
        let (Some((mailbox, rest)), Some(Argument::Word(content))) =
            (arguments.split_first(), arguments.last())
        else {
            return Err(MALFORMED);
        };
        require_inbox(mailbox)?;
        let mut flags = BTreeSet::new();
        let mut date = " 1-Jun-2002 12:00:00 +0000";
        for optional in rest.split_last().ok_or(MALFORMED)?.1 {
            match optional {
                Argument::List(_) => flags = flags_of(std::slice::from_ref(optional))?,
                Argument::Word(_) => date = optional.text().ok_or(MALFORMED)?,
            }
        }
        if date.contains(['"', '\\', '\r', '\n']) {
            return Err(MALFORMED);
        }
        let held: usize = self
            .inbox
            .messages
            .iter()
            .map(|message| message.content.len())
            .sum();
        if held + content.len() > MAX_MAILBOX {
            return Err(Refusal::No("[OVERQUOTA] The mailbox is full"));
        }
        let uid = self.inbox.append(content.clone(), flags, date.into());
        if matches!(self.state, State::Selected(_)) {
            self.client
                .untagged(&format!("{} EXISTS", self.inbox.messages.len()))?;
        }
        Ok(format!(
            "[APPENDUID {UID_VALIDITY} {uid}] Kept until you log out"
        ))
    }

    fn select(&mut self, arguments: &[Argument], access: Access) -> Outcome {
        // A SELECT that fails leaves no mailbox selected (RFC 3501 section 6.3.1).
        self.state = State::Authenticated;
        require_inbox(arguments.first().ok_or(MALFORMED)?)?;
        self.state = State::Selected(access);
        let flags = SYSTEM_FLAGS.join(" ");
        self.client.untagged(&format!("FLAGS ({flags})"))?;
        self.client
            .untagged(&format!("{} EXISTS", self.inbox.messages.len()))?;
        self.client.untagged("0 RECENT")?;
        let unseen = self
            .inbox
            .numbered()
            .find(|(_, message)| !message.has(r"\Seen"))
            .map(|(place, _)| place);
        if let Some(place) = unseen {
            self.client
                .untagged(&format!("OK [UNSEEN {place}] The first one to read"))?;
        }
        self.client
            .untagged(&format!("OK [UIDVALIDITY {UID_VALIDITY}] Always"))?;
        self.client
            .untagged(&format!("OK [UIDNEXT {}] Next", self.inbox.next_uid))?;
        match access {
            Access::ReadOnly => {
                self.client.untagged("OK [PERMANENTFLAGS ()] None")?;
                Ok("[READ-ONLY] Selected".into())
            }
            Access::ReadWrite => {
                self.client.untagged(&format!(
                    "OK [PERMANENTFLAGS ({flags} \\*)] Until you log out"
                ))?;
                Ok("[READ-WRITE] Selected".into())
            }
        }
    }

    fn list(&mut self, name: &str, arguments: &[Argument]) -> Outcome {
        let (reference, pattern) = (text_at(arguments, 0)?, text_at(arguments, 1)?);
        match pattern {
            // What is the separator? (RFC 3501 section 6.3.8)
            "" => self
                .client
                .untagged(&format!("{name} (\\Noselect) \"/\" \"\""))?,
            _ if !reference.is_empty() => {}
            "*" | "%" => self.client.untagged(&format!("{name} () \"/\" INBOX"))?,
            _ if pattern
                .trim_end_matches(['*', '%'])
                .eq_ignore_ascii_case("INBOX") =>
            {
                self.client.untagged(&format!("{name} () \"/\" INBOX"))?;
            }
            _ => {}
        }
        Ok("That is all".into())
    }

    fn status(&mut self, arguments: &[Argument]) -> Outcome {
        require_inbox(arguments.first().ok_or(MALFORMED)?)?;
        let mut values = Vec::new();
        for item in arguments
            .get(1)
            .and_then(Argument::texts)
            .ok_or(MALFORMED)?
        {
            let item = item.to_ascii_uppercase();
            let value = match item.as_str() {
                "MESSAGES" => self.inbox.messages.len().to_string(),
                "RECENT" => "0".into(),
                "UIDNEXT" => self.inbox.next_uid.to_string(),
                "UIDVALIDITY" => UID_VALIDITY.to_string(),
                "UNSEEN" => self.inbox.unseen().to_string(),
                _ => return Err(Refusal::Bad("No such status item")),
            };
            values.push(format!("{item} {value}"));
        }
        self.client
            .untagged(&format!("STATUS INBOX ({})", values.join(" ")))?;
        Ok("That is all".into())
    }

    /// IDLE (RFC 2177). Nothing ever happens in this mailbox, so it only waits.
    fn idle(&mut self) -> Outcome {
        self.client.invite("Nothing will happen")?;
        if self.client.read_line()?.eq_ignore_ascii_case(b"DONE") {
            Ok("It was quiet".into())
        } else {
            Err(Refusal::Bad("DONE ends IDLE"))
        }
    }
}

fn text_at(arguments: &[Argument], index: usize) -> Result<&str, Refusal> {
    arguments
        .get(index)
        .and_then(Argument::text)
        .ok_or(MALFORMED)
}

fn require_inbox(mailbox: &Argument) -> Result<(), Refusal> {
    match mailbox.text().ok_or(MALFORMED)? {
        name if name.eq_ignore_ascii_case("INBOX") => Ok(()),
        _ => Err(Refusal::No("[NONEXISTENT] INBOX is all there is")),
    }
}

/// Reads flags. The system flags get their usual spelling, since case makes no difference in them.
fn flags_of(arguments: &[Argument]) -> Result<BTreeSet<String>, Refusal> {
    let spelled = |flag: &str| {
        let system = SYSTEM_FLAGS
            .iter()
            .find(|system| system.eq_ignore_ascii_case(flag));
        system.map_or_else(|| flag.to_string(), ToString::to_string)
    };
    let lists: Option<Vec<_>> = arguments.iter().map(Argument::texts).collect();
    let flags = lists.ok_or(MALFORMED)?.concat();
    if flags
        .iter()
        .any(|flag| flag.is_empty() || !flag.bytes().all(|octet| octet.is_ascii_graphic()))
    {
        return Err(MALFORMED);
    }
    Ok(flags.into_iter().map(spelled).collect())
}
