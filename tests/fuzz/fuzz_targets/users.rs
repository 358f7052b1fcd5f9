//! /etc/passwd and /etc/group as the static build reads them, against a second, naive reading, and against the C library's.
#![no_main]

use imap_tls::fuzzing::users::{groups, is_name, memberships, user};
use libfuzzer_sys::fuzz_target;
use std::ffi::CStr;

fuzz_target!(|input: &[u8]| {
    let mut parts = input.splitn(2, |&byte| byte == b'\n');
    let key = parts.next().unwrap_or_default();
    let lines = parts.next().unwrap_or_default();
    let Ok(key) = std::str::from_utf8(key) else {
        return;
    };
    for by_number in [false, true] {
        let found = user(lines, key, by_number);
        assert_eq!(found, naive_user(lines, key, by_number));
        if let Some((name, uid, ..)) = &found {
            assert!(is_name(name) && (by_number || name == key));
            assert!(
                !by_number
                    || key == uid.to_string()
                    || key.trim_start_matches(['+', '0']) == uid.to_string()
                    || *uid == 0
            );
        }
    }
    if is_name(key) {
        assert!(!key.contains([':', '/', '\n', '\0']) && !key.starts_with(['-', '+']));
        library(lines, key);
    }
    assert_eq!(
        groups(lines, key, false),
        naive_groups(lines, |name, _| name == key.as_bytes())
    );
    assert_eq!(
        groups(lines, key, true),
        naive_groups(lines, |_, members| members
            .split(|&byte| byte == b',')
            .any(|member| member == key.as_bytes()))
    );
    let numbers = memberships(lines, key);
    if !numbers.is_empty() {
        let text = String::from_utf8_lossy(lines);
        assert_eq!(text.split_ascii_whitespace().next(), Some(key));
        assert!(numbers.len() < text.split_ascii_whitespace().count());
    }
});

type Found = (String, u32, u32, Vec<u8>, Vec<u8>);

fn fields(line: &[u8]) -> Vec<&[u8]> {
    line.split(|&byte| byte == b':').collect()
}

fn number(field: &[u8]) -> Option<u32> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn naive_user(lines: &[u8], key: &str, by_number: bool) -> Option<Found> {
    for line in lines.split(|&byte| byte == b'\n') {
        let fields = fields(line);
        let &[name, password, uid, gid, gecos, home, shell, ..] = &fields[..] else {
            continue;
        };
        let is_it = if by_number { uid } else { name } == key.as_bytes();
        let texts = (std::str::from_utf8(name), std::str::from_utf8(password));
        if let (true, (Ok(name), Ok(_)), Some(uid), Some(gid)) =
            (is_it, texts, number(uid), number(gid))
        {
            if is_name(name) && !gecos.contains(&0) {
                return Some((name.to_owned(), uid, gid, home.to_vec(), shell.to_vec()));
            }
        }
    }
    None
}

fn naive_groups(lines: &[u8], is_it: impl Fn(&[u8], &[u8]) -> bool) -> Vec<u32> {
    let lines = lines.split(|&byte| byte == b'\n').map(fields);
    let found = lines.filter_map(|fields| match fields[..] {
        [name, _, id, members, ..] if is_it(name, members) => number(id),
        _ => None,
    });
    found.collect()
}

/// What fgetpwent(3) makes of a line that we accept, if it is one that the library takes for a user, too.
///
/// The library is laxer (spaces in front, `+` and `-` lines of NIS, numbers with signs and none, missing fields), so only what it
/// finds in lines of seven plain fields is looked at.
fn library(lines: &[u8], key: &str) {
    for line in lines.split(|&byte| byte == b'\n') {
        let is_plain = |line: &[u8]| {
            let fields = fields(line);
            let is_text = line.iter().all(|&byte| byte > b' ' && byte < 0x7f);
            let is_number = |field: &[u8]| {
                !field.is_empty() && field.len() < 10 && field.iter().all(u8::is_ascii_digit)
            };
            is_text
                && fields.len() == 7
                && !line.starts_with(b"#")
                && is_number(fields[2])
                && is_number(fields[3])
        };
        if !is_plain(line) || line.len() > 1000 {
            continue;
        }
        let ours = user(line, key, false);
        let theirs = read_by_library(line);
        let theirs = theirs.filter(|found| found.0 == key);
        assert_eq!(ours, theirs, "{:?}", String::from_utf8_lossy(line));
    }
}

fn read_by_library(line: &[u8]) -> Option<Found> {
    let text = [line, b"\n"].concat();
    let mut entry = std::mem::MaybeUninit::<libc::passwd>::uninit();
    let mut buffer = [0_u8; 4096];
    let mut result = std::ptr::null_mut();
    // SAFETY: the stream reads `text`, which outlives it, and is closed here; the entry points into `buffer`, which outlives it;
    // it is looked at only if the call says that it is there.
    unsafe {
        let stream = libc::fmemopen(text.as_ptr().cast_mut().cast(), text.len(), c"r".as_ptr());
        if stream.is_null() {
            return None;
        }
        fgetpwent_r(
            stream,
            entry.as_mut_ptr(),
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            &raw mut result,
        );
        libc::fclose(stream);
        let entry = result.as_ref()?;
        let bytes = |pointer| CStr::from_ptr(pointer).to_bytes().to_vec();
        Some((
            String::from_utf8(bytes(entry.pw_name)).ok()?,
            entry.pw_uid,
            entry.pw_gid,
            bytes(entry.pw_dir),
            bytes(entry.pw_shell),
        ))
    }
}

unsafe extern "C" {
    fn fgetpwent_r(
        stream: *mut libc::FILE,
        entry: *mut libc::passwd,
        buffer: *mut libc::c_char,
        length: libc::size_t,
        result: *mut *mut libc::passwd,
    ) -> libc::c_int;
}
