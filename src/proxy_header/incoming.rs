//! A PROXY header from a balancer, version 1 or 2: read to its last octet and not one further, since what follows is TLS or IMAP.
//!
//! "The specification" is proxy-protocol.txt of HAProxy. The crate `ppp` knows the format; what it takes too lightly (a `+` before a
//! port, datagrams, broken TLVs) or refuses although the specification does not (LOCAL and UNKNOWN with anything behind them) is
//! dealt with before it is asked.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};

use crate::activation::Addresses;
use crate::channel::{Channel, Received};
use crate::sandbox::Sandboxed;

/// What is to be done with a header of which so much is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// It is complete. `None`: the connection is the balancer's own, or it does not know whose it is.
    Complete(Option<Addresses>),
    /// At least this many octets are still to come: so many may be read without taking any of what follows the header.
    Needs(usize),
}

/// Why there is no header to be had.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fault {
    /// The connection ended within it.
    CutOff,
    /// It is not what the specification allows.
    Malformed(&'static str),
    /// What came begins like no header.
    Missing,
    /// It was not complete when the time was over.
    Slow,
    /// The connection ended before its first octet, as a health check does.
    Silent,
    /// It is longer than we read.
    TooLong,
    /// The system has a reason not to read it.
    Unreadable(Errno),
}

impl Fault {
    fn ended_after(read: &[u8]) -> Self {
        if read.is_empty() {
            Self::Silent
        } else {
            Self::CutOff
        }
    }
}

/// How long a balancer may take for the whole header, which it sends with, or before, the client's first octets.
pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(5);
/// The longest header that is read: 16 octets, at most 216 of addresses, and room for TLVs, of which none is used here.
pub const LIMIT: usize = 4096;
/// The longest version 1 header with its line end (section 2.1 of the specification).
const V1_LIMIT: usize = 107;
/// The shortest one: `PROXY UNKNOWN`.
const V1_LEAST: usize = 15;
const V1_START: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8] = ppp::v2::PROTOCOL_PREFIX;
/// Signature, version and command, family, length.
const V2_FIXED: usize = 16;

/// Reads a header, and nothing of what follows it.
///
/// Security: these are the first octets from the network, so whoever reads them has entered the sandbox.
///
/// # Errors
/// Without a header the connection cannot be served: whose would it be?
pub(crate) fn receive(
    channel: &Channel,
    deadline: Instant,
    _: &Sandboxed,
) -> Result<Option<Addresses>, Fault> {
    let mut header = Vec::new();
    loop {
        let needed = match step(&header)? {
            Step::Complete(addresses) => return Ok(addresses),
            Step::Needs(needed) => needed,
        };
        if Instant::now() >= deadline {
            return Err(Fault::Slow);
        }
        let length = header.len();
        header.resize(length + needed, 0);
        let received = channel.receive(header.get_mut(length..).unwrap_or_default());
        header.truncate(match received {
            Ok(Received::Bytes(count)) => length + count,
            _ => length,
        });
        match received {
            Ok(Received::Bytes(_)) => {}
            Ok(Received::Later) => wait_for(channel, deadline),
            Ok(Received::End) => return Err(Fault::ended_after(&header)),
            Err(error) => {
                return Err(match Errno::try_from(error) {
                    // HAProxy ends its health checks by a reset.
                    Ok(Errno::ECONNRESET) => Fault::ended_after(&header),
                    Ok(errno) => Fault::Unreadable(errno),
                    Err(_) => Fault::CutOff,
                });
            }
        }
    }
}

fn wait_for(channel: &Channel, deadline: Instant) {
    let Some(input) = channel.input() else { return };
    let mut poll = [PollFd::new(input, PollFlags::POLLIN)];
    let left = deadline.saturating_duration_since(Instant::now());
    // A spurious return is met by reading again.
    let _ = nix::poll::ppoll(&mut poll, Some(left.into()), None);
}

/// What to do when `read` was read, which holds no octet from after the header.
///
/// # Errors
/// When nothing that may still come makes it a header.
pub fn step(read: &[u8]) -> Result<Step, Fault> {
    if read.is_empty() {
        Ok(Step::Needs(V1_LEAST))
    } else if agrees(read, V1_START) {
        step_v1(read)
    } else if agrees(read, V2_SIGNATURE) {
        step_v2(read)
    } else {
        Err(Fault::Missing)
    }
}

/// Whether it begins with `start`, as far as it goes.
fn agrees(read: &[u8], start: &[u8]) -> bool {
    read.iter().zip(start).all(|(one, other)| one == other)
}

/// A line, of which the end is known only when it is there: its two octets may be read at any time before.
fn step_v1(read: &[u8]) -> Result<Step, Fault> {
    const LINE_END: Fault = Fault::Malformed("its line does not end with CR LF");
    let end = read
        .iter()
        .position(|octet| matches!(octet, b'\r' | b'\n'))
        .unwrap_or(read.len());
    if end + 2 > V1_LIMIT {
        return Err(Fault::TooLong);
    }
    match read.get(end..).unwrap_or_default() {
        [] => Ok(Step::Needs(V1_LEAST.saturating_sub(read.len()).max(2))),
        b"\r" => Ok(Step::Needs(1)),
        b"\r\n" => parse_v1(read).map(Step::Complete),
        _ => Err(LINE_END),
    }
}

fn parse_v1(line: &[u8]) -> Result<Option<Addresses>, Fault> {
    // "The receiver must ignore anything presented before the CRLF" (section 2.1).
    if line == b"PROXY UNKNOWN\r\n" || line.starts_with(b"PROXY UNKNOWN ") {
        return Ok(None);
    }
    const NOT_AS_WRITTEN: Fault =
        Fault::Malformed("it is not TCP4 or TCP6, two addresses and two ports");
    // Rust's own parser of numbers takes +143 too.
    if line.contains(&b'+') {
        return Err(NOT_AS_WRITTEN);
    }
    let header = ppp::v1::Header::try_from(line).map_err(|_| NOT_AS_WRITTEN)?;
    match header.addresses {
        ppp::v1::Addresses::Tcp4(ip) => Ok(Some(Addresses::canonical(
            (ip.source_address, ip.source_port).into(),
            (ip.destination_address, ip.destination_port).into(),
        ))),
        ppp::v1::Addresses::Tcp6(ip) => Ok(Some(Addresses::canonical(
            (ip.source_address, ip.source_port).into(),
            (ip.destination_address, ip.destination_port).into(),
        ))),
        ppp::v1::Addresses::Unknown => Err(NOT_AS_WRITTEN),
    }
}

/// Its length is among its first octets.
fn step_v2(read: &[u8]) -> Result<Step, Fault> {
    const LOCAL: u8 = 0x20;
    const PROXY: u8 = 0x21;
    let Some(&[command, family, high, low]) = read.get(V2_SIGNATURE.len()..V2_FIXED) else {
        return Ok(Step::Needs(V2_FIXED.saturating_sub(read.len())));
    };
    let length = V2_FIXED + usize::from(u16::from_be_bytes([high, low]));
    if !matches!(command, LOCAL | PROXY) {
        return Err(Fault::Malformed(
            "its version is not 2, or its command neither LOCAL nor PROXY",
        ));
    }
    if length > LIMIT {
        return Err(Fault::TooLong);
    }
    match length.checked_sub(read.len()) {
        // "The receiver must discard the protocol block including the family" (section 2.2).
        Some(0) if command == LOCAL => Ok(Step::Complete(None)),
        Some(0) => parse_v2(read, family).map(Step::Complete),
        Some(needed) => Ok(Step::Needs(needed)),
        None => Err(Fault::Malformed("something follows it")),
    }
}

fn parse_v2(header: &[u8], family: u8) -> Result<Option<Addresses>, Fault> {
    const UNSPECIFIED: u8 = 0x00;
    const TCP_OVER_IPV4: u8 = 0x11;
    const TCP_OVER_IPV6: u8 = 0x21;
    const UNIX_STREAM: u8 = 0x31;
    match family {
        UNSPECIFIED => return Ok(None),
        TCP_OVER_IPV4 | TCP_OVER_IPV6 | UNIX_STREAM => {}
        _ => return Err(Fault::Malformed("its addresses are not those of a stream")),
    }
    let parsed = ppp::v2::Header::try_from(header)
        .map_err(|_| Fault::Malformed("it is too short for its addresses"))?;
    // Security: none of them is used. What a balancer says about TLS is not about the session that we are going to have.
    if parsed.tlvs().any(|tlv| tlv.is_err()) {
        return Err(Fault::Malformed("its TLVs do not end where it ends"));
    }
    match parsed.addresses {
        ppp::v2::Addresses::IPv4(ip) => Ok(Some(Addresses::canonical(
            (ip.source_address, ip.source_port).into(),
            (ip.destination_address, ip.destination_port).into(),
        ))),
        ppp::v2::Addresses::IPv6(ip) => Ok(Some(Addresses::canonical(
            (ip.source_address, ip.source_port).into(),
            (ip.destination_address, ip.destination_port).into(),
        ))),
        // A client on a unix socket of the balancer's machine: no address that would tell us anything.
        ppp::v2::Addresses::Unix(_) | ppp::v2::Addresses::Unspecified => Ok(None),
    }
}

impl Addresses {
    /// The client's address and that which it connected to, as everything else here knows them: IPv4 in IPv6 as IPv4.
    fn canonical(peer: SocketAddr, local: SocketAddr) -> Self {
        let canonical =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        Self {
            local: canonical(local),
            peer: canonical(peer),
        }
    }
}

/// Never an octet of what was read: what has no header in front may begin with a password.
impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CutOff => f.write_str("it is cut off by the end of the connection"),
            Self::Malformed(how) => f.write_str(how),
            Self::Missing => f.write_str(
                "there is none: does the balancer send it (send-proxy, send-proxy-v2 in HAProxy)?",
            ),
            Self::Slow => f.write_str("it is not complete in time"),
            Self::Silent => f.write_str("the connection ended without a word"),
            Self::TooLong => write!(
                f,
                "it is longer than {V1_LIMIT} octets in version 1, or {LIMIT} in version 2"
            ),
            Self::Unreadable(errno) => write!(f, "it cannot be read: {}", errno.desc()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    const SIGNATURE: &str = "\r\n\r\n\0\r\nQUIT\n";

    fn v2(rest: &[u8]) -> Vec<u8> {
        [SIGNATURE.as_bytes(), rest].concat()
    }

    fn addresses(peer: &str, local: &str) -> Option<Addresses> {
        let [local, peer] = [local, peer].map(|address| address.parse().unwrap());
        Some(Addresses { local, peer })
    }

    /// What comes of these bytes when they arrive in pieces of this size, and how many octets of them were taken.
    fn feed(bytes: &[u8], piece: usize) -> (Result<Option<Addresses>, Fault>, usize) {
        let mut taken = 0;
        loop {
            match step(&bytes[..taken]) {
                Ok(Step::Complete(addresses)) => return (Ok(addresses), taken),
                Ok(Step::Needs(needed)) => {
                    assert!(needed > 0);
                    if taken == bytes.len() {
                        return (Err(Fault::CutOff), taken);
                    }
                    taken = bytes.len().min(taken + needed.min(piece));
                }
                Err(fault) => return (Err(fault), taken),
            }
        }
    }

    fn good() -> Vec<(Vec<u8>, Option<Addresses>)> {
        let v4 = addresses("192.0.2.7:4711", "198.51.100.1:143");
        let v6 = addresses("[2001:db8::7]:65535", "[2001:db8::1]:993");
        let v4_bytes = b"\xc0\0\x02\x07\xc6\x33\x64\x01\x12\x67\0\x8f";
        let v6_bytes = b"\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x07\x20\x01\x0d\xb8\0\0\0\0\0\0\0\0\0\0\0\x01\xff\xff\x03\xe1";
        let mapped = b"\0\0\0\0\0\0\0\0\0\0\xff\xff\xc0\0\x02\x07\0\0\0\0\0\0\0\0\0\0\xff\xff\xc6\x33\x64\x01\x12\x67\0\x8f";
        let tls = b"\x20\0\x0f\x01\0\0\0\0\x21\0\x07TLSv1.3";
        let longest = "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255";
        vec![
            (
                b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 143\r\n".to_vec(),
                v4,
            ),
            (
                b"PROXY TCP6 2001:db8::7 2001:DB8:0:0::1 65535 993\r\n".to_vec(),
                v6,
            ),
            (
                b"PROXY TCP6 ::ffff:192.0.2.7 ::ffff:198.51.100.1 4711 143\r\n".to_vec(),
                v4,
            ),
            (
                b"PROXY TCP6 :: :: 0 0\r\n".to_vec(),
                addresses("[::]:0", "[::]:0"),
            ),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN \r\n".to_vec(), None),
            (b"PROXY UNKNOWN a b c d e f g h \xff\0\r\n".to_vec(), None),
            (
                format!("PROXY UNKNOWN {longest} {longest}\r\n").into_bytes(),
                None,
            ),
            (v2(&[b"\x21\x11\0\x0c", &v4_bytes[..]].concat()), v4),
            (v2(&[b"\x21\x21\0\x24", &v6_bytes[..]].concat()), v6),
            (v2(&[b"\x21\x21\0\x24", &mapped[..]].concat()), v4),
            (v2(&[b"\x21\x11\0\x1e", &v4_bytes[..], tls].concat()), v4),
            (
                v2(&[
                    b"\x21\x11\x0f\xf0",
                    &v4_bytes[..],
                    b"\x04\x0f\xe1",
                    &[0; 0xfe1],
                ]
                .concat()),
                v4,
            ),
            (v2(b"\x20\0\0\0"), None),
            (v2(b"\x20\x11\0\x02xx"), None),
            (v2(b"\x20\xff\0\x02xx"), None),
            (v2(b"\x21\0\0\0"), None),
            (v2(b"\x21\0\0\x03abc"), None),
            (v2(&[b"\x21\x31\0\xd8", &[b'/'; 216][..]].concat()), None),
        ]
    }

    #[test]
    fn a_header_is_read_to_its_end_and_no_further_in_any_pieces() {
        for (header, expected) in good() {
            for rest in ["", "\r\n", "* a LOGIN", "PROXY UNKNOWN\r\n"] {
                let bytes = [&header, rest.as_bytes()].concat();
                for piece in [1, 2, 3, 7, 4096] {
                    let shown = String::from_utf8_lossy(&bytes).into_owned();
                    assert_eq!(
                        feed(&bytes, piece),
                        (Ok(expected), header.len()),
                        "{shown:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_header_that_is_cut_off_is_none() {
        for (header, _) in good() {
            for length in 0..header.len() {
                let (result, taken) = feed(&header[..length], 5);
                assert_eq!((result, taken), (Err(Fault::CutOff), length));
            }
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        for text in [
            "GET / HTTP/1.1\r\n\r\n",
            "a LOGIN u sekret\r\n",
            "\x16\x03\x01\x02\0\x01\0\x01\x7c\x03\x03",
            "proxy TCP4 192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXYTCP4 192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXZ UNKNOWN\r\n",
            " PROXY UNKNOWN\r\n",
            "\nPROXY UNKNOWN\r\n",
            "\r\n\r\n\0\r\nQUIT\r\x21\x11\0\x0c",
            "\r\nPROXY UNKNOWN\r\n",
        ] {
            assert_eq!(
                feed(text.as_bytes(), 4096).0,
                Err(Fault::Missing),
                "{text:?}"
            );
        }
    }

    fn is_malformed(bytes: &[u8]) -> bool {
        let results = [1, 2, 15, 4096].map(|piece| feed(bytes, piece).0);
        let [first, ..] = results;
        assert!(results.iter().all(|result| *result == first), "{results:?}");
        matches!(first, Err(Fault::Malformed(_)))
    }

    #[test]
    fn version_1_is_taken_as_it_is_written_in_the_specification() {
        for line in [
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 143\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 143\r\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 143\r ",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 143 \r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711  143\r\n",
            "PROXY  TCP4 192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXY TCP4  192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXY\tTCP4 192.0.2.7 198.51.100.1 4711 143\r\n"
                .replace('\t', " \t")
                .as_str(),
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711\r\n",
            "PROXY TCP4 192.0.2.7 4711 143\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 143 144\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 04711 143\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 00\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 +4711 143\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 4711 +0143\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 -1 143\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 65536 143\r\n",
            "PROXY TCP4 192.0.2.7 198.51.100.1 0x12 143\r\n",
            "PROXY TCP4 192.0.2.007 198.51.100.1 4711 143\r\n",
            "PROXY TCP4 192.0.2.256 198.51.100.1 4711 143\r\n",
            "PROXY TCP4 192.0.2 198.51.100.1 4711 143\r\n",
            "PROXY TCP4 ::1 ::1 4711 143\r\n",
            "PROXY TCP6 192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXY TCP6 fe80::1%eth0 ::1 4711 143\r\n",
            "PROXY TCP6 [::1] ::1 4711 143\r\n",
            "PROXY TCP6 ::1::2 ::1 4711 143\r\n",
            "PROXY TCP5 192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXY tcp4 192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXY UDP4 192.0.2.7 198.51.100.1 4711 143\r\n",
            "PROXY UNIX /a /b\r\n",
            "PROXY unknown\r\n",
            "PROXY UNKNOWN2\r\n",
            "PROXY UNKNOW\r\n",
            "PROXY \r\n",
            "PROXY TCP4\r\n",
            "PROXY TCP4 a\u{7f}b 198.51.100.1 4711 143\r\n",
            "PROXY TCP4 192.0.2.7\0 198.51.100.1 4711 143\r\n",
            "PROXY TCP4 \u{e4} 198.51.100.1 4711 143\r\n",
        ] {
            assert!(is_malformed(line.as_bytes()), "{line:?}");
        }
    }

    #[test]
    fn version_2_is_taken_as_it_is_written_in_the_specification() {
        for (name, rest) in [
            ("version 1", &b"\x11\x11\0\0"[..]),
            ("version 3", b"\x31\x11\0\0"),
            ("command 2", b"\x22\x11\0\0"),
            ("no room for IPv4 addresses", b"\x21\x11\0\x0b12345678901"),
            ("no room for IPv6 addresses", b"\x21\x21\0\x0c123456789012"),
            ("no room for unix addresses", b"\x21\x31\0\x0c123456789012"),
            ("datagrams over IPv4", b"\x21\x12\0\x0c123456789012"),
            ("datagrams over IPv6", b"\x21\x22\0\0"),
            ("no protocol", b"\x21\x10\0\x0c123456789012"),
            ("no family, but a stream", b"\x21\x01\0\0"),
            ("family 4", b"\x21\x41\0\0"),
            ("protocol 3", b"\x21\x13\0\x0c123456789012"),
            ("half a TLV", b"\x21\x11\0\x0e123456789012\x04\0"),
            (
                "a TLV longer than the header",
                b"\x21\x11\0\x0f123456789012\x04\0\x01",
            ),
            (
                "the second TLV too long",
                b"\x21\x11\0\x12123456789012\x04\0\0\x20\xff\xff",
            ),
        ] {
            assert!(is_malformed(&v2(rest)), "{name}");
        }
    }

    #[test]
    fn a_header_beyond_the_limits_is_refused_before_it_is_read() {
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        assert_eq!(feed(long.as_bytes(), 4096).0, Err(Fault::TooLong));
        let endless = "PROXY TCP4 ".to_owned() + &"1".repeat(5000);
        let (result, taken) = feed(endless.as_bytes(), 4096);
        assert_eq!(result, Err(Fault::TooLong));
        assert!(taken <= V1_LIMIT, "{taken}");
        for command in [b"\x21\x11\x0f\xf1", b"\x20\0\xff\xff"] {
            let (result, taken) = feed(&v2(command), 4096);
            assert_eq!((result, taken), (Err(Fault::TooLong), V2_FIXED));
        }
    }

    /// What `receive` makes of it, and what is left for whoever reads next.
    fn receive_from(bytes: &[u8]) -> (Result<Option<Addresses>, Fault>, Vec<u8>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        drop(theirs);
        let channel = Channel::new(ours.into(), None);
        let deadline = Instant::now() + Duration::from_secs(20);
        let result = receive(&channel, deadline, &Sandboxed::pretended());
        let mut rest = vec![0; 100];
        let Ok(Received::Bytes(count)) = channel.receive(&mut rest) else {
            return (result, Vec::new());
        };
        rest.truncate(count);
        (result, rest)
    }

    #[test]
    fn what_follows_the_header_stays_in_the_socket() {
        for (header, expected) in good() {
            let (result, rest) = receive_from(&[&header[..], b"a NOOP\r\n"].concat());
            assert_eq!(
                (result, rest.as_slice()),
                (Ok(expected), &b"a NOOP\r\n"[..])
            );
        }
    }

    #[test]
    fn an_end_and_a_silence_are_told_apart() {
        assert_eq!(receive_from(b"").0, Err(Fault::Silent));
        assert_eq!(receive_from(b"PROXY TCP4 ").0, Err(Fault::CutOff));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Channel::new(ours.into(), None);
        let deadline = Instant::now() + Duration::from_millis(30);
        let result = receive(&channel, deadline, &Sandboxed::pretended());
        assert_eq!(result, Err(Fault::Slow));
        assert!(Instant::now() >= deadline);
        drop(theirs);
    }

    #[test]
    fn a_pipe_is_read_as_a_socket_is() {
        let (input, output) = nix::unistd::pipe().unwrap();
        nix::unistd::write(&output, b"PROXY UNKNOWN\r\na NOOP\r\n").unwrap();
        let channel = Channel::new(input, Some(output));
        let deadline = Instant::now() + Duration::from_secs(20);
        assert_eq!(
            receive(&channel, deadline, &Sandboxed::pretended()),
            Ok(None)
        );
        let mut rest = [0; 100];
        assert_eq!(channel.receive(&mut rest).unwrap(), Received::Bytes(8));
    }

    #[test]
    fn a_fault_is_one_bounded_line_without_a_word_of_the_peers() {
        for fault in [
            Fault::CutOff,
            Fault::Missing,
            Fault::Silent,
            Fault::Slow,
            Fault::TooLong,
        ] {
            let text = fault.to_string();
            assert!(text.len() < 100 && !text.contains('\n'), "{text}");
        }
    }
}
