//! The backend's one mailbox: two messages, held in memory, as fresh for every connection as the day they were written.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::syntax::NumberSet;

/// The mailbox has the same messages under the same UIDs in every connection, so its UIDVALIDITY never changes.
pub(super) const UID_VALIDITY: u32 = 1;

pub(super) struct Message {
    pub(super) content: Vec<u8>,
    pub(super) date: String,
    pub(super) flags: BTreeSet<String>,
    pub(super) uid: u32,
}

pub(super) struct Mailbox {
    pub(super) messages: Vec<Message>,
    pub(super) next_uid: u32,
}

/// Whether a command's numbers, and the numbers in its answer, are UIDs or places in the mailbox.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Numbers {
    Sequence,
    Uids,
}

/// Messages chosen by their numbers.
pub(super) struct Selection {
    numbers: Numbers,
    set: NumberSet,
}

impl Selection {
    pub(super) fn contains(&self, place: u32, message: &Message) -> bool {
        self.set.contains(match self.numbers {
            Numbers::Sequence => place,
            Numbers::Uids => message.uid,
        })
    }
}

/// What SEARCH can be asked for; several keys must all match.
pub(super) enum Key {
    All,
    Flag { flag: &'static str, present: bool },
    Selected(Selection),
}

impl Key {
    /// Reads a key that is one word and no number, in capitals.
    pub(super) fn parse(upper: &str) -> Option<Self> {
        let (flag, present) = match upper {
            "ALL" => return Some(Self::All),
            "ANSWERED" => (r"\Answered", true),
            "DELETED" => (r"\Deleted", true),
            "DRAFT" => (r"\Draft", true),
            "FLAGGED" => (r"\Flagged", true),
            "SEEN" => (r"\Seen", true),
            "UNANSWERED" => (r"\Answered", false),
            "UNDELETED" => (r"\Deleted", false),
            "UNDRAFT" => (r"\Draft", false),
            "UNFLAGGED" => (r"\Flagged", false),
            "UNSEEN" => (r"\Seen", false),
            _ => return None,
        };
        Some(Self::Flag { flag, present })
    }

    pub(super) fn matches(&self, place: u32, message: &Message) -> bool {
        match self {
            Self::All => true,
            Self::Flag { flag, present } => message.has(flag) == *present,
            Self::Selected(selection) => selection.contains(place, message),
        }
    }
}

impl Mailbox {
    pub(super) fn inbox() -> Self {
        let mut inbox = Self {
            messages: Vec::new(),
            next_uid: 1,
        };
        let welcome = "\
            From: The demonstration <demo@localhost>\r\n\
            To: You <demo@localhost>\r\n\
            Subject: It works\r\n\
            Date: Sat, 1 Jun 2002 12:00:00 +0000\r\n\
            Message-ID: <1@demo.localhost>\r\n\
            MIME-Version: 1.0\r\n\
            Content-Type: text/plain; charset=us-ascii\r\n\
            \r\n\
            You read this through imap-tls. The IMAP server that holds it\r\n\
            knows nothing of TLS.\r\n";
        let second = "\
            From: The demonstration <demo@localhost>\r\n\
            To: You <demo@localhost>\r\n\
            Subject: Who did what\r\n\
            Date: Sat, 1 Jun 2002 12:05:00 +0000\r\n\
            Message-ID: <2@demo.localhost>\r\n\
            MIME-Version: 1.0\r\n\
            Content-Type: text/plain; charset=us-ascii\r\n\
            \r\n\
            The keeper signed for the certificate and went.\r\n\
            The network process moves the bytes between you and the backend.\r\n";
        inbox.append(
            welcome.into(),
            BTreeSet::from([r"\Seen".into()]),
            " 1-Jun-2002 12:00:00 +0000".into(),
        );
        inbox.append(
            second.into(),
            BTreeSet::new(),
            " 1-Jun-2002 12:05:00 +0000".into(),
        );
        inbox
    }

    /// Adds a message and gives its UID.
    pub(super) fn append(
        &mut self,
        content: Vec<u8>,
        flags: BTreeSet<String>,
        date: String,
    ) -> u32 {
        let uid = self.next_uid;
        self.next_uid += 1;
        self.messages.push(Message {
            content,
            date,
            flags,
            uid,
        });
        uid
    }

    /// The messages with their places, counted from one.
    pub(super) fn numbered(&mut self) -> impl Iterator<Item = (u32, &mut Message)> {
        (1..).zip(&mut self.messages)
    }

    /// Reads a set of numbers as this mailbox understands it.
    pub(super) fn selection(&self, text: &str, numbers: Numbers) -> Option<Selection> {
        let largest = match numbers {
            Numbers::Sequence => u32::try_from(self.messages.len()).ok()?,
            Numbers::Uids => self.messages.last().map_or(0, |message| message.uid),
        };
        let set = NumberSet::parse(text, largest)?;
        Some(Selection { numbers, set })
    }

    /// Removes the messages marked as deleted and gives the places they had, each counted after those before it had gone
    /// (RFC 3501 section 7.4.1).
    pub(super) fn expunge(&mut self, selection: Option<&Selection>) -> Vec<u32> {
        let mut place = 1;
        let mut gone = Vec::new();
        self.messages.retain(|message| {
            let chosen = selection.is_none_or(|selection| selection.contains(place, message));
            let goes = chosen && message.has(r"\Deleted");
            if goes {
                gone.push(place);
            } else {
                place += 1;
            }
            !goes
        });
        gone
    }

    pub(super) fn unseen(&self) -> usize {
        self.messages
            .iter()
            .filter(|message| !message.has(r"\Seen"))
            .count()
    }
}

impl Message {
    pub(super) fn has(&self, flag: &str) -> bool {
        self.flags.contains(flag)
    }

    /// `(\Answered \Seen)`
    pub(super) fn flag_list(&self) -> String {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        format!("({})", flags.join(" "))
    }

    /// The header with the empty line that ends it, and the text after that.
    fn split(&self) -> (&[u8], &[u8]) {
        let end = self
            .content
            .windows(4)
            .position(|window| window == b"\r\n\r\n");
        self.content
            .split_at(end.map_or(self.content.len(), |end| end + 4))
    }

    fn part(&self, part: &Part) -> Vec<u8> {
        let (header, text) = self.split();
        match part {
            Part::Fields { except, names } => {
                let mut chosen = Vec::new();
                let mut choosing = false;
                for line in header.split_inclusive(|&octet| octet == b'\n') {
                    // A line that starts with white space continues the field before it (RFC 5322 section 2.2.3).
                    if !line.starts_with(b" ") && !line.starts_with(b"\t") {
                        let name = line
                            .split(|&octet| octet == b':')
                            .next()
                            .unwrap_or_default();
                        let named = names
                            .iter()
                            .any(|wanted| wanted.as_bytes().eq_ignore_ascii_case(name));
                        choosing = named != *except && line != b"\r\n";
                    }
                    if choosing {
                        chosen.extend_from_slice(line);
                    }
                }
                chosen.extend_from_slice(b"\r\n");
                chosen
            }
            Part::Header => header.to_vec(),
            Part::Text => text.to_vec(),
            Part::Whole => self.content.clone(),
        }
    }
}

/// A part of a message.
#[derive(Debug, Eq, PartialEq)]
enum Part {
    Fields { except: bool, names: Vec<String> },
    Header,
    Text,
    Whole,
}

/// What FETCH can be asked for.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Item {
    Flags,
    InternalDate,
    Section(Section),
    Size,
    Uid,
}

#[derive(Debug, Eq, PartialEq)]
pub(super) struct Section {
    /// How the answer names it: `BODY[TEXT]<0>`.
    name: String,
    part: Part,
    /// Whether to leave `\Seen` as it is.
    peek: bool,
    /// `<first.count>`
    range: Option<(usize, usize)>,
}

impl Item {
    /// Reads one item, such as `FLAGS` or `BODY.PEEK[HEADER]`. `None`: not known here.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let upper = text.to_ascii_uppercase();
        let old_name = |part, peek| {
            Some(Self::Section(Section {
                name: upper.clone(),
                part,
                peek,
                range: None,
            }))
        };
        match upper.as_str() {
            "FLAGS" => Some(Self::Flags),
            "INTERNALDATE" => Some(Self::InternalDate),
            "RFC822" => old_name(Part::Whole, false),
            "RFC822.HEADER" => old_name(Part::Header, true),
            "RFC822.SIZE" => Some(Self::Size),
            "RFC822.TEXT" => old_name(Part::Text, false),
            "UID" => Some(Self::Uid),
            _ => Section::parse(&upper).map(Self::Section),
        }
    }

    pub(super) fn marks_as_seen(&self) -> bool {
        matches!(self, Self::Section(section) if !section.peek)
    }

    /// Adds the item's name and value to an answer.
    pub(super) fn write(&self, message: &Message, answer: &mut Vec<u8>) {
        let value = match self {
            Self::Flags => format!("FLAGS {}", message.flag_list()),
            Self::InternalDate => format!("INTERNALDATE \"{}\"", message.date),
            Self::Section(section) => return section.write(message, answer),
            Self::Size => format!("RFC822.SIZE {}", message.content.len()),
            Self::Uid => format!("UID {}", message.uid),
        };
        answer.extend_from_slice(value.as_bytes());
    }
}

impl Section {
    /// Reads `BODY[part]<first.count>` or `BODY.PEEK[...]`, in capitals.
    fn parse(upper: &str) -> Option<Self> {
        let (peek, rest) = match upper.strip_prefix("BODY.PEEK[") {
            Some(rest) => (true, rest),
            None => (false, upper.strip_prefix("BODY[")?),
        };
        let (part_name, rest) = rest.split_once(']')?;
        let part = match part_name {
            "" => Part::Whole,
            "HEADER" => Part::Header,
            "TEXT" => Part::Text,
            _ => Self::fields(part_name)?,
        };
        let mut name = format!("BODY[{part_name}]");
        let range = match rest {
            "" => None,
            _ => {
                let (first, count) = rest.strip_prefix('<')?.strip_suffix('>')?.split_once('.')?;
                let first = first.parse().ok()?;
                write!(name, "<{first}>").ok()?;
                Some((first, count.parse().ok()?))
            }
        };
        Some(Self {
            name,
            part,
            peek,
            range,
        })
    }

    /// Reads `HEADER.FIELDS (FROM TO)` or `HEADER.FIELDS.NOT (...)`.
    fn fields(part_name: &str) -> Option<Part> {
        let (kind, list) = part_name.split_once(" (")?;
        let except = match kind {
            "HEADER.FIELDS" => false,
            "HEADER.FIELDS.NOT" => true,
            _ => return None,
        };
        let names = list
            .strip_suffix(')')?
            .split(' ')
            .map(|name| name.trim_matches('"').into())
            .collect();
        Some(Part::Fields { except, names })
    }

    fn write(&self, message: &Message, answer: &mut Vec<u8>) {
        let mut octets = message.part(&self.part);
        if let Some((first, count)) = self.range {
            octets = octets.into_iter().skip(first).take(count).collect();
        }
        answer.extend_from_slice(format!("{} {{{}}}\r\n", self.name, octets.len()).as_bytes());
        answer.extend_from_slice(&octets);
    }
}
