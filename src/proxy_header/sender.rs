//! Who may send a header (`--proxy-from`): a balancer by its address, or whoever has no address.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

/// One value of `--proxy-from`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Sender {
    /// Addresses of which the first `prefix` bits are those of `address`, whose other bits are zero.
    Network { address: IpAddr, prefix: u32 },
    /// A peer on a unix socket or a pipe, which has no address.
    Unix,
}

impl Sender {
    /// Whether it is meant. `None` is a peer on a unix socket or a pipe.
    pub(crate) fn includes(&self, peer: Option<IpAddr>) -> bool {
        match (self, peer) {
            (Self::Unix, None) => true,
            (Self::Network { address, prefix }, Some(peer)) => {
                address.is_ipv4() == peer.is_ipv4() && first_bits(peer, *prefix) == *address
            }
            (Self::Unix, Some(_)) | (Self::Network { .. }, None) => false,
        }
    }

    /// Whether it means everybody on the internet.
    pub(crate) fn is_everybody(&self) -> bool {
        matches!(self, Self::Network { prefix: 0, .. })
    }
}

fn width(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// The address with all bits cleared but the first `prefix`.
fn first_bits(address: IpAddr, prefix: u32) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix));
            IpAddr::V4((u32::from(v4) & mask.unwrap_or(0)).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128_u32.saturating_sub(prefix));
            IpAddr::V6((u128::from(v6) & mask.unwrap_or(0)).into())
        }
    }
}

/// `192.0.2.1`, `192.0.2.0/24`, `2001:db8::/32`, `unix`. Bits behind the prefix are a slip of the pen, so they are refused, as
/// Postfix does in `mynetworks`.
impl FromStr for Sender {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let Ok(address) = address.parse::<IpAddr>() else {
            return Err("not an address, a network such as 192.0.2.0/24, or unix".to_owned());
        };
        let width = width(address);
        let prefix = match prefix.map(str::parse::<u8>) {
            None => width,
            Some(Ok(bits)) if u32::from(bits) <= width => bits.into(),
            Some(_) => return Err(format!("the prefix is not a number from 0 to {width}")),
        };
        let network = first_bits(address, prefix);
        if network != address {
            return Err(format!(
                "{address} has bits behind the first {prefix}: is {network}/{prefix} meant?"
            ));
        }
        Ok(Self::canonical(address, prefix))
    }
}

impl Sender {
    /// Peers of an IPv6 socket that come by IPv4 are known by their IPv4 address, and so are networks of them.
    fn canonical(address: IpAddr, prefix: u32) -> Self {
        let mapped = match address {
            IpAddr::V6(v6) if prefix >= MAPPED_BITS => v6.to_ipv4_mapped(),
            _ => None,
        };
        match mapped {
            Some(v4) => Self::Network {
                address: v4.into(),
                prefix: prefix - MAPPED_BITS,
            },
            None => Self::Network { address, prefix },
        }
    }
}

/// The bits that all IPv4-mapped addresses have in common (RFC 4291 section 2.5.5.2).
const MAPPED_BITS: u32 = Ipv6Addr::BITS - std::net::Ipv4Addr::BITS;

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network { address, prefix } if *prefix == width(*address) => {
                write!(f, "{address}")
            }
            Self::Network { address, prefix } => write!(f, "{address}/{prefix}"),
            Self::Unix => f.write_str("unix"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn includes(sender: &str, peer: &str) -> bool {
        let sender: Sender = sender.parse().unwrap();
        sender.includes(Some(peer.parse().unwrap()))
    }

    #[test]
    fn a_prefix_is_compared_to_its_last_bit() {
        for (sender, inside, outside) in [
            ("192.0.2.1", "192.0.2.1", "192.0.2.0"),
            ("192.0.2.0/24", "192.0.2.255", "192.0.3.0"),
            ("192.0.2.128/25", "192.0.2.128", "192.0.2.127"),
            ("192.0.2.6/31", "192.0.2.7", "192.0.2.8"),
            ("128.0.0.0/1", "255.255.255.255", "127.255.255.255"),
            ("0.0.0.0/0", "255.0.0.1", "::"),
            ("::/0", "ffff::", "0.0.0.0"),
            ("2001:db8::/32", "2001:db8:ffff::1", "2001:db9::"),
            ("2001:db8::8/125", "2001:db8::f", "2001:db8::10"),
            ("::1", "::1", "0.0.0.1"),
            ("::ffff:192.0.2.0/120", "192.0.2.9", "192.0.3.9"),
            ("::ffff:192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ] {
            assert!(includes(sender, inside), "{sender} {inside}");
            assert!(!includes(sender, outside), "{sender} {outside}");
        }
    }

    #[test]
    fn only_unix_is_who_has_no_address() {
        let unix: Sender = "unix".parse().unwrap();
        assert!(unix.includes(None) && !unix.includes(Some("127.0.0.1".parse().unwrap())));
        for everybody in ["0.0.0.0/0", "::/0"] {
            let everybody: Sender = everybody.parse().unwrap();
            assert!(everybody.is_everybody() && !everybody.includes(None));
        }
    }

    #[test]
    fn a_slip_is_refused_and_what_is_good_is_printed_as_it_was() {
        for slip in [
            "",
            "balancer",
            "balancer.example",
            "Unix",
            "unix/1",
            "192.0.2",
            "192.0.2.1:143",
            "192.0.2.01",
            "192.0.2.0/33",
            "192.0.2.0/",
            "192.0.2.0/-1",
            "192.0.2.0/24/1",
            "192.0.2.1/24",
            "2001:db8::/129",
            "2001:db8::1/64",
            "[::1]",
            "fe80::1%eth0",
            " 192.0.2.1",
        ] {
            assert!(slip.parse::<Sender>().is_err(), "{slip}");
        }
        for text in ["192.0.2.1", "192.0.2.0/24", "2001:db8::/32", "::1", "unix"] {
            assert_eq!(text.parse::<Sender>().unwrap().to_string(), text);
        }
    }
}
