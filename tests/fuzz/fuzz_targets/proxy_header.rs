//! PROXY headers: any bytes are taken without a panic, in any pieces with the same result; what is asked for never goes beyond
//! the header; and a second, naive reading of the specification, which has all bytes at once, agrees.
#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use imap_tls::proxy_header::incoming::{Fault, LIMIT, Step, step};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};

fuzz_target!(|input: &[u8]| {
    let (cuts, bytes) = input.split_at(input.len().min(4));
    let at_once = feed(bytes, &[]);
    assert_eq!(at_once, feed(bytes, cuts));
    assert_eq!(at_once, feed(bytes, &[0]));
    match (&at_once, naive(bytes)) {
        (Read::Header(addresses, length), Naive::Header(expected, expected_length)) => {
            assert_eq!((addresses, *length), (&expected, expected_length));
            // What follows does not matter.
            assert_eq!(feed(&bytes[..*length], &[]), at_once);
        }
        (Read::Refused, Naive::Refused) | (Read::Unfinished, Naive::Unfinished) => {}
        (read, naive) => panic!("{read:?}, but {naive:?}"),
    }
});

/// What came of it.
#[derive(Debug, Eq, PartialEq)]
enum Read {
    /// With so many octets taken.
    Header(Option<(SocketAddr, SocketAddr)>, usize),
    Refused,
    Unfinished,
}

/// Reads as the program does; `cuts` are the most octets that arrive at a time, less one, over and over.
fn feed(bytes: &[u8], cuts: &[u8]) -> Read {
    let mut taken = 0;
    let mut cuts = cuts.iter().cycle();
    loop {
        match step(&bytes[..taken]) {
            Ok(Step::Complete(addresses)) => {
                let addresses = addresses.map(|addresses| (addresses.peer, addresses.local));
                return Read::Header(addresses, taken);
            }
            Ok(Step::Needs(needed)) => {
                assert!(needed > 0 && taken + needed <= LIMIT);
                let arrived = cuts.next().map_or(usize::MAX, |cut| 1 + usize::from(*cut));
                let more = needed.min(arrived).min(bytes.len() - taken);
                if more == 0 {
                    return Read::Unfinished;
                }
                taken += more;
            }
            Err(fault) => {
                assert!(!matches!(
                    fault,
                    Fault::CutOff | Fault::Silent | Fault::Slow
                ));
                return Read::Refused;
            }
        }
    }
}

#[derive(Debug)]
enum Naive {
    Header(Option<(SocketAddr, SocketAddr)>, usize),
    Refused,
    Unfinished,
}

fn naive(bytes: &[u8]) -> Naive {
    const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
    let is_start = |start: &[u8]| bytes.starts_with(start) || start.starts_with(bytes);
    if is_start(b"PROXY ") && !bytes.is_empty() {
        naive_v1(bytes)
    } else if is_start(&SIGNATURE) && !bytes.is_empty() {
        naive_v2(bytes)
    } else if bytes.is_empty() {
        Naive::Unfinished
    } else {
        Naive::Refused
    }
}

/// By words instead of a parser: a line is good if writing what was read gives the line again.
fn naive_v1(bytes: &[u8]) -> Naive {
    let Some(end) = bytes.iter().position(|byte| b"\r\n".contains(byte)) else {
        return if bytes.len() > 105 {
            Naive::Refused
        } else {
            Naive::Unfinished
        };
    };
    if end > 105 {
        return Naive::Refused;
    }
    match &bytes[end..] {
        b"\r" => return Naive::Unfinished,
        [b'\r', b'\n', ..] => {}
        _ => return Naive::Refused,
    }
    let line = &bytes[..end];
    if line == b"PROXY UNKNOWN" || line.starts_with(b"PROXY UNKNOWN ") {
        return Naive::Header(None, end + 2);
    }
    let Ok(line) = std::str::from_utf8(line) else {
        return Naive::Refused;
    };
    let words: Vec<&str> = line.split(' ').collect();
    let &["PROXY", family, source, destination, from, to] = &words[..] else {
        return Naive::Refused;
    };
    let port = |word: &str| {
        word.parse::<u16>()
            .ok()
            .filter(|port| port.to_string() == word)
    };
    let address = |word: &str| match family {
        "TCP4" => word.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        "TCP6" => word.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        _ => None,
    };
    match (address(source), address(destination), port(from), port(to)) {
        (Some(source), Some(destination), Some(from), Some(to)) => Naive::Header(
            Some((
                SocketAddr::new(source.to_canonical(), from),
                SocketAddr::new(destination.to_canonical(), to),
            )),
            end + 2,
        ),
        _ => Naive::Refused,
    }
}

fn naive_v2(bytes: &[u8]) -> Naive {
    let [command, family, high, low] = match bytes.get(12..16) {
        Some(fixed) => <[u8; 4]>::try_from(fixed).unwrap(),
        None => return Naive::Unfinished,
    };
    let length = usize::from(high) * 256 + usize::from(low);
    if command >> 4 != 2 || command & 15 > 1 || 16 + length > LIMIT {
        return Naive::Refused;
    }
    let Some(content) = bytes.get(16..16 + length) else {
        return Naive::Unfinished;
    };
    if command == 0x20 || family == 0 {
        return Naive::Header(None, 16 + length);
    }
    let room = match family {
        0x11 => 12,
        0x21 => 36,
        0x31 => 216,
        _ => return Naive::Refused,
    };
    let Some((addresses, mut tlvs)) = content.split_at_checked(room) else {
        return Naive::Refused;
    };
    while let Some((_, rest)) = tlvs.split_first() {
        let Some(&[high, low]) = rest.get(..2) else {
            return Naive::Refused;
        };
        let Some(rest) = rest.get(2 + usize::from(high) * 256 + usize::from(low)..) else {
            return Naive::Refused;
        };
        tlvs = rest;
    }
    let number = |at: usize| u16::from(addresses[at]) * 256 + u16::from(addresses[at + 1]);
    let v4 = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&addresses[at..at + 4]).unwrap());
    let v6 = |at: usize| {
        IpAddr::from(<[u8; 16]>::try_from(&addresses[at..at + 16]).unwrap()).to_canonical()
    };
    let pair = match family {
        0x11 => Some((
            SocketAddr::new(v4(0), number(8)),
            SocketAddr::new(v4(4), number(10)),
        )),
        0x21 => Some((
            SocketAddr::new(v6(0), number(32)),
            SocketAddr::new(v6(16), number(34)),
        )),
        _ => None,
    };
    Naive::Header(pair, 16 + length)
}

// From nothing a fuzzer would hardly come to a header: it begins with good ones.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    const SEEDS: [&[u8]; 5] = [
        b"....PROXY TCP4 192.0.2.7 198.51.100.1 4711 143\r\na",
        b"....PROXY TCP6 2001:db8::7 ::ffff:198.51.100.1 65535 993\r\na",
        b"....PROXY UNKNOWN a b\r\na",
        b"....\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x13123456789012\x20\0\x04abcdz",
        b"....\r\n\r\n\0\r\nQUIT\n\x21\x21\0\x28123456789012345678901234567890123456\x04\0\x01.z",
    ];
    let seed_bytes = SEEDS[usize::try_from(seed).unwrap_or(0) % SEEDS.len()];
    let size = if size < 8 && max_size >= seed_bytes.len() {
        data[..seed_bytes.len()].copy_from_slice(seed_bytes);
        seed_bytes.len()
    } else {
        size
    };
    fuzzer_mutate(data, size, max_size)
});
