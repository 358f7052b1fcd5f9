//! Users and groups by name or number.
//!
//! A program that is linked statically cannot load the modules that a C library asks for users elsewhere than in `/etc/passwd`
//! (LDAP, sssd; nsswitch.conf(5)). Such a build reads the files itself, and only for a name that is not in them runs getent(1),
//! which can. (musl would also ask nscd each time for a number that is nobody's.) Other builds leave it all to the C library.

mod getent;

use std::ffi::{CStr, CString, OsStr};
use std::os::unix::ffi::OsStrExt as _;

use nix::unistd::{Gid, Group, Uid, User};

use crate::error::reason;
use crate::sys::uninterrupted;

/// Whether this build is the static one.
const IS_STATIC: bool = cfg!(target_feature = "crt-static");

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// The user of this name.
///
/// # Errors
/// In words, if it cannot be told whether there is one.
pub(crate) fn user_by_name(name: &str) -> Result<Option<User>, String> {
    if !IS_STATIC {
        return uninterrupted(|| User::from_name(name)).map_err(|error| error.desc().to_owned());
    }
    if !may_be_name(name) {
        return Ok(None);
    }
    match find_user(&read(PASSWD)?, 0, name) {
        Some(user) => Ok(Some(user)),
        None => asked_user(0, name),
    }
}

/// The user of this number. With [`Elsewhere::Ignored`], a static build looks into `/etc/passwd` alone.
///
/// # Errors
/// In words, if it cannot be told whether there is one.
pub(crate) fn user_by_number(number: Uid, elsewhere: Elsewhere) -> Result<Option<User>, String> {
    if !IS_STATIC {
        return uninterrupted(|| User::from_uid(number)).map_err(|error| error.desc().to_owned());
    }
    let key = number.to_string();
    match find_user(&read(PASSWD)?, NUMBER, &key) {
        None if elsewhere == Elsewhere::Asked => asked_user(NUMBER, &key),
        found => Ok(found),
    }
}

/// Whether users are looked for in other places than `/etc/passwd`, which for a static build is a program to run.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Elsewhere {
    Asked,
    Ignored,
}

/// The group of this name.
///
/// # Errors
/// In words, if it cannot be told whether there is one.
pub(crate) fn group_by_name(name: &str) -> Result<Option<Gid>, String> {
    if !IS_STATIC {
        let found =
            uninterrupted(|| Group::from_name(name)).map_err(|error| error.desc().to_owned())?;
        return Ok(found.map(|group| group.gid));
    }
    if !may_be_name(name) {
        return Ok(None);
    }
    let is_it = |group: &GroupLine<'_>| group.name == name.as_bytes();
    match read(GROUP)?
        .split(is_newline)
        .filter_map(parse_group)
        .find(is_it)
    {
        Some(group) => Ok(Some(group.number)),
        None => {
            let output = getent::ask("group", name)?.unwrap_or_default();
            let mut groups = output.split(is_newline).filter_map(parse_group);
            Ok(groups.find(is_it).map(|group| group.number))
        }
    }
}

/// Gives this process the groups of a user, of which `group` is one; initgroups(3).
///
/// # Errors
/// In words, if the groups cannot be told or the kernel refuses them.
pub(crate) fn assume_groups(name: &CStr, group: Gid) -> Result<(), String> {
    if !IS_STATIC {
        return uninterrupted(|| nix::unistd::initgroups(name, group))
            .map_err(|error| error.desc().to_owned());
    }
    let name = name
        .to_str()
        .map_err(|_| "its name is not UTF-8".to_owned())?;
    let is_local = find_user(&read(PASSWD)?, 0, name).is_some();
    let mut groups = vec![group];
    let mut add = |number| {
        if !groups.contains(&number) {
            groups.push(number);
        }
    };
    let local = read(GROUP)?;
    let lines = local.split(is_newline).filter_map(parse_group);
    lines
        .filter(|group| group.has_member(name))
        .for_each(|group| add(group.number));
    if !is_local {
        let output = getent::ask("initgroups", name)?.unwrap_or_default();
        parse_memberships(&output, name).for_each(add);
    }
    nix::unistd::setgroups(&groups).map_err(|error| error.desc().to_owned())
}

/// Asks getent(1), which must answer with what was asked for: it takes numbers for names, and some modules ignore case.
fn asked_user(field: usize, key: &str) -> Result<Option<User>, String> {
    let output = getent::ask("passwd", key)?;
    Ok(output.and_then(|output| find_user(&output, field, key)))
}

/// The place of the number in a line of passwd(5).
const NUMBER: usize = 2;

/// The first user whose line has this key in this field. The others' lines are not parsed: there may be many.
fn find_user(lines: &[u8], field: usize, key: &str) -> Option<User> {
    lines
        .split(is_newline)
        .filter(|line| line.split(is_colon).nth(field) == Some(key.as_bytes()))
        .find_map(parse_user)
}

/// What a name cannot be in passwd(5), and what getent(1) would take for something else, is nobody's.
fn may_be_name(name: &str) -> bool {
    const LENGTH_LIMIT: usize = 256;
    !name.is_empty()
        && name.len() <= LENGTH_LIMIT
        && !name.starts_with(['-', '+'])
        && !name.contains([':', '/'])
        && !name.contains(char::is_control)
}

/// A file of lines; one that is not there has none.
fn read(path: &str) -> Result<Vec<u8>, String> {
    match std::fs::read(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot read {path}: {}", reason(&error)))
        }
        result => Ok(result.unwrap_or_default()),
    }
}

fn is_newline(octet: &u8) -> bool {
    *octet == b'\n'
}

fn is_colon(octet: &u8) -> bool {
    *octet == b':'
}

/// A line of passwd(5).
fn parse_user(line: &[u8]) -> Option<User> {
    let mut fields = line.split(is_colon);
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let name = text().filter(|name| may_be_name(name))?;
    let _password = text()?;
    let uid = Uid::from_raw(text()?.parse().ok()?);
    let gid = Gid::from_raw(text()?.parse().ok()?);
    let mut bytes = || fields.next();
    let (gecos, directory, shell) = (bytes()?, bytes()?, bytes()?);
    Some(User {
        name: name.to_owned(),
        passwd: CString::default(),
        uid,
        gid,
        gecos: CString::new(gecos).ok()?,
        dir: OsStr::from_bytes(directory).into(),
        shell: OsStr::from_bytes(shell).into(),
    })
}

/// A line of group(5).
struct GroupLine<'a> {
    name: &'a [u8],
    number: Gid,
    members: &'a [u8],
}

impl GroupLine<'_> {
    fn has_member(&self, name: &str) -> bool {
        let mut members = self.members.split(|octet| *octet == b',');
        members.any(|member| member == name.as_bytes())
    }
}

fn parse_group(line: &[u8]) -> Option<GroupLine<'_>> {
    let mut fields = line.split(is_colon);
    let (name, _password) = (fields.next()?, fields.next()?);
    let number = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    Some(GroupLine {
        name,
        number: Gid::from_raw(number),
        members: fields.next()?,
    })
}

/// What `getent initgroups NAME` prints: the name, and numbers.
fn parse_memberships<'a>(output: &'a [u8], name: &str) -> impl Iterator<Item = Gid> + use<'a> {
    let mut words = output
        .split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty());
    let is_it = words.next() == Some(name.as_bytes());
    words
        .filter(move |_| is_it)
        .filter_map(|word| std::str::from_utf8(word).ok()?.parse().ok())
        .map(Gid::from_raw)
}

/// For fuzz targets: the files' readers, which only the static build uses.
#[cfg(fuzzing)]
#[allow(missing_docs)]
pub mod door {
    use super::*;

    /// Name, numbers, directory and shell of the user of this name, or of this number.
    pub fn user(
        lines: &[u8],
        key: &str,
        by_number: bool,
    ) -> Option<(String, u32, u32, Vec<u8>, Vec<u8>)> {
        let field = if by_number { NUMBER } else { 0 };
        let user = find_user(lines, field, key)?;
        let bytes = |path: &std::path::Path| path.as_os_str().as_bytes().to_vec();
        Some((
            user.name,
            user.uid.as_raw(),
            user.gid.as_raw(),
            bytes(&user.dir),
            bytes(&user.shell),
        ))
    }

    /// The numbers of the groups that have this name, or this member.
    pub fn groups(lines: &[u8], name: &str, is_member: bool) -> Vec<u32> {
        let groups = lines.split(is_newline).filter_map(parse_group);
        let found = groups.filter(|group| {
            if is_member {
                group.has_member(name)
            } else {
                group.name == name.as_bytes()
            }
        });
        found.map(|group| group.number.as_raw()).collect()
    }

    pub fn memberships(output: &[u8], name: &str) -> Vec<u32> {
        parse_memberships(output, name).map(Gid::as_raw).collect()
    }

    pub fn is_name(name: &str) -> bool {
        may_be_name(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(line: &str) -> Option<(String, u32, u32, String, String)> {
        let user = parse_user(line.as_bytes())?;
        let text = |path: std::path::PathBuf| path.into_os_string().into_string().unwrap();
        Some((
            user.name,
            user.uid.as_raw(),
            user.gid.as_raw(),
            text(user.dir),
            text(user.shell),
        ))
    }

    #[test]
    fn lines_of_passwd_are_read_and_others_are_not() {
        assert_eq!(
            user("alice:x:1000:1001:Alice,,,:/home/alice:/bin/sh"),
            Some((
                "alice".to_owned(),
                1000,
                1001,
                "/home/alice".to_owned(),
                "/bin/sh".to_owned()
            ))
        );
        assert!(user("a:x:1:2:::").is_some());
        for line in [
            "",
            "alice",
            "alice:x:1000:1001:Alice",
            "alice:x:1000:1001:Alice:/home/alice",
            "alice:x:-1:1001::/:/bin/sh",
            "alice:x:4294967296:1001::/:/bin/sh",
            "alice:x::1001::/:/bin/sh",
            ":x:0:0::/:/bin/sh",
            "+::::::",
            "+alice:x:0:0::/:/bin/sh",
            "-alice:x:0:0::/:/bin/sh",
            "# alice",
        ] {
            assert_eq!(user(line), None, "{line}");
        }
    }

    #[test]
    fn what_is_no_name_is_not_asked_for() {
        for name in [
            "",
            "-n",
            "+x",
            "a:b",
            "a/b",
            "a\nb",
            "a\0b",
            &"a".repeat(257),
        ] {
            assert!(!may_be_name(name), "{name:?}");
        }
        for name in [
            "alice",
            "alice@example.org",
            "EXAMPLE\\alice",
            "élise",
            "a b",
        ] {
            assert!(may_be_name(name), "{name:?}");
        }
    }

    #[test]
    fn the_first_line_that_fits_counts() {
        let lines =
            b"\nroot:x:0:0:root:/root:/bin/sh\nbad line\nmail:x:8:8::/:/x\nmail:x:9:9::/:/x";
        let by_name = |name| Some(find_user(lines, 0, name)?.uid.as_raw());
        assert_eq!(
            (by_name("mail"), by_name("mai"), by_name("")),
            (Some(8), None, None)
        );
        let by_number = |number| Some(find_user(lines, NUMBER, number)?.name);
        assert_eq!(by_number("9").as_deref(), Some("mail"));
        assert_eq!((by_number("x"), by_number("")), (None, None));
    }

    #[test]
    fn members_are_whole_names() {
        let group = parse_group(b"mail:x:8:al,alice,b").unwrap();
        assert_eq!((group.name, group.number.as_raw()), (b"mail".as_slice(), 8));
        for (name, is_member) in [("alice", true), ("al", true), ("ali", false), ("", false)] {
            assert_eq!(group.has_member(name), is_member, "{name}");
        }
        assert!(parse_group(b"mail:x:8:").is_some_and(|group| !group.has_member("a")));
        for line in [b"mail:x:8".as_slice(), b"mail:x::a", b"mail:x:a:a", b""] {
            assert!(parse_group(line).is_none());
        }
    }

    #[test]
    fn memberships_are_those_of_the_name() {
        let of = |output: &[u8], name| {
            let groups = parse_memberships(output, name).map(Gid::as_raw);
            groups.collect::<Vec<_>>()
        };
        assert_eq!(
            of(b"alice                 100 27 1000\n", "alice"),
            [100, 27, 1000]
        );
        assert_eq!(of(b"alice 100", "bob"), [0; 0]);
        assert_eq!(of(b"alice", "alice"), [0; 0]);
        assert_eq!(of(b"", "alice"), [0; 0]);
    }

    /// Both ways know the users of this machine, and agree about them.
    #[test]
    fn the_files_say_what_the_library_says() {
        let lines = read(PASSWD).unwrap();
        let users: Vec<_> = lines.split(is_newline).filter_map(parse_user).collect();
        assert!(users.iter().any(|user| user.uid.is_root()));
        for user in users {
            let known = User::from_name(&user.name).unwrap().unwrap();
            assert_eq!(
                (known.uid, known.gid, known.dir, known.shell),
                (user.uid, user.gid, user.dir, user.shell)
            );
        }
    }
}
