//! Ticket keys on disk, as simultaneous and successive keepers meet them.
#![allow(clippy::print_stderr, reason = "a test that cannot run says so")]

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{geteuid, mkdtemp, mkfifo};

use super::{
    CLOCK_TOLERANCE_SECONDS, KEYS_LIMIT, LIFETIME_SECONDS, Loaded, OPENING_SECONDS,
    SEALING_SECONDS, SURE_SECONDS, TicketKeys,
};

const NOW: u64 = 1_800_000_000;
const LINE: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f\n";

/// A directory that is gone after the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        Self(mkdtemp(&std::env::temp_dir().join("imap-tls-tickets.XXXXXX")).unwrap())
    }

    /// A place for ticket keys, where there is nothing yet.
    fn place(&self) -> PathBuf {
        self.0.join("ticket-keys")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// Loads for one connection.
fn load(path: &Path, now: u64) -> Loaded {
    super::load(path, now, 0)
}

/// Loads for a listener, where nothing may be wrong.
fn keys_for(path: &Path, now: u64, sealing: u64) -> TicketKeys {
    let Loaded { keys, warnings } = super::load(path, now, sealing);
    assert_eq!(warnings, [""; 0]);
    keys.unwrap()
}

/// Loads where nothing may be wrong.
fn keys(path: &Path, now: u64) -> TicketKeys {
    keys_for(path, now, 0)
}

/// Loads where one thing is to be told.
fn warned(path: &Path, now: u64, expected: &str) -> Option<TicketKeys> {
    let Loaded { keys, warnings } = load(path, now);
    let [warning] = &warnings[..] else {
        panic!("one warning about '{expected}' expected: {warnings:?}");
    };
    let head = format!("ticket keys '{}' (--ticket-keys): ", path.display());
    assert!(warning.starts_with(&head), "{warning}");
    assert!(warning.contains(expected), "{warning}");
    keys
}

fn ticket(keys: &TicketKeys, now: u64) -> Vec<u8> {
    keys.seal(b"context", b"session", now).unwrap()
}

fn opens(keys: &TicketKeys, ticket: &[u8], now: u64) -> bool {
    keys.open(b"context", ticket, now).as_deref() == Some(b"session")
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn names(directory: &Path) -> Vec<OsString> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    names
}

/// Holds the lock on a directory as another connection would.
fn hold(directory: &Path) -> Flock<File> {
    Flock::lock(
        File::open(directory).unwrap(),
        FlockArg::LockExclusiveNonblock,
    )
    .unwrap()
}

#[test]
fn a_missing_directory_is_made_for_us_alone() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let first = keys(&place, NOW);
    assert_eq!(mode(&place), 0o700);
    assert_eq!(mode(&place.join("keys")), 0o600);
    assert_eq!(names(&place), ["keys"]);
    let second = keys(&place, NOW + 5);
    assert!(opens(&second, &ticket(&first, NOW), NOW + 5));
    assert!(opens(&first, &ticket(&second, NOW + 5), NOW));
}

#[test]
fn a_directory_in_a_missing_directory_is_a_warning() {
    let scratch = Scratch::new();
    let keys = warned(&scratch.place().join("deeper"), NOW, "make the latter");
    assert!(keys.is_none());
    assert!(!scratch.place().exists());
}

#[test]
fn keys_are_replaced_only_when_it_is_time() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let first = keys(&place, NOW);
    let bytes = fs::read(place.join("keys")).unwrap();
    let late = NOW + SEALING_SECONDS - 1;
    let last = ticket(&keys(&place, late), late);
    assert_eq!(fs::read(place.join("keys")).unwrap(), bytes);
    assert!(opens(&first, &last, late));

    let rotated = keys(&place, late + 1);
    assert_ne!(fs::read(place.join("keys")).unwrap(), bytes);
    assert!(opens(&rotated, &last, late + 1));
    let newer = ticket(&rotated, late + 1);
    assert!(!opens(&first, &newer, late + 1));

    let expired = keys(&place, NOW + OPENING_SECONDS);
    assert!(!opens(&expired, &last, NOW + OPENING_SECONDS));
    assert!(opens(&expired, &newer, NOW + OPENING_SECONDS));
    let file = fs::read(place.join("keys")).unwrap();
    let secret = &first.keys[0].secret;
    assert!(bytes.windows(secret.len()).any(|window| window == secret));
    assert!(!file.windows(secret.len()).any(|window| window == secret));
}

#[test]
fn a_listener_has_a_key_that_seals_until_it_reads_again() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let seals = |keys: &TicketKeys, now| keys.seal(b"context", b"session", now).is_some();
    for renewal in [1, 3600, SURE_SECONDS] {
        for age in (0..=SEALING_SECONDS).step_by(1799) {
            let now = NOW - age;
            let first = ticket(&keys(&place, now), now);
            let listener = keys_for(&place, NOW, renewal);
            assert!(seals(&listener, NOW), "{age} {renewal}");
            assert!(seals(&listener, NOW + renewal), "{age} {renewal}");
            // What was sealed before is as good as before, and so is what is sealed at the end.
            assert!(opens(&listener, &first, NOW), "{age} {renewal}");
            let last = NOW + renewal;
            let end = last + u64::from(LIFETIME_SECONDS);
            assert!(opens(&listener, &ticket(&listener, last), end));
            fs::remove_dir_all(&place).unwrap();
        }
    }
}

#[test]
fn a_listener_that_seldom_reads_its_keys_makes_no_key_each_time() {
    let scratch = Scratch::new();
    let place = scratch.place();
    drop(keys(&place, NOW));
    let set = fs::read(place.join("keys")).unwrap();
    let soon = NOW + SEALING_SECONDS - SURE_SECONDS - 1;
    let kept = keys_for(&place, soon, 86_400);
    assert_eq!(fs::read(place.join("keys")).unwrap(), set);
    let sealed = |now| kept.seal(b"context", b"session", now).is_some();
    assert!(sealed(soon + SURE_SECONDS) && !sealed(soon + SURE_SECONDS + 1));
    // Not even one that reads them all the time loses a key that still opens.
    let mut now = soon + 1;
    let mut tickets: Vec<(u64, Vec<u8>)> = Vec::new();
    while now < NOW + 3 * OPENING_SECONDS {
        let keys = keys_for(&place, now, 86_400);
        assert!(keys.keys.len() < KEYS_LIMIT);
        tickets.retain(|(sealed, _)| now - sealed <= u64::from(LIFETIME_SECONDS));
        assert!(tickets.iter().all(|(_, ticket)| opens(&keys, ticket, now)));
        tickets.push((now, ticket(&keys, now)));
        now += 600;
    }
}

#[test]
fn a_ticket_does_not_outlive_its_lifetime_though_its_key_does() {
    let scratch = Scratch::new();
    let early = ticket(&keys(&scratch.place(), NOW), NOW);
    let end = NOW + u64::from(LIFETIME_SECONDS);
    let rotated = keys(&scratch.place(), end + 1);
    assert!(opens(&rotated, &early, end));
    assert!(!opens(&rotated, &early, end + 1));
}

#[test]
fn a_clock_that_was_set_back_costs_the_keys_from_the_future() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let ahead = keys(&place, NOW);
    let ticket_of_ahead = ticket(&ahead, NOW);
    // A little is nothing.
    let a_little = NOW - CLOCK_TOLERANCE_SECONDS;
    assert!(opens(&keys(&place, a_little), &ticket_of_ahead, a_little));
    let back = a_little - 1;
    let replaced = warned(&place, back, "clock set back").unwrap();
    assert!(!opens(&replaced, &ticket_of_ahead, back));
    // Told once, and mended.
    assert!(opens(&keys(&place, back), &ticket(&replaced, back), back));
    assert!(!opens(&keys(&place, NOW), &ticket_of_ahead, NOW));
}

#[test]
fn a_clock_that_ran_ahead_costs_only_the_keys_of_that_time() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let usual = ticket(&keys(&place, NOW), NOW);
    let ahead = NOW + SEALING_SECONDS + 3600;
    drop(keys(&place, ahead));
    let back = warned(&place, NOW + 60, "clock set back").unwrap();
    assert!(opens(&back, &usual, NOW + 60));
    assert!(opens(
        &keys(&place, NOW + 61),
        &ticket(&back, NOW + 60),
        NOW + 61
    ));
}

#[test]
fn a_file_damaged_anywhere_is_told_once_and_made_new() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let file = place.join("keys");
    let old = ticket(&keys(&place, NOW), NOW);
    let good = fs::read(&file).unwrap();
    for at in 0..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 1;
        for bytes in [&damaged[..], &good[..at]] {
            fs::write(&file, bytes).unwrap();
            let fresh = warned(&place, NOW, "it is damaged").unwrap();
            assert!(!opens(&fresh, &old, NOW));
            assert!(opens(&keys(&place, NOW), &ticket(&fresh, NOW), NOW));
        }
    }
    fs::write(&file, vec![0; 1 << 20]).unwrap();
    assert!(warned(&place, NOW, "it is damaged").is_some());
    assert_eq!(mode(&file), 0o600);
}

#[test]
fn a_file_that_others_may_have_read_is_made_new() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let file = place.join("keys");
    let leaked = ticket(&keys(&place, NOW), NOW);
    for wrong in [0o640, 0o604, 0o620, 0o601] {
        set_mode(&file, wrong);
        let fresh = warned(&place, NOW, &format!("open to others (mode {wrong:04o})")).unwrap();
        assert!(!opens(&fresh, &leaked, NOW));
        assert_eq!(mode(&file), 0o600);
    }
    if geteuid().is_root() {
        chown(&file, Some(65_534), None).unwrap();
        assert!(warned(&place, NOW, "belongs to uid 65534, not to uid 0").is_some());
        assert_eq!(fs::metadata(&file).unwrap().uid(), 0);
    } else {
        eprintln!("not tested without root: a file of another owner");
    }
}

#[test]
fn a_link_in_the_place_of_the_keys_is_not_followed() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let file = place.join("keys");
    let elsewhere = scratch.0.join("elsewhere");
    let old = ticket(&keys(&place, NOW), NOW);
    fs::rename(&file, &elsewhere).unwrap();
    let before = fs::read(&elsewhere).unwrap();
    symlink(&elsewhere, &file).unwrap();
    let fresh = warned(&place, NOW, "it is a symbolic link").unwrap();
    assert!(!opens(&fresh, &old, NOW));
    assert!(fs::symlink_metadata(&file).unwrap().is_file());
    // Nor is one in the place of the new set.
    symlink(&elsewhere, place.join("keys.new")).unwrap();
    drop(keys(&place, NOW + SEALING_SECONDS));
    assert_eq!(names(&place), ["keys"]);
    assert_eq!(fs::read(&elsewhere).unwrap(), before);
}

#[test]
fn what_is_no_file_in_the_place_of_the_keys_is_a_warning() {
    let scratch = Scratch::new();
    let place = scratch.place();
    drop(keys(&place, NOW));
    let file = place.join("keys");
    fs::remove_file(&file).unwrap();
    // A FIFO would keep a reader waiting.
    mkfifo(&file, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    assert!(warned(&place, NOW, "it is no regular file").is_some());
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let Loaded { keys, warnings } = load(&place, NOW);
    assert!(keys.is_none());
    assert!(
        warnings[0].contains("it is no regular file"),
        "{warnings:?}"
    );
    assert!(
        warnings[1].contains("cannot write 'keys' in it: "),
        "{warnings:?}"
    );
    assert_eq!(names(&place), ["keys"]);
}

#[test]
fn a_directory_that_is_not_ours_alone_is_a_warning() {
    let scratch = Scratch::new();
    let place = scratch.place();
    drop(keys(&place, NOW));
    for wrong in [0o750, 0o701, 0o720, 0o1777] {
        set_mode(&place, wrong);
        let expected = format!("open to others (mode {wrong:04o}): make it ours alone");
        assert!(warned(&place, NOW, &expected).is_none());
    }
    set_mode(&place, 0o700);
    if geteuid().is_root() {
        chown(&place, Some(65_534), None).unwrap();
        assert!(warned(&place, NOW, "belongs to uid 65534, not to uid 0").is_none());
    } else {
        assert!(warned(Path::new("/"), NOW, "belongs to uid 0").is_none());
    }
}

#[test]
fn a_link_to_a_directory_is_a_warning() {
    let scratch = Scratch::new();
    drop(keys(&scratch.place(), NOW));
    let link = scratch.0.join("link");
    symlink(scratch.place(), &link).unwrap();
    assert!(warned(&link, NOW, "it is a symbolic link").is_none());
    symlink(scratch.0.join("nowhere"), scratch.0.join("dangling")).unwrap();
    let dangling = warned(
        &scratch.0.join("dangling"),
        NOW,
        "cannot open it: No such file",
    );
    assert!(dangling.is_none());
    assert_eq!(names(&scratch.0), ["dangling", "link", "ticket-keys"]);
}

#[test]
fn what_a_killed_connection_left_is_in_nobodys_way() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let first = ticket(&keys(&place, NOW), NOW);
    fs::write(place.join("keys.new"), b"half").unwrap();
    assert!(opens(&keys(&place, NOW), &first, NOW));
    let later = NOW + SEALING_SECONDS;
    assert!(opens(&keys(&place, later), &first, later));
    assert_eq!(names(&place), ["keys"]);
}

#[test]
fn hundreds_of_first_connections_agree_on_one_set() {
    const CONNECTIONS: usize = 200;
    let scratch = Scratch::new();
    let place = scratch.place();
    // First on an empty place, then on keys that are due.
    for now in [NOW, NOW + SEALING_SECONDS] {
        let start = Barrier::new(CONNECTIONS);
        let sets: Vec<_> = thread::scope(|scope| {
            let connections: Vec<_> = (0..CONNECTIONS)
                .map(|_| {
                    scope.spawn(|| {
                        start.wait();
                        keys(&place, now)
                    })
                })
                .collect();
            connections
                .into_iter()
                .map(|connection| connection.join().unwrap())
                .collect()
        });
        let tickets: Vec<_> = sets.iter().map(|set| ticket(set, now)).collect();
        for set in &sets {
            assert!(tickets.iter().all(|ticket| opens(set, ticket, now)));
        }
        assert_eq!(fs::read(place.join("keys")).unwrap(), sets[0].encode());
        assert_eq!(names(&place), ["keys"]);
    }
}

#[test]
fn a_lock_that_is_never_given_up_holds_nobody_for_long() {
    let scratch = Scratch::new();
    let place = scratch.place();
    let first = ticket(&keys(&place, NOW), NOW);
    let lock = hold(&place);
    let bounded = |now| {
        let start = Instant::now();
        let Loaded { keys, warnings } = load(&place, now);
        assert!(start.elapsed() < Duration::from_secs(5));
        assert_eq!(warnings, [""; 0]);
        keys
    };
    // What needs no lock does not ask for it; keys that are due still open tickets.
    assert!(opens(&bounded(NOW).unwrap(), &first, NOW));
    let due = NOW + SEALING_SECONDS;
    let old = bounded(due).unwrap();
    assert!(opens(&old, &first, due));
    assert!(old.seal(b"context", b"session", due).is_none());
    assert!(
        bounded(NOW + OPENING_SECONDS)
            .is_some_and(|keys| keys.seal(b"", b"", NOW + OPENING_SECONDS).is_none())
    );
    fs::remove_file(place.join("keys")).unwrap();
    assert!(bounded(NOW).is_none());
    drop(lock);
    assert!(bounded(NOW).is_some());
}

#[test]
fn who_waits_for_the_lock_uses_what_its_holder_wrote() {
    let scratch = Scratch::new();
    let place = scratch.place();
    drop(keys(&place, NOW));
    let set = fs::read(place.join("keys")).unwrap();
    fs::remove_file(place.join("keys")).unwrap();
    let lock = hold(&place);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| keys(&place, NOW));
        fs::write(scratch.0.join("set"), &set).unwrap();
        set_mode(&scratch.0.join("set"), 0o600);
        fs::rename(scratch.0.join("set"), place.join("keys")).unwrap();
        assert_eq!(waiting.join().unwrap().encode(), set);
    });
    drop(lock);
}

#[test]
fn a_directory_where_nothing_can_be_made_is_a_warning() {
    // Ours, mode 0500, and not even root makes files there.
    let place = Path::new("/proc/self/fd");
    assert!(warned(place, NOW, "cannot write 'keys' in it: ").is_none());
}

#[test]
fn a_full_or_read_only_disk_is_a_warning_and_old_keys_last_their_time() {
    let scratch = Scratch::new();
    // A thread with a mount table of its own, so that the other tests see nothing of it.
    let ran = thread::scope(|scope| {
        scope
            .spawn(|| {
                if unshare(CloneFlags::CLONE_NEWNS).is_err() {
                    return false;
                }
                let nothing = None::<&str>;
                let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
                mount(nothing, "/", nothing, private, nothing).unwrap();
                let remount = |flags, options: &str| {
                    mount(
                        Some("tmpfs"),
                        &scratch.0,
                        Some("tmpfs"),
                        flags,
                        Some(options),
                    )
                    .unwrap();
                };
                remount(MsFlags::empty(), "size=8k");
                let place = scratch.place();
                let first = ticket(&keys(&place, NOW), NOW);
                let due = NOW + SEALING_SECONDS;
                for (read_only, reason) in
                    [(false, "No space left"), (true, "Read-only file system")]
                {
                    if read_only {
                        fs::remove_file(scratch.0.join("ballast")).unwrap();
                        remount(MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, "size=8k");
                    } else {
                        fs::write(scratch.0.join("ballast"), [1; 8192]).unwrap_err();
                    }
                    assert!(opens(&keys(&place, due - 1), &first, due - 1));
                    let old = warned(&place, due, &format!("cannot write 'keys' in it: {reason}"));
                    assert!(opens(&old.unwrap(), &first, due));
                    assert_eq!(names(&place), ["keys"]);
                }
                let made = warned(&scratch.0.join("other"), NOW, "cannot make it: Read-only");
                assert!(made.is_none());
                remount(MsFlags::MS_REMOUNT, "size=8k");
                assert!(opens(&keys(&place, due), &first, due));
                true
            })
            .join()
            .unwrap()
    });
    if !ran {
        eprintln!("not tested without root: a full and a read-only file system");
    }
}

#[test]
fn what_can_hold_no_keys_is_a_warning() {
    assert!(
        warned(
            Path::new("/dev/null"),
            NOW,
            "neither a directory nor a regular file"
        )
        .is_none()
    );
    let scratch = Scratch::new();
    mkfifo(&scratch.place(), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
    assert!(warned(&scratch.place(), NOW, "neither a directory").is_none());
    let through_a_file = scratch.place().join("deeper");
    assert!(warned(&through_a_file, NOW, "Not a directory").is_none());
}

#[test]
fn machines_that_share_a_file_open_each_others_tickets() {
    let scratch = Scratch::new();
    let place = scratch.place();
    fs::write(&place, LINE).unwrap();
    set_mode(&place, 0o640);
    let before = keys(&place, NOW);
    let newer = LINE.replace("00", "a7");
    fs::write(&place, format!("# new\n{newer}\n# old\n{LINE}")).unwrap();
    let after = keys(&place, NOW);
    assert!(opens(&after, &ticket(&before, NOW), NOW));
    assert!(!opens(&before, &ticket(&after, NOW), NOW));
    // Such keys have no age, whatever the clock says; their tickets have.
    assert!(opens(&keys(&place, NOW + 9), &ticket(&after, NOW), NOW + 9));
    let later = NOW + 10 * OPENING_SECONDS;
    assert!(opens(&keys(&place, later), &ticket(&after, later), later));
    assert!(!opens(&keys(&place, later), &ticket(&after, NOW), later));
    let text = fs::read_to_string(&place).unwrap();
    assert!(text.starts_with("# new\n"), "nothing is rotated");
    // A link to it is as good, as for any other secret.
    let link = scratch.0.join("link");
    symlink(&place, &link).unwrap();
    assert!(opens(&keys(&link, NOW), &ticket(&after, NOW), NOW));
}

#[test]
fn a_fixed_file_that_is_open_to_others_or_unusable_is_a_warning() {
    let scratch = Scratch::new();
    let place = scratch.place();
    fs::write(&place, LINE).unwrap();
    for (wrong, expected) in [
        (0o644, "open to everybody (mode 0644): chmod o="),
        (0o602, "open to everybody (mode 0602)"),
        (0o660, "its group can write to it (mode 0660): chmod g-w"),
    ] {
        set_mode(&place, wrong);
        assert!(warned(&place, NOW, expected).is_none());
    }
    set_mode(&place, 0o600);
    drop(keys(&place, NOW));
    fs::write(&place, format!("{LINE}no key\n")).unwrap();
    assert!(warned(&place, NOW, "line 2 is not 64 hexadecimal digits").is_none());
    fs::write(&place, [b'#'; 64 * 1024]).unwrap();
    assert!(warned(&place, NOW, "there is no key in it").is_none());
    fs::write(&place, [b'#'; 64 * 1024 + 1]).unwrap();
    assert!(warned(&place, NOW, "larger than 65536 octets").is_none());
}

#[test]
fn the_lock_is_given_back_whether_keys_could_be_made_or_not() {
    let scratch = Scratch::new();
    drop(keys(&scratch.place(), NOW));
    drop(hold(&scratch.place()));
    fs::remove_file(scratch.place().join("keys")).unwrap();
    fs::create_dir(scratch.place().join("keys")).unwrap();
    assert!(load(&scratch.place(), NOW).keys.is_none());
    drop(hold(&scratch.place()));
}
