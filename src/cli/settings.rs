//! The file of settings (`--settings`): variables that are not in the environment, in the form of systemd's `EnvironmentFile=`.
//!
//! systemd reads such a file itself and hands its variables on; xinetd and inetd do not. The listener cannot be handed new ones, so
//! it reads the file when it starts and again when it is told to reload.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use super::is_own_variable;
use crate::error::Error;
use crate::files::{Place, any_mode, read};
use crate::sys;

/// Where the option's value may come from, too.
pub(super) const SETTINGS_VARIABLE: &str = "IMAP_TLS_SETTINGS";
const OPTION: &str = "settings";
/// With which our variables begin.
pub(super) const OWN_PREFIX: &str = "IMAP_TLS_";
/// The longest file, in octets.
const LIMIT: u64 = 64 * 1024;
/// In UTF-8. It does not show, and makes a comment no comment.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The variables that are in the environment because the file set them, and their values.
pub(super) type Applied = Vec<(String, OsString)>;

/// Puts the file's settings into the environment, where the options are looked for, and takes away those that an earlier reading
/// put there (`applied`). What the superserver set wins.
///
/// # Errors
/// `Setup` if the file cannot be read; `Usage` if there is something in it that is none of our settings.
pub(super) fn apply(arguments: &[OsString], applied: &mut Applied) -> Result<(), Error> {
    take_away(applied);
    let Some(path) = find(arguments) else {
        return Ok(());
    };
    let path = Path::new(&path);
    let place = Place::new("settings", path, "--settings");
    let bytes = read(path, &place, LIMIT, any_mode)?;
    let settings = parse(&bytes).map_err(|(line, why)| {
        Error::Usage(format!(
            "line {line} of settings '{}' (--settings): {why}",
            path.display()
        ))
    })?;
    for (name, value) in settings {
        if std::env::var_os(&name).is_none() {
            let value = OsStr::from_bytes(value).to_owned();
            sys::set_variable(&name, &value);
            applied.push((name, value));
        }
    }
    Ok(())
}

/// Makes the environment what it was when `before` had been applied.
pub(super) fn put_back(applied: &mut Applied, before: Applied) {
    take_away(applied);
    for (name, value) in &before {
        sys::set_variable(name, value);
    }
    *applied = before;
}

fn take_away(applied: &mut Applied) {
    for (name, _) in applied.drain(..) {
        sys::unset_variable(&name);
    }
}

/// Options that no word follows as their value; a test compares with clap's.
const WITHOUT_VALUE: [&[u8]; 10] = [
    b"accept-proxy",
    b"backend-user-from-cert",
    b"check",
    b"help",
    b"keep",
    b"quiet",
    b"strict-sni",
    b"unprivileged",
    b"verbose",
    b"version",
];

/// The option's value, before anything else is read: it decides what there is to read. What follows BACKEND is for the backend,
/// whatever it looks like.
pub(super) fn find(arguments: &[OsString]) -> Option<OsString> {
    let mut words = arguments.iter().skip(1).map(|word| word.as_bytes());
    while let Some(word) = words.next() {
        match word {
            [b'-', b'-', option @ ..] if !option.is_empty() => {
                let mut parts = option.splitn(2, |byte| *byte == b'=');
                let name = parts.next().unwrap_or_default();
                let mut value = parts.next();
                if value.is_none() && !WITHOUT_VALUE.contains(&name) {
                    value = words.next();
                }
                if name == OPTION.as_bytes() {
                    return value.map(|path| OsString::from_vec(path.to_vec()));
                }
            }
            [b'-', letter, ..] if *letter != b'-' => {}
            _ => break,
        }
    }
    std::env::var_os(SETTINGS_VARIABLE).filter(|path| !path.is_empty())
}

/// A setting of Courier's imapd, for the backend as is every variable without our prefix.
const COURIERS: &str = "IMAP_TLS_REQUIRED";

/// Whether a variable bears our prefix, in whatever case, and is no setting.
fn is_stray(name: &[u8]) -> bool {
    let prefix = name.get(..OWN_PREFIX.len()).unwrap_or_default();
    prefix.eq_ignore_ascii_case(OWN_PREFIX.as_bytes())
        && !is_own_variable(name)
        && name != COURIERS.as_bytes()
}

fn no_such_setting(name: &str) -> String {
    format!("there is no setting {name}")
}

/// Looks for slips in the environment, as [`parse`] does in the file: what was meant would silently not hold. An empty value
/// is one too: somebody may mean by it what is not set, and somebody else no.
///
/// # Errors
/// `Usage`, which names the variable.
pub(super) fn check_environment(
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(), Error> {
    for (name, value) in variables {
        let name = name.to_string_lossy();
        if is_stray(name.as_bytes()) {
            return Err(Error::Usage(format!(
                "{}, which is in the environment",
                no_such_setting(&name)
            )));
        }
        if value.is_empty() && is_own_variable(name.as_bytes()) {
            return Err(Error::Usage(format!(
                "{name} is empty: give it a value, or take it away"
            )));
        }
    }
    Ok(())
}

type Setting<'a> = (String, &'a [u8]);

/// `NAME=VALUE`, `NAME="VALUE"` or `NAME='VALUE'`; nothing is expanded. Blank lines and those with `#` or `;` in front do not count,
/// nor does white space around a line, so that it may end as on Windows. The last value of a name is the one that holds.
///
/// systemd reads the same file, and knows escapes and lines that go on. What it would take for one is refused, so that the file
/// means one thing.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Setting<'_>>, (usize, String)> {
    if bytes.starts_with(BYTE_ORDER_MARK) {
        let why = "a byte order mark is in front of it, as some editors put there: take it away";
        return Err((1, why.to_owned()));
    }
    let mut settings: Vec<Setting<'_>> = Vec::new();
    for (number, whole) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let fault = |why: &str| Err((number, why.to_owned()));
        let line = trim(whole);
        if line.contains(&b'\r') {
            return fault("a carriage return is in the middle of it, where it ends for systemd");
        }
        if matches!(line.first(), None | Some(b'#' | b';')) {
            if whole.ends_with(b"\\") {
                return fault(
                    "a comment that ends with a backslash, which goes on in the next line for systemd before 254",
                );
            }
            continue;
        }
        let (name, value) = parse_line(line).map_err(|why| (number, why))?;
        settings.retain(|(other, _)| *other != name);
        settings.push((name, value));
    }
    Ok(settings)
}

fn parse_line(line: &[u8]) -> Result<Setting<'_>, String> {
    let mut parts = line.splitn(2, |byte| *byte == b'=');
    let (Some(name), Some(value)) = (parts.next(), parts.next()) else {
        return Err("not NAME=VALUE".to_owned());
    };
    let name = String::from_utf8_lossy(name).into_owned();
    let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    if name.is_empty() || !name.bytes().all(is_name) {
        return Err(format!("'{}' is no name", name.escape_debug()));
    }
    if is_stray(name.as_bytes()) || name == SETTINGS_VARIABLE {
        return Err(no_such_setting(&name));
    }
    let value = trim(value);
    // With one such value systemd passes over the setting, or over the whole file.
    let control = |byte: &u8| byte.is_ascii_control() && *byte != b'\t';
    // Without the value, which may be a password for the backend.
    if let Some(octet) = value.iter().find(|byte| control(byte)) {
        return Err(format!(
            "the value of {name} contains a control character (0x{octet:02x})"
        ));
    }
    if std::str::from_utf8(value).is_err() {
        return Err(format!("the value of {name} is not UTF-8"));
    }
    match unquote(value) {
        Ok(value) => Ok((name, value)),
        Err(why) => Err(format!("the value of {name} {why}")),
    }
}

/// Without what systemd takes for white space, which a form feed is not.
fn trim(mut bytes: &[u8]) -> &[u8] {
    while let [b' ' | b'\t' | b'\r', rest @ ..] | [rest @ .., b' ' | b'\t' | b'\r'] = bytes {
        bytes = rest;
    }
    bytes
}

/// What is between the quotes, if there are any.
///
/// # Errors
/// What systemd would read otherwise, and what to do.
fn unquote(value: &[u8]) -> Result<&[u8], &'static str> {
    const ESCAPE: &str = "has a backslash that systemd takes away: put the value between single quotes, where each stands for itself";
    let [quote @ (b'"' | b'\''), rest @ ..] = value else {
        return if value.contains(&b'\\') {
            Err(ESCAPE)
        } else {
            Ok(value)
        };
    };
    let is_escape = |pair: &[u8]| matches!(pair, [b'\\', b'"' | b'$' | b'\\' | b'`']);
    if *quote == b'"' && rest.windows(2).any(is_escape) {
        return Err(ESCAPE);
    }
    let mut parts = rest.splitn(2, |byte| byte == quote);
    match (parts.next(), parts.next()) {
        (Some(quoted), Some([])) => Ok(quoted),
        (_, None) => Err("begins with a quote that is not closed in its line"),
        _ => Err("goes on after its closing quote: a comment needs a line of its own"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_form_is_that_of_an_environment_file() {
        let text = b"# a comment\n\n; another\nIMAP_TLS_TLS=required\n IMAP_TLS_BACKEND=\"imapd -x\" \nIMAP_TLS_CERT='c d'\nIMAP_TLS_REQUIRED=0\nIMAP_TLS_TLS=optional\nIMAP_TLS_KEY=";
        let expected: [(String, &[u8]); 5] = [
            ("IMAP_TLS_BACKEND".into(), b"imapd -x"),
            ("IMAP_TLS_CERT".into(), b"c d"),
            ("IMAP_TLS_REQUIRED".into(), b"0"),
            ("IMAP_TLS_TLS".into(), b"optional"),
            ("IMAP_TLS_KEY".into(), b""),
        ];
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn what_systemd_would_read_otherwise_is_refused() {
        for (text, why) in [
            (r#"NAME=a\"#, "a backslash"),
            ("NAME=a\\\nIMAP_TLS_CERT=c", "a backslash"),
            (r"NAME=C:\x", "a backslash"),
            (r#"NAME="a\"b""#, "a backslash"),
            (r#"NAME="a\\b""#, "a backslash"),
            (r#"NAME="a\$b""#, "a backslash"),
            (r#"NAME="a" # comment"#, "goes on after its closing quote"),
            (r#"NAME="a"b"c""#, "goes on after its closing quote"),
            ("NAME='a''b'", "goes on after its closing quote"),
            ("NAME=\"a\nb\"", "not closed in its line"),
            (r#"NAME="a\"#, "not closed in its line"),
            ("NAME='a\"", "not closed in its line"),
            ("NAME='", "not closed in its line"),
            ("# a\\\nNAME=b", "a comment that ends with a backslash"),
            ("# a\rNAME=b", "a carriage return"),
        ] {
            let (line, text) = parse(text.as_bytes()).unwrap_err();
            assert_eq!(line, 1, "{text}");
            assert!(text.contains(why), "{text}");
        }
        for (text, value) in [
            (r#"NAME="a\.b 'c' #""#, r"a\.b 'c' #"),
            (r"NAME='a\\b\$'", r"a\\b\$"),
            (r#"NAME=a"b"#, r#"a"b"#),
            ("NAME=a # b", "a # b"),
            (r#"NAME="" "#, ""),
        ] {
            let settings = parse(text.as_bytes()).unwrap();
            let expected = [("NAME".to_owned(), value.as_bytes())];
            assert_eq!(settings, expected, "{text}");
        }
    }

    #[test]
    fn a_line_may_end_as_on_windows() {
        let text = b"# a comment\r\n\r\nIMAP_TLS_TLS=required\r\nIMAP_TLS_CERT=\"c d\"\r\nIMAP_TLS_KEY=k\r";
        let expected: [(String, &[u8]); 3] = [
            ("IMAP_TLS_TLS".into(), b"required"),
            ("IMAP_TLS_CERT".into(), b"c d"),
            ("IMAP_TLS_KEY".into(), b"k"),
        ];
        assert_eq!(parse(text).unwrap(), expected);
    }

    #[test]
    fn what_is_no_setting_is_refused_with_its_line() {
        for (text, line, why) in [
            (b"PATH=/x\nIMAP_TLS_CERTS=c".as_slice(), 2, "IMAP_TLS_CERTS"),
            (b"IMAP_TLS_SETTINGS=x", 1, "IMAP_TLS_SETTINGS"),
            (b"\n\nIMAP_TLS_CERT", 3, "NAME=VALUE"),
            (b"export IMAP_TLS_CERT=c", 1, "export"),
            (b"IMAP_TLS_CERT=a\0b", 1, "a control character (0x00)"),
            (b"IMAP_TLS_CERT=a\x0c", 1, "control character"),
            (b"IMAP_TLS_CERT='a\x7f'", 1, "control character"),
            (b"IMAP_TLS_CERT=\xe4", 1, "not UTF-8"),
            (b"\x0cIMAP_TLS_CERT=a", 1, "is no name"),
            (
                b"\nIMAP_TLS_BACKEND_USER = nobody",
                2,
                "IMAP_TLS_BACKEND_USER ",
            ),
            (b"IMAP_TLS_CERT2=c", 1, "IMAP_TLS_CERT2"),
            (b"imap_tls_cert=c", 1, "imap_tls_cert"),
            (b"\xef\xbb\xbf# a comment", 1, "byte order mark"),
        ] {
            let (number, text) = parse(text).unwrap_err();
            assert_eq!(number, line);
            assert!(text.contains(why), "{text}");
        }
    }

    #[test]
    fn slips_in_the_environment_are_refused_and_other_variables_are_not() {
        let check = |name: &str, value: &str| {
            let result =
                check_environment([("HOME".into(), "".into()), (name.into(), value.into())]);
            result.map_err(|error| error.to_string())
        };
        for (name, value) in [
            ("IMAP_TLS_STRICT_SNI", "no"),
            ("IMAP_TLS_REQUIRED", ""),
            ("IMAP_TLS", ""),
            ("PATH", ""),
        ] {
            assert_eq!(check(name, value), Ok(()), "{name}");
        }
        for variable in super::super::plain::own_variables() {
            let message = check(variable, "").unwrap_err();
            assert_eq!(
                message,
                format!("{variable} is empty: give it a value, or take it away")
            );
        }
        for name in ["IMAP_TLS_CERTS", "imap_tls_cert"] {
            let message = check(name, "c").unwrap_err();
            assert!(message.starts_with("there is no setting "), "{message}");
        }
    }

    #[test]
    fn the_option_is_found_before_the_others_are_read() {
        let find = |words: &[&str]| {
            let words: Vec<OsString> = ["imap-tls"].iter().chain(words).map(Into::into).collect();
            super::find(&words)
        };
        assert_eq!(find(&["--settings", "f", "imapd"]), Some("f".into()));
        assert_eq!(find(&["-v", "--settings=f"]), Some("f".into()));
        assert_eq!(find(&["--", "imapd", "--settings", "f"]), None);
        assert_eq!(find(&["--cert", "c", "--settings", "f"]), Some("f".into()));
        assert_eq!(find(&["--accept-proxy", "--settings=f"]), Some("f".into()));
    }

    #[test]
    fn what_is_an_argument_of_the_backend_is_no_option() {
        let find = |words: &[&str]| {
            let words: Vec<OsString> = ["imap-tls"].iter().chain(words).map(Into::into).collect();
            super::find(&words)
        };
        for words in [
            ["--cert", "c", "imapd", "--settings", "f"].as_slice(),
            &["imapd", "--settings=f"],
            &["-v", "-", "--settings=f"],
            &["--check", "imapd", "--settings=f"],
            &["--check=json", "imapd", "--settings=f"],
        ] {
            assert_eq!(find(words), None, "{words:?}");
        }
    }

    #[test]
    fn options_without_a_value_are_claps_own() {
        let command = super::super::command_line();
        let mut known: Vec<_> = command
            .get_arguments()
            .filter(|argument| {
                !argument.get_action().takes_values() || argument.is_require_equals_set()
            })
            .filter_map(|argument| argument.get_long())
            .map(str::as_bytes)
            .collect();
        known.push(b"version");
        known.sort_unstable();
        known.dedup();
        assert_eq!(known, WITHOUT_VALUE);
    }
}
