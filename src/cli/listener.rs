//! The options of the listener: where it listens, and how much it takes on.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::arguments::parse_seconds;

/// How much the listener takes on, and what it says to those who come beyond that.
#[derive(Clone, Debug)]
pub(crate) struct Listening {
    pub(crate) addresses: Vec<ListenAddress>,
    /// How long connections may go on after SIGTERM.
    pub(crate) drain_timeout: Duration,
    pub(crate) max_connections: usize,
    pub(crate) max_per_source: usize,
    pub(crate) prefixes: Prefixes,
    pub(crate) refusal: Refusal,
    /// How often certificates, keys and whatever else is in files are read anew.
    pub(crate) renewal: Duration,
}

/// Where to listen.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum ListenAddress {
    Inet(SocketAddr),
    Unix(PathBuf),
}

/// How much of an address is one source, in bits.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Prefixes {
    pub(crate) v4: u8,
    pub(crate) v6: u8,
}

/// What a client is told that there is no room for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, clap::ValueEnum)]
pub(crate) enum Refusal {
    /// A BYE, except under implicit TLS
    Imap,
    /// Nothing
    Silent,
}

impl ListenAddress {
    /// Whether a socket of one is in the way of the other's, where `all` are listened on.
    pub(super) fn overlaps(&self, other: &Self, all: &[Self]) -> bool {
        let (Self::Inet(one), Self::Inet(other)) = (self, other) else {
            return self == other;
        };
        // Port 0 is another one for each socket.
        if one.port() != other.port() || one.port() == 0 {
            return false;
        }
        let port = one.port();
        let all_of_v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
        let has_own = all.contains(&Self::Inet(all_of_v4));
        let holds = |held: IpAddr, wanted: IpAddr| {
            // All of IPv6's are those of IPv4 as well, unless these have a socket of their own.
            held.is_unspecified()
                && (held.is_ipv4() == wanted.is_ipv4() || (held.is_ipv6() && !has_own))
        };
        let [first, second] = [one, other].map(|address| address.ip().to_canonical());
        one == other
            || (first == second && first.is_ipv4())
            || holds(first, second)
            || holds(second, first)
    }
}

impl FromStr for ListenAddress {
    type Err = String;

    /// `ADDR:PORT`, `PORT` for all addresses, or `unix:PATH`.
    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(path.into()));
        }
        let all = |port| SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
        let address = text.parse().or_else(|_| text.parse().map(all));
        address
            .map(Self::Inet)
            .map_err(|_| "neither ADDRESS:PORT, nor a port, nor unix:PATH".to_owned())
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Prefixes {
    type Err = String;

    /// `32,64`: bits of IPv4, bits of IPv6.
    fn from_str(text: &str) -> Result<Self, String> {
        let bits = |text: &str, most| text.parse().ok().filter(|bits| (1..=most).contains(bits));
        let parsed = text.split_once(',').and_then(|(v4, v6)| {
            Some(Self {
                v4: bits(v4, 32)?,
                v6: bits(v6, 128)?,
            })
        });
        parsed.ok_or_else(|| "not two numbers of bits such as 32,64".to_owned())
    }
}

/// Between the addresses in `IMAP_TLS_LISTEN` and the like, which have colons of their own.
pub(super) const ADDRESS_SEPARATOR: char = ' ';
/// More processes than any machine has.
const CONNECTIONS_MOST: usize = 1_000_000;

/// As clap knows them. None is in a command line that a superserver starts often: where one is, clap reads it.
#[derive(Debug, clap::Args)]
pub(super) struct ListenerArguments {
    /// Listen here; may be repeated
    #[arg(long, env = "IMAP_TLS_LISTEN", hide_env = true, value_name = "ADDR:PORT", help_heading = "Listener", value_delimiter = ADDRESS_SEPARATOR)]
    pub(super) listen: Vec<ListenAddress>,
    /// Connections in all [default: 1000]
    #[arg(long, env = "IMAP_TLS_MAX_CONNECTIONS", hide_env = true, default_value = "1000", hide_default_value = true, value_name = "N", help_heading = "Listener", value_parser = parse_count)]
    pub(super) max_connections: usize,
    /// Connections from one source [default: 20]
    #[arg(long, env = "IMAP_TLS_MAX_PER_SOURCE", hide_env = true, default_value = "20", hide_default_value = true, value_name = "N", help_heading = "Listener", value_parser = parse_count)]
    pub(super) max_per_source: usize,
    /// Bits that make a source [default: 32,64]
    #[arg(
        long,
        env = "IMAP_TLS_SOURCE_PREFIX",
        hide_env = true,
        default_value = "32,64",
        hide_default_value = true,
        value_name = "V4,V6",
        help_heading = "Listener"
    )]
    pub(super) source_prefix: Prefixes,
    /// imap or silent [default: imap]
    #[arg(
        long,
        env = "IMAP_TLS_REFUSAL",
        hide_env = true,
        value_enum,
        hide_possible_values = true,
        default_value = "imap",
        hide_default_value = true,
        value_name = "HOW",
        help_heading = "Listener"
    )]
    pub(super) refusal: Refusal,
    /// For connections, at the end [default: 30]
    #[arg(long, env = "IMAP_TLS_DRAIN_TIMEOUT", hide_env = true, default_value = "30", hide_default_value = true, value_name = "SECONDS", help_heading = "Listener", value_parser = parse_seconds)]
    pub(super) drain_timeout: Duration,
    /// Between looks at files [default: 3600]
    #[arg(long, env = "IMAP_TLS_RENEWAL", hide_env = true, default_value = "3600", hide_default_value = true, value_name = "SECONDS", help_heading = "Listener", value_parser = parse_seconds)]
    pub(super) renewal: Duration,
}

/// The listener's variables: an environment with one is for clap to read. (A test compares.)
pub(super) const LISTENER_VARIABLES: [&str; 7] = [
    "IMAP_TLS_DRAIN_TIMEOUT",
    "IMAP_TLS_LISTEN",
    "IMAP_TLS_MAX_CONNECTIONS",
    "IMAP_TLS_MAX_PER_SOURCE",
    "IMAP_TLS_REFUSAL",
    "IMAP_TLS_RENEWAL",
    "IMAP_TLS_SOURCE_PREFIX",
];

/// clap's defaults, without asking clap. (A test compares.)
impl Default for ListenerArguments {
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            max_connections: 1000,
            max_per_source: 20,
            source_prefix: Prefixes { v4: 32, v6: 64 },
            refusal: Refusal::Imap,
            drain_timeout: Duration::from_secs(30),
            renewal: Duration::from_secs(3600),
        }
    }
}

impl From<ListenerArguments> for Listening {
    fn from(arguments: ListenerArguments) -> Self {
        Self {
            addresses: arguments.listen,
            drain_timeout: arguments.drain_timeout,
            max_connections: arguments.max_connections,
            max_per_source: arguments.max_per_source,
            prefixes: arguments.source_prefix,
            refusal: arguments.refusal,
            renewal: arguments.renewal,
        }
    }
}

fn parse_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=CONNECTIONS_MOST) => Ok(count),
        _ => Err(format!("not a number from 1 to {CONNECTIONS_MOST}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_port_or_a_path() {
        for (text, expected) in [
            ("127.0.0.1:143", "127.0.0.1:143"),
            ("[::1]:993", "[::1]:993"),
            ("143", "[::]:143"),
            ("unix:/run/imap-tls/imap", "unix:/run/imap-tls/imap"),
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), expected);
        }
        for text in [
            "",
            "unix:",
            "localhost:143",
            "127.0.0.1",
            "::1:99999",
            "70000",
        ] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }

    #[test]
    fn all_addresses_of_a_port_are_each_of_them() {
        let overlap = |texts: &str| {
            let all: Vec<ListenAddress> =
                texts.split(' ').map(|text| text.parse().unwrap()).collect();
            let [one, other, ..] = all.as_slice() else {
                panic!("{texts}");
            };
            assert_eq!(one.overlaps(other, &all), other.overlaps(one, &all));
            one.overlaps(other, &all)
        };
        for texts in [
            "143 127.0.0.1:143",
            "143 [::1]:143",
            "143 [::1]:143 0.0.0.0:143",
            "0.0.0.0:143 127.0.0.1:143",
            "127.0.0.1:143 [::ffff:127.0.0.1]:143",
            "unix:/run/imap unix:/run//imap",
        ] {
            assert!(overlap(texts), "{texts}");
        }
        for texts in [
            "143 0.0.0.0:143",
            "143 993",
            "143 127.0.0.1:993",
            "0.0.0.0:143 [::1]:143",
            "127.0.0.1:0 [::]:0",
            "127.0.0.1:143 127.0.0.2:143",
            "[fe80::1%1]:143 [fe80::1%2]:143",
            "unix:/run/imap unix:/run/imaps",
            "143 unix:/143",
        ] {
            assert!(!overlap(texts), "{texts}");
        }
    }

    #[test]
    fn prefixes_are_two() {
        assert_eq!("24,56".parse(), Ok(Prefixes { v4: 24, v6: 56 }));
        for text in ["", "24", "0,64", "33,64", "32,129", "24,56,1"] {
            assert!(text.parse::<Prefixes>().is_err(), "{text}");
        }
    }
}
