//! Rewriting capabilities: idempotent, never more than one STARTTLS, and nothing else of the line touched.
#![no_main]

use imap_tls::imap::{ExternalAuth, StartTlsOffer, rewrite_capabilities};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| {
    for offer in [StartTlsOffer::Offered, StartTlsOffer::Withdrawn] {
        let once = rewrite_capabilities(line, offer, ExternalAuth::Withdrawn).into_owned();
        assert_eq!(rewrite_capabilities(&once, offer, ExternalAuth::Withdrawn), once, "not idempotent");
        let (Some(before), Some(after)) = (Parts::of(line), Parts::of(&once)) else {
            assert_eq!(once, line, "no list, yet something has changed");
            continue;
        };
        assert_eq!((after.head, after.tail), (before.head, before.tail));
        assert_eq!(after.kept(), before.kept());
        assert_eq!(
            after.starttls(),
            usize::from(offer == StartTlsOffer::Offered)
        );
    }
});

/// A line with a list of capabilities, taken apart.
struct Parts<'a> {
    head: &'a [u8],
    list: Vec<&'a [u8]>,
    tail: &'a [u8],
}

impl<'a> Parts<'a> {
    fn of(line: &'a [u8]) -> Option<Self> {
        let words: Vec<&[u8]> = words(line).take(2).collect();
        let after_words = match words.as_slice() {
            _ if line.starts_with(b"+") => 1,
            [_, second] => end_of(second, line),
            _ => return None,
        };
        if words.len() == 2 && words[0] == b"*" && words[1].eq_ignore_ascii_case(b"CAPABILITY") {
            return Some(Self::new(line, after_words, line.len()));
        }
        let known = [&b"OK"[..], b"NO", b"BAD", b"BYE", b"PREAUTH"];
        if !line.starts_with(b"+") && !known.iter().any(|name| words[1].eq_ignore_ascii_case(name))
        {
            return None;
        }
        let start = after_words + line[after_words..].iter().position(|&byte| byte > b' ')?;
        let end = start + line[start..].iter().position(|&byte| byte == b']')?;
        let code = line[start..end].strip_prefix(b"[")?;
        let name = self::words(code).next()?;
        let is_list = name.eq_ignore_ascii_case(b"CAPABILITY");
        is_list.then(|| Self::new(line, end_of(name, line), end))
    }

    fn new(line: &'a [u8], start: usize, end: usize) -> Self {
        Self {
            head: &line[..start],
            list: words(&line[start..end]).collect(),
            tail: &line[end..],
        }
    }

    /// The words that are not to come or go.
    fn kept(&self) -> Vec<&'a [u8]> {
        let stays = |word: &&&[u8]| {
            let upper = word.to_ascii_uppercase();
            let looks_at_tls = upper.starts_with(b"AUTH=")
                && (upper.ends_with(b"-PLUS") || upper == b"AUTH=EXTERNAL");
            upper != b"STARTTLS" && !looks_at_tls
        };
        self.list.iter().filter(stays).copied().collect()
    }

    fn starttls(&self) -> usize {
        let is_starttls = |word: &&&[u8]| word.eq_ignore_ascii_case(b"STARTTLS");
        self.list.iter().filter(is_starttls).count()
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes
        .split(|byte| *byte <= b' ')
        .filter(|word| !word.is_empty())
}

/// Where a part of a line ends in it.
fn end_of(part: &[u8], line: &[u8]) -> usize {
    part.as_ptr() as usize + part.len() - line.as_ptr() as usize
}
