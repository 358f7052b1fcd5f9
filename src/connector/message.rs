//! What passes between the network process and the connector: an order of one octet, and one answer.

use crate::error::{EXIT_SETUP, EXIT_TEMPORARY};

/// What the connector is told to do.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Order {
    /// Connect one of the sockets.
    Connect,
    /// See what can be seen without connecting (`--check`).
    Examine,
}

/// What came of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Outcome {
    /// The socket with this number is connected, or, when nothing was to be connected, all is well; the text says to what.
    Done {
        socket: u8,
        text: String,
    },
    Failed {
        exit_status: u8,
        text: String,
    },
}

/// Octets of an order.
pub(super) const ORDER_LENGTH: usize = 1;
/// The longest answer.
pub(super) const ANSWER_LIMIT: usize = 512;

const CONNECT: u8 = 1;
const EXAMINE: u8 = 2;

impl Order {
    pub(super) fn encode(self) -> [u8; ORDER_LENGTH] {
        match self {
            Self::Connect => [CONNECT],
            Self::Examine => [EXAMINE],
        }
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [CONNECT] => Some(Self::Connect),
            [EXAMINE] => Some(Self::Examine),
            _ => None,
        }
    }
}

impl Outcome {
    /// One octet for the socket or the exit status, which never meet, then the text as far as it fits.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (first, text) = match self {
            Self::Done { socket, text } => (*socket, text),
            Self::Failed { exit_status, text } => (*exit_status, text),
        };
        let mut bytes = vec![first];
        bytes.extend(text.bytes().take(ANSWER_LIMIT - 1));
        bytes
    }

    /// Nothing but an answer with a first octet is one.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (&first, text) = bytes.split_first()?;
        let text = String::from_utf8_lossy(text).into_owned();
        Some(match first {
            EXIT_SETUP | EXIT_TEMPORARY => Self::Failed {
                exit_status: first,
                text,
            },
            socket => Self::Done { socket, text },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_answers_survive_the_way() {
        for order in [Order::Connect, Order::Examine] {
            assert_eq!(Order::decode(&order.encode()), Some(order));
        }
        for bytes in [&[][..], &[0], &[3], &[1, 1]] {
            assert_eq!(Order::decode(bytes), None);
        }
        for outcome in [
            Outcome::Done {
                socket: 1,
                text: "127.0.0.1:143".to_owned(),
            },
            Outcome::Failed {
                exit_status: 111,
                text: String::new(),
            },
        ] {
            assert_eq!(Outcome::decode(&outcome.encode()), Some(outcome));
        }
        assert_eq!(Outcome::decode(&[]), None);
    }

    #[test]
    fn an_answer_is_never_too_long() {
        let outcome = Outcome::Failed {
            exit_status: 100,
            text: "ä".repeat(ANSWER_LIMIT),
        };
        let bytes = outcome.encode();
        assert_eq!(bytes.len(), ANSWER_LIMIT);
        assert!(Outcome::decode(&bytes).is_some());
    }
}
