//! What passes between the network process and the keeper, as bytes: pure, every length checked before it is used.
//!
//! A message is an octet for its kind and its fields. A field is preceded by its length in four octets, except the last of a
//! request or a reply, which goes to the end.

use rustls::SignatureScheme;

use super::signing::{SIGN_LIMIT, SignRequest};
use super::tickets::{PLAINTEXT_LIMIT, TICKET_LIMIT};
use crate::host_name::{HostName, NAME_LIMIT};

/// The longest request: a kind, a name and a ticket.
pub const REQUEST_LIMIT: usize = 1 + 1 + NAME_LIMIT + TICKET_LIMIT;
/// The longest reply to a signature, in octets: one of RSA-16384 and the kind.
pub const REPLY_LIMIT: usize = 2049;
/// The longest introduction, and the longest reply to any other request: certificate chains of real life are 2 to 10 KiB.
pub const INTRODUCTION_LIMIT: usize = 128 * 1024;

/// The longest binding: a policy, and a digest of whose certificates are accepted from clients.
pub const BINDING_LIMIT: usize = 1 + 32;

/// What the network process asks for.
#[derive(Debug, Eq, PartialEq)]
pub enum Request<'a> {
    /// The keeper service's introduction. What tickets are to be bound to is said here, before a client was heard, and once.
    Begin(&'a [u8]),
    /// The certificate for a name that is in the directory (`--cert-dir`).
    Certificate(HostName),
    /// What is sealed in a ticket; the name is the one that the client asks for now.
    Open {
        /// Empty where the client names none.
        name: Option<HostName>,
        /// As the client brought it.
        ticket: &'a [u8],
    },
    /// A ticket for a session.
    Seal {
        /// Empty where the client named none.
        name: Option<HostName>,
        /// What rustls wants to find again.
        session: &'a [u8],
    },
    /// A signature.
    Sign(SignRequest<'a>),
}

impl<'a> Request<'a> {
    const CERTIFICATE: u8 = 1;
    const OPEN: u8 = 2;
    const SEAL: u8 = 3;
    const SIGN: u8 = 4;
    const BEGIN: u8 = 5;

    /// The request as bytes.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::Begin(binding) => [&[Self::BEGIN], *binding].concat(),
            Self::Certificate(name) => [&[Self::CERTIFICATE], name.as_str().as_bytes()].concat(),
            Self::Open { name, ticket } => encode_named(Self::OPEN, name.as_ref(), ticket),
            Self::Seal { name, session } => encode_named(Self::SEAL, name.as_ref(), session),
            Self::Sign(request) => [&[Self::SIGN], request.encode().as_slice()].concat(),
        }
    }

    /// The request in `bytes`, if it is one of a permitted form.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        match bytes.split_first()? {
            (&Self::BEGIN, binding) => {
                (binding.len() <= BINDING_LIMIT).then_some(Self::Begin(binding))
            }
            (&Self::CERTIFICATE, name) => {
                let name = std::str::from_utf8(name).ok()?;
                HostName::new(name).map(Self::Certificate)
            }
            (&Self::OPEN, rest) => {
                let (name, ticket) = decode_named(rest, TICKET_LIMIT)?;
                Some(Self::Open { name, ticket })
            }
            (&Self::SEAL, rest) => {
                let (name, session) = decode_named(rest, PLAINTEXT_LIMIT)?;
                Some(Self::Seal { name, session })
            }
            (&Self::SIGN, rest) if rest.len() <= SIGN_LIMIT => {
                SignRequest::decode(rest).map(Self::Sign)
            }
            _ => None,
        }
    }
}

/// A name's length fits an octet.
fn encode_named(kind: u8, name: Option<&HostName>, content: &[u8]) -> Vec<u8> {
    let name = name.map_or("", HostName::as_str).as_bytes();
    let length = u8::try_from(name.len()).unwrap_or(0);
    [&[kind, length], name, content].concat()
}

fn decode_named(bytes: &[u8], limit: usize) -> Option<(Option<HostName>, &[u8])> {
    let (&length, rest) = bytes.split_first()?;
    let (name, content) = rest.split_at_checked(usize::from(length))?;
    let name = match std::str::from_utf8(name).ok()? {
        "" => None,
        name => Some(HostName::new(name)?),
    };
    (content.len() <= limit).then_some((name, content))
}

/// The keeper's answer to a request.
#[derive(Debug, Eq, PartialEq)]
pub enum Reply<'a> {
    /// A certificate, which is one more than those shown before.
    Certificate(Holding),
    /// A set-up fault, in words for the log.
    Fault(String),
    /// No certificate is filed under that name; the ticket is none of ours, or too old.
    Nothing,
    /// What was sealed in the ticket.
    Opened(&'a [u8]),
    /// No certificate is filed under that name, and that of its domain cannot be read, which is in words for the log.
    PassedOver(String),
    /// Not a request of a permitted form, or one too many.
    Refused,
    /// The ticket.
    Sealed(&'a [u8]),
    /// The signature.
    Signed(&'a [u8]),
}

impl<'a> Reply<'a> {
    const REFUSED: u8 = 0;
    const CERTIFICATE: u8 = 1;
    const OPENED: u8 = 2;
    const SEALED: u8 = 3;
    const SIGNED: u8 = 4;
    const NOTHING: u8 = 5;
    const FAULT: u8 = 6;
    const PASSED_OVER: u8 = 7;

    /// The reply as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let (kind, content): (u8, &[u8]) = match self {
            Self::Certificate(holding) => {
                return [vec![Self::CERTIFICATE], holding.encode()].concat();
            }
            Self::Fault(text) => (Self::FAULT, text.as_bytes()),
            Self::Nothing => (Self::NOTHING, &[]),
            Self::Opened(session) => (Self::OPENED, session),
            Self::PassedOver(text) => (Self::PASSED_OVER, text.as_bytes()),
            Self::Refused => (Self::REFUSED, &[]),
            Self::Sealed(ticket) => (Self::SEALED, ticket),
            Self::Signed(signature) => (Self::SIGNED, signature),
        };
        [&[kind], content].concat()
    }

    /// The reply in `bytes`, if it is one.
    pub fn decode(bytes: &'a [u8]) -> Option<Self> {
        match bytes.split_first()? {
            (&Self::REFUSED, []) => Some(Self::Refused),
            (&Self::NOTHING, []) => Some(Self::Nothing),
            (&Self::CERTIFICATE, holding) => Holding::decode(holding).map(Self::Certificate),
            (&Self::FAULT, text) => Some(Self::Fault(String::from_utf8_lossy(text).into_owned())),
            (&Self::PASSED_OVER, text) => {
                Some(Self::PassedOver(String::from_utf8_lossy(text).into_owned()))
            }
            (_, []) => None,
            (&Self::OPENED, session) => Some(Self::Opened(session)),
            (&Self::SEALED, ticket) => Some(Self::Sealed(ticket)),
            (&Self::SIGNED, signature) => Some(Self::Signed(signature)),
            _ => None,
        }
    }
}

/// The keeper's first message: what it holds, or why it cannot serve.
#[derive(Debug, Eq, PartialEq)]
pub enum Introduction {
    /// A set-up fault, in words for the log.
    Fault(String),
    /// Keys and their certificate chains, examined and matching.
    Ready(Holdings),
}

/// The public side of all that a keeper holds.
#[derive(Debug, Default, Eq, PartialEq)]
pub struct Holdings {
    /// The certificates named by `--cert`, in that order.
    pub certificates: Vec<Holding>,
    /// Whether there are more by name (`--cert-dir`).
    pub has_directory: bool,
    /// Whether tickets can be sealed and opened.
    pub has_ticket_keys: bool,
    /// What is wrong, but stops nobody: lines for the log.
    pub warnings: Vec<String>,
}

/// The public side of one key.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Holding {
    /// The certificate chain in DER, our own certificate first.
    pub chain: Vec<Vec<u8>>,
    /// The host names that our own certificate is for.
    pub names: Vec<String>,
    /// An OCSP response in DER for stapling; empty if there is none.
    pub ocsp: Vec<u8>,
    /// Until when that is stapled, in seconds since 1970.
    pub ocsp_end: i64,
    /// What the key can sign with, best first.
    pub schemes: Vec<SignatureScheme>,
}

impl Introduction {
    const FAULT: u8 = 0;
    const READY: u8 = 1;

    /// The same for those who are to say nothing of them.
    #[must_use]
    pub fn without_warnings(mut self) -> Self {
        if let Self::Ready(holdings) = &mut self {
            holdings.warnings.clear();
        }
        self
    }

    /// The message as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Self::Fault(text) => {
                bytes.push(Self::FAULT);
                bytes.extend_from_slice(text.as_bytes());
            }
            Self::Ready(holdings) => {
                bytes.extend([
                    Self::READY,
                    u8::from(holdings.has_directory),
                    u8::from(holdings.has_ticket_keys),
                ]);
                put_list(&mut bytes, holdings.warnings.iter().map(String::as_bytes));
                put_list(
                    &mut bytes,
                    holdings.certificates.iter().map(Holding::encode),
                );
            }
        }
        bytes
    }

    /// The message in `bytes`, if it is one.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes.split_first()? {
            (&Self::FAULT, text) => Some(Self::Fault(String::from_utf8_lossy(text).into_owned())),
            (&Self::READY, rest) => {
                let (&has_directory, rest) = rest.split_first()?;
                let (&has_ticket_keys, mut rest) = rest.split_first()?;
                let holdings = Holdings {
                    warnings: take_list(&mut rest, text)?,
                    certificates: take_list(&mut rest, Holding::decode)?,
                    has_directory: has_directory != 0,
                    has_ticket_keys: has_ticket_keys != 0,
                };
                rest.is_empty().then_some(Self::Ready(holdings))
            }
            _ => None,
        }
    }
}

impl Holding {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        put_list(&mut bytes, &self.chain);
        put_list(&mut bytes, self.names.iter().map(String::as_bytes));
        put(&mut bytes, &self.ocsp);
        put(&mut bytes, &self.ocsp_end.to_be_bytes());
        put_list(
            &mut bytes,
            self.schemes
                .iter()
                .map(|scheme| u16::from(*scheme).to_be_bytes()),
        );
        bytes
    }

    fn decode(mut rest: &[u8]) -> Option<Self> {
        let holding = Self {
            chain: take_list(&mut rest, |bytes| Some(bytes.to_vec()))?,
            names: take_list(&mut rest, text)?,
            ocsp: take(&mut rest)?.to_vec(),
            ocsp_end: i64::from_be_bytes(take(&mut rest)?.try_into().ok()?),
            schemes: take_list(&mut rest, |bytes| {
                let number: &[u8; 2] = bytes.try_into().ok()?;
                Some(SignatureScheme::from(u16::from_be_bytes(*number)))
            })?,
        };
        // A key without a certificate is of no use to anybody.
        (rest.is_empty() && !holding.chain.is_empty()).then_some(holding)
    }
}

fn text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).ok().map(str::to_owned)
}

pub(super) fn put(bytes: &mut Vec<u8>, field: &[u8]) {
    // Longer ones cannot come: files are limited far below.
    let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
    bytes.extend(length.to_be_bytes());
    bytes.extend_from_slice(field);
}

/// A list is a field that contains a field for each item.
fn put_list<T: AsRef<[u8]>>(bytes: &mut Vec<u8>, items: impl IntoIterator<Item = T>) {
    let mut list = Vec::new();
    for item in items {
        put(&mut list, item.as_ref());
    }
    put(bytes, &list);
}

pub(super) fn take<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, tail) = rest.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let (field, tail) = tail.split_at_checked(length)?;
    *rest = tail;
    Some(field)
}

fn take_list<T>(rest: &mut &[u8], read: impl Fn(&[u8]) -> Option<T>) -> Option<Vec<T>> {
    let mut list = take(rest)?;
    let mut items = Vec::new();
    while !list.is_empty() {
        items.push(read(take(&mut list)?)?);
    }
    Some(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holding() -> Holding {
        Holding {
            chain: vec![vec![1; 700], vec![2; 3]],
            names: vec!["mail.example".into(), "*.example".into()],
            ocsp: vec![3; 40],
            ocsp_end: 1_780_272_000,
            schemes: vec![SignatureScheme::ED25519, SignatureScheme::RSA_PSS_SHA256],
        }
    }

    fn name() -> Option<HostName> {
        HostName::new("mail.example")
    }

    #[test]
    fn requests_survive_the_way() {
        for request in [
            Request::Begin(b""),
            Request::Begin(&[7; BINDING_LIMIT]),
            Request::Certificate(name().unwrap()),
            Request::Open {
                name: None,
                ticket: b"ticket",
            },
            Request::Open {
                name: name(),
                ticket: &[7; TICKET_LIMIT],
            },
            Request::Seal {
                name: name(),
                session: b"",
            },
        ] {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
    }

    #[test]
    fn requests_out_of_form_are_none() {
        let open = |length| {
            let ticket = vec![7; length];
            Request::Open {
                name: name(),
                ticket: &ticket,
            }
            .encode()
        };
        assert!(Request::decode(&open(TICKET_LIMIT)).is_some());
        assert_eq!(Request::decode(&open(TICKET_LIMIT + 1)), None);
        for bytes in [
            b"".as_slice(),
            &[0],
            &[9, 1, 2],
            &[1],
            b"\x01../../etc/shadow",
            b"\x01mail.example\0",
            b"\x01*.example",
            &[2],
            &[2, 5, b'a'],
            b"\x02\x02a/ticket",
            b"\x03\x03\xff\xfe\xfdx",
            &[4],
            &[4, 0, 4, 3],
            &[5; 1 + BINDING_LIMIT + 1],
        ] {
            assert_eq!(Request::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn replies_survive_the_way() {
        for reply in [
            Reply::Certificate(holding()),
            Reply::Fault("why".into()),
            Reply::Nothing,
            Reply::Opened(b"session"),
            Reply::PassedOver("why".into()),
            Reply::Refused,
            Reply::Sealed(b"ticket"),
            Reply::Signed(b"signature"),
        ] {
            assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
        for bytes in [
            b"".as_slice(),
            &[1],
            &[2],
            &[3],
            &[4],
            &[0, 0],
            &[5, 0],
            &[9, 9],
        ] {
            assert_eq!(Reply::decode(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn introductions_survive_the_way_and_nothing_less() {
        let ready = Introduction::Ready(Holdings {
            certificates: vec![
                holding(),
                Holding {
                    names: vec![],
                    ocsp: vec![],
                    ..holding()
                },
            ],
            has_directory: true,
            has_ticket_keys: true,
            warnings: vec!["a".into()],
        });
        let whole = ready.encode();
        assert_eq!(Introduction::decode(&whole), Some(ready));
        for length in 0..whole.len() {
            assert_eq!(Introduction::decode(&whole[..length]), None, "{length}");
        }
        let fault = Introduction::Fault("why".into());
        assert_eq!(Introduction::decode(&fault.encode()), Some(fault));
    }
}
