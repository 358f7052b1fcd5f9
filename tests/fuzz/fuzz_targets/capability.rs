//! Rewriting capabilities: the same as a second, naive way of doing it; idempotent, with never more than one STARTTLS, and nothing
//! else of the line touched. Where `imap-codec` reads a list of capabilities, it reads the right one afterwards.
#![no_main]

mod naive_capability;

use imap_codec::decode::Decoder as _;
use imap_codec::imap_types::response::{Code, Data, Greeting, Response, Status};
use imap_codec::{GreetingCodec, ResponseCodec};
use imap_tls::imap::{ExternalAuth, StartTlsOffer, rewrite_capabilities};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &[u8]| {
    for offer in [StartTlsOffer::Offered, StartTlsOffer::Withdrawn] {
        for external in [ExternalAuth::Kept, ExternalAuth::Withdrawn] {
            check(line, offer, external);
        }
    }
});

fn check(line: &[u8], offer: StartTlsOffer, external: ExternalAuth) {
    let is_offered = offer == StartTlsOffer::Offered;
    let is_kept = external == ExternalAuth::Kept;
    let once = rewrite_capabilities(line, offer, external).into_owned();
    assert_eq!(once, naive_capability::rewrite(line, is_offered, is_kept));
    assert_eq!(
        rewrite_capabilities(&once, offer, external),
        once,
        "not idempotent"
    );
    compare_with_codec(line, &once, is_offered, is_kept);
    let (Some((start, end)), Some((new_start, new_end))) =
        (naive_capability::list(line), naive_capability::list(&once))
    else {
        assert_eq!(once, line, "no list, yet something has changed");
        return;
    };
    assert_eq!(
        (&once[..new_start], &once[new_end..]),
        (&line[..start], &line[end..])
    );
    let (old, new) = (words(&line[start..end]), words(&once[new_start..new_end]));
    let stays = |word: &&&[u8]| stays(word, is_kept);
    assert!(
        old.iter().filter(stays).eq(new.iter().filter(stays)),
        "others have come or gone"
    );
    let is_starttls = |word: &&&[u8]| word.eq_ignore_ascii_case(b"STARTTLS");
    assert_eq!(
        new.iter().filter(is_starttls).count(),
        usize::from(is_offered)
    );
    assert_eq!(
        new.iter().filter(stays).count() + usize::from(is_offered),
        new.len()
    );
}

/// Whether a word is not to come or go.
fn stays(word: &[u8], is_external_kept: bool) -> bool {
    let upper = word.to_ascii_uppercase();
    let is_external = upper == b"AUTH=EXTERNAL" && !is_external_kept;
    let is_bound = upper.starts_with(b"AUTH=") && upper[5..].ends_with(b"-PLUS");
    upper != b"STARTTLS" && !is_external && !is_bound
}

fn words(bytes: &[u8]) -> Vec<&[u8]> {
    let words = bytes.split(|byte| *byte <= b' ');
    words.filter(|word| !word.is_empty()).collect()
}

/// The list that a client reads, by the word of `imap-codec`, which reads by the grammar: one space between two capabilities, each
/// an atom. We rewrite more than it reads, since clients may read more, too; so only lines that it reads are compared.
fn compare_with_codec(line: &[u8], rewritten: &[u8], is_offered: bool, is_external_kept: bool) {
    let Some(before) = read(line) else { return };
    let mut expected: Vec<String> = before
        .into_iter()
        .filter(|name| stays(name.as_bytes(), is_external_kept))
        .collect();
    if expected.is_empty() && !is_offered {
        // A list without any capability is none for the codec. IMAP4rev1 is in every list (RFC 3501 section 7.2.1), which the
        // codec does not ask for.
        return;
    }
    let after = read(rewritten).expect("was a list, and is none any more");
    let mut kept: Vec<String> = after
        .iter()
        .filter(|name| *name != "STARTTLS")
        .cloned()
        .collect();
    // The codec may give a capability another letter case, but it does so each time.
    assert_eq!(kept, expected);
    kept.extend(is_offered.then(|| "STARTTLS".to_owned()));
    let mut after = after;
    expected.extend(is_offered.then(|| "STARTTLS".to_owned()));
    after.sort();
    expected.sort();
    assert_eq!(after, expected);
}

fn read(line: &[u8]) -> Option<Vec<String>> {
    let text = [line, b"\r\n"].concat();
    let of_code = |code: Option<Code<'_>>| match code {
        Some(Code::Capability(list)) => {
            Some(list.into_iter().map(|name| name.to_string()).collect())
        }
        _ => None,
    };
    if let Ok((b"", Greeting { code, .. })) = GreetingCodec::default().decode(&text) {
        return of_code(code);
    }
    match ResponseCodec::default().decode(&text) {
        Ok((b"", Response::Data(Data::Capability(list)))) => {
            Some(list.into_iter().map(|name| name.to_string()).collect())
        }
        Ok((b"", Response::Status(Status::Untagged(body)))) => of_code(body.code),
        Ok((b"", Response::Status(Status::Tagged(tagged)))) => of_code(tagged.body.code),
        Ok((b"", Response::Status(Status::Bye(bye)))) => of_code(bye.code),
        _ => None,
    }
}
