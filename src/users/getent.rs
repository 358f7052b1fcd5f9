//! getent(1): the C library's look-ups for a program that cannot load what they need.

use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};

use crate::error::reason;

/// Where it is: `PATH` is not asked, which the superserver, or whoever starts this program, may have set.
const PATHS: [&str; 2] = ["/usr/bin/getent", "/bin/getent"];
/// How much of an answer is read: far more than a line of passwd(5).
const ANSWER_LIMIT: u64 = 64 * 1024;
/// How long a directory server may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Its exit status for a key that is in no database.
const NOT_FOUND: i32 = 2;

/// What `getent DATABASE KEY` prints; `None` if there is no such key, or no such program.
///
/// # Errors
/// In words, if it cannot be run, fails, or says too much or nothing for too long.
pub(super) fn ask(database: &str, key: &str) -> Result<Option<Vec<u8>>, String> {
    ask_within(&PATHS, database, key, PATIENCE)
}

fn ask_within(
    paths: &[&str],
    database: &str,
    key: &str,
    patience: Duration,
) -> Result<Option<Vec<u8>>, String> {
    let Some(path) = paths
        .iter()
        .find(|path| std::fs::exists(path).unwrap_or(false))
    else {
        return Ok(None);
    };
    let failed = |why: String| format!("{path} {database}: {why}");
    let mut child = Command::new(path)
        .args([database, "--", key])
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| failed(reason(&error)))?;
    let answer = read_answer(&mut child, Instant::now() + patience);
    if answer.is_err() {
        // It may have ended by itself meanwhile.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| failed(reason(&error)))?;
    let answer = answer.map_err(failed)?;
    match status.code() {
        Some(0) => Ok(Some(answer)),
        Some(NOT_FOUND) => Ok(None),
        _ => Err(failed(status.to_string())),
    }
}

fn read_answer(child: &mut Child, deadline: Instant) -> Result<Vec<u8>, String> {
    let Some(mut output) = child.stdout.take() else {
        return Ok(Vec::new());
    };
    let mut answer = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut poll = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
        match nix::poll::ppoll(&mut poll, Some(left.into()), None) {
            Ok(0) => return Err("no answer in time".to_owned()),
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(reason(&error.into())),
        }
        match output.read(&mut piece) {
            Ok(0) => return Ok(answer),
            Ok(count) => answer.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(reason(&error)),
        }
        if answer.len() as u64 > ANSWER_LIMIT {
            return Err(format!("an answer of more than {ANSWER_LIMIT} octets"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A program in the place of getent(1).
    struct Pretended(std::path::PathBuf);

    impl Pretended {
        fn new(name: &str, script: &str) -> Self {
            let path = std::env::temp_dir().join(format!("getent-{name}-{}", std::process::id()));
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
            Self(path)
        }

        fn ask(&self, key: &str) -> Result<Option<Vec<u8>>, String> {
            self.ask_within(key, PATIENCE)
        }

        fn ask_within(&self, key: &str, patience: Duration) -> Result<Option<Vec<u8>>, String> {
            let paths = ["/nonexistent/getent", self.0.to_str().unwrap()];
            loop {
                let answer = ask_within(&paths, "passwd", key, patience);
                // A child that another test has just forked may still have what we wrote to open, until it executes something.
                if !matches!(&answer, Err(why) if why.contains("Text file busy")) {
                    return answer;
                }
            }
        }
    }

    impl Drop for Pretended {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn a_key_is_an_argument_and_the_environment_is_empty() {
        let program = Pretended::new("arguments", "echo \"$#:$1:$2:$3:${HOME-none}:$(pwd)\"");
        let answer = program.ask("--help $(id) 'x").unwrap().unwrap();
        assert_eq!(
            String::from_utf8(answer).unwrap(),
            "3:passwd:--:--help $(id) 'x:none:/\n"
        );
    }

    #[test]
    fn no_such_key_and_no_such_program_are_no_faults() {
        assert_eq!(Pretended::new("two", "exit 2").ask("x"), Ok(None));
        let ask = ask_within(&["/nonexistent/getent"], "passwd", "x", PATIENCE);
        assert_eq!(ask, Ok(None));
    }

    #[test]
    fn faults_are_told() {
        for (name, script, expected) in [
            ("three", "exit 3", "exit status: 3"),
            ("endless", "exec cat /dev/zero", "more than 65536 octets"),
            ("killed", "kill -9 $$", "signal: 9"),
        ] {
            let error = Pretended::new(name, script).ask("x").unwrap_err();
            assert!(error.contains(expected), "{name}: {error}");
        }
        let slow = Pretended::new("slow", "exec sleep 100");
        let error = slow
            .ask_within("x", Duration::from_millis(100))
            .unwrap_err();
        assert!(error.contains("no answer in time"), "{error}");
    }

    #[test]
    fn the_real_one_knows_root() {
        if let Some(answer) = ask("passwd", "root").unwrap() {
            assert!(answer.starts_with(b"root:"));
            assert_eq!(ask("passwd", "no-such-user"), Ok(None));
        }
    }
}
