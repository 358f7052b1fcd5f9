//! The command line, read with clap and without: what the plain reader accepts, clap accepts with the same meaning. And the file
//! of settings, against a second, naive reading; and where it is looked for, against what clap says.
#![no_main]

use imap_tls::fuzzing::options::{listen_address, os, own_variables, read, sender, settings, size};
use libfuzzer_sys::fuzz_target;
use std::ffi::OsString;
use std::net::IpAddr;

fuzz_target!(|input: &[u8]| {
    let Some((&kind, rest)) = input.split_first() else {
        return;
    };
    match kind % 4 {
        0 | 1 => command_line(rest),
        2 => file_of_settings(rest),
        _ => values(rest),
    }
});

/// Words that a fuzzer would not find soon, by number; others are given as they are.
const WORDS: [&str; 64] = [
    "--accept-proxy",
    "--backend-fd",
    "--backend-user",
    "--backend-user-from-cert",
    "--cert",
    "--cert-dir",
    "--check",
    "--check=json",
    "--chroot",
    "--client-ca",
    "--client-cert",
    "--client-crl",
    "--connect",
    "--drain-timeout",
    "--group",
    "--handshake-timeout",
    "--help",
    "--keeper-user",
    "--key",
    "--listen",
    "--log",
    "--login-timeout",
    "--max-connections",
    "--memory-limit",
    "--min-tls",
    "--ocsp",
    "--proxy-from",
    "--quiet",
    "--settings",
    "--send-proxy",
    "--source-prefix",
    "--strict-sni",
    "--ticket-keys",
    "--tls",
    "--unprivileged",
    "--user",
    "--verbose",
    "--",
    "-v",
    "--require",
    "-h",
    "-qv",
    "imapd",
    "/etc/a.pem",
    "required",
    "optional",
    "implicit",
    "1.2",
    "1.3",
    "3",
    "30",
    "32M",
    "auto",
    "stderr",
    "syslog",
    "v1",
    "v2",
    "unix:/a",
    "192.0.2.0/24",
    "[::1]:143",
    "--settings=/s",
    "--tls=implicit",
    "request",
    "",
];

/// Words are separated by octets from 0xC0 on, which are words themselves; behind a 0xFF are variables.
fn command_line(input: &[u8]) {
    let mut parts = input.splitn(2, |&byte| byte == 0xff);
    let words = words(parts.next().unwrap_or_default());
    let arguments: Vec<OsString> = std::iter::once("imap-tls".into()).chain(words).collect();
    let mut variables: Vec<(&'static str, OsString)> = Vec::new();
    for part in parts.next().unwrap_or_default().split(|&byte| byte == 0xff) {
        let Some((&name, value)) = part.split_first() else {
            continue;
        };
        let name = own_variables()[usize::from(name) % own_variables().len()];
        let value: Vec<OsString> = self::words(value).collect();
        let value = value.join(os(b":"));
        variables.retain(|(other, _)| *other != name);
        variables.push((name, value));
    }
    if arguments.len() > 24 || variables.len() > 8 {
        return;
    }
    let both = read(&arguments, &variables);
    if both.plain.is_some() {
        assert_eq!(both.plain, both.clap, "{arguments:?} {variables:?}");
    }
    // Else the options would come from another file than the one that is named, or from one that is not.
    if both.clap.is_some() {
        assert_eq!(
            both.settings.0, both.settings.1,
            "{arguments:?} {variables:?}"
        );
    }
}

fn words(input: &[u8]) -> impl Iterator<Item = OsString> {
    let mut rest = input;
    std::iter::from_fn(move || {
        let &first = rest.first()?;
        if let Some(place) = first.checked_sub(0xc0) {
            rest = &rest[1..];
            return Some(WORDS[usize::from(place) % WORDS.len()].into());
        }
        let end = rest
            .iter()
            .position(|&byte| byte >= 0xc0)
            .unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        rest = after;
        // No argument and no variable can contain it.
        let word: Vec<u8> = word.iter().copied().filter(|&byte| byte != 0).collect();
        Some(os(&word).to_owned())
    })
}

fn file_of_settings(bytes: &[u8]) {
    let read = settings(bytes);
    assert_eq!(read, naive_settings(bytes));
    let Ok(settings) = read else { return };
    for (place, (name, value)) in settings.iter().enumerate() {
        assert!(!value.contains(&0) && !value.contains(&b'\n'));
        assert!(!name.is_empty() && !name.contains('='));
        assert!(
            settings[..place].iter().all(|(other, _)| other != name),
            "{name} twice"
        );
        assert!(is_known(name));
        assert_ne!(name, "IMAP_TLS_SETTINGS");
    }
}

/// Another's variable, one of ours, or Courier's that looks like one.
fn is_known(name: &str) -> bool {
    let is_another = !name.to_ascii_uppercase().starts_with("IMAP_TLS_");
    is_another || own_variables().contains(&name) || name == "IMAP_TLS_REQUIRED"
}

/// Line by line, as text that may be anything.
fn naive_settings(bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>, usize> {
    // A character for an octet, so that a string's own functions serve.
    let text: String = bytes.iter().map(|&byte| char::from(byte)).collect();
    let blank = [' ', '\t', '\r'];
    if bytes.starts_with("\u{feff}".as_bytes()) {
        return Err(1);
    }
    let mut found: Vec<(String, Vec<u8>)> = Vec::new();
    for (index, whole) in text.split('\n').enumerate() {
        let fault = Err(index + 1);
        let line = whole.trim_matches(blank);
        if line.contains('\r') {
            return fault;
        }
        if line.is_empty() || line.starts_with(['#', ';']) {
            if whole.ends_with('\\') {
                return fault;
            }
            continue;
        }
        let Some((name, value)) = line.split_once('=') else {
            return fault;
        };
        let is_word = name
            .chars()
            .all(|character| character.is_ascii_alphanumeric() || character == '_');
        let is_known = is_known(name) && name != "IMAP_TLS_SETTINGS";
        let value = value.trim_matches(blank);
        let octets: Vec<u8> = value
            .chars()
            .map(|character| u8::try_from(character).unwrap())
            .collect();
        let is_text = String::from_utf8(octets).is_ok();
        let has_control = value
            .chars()
            .any(|character| character.is_ascii_control() && character != '\t');
        if name.is_empty() || !is_word || !is_known || !is_text || has_control {
            return fault;
        }
        let escapes = ["\\\"", "\\$", "\\\\", "\\`"];
        let value = match value.chars().next() {
            Some('"') if escapes.iter().any(|escape| value.contains(escape)) => return fault,
            Some(quote @ ('"' | '\'')) => match value.split(quote).collect::<Vec<_>>()[..] {
                [_, quoted, ""] => quoted,
                _ => return fault,
            },
            _ if value.contains('\\') => return fault,
            _ => value,
        };
        let octets = value
            .chars()
            .map(|character| u8::try_from(character).unwrap());
        found.retain(|(other, _)| other != name);
        found.push((name.to_owned(), octets.collect()));
    }
    Ok(found)
}

fn values(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    assert_eq!(size(text), naive_size(text), "{text:?}");
    if let Some(shown) = listen_address(text) {
        assert_eq!(listen_address(&shown).as_ref(), Some(&shown));
    }
    let (network, address) = text.split_once(' ').unwrap_or((text, "192.0.2.7"));
    if let Ok(address) = address.parse::<IpAddr>() {
        let address = address.to_canonical();
        if let Some(includes) = sender(network, address) {
            assert_eq!(includes, naive_sender(network, address), "{text:?}");
        }
    }
}

fn naive_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.to_ascii_lowercase().strip_suffix(['k', 'm', 'g']) {
        Some(digits) => (
            digits.to_owned(),
            text.as_bytes()[text.len() - 1].to_ascii_lowercase(),
        ),
        None => (text.to_owned(), 0),
    };
    let unit: u128 = match unit {
        b'k' => 1024,
        b'm' => 1024 * 1024,
        b'g' => 1024 * 1024 * 1024,
        _ => 1,
    };
    let number: u64 = digits.parse().ok()?;
    u64::try_from(u128::from(number) * unit).ok()
}

/// By bits, written out as text.
fn naive_sender(network: &str, address: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(v4) => (true, format!("{:032b}", u32::from(v4))),
        IpAddr::V6(v6) => (false, format!("{:0128b}", u128::from(v6))),
    };
    let (base, length) = network.split_once('/').unwrap_or((network, "128"));
    let Ok(base) = base.parse::<IpAddr>() else {
        // The word for those without an address.
        return false;
    };
    let (is_v4, base) = bits(base.to_canonical());
    let (is_v4_too, address) = bits(address);
    let mut length: usize = length.parse().unwrap_or(0);
    if is_v4 && network.contains(':') && network.contains('/') {
        length = length.saturating_sub(96);
    }
    let length = length.min(base.len());
    is_v4 == is_v4_too && base[..length] == address[..length]
}
