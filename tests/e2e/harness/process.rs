//! Looks at live processes through /proc: identity, privileges, descriptors, limits, memory, children.

use super::program::eventually;
use super::{is_root, libc, sys};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// A process, by id. Every method reads /proc anew; they panic when the process is gone, except [`Process::alive`].
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Process(pub i32);

/// What `/proc/PID/status` says.
#[derive(Clone, Debug)]
pub struct Status(BTreeMap<String, String>);

impl Process {
    fn path(self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.0))
    }

    fn read(self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("/proc/{}/{name}: {error}", self.0))
    }

    /// False once the process has ended, also while it is a zombie.
    pub fn alive(self) -> bool {
        self.state()
            .is_some_and(|state| state != 'Z' && state != 'X')
    }

    /// Has it stand still, and waits until it does: the signal alone may find it on its way to something.
    pub fn stop(self) {
        sys::kill(self.0, libc::SIGSTOP).unwrap();
        eventually(&format!("process {} stands still", self.0), || {
            (self.state() == Some('T')).then_some(())
        });
    }

    /// R, S, D, T, t, Z ..., or nothing when there is no such process.
    pub fn state(self) -> Option<char> {
        self.stat().map(|fields| fields[0].chars().next().unwrap())
    }

    /// The fields of `/proc/PID/stat` after the name: state, parent, group, session ...
    fn stat(self) -> Option<Vec<String>> {
        let text = fs::read_to_string(self.path("stat")).ok()?;
        Some(
            text[text.rfind(')')? + 2..]
                .split_whitespace()
                .map(str::to_owned)
                .collect(),
        )
    }

    pub fn parent(self) -> Option<Process> {
        self.stat()
            .map(|fields| Process(fields[1].parse().unwrap()))
    }

    pub fn session(self) -> Option<i32> {
        self.stat().map(|fields| fields[3].parse().unwrap())
    }

    /// The processor time that it has used, in ticks of a hundredth of a second.
    pub fn ticks(self) -> u64 {
        let fields = self.stat().expect("the process is there");
        let number = |index: usize| fields[index].parse::<u64>().unwrap();
        // utime and stime: proc_pid_stat(5) counts from the process's number on.
        number(11) + number(12)
    }

    pub fn status(self) -> Status {
        Status::parse(&String::from_utf8_lossy(&self.read("status")))
    }

    /// The same, if it has not ended meanwhile.
    pub fn status_if_alive(self) -> Option<Status> {
        let text = fs::read(self.path("status")).ok()?;
        Some(Status::parse(&String::from_utf8_lossy(&text)))
    }

    /// The children of its main thread, in the order of their creation (zombies included).
    pub fn children(self) -> Vec<Process> {
        let list =
            fs::read_to_string(self.path(&format!("task/{}/children", self.0))).unwrap_or_default();
        list.split_whitespace()
            .map(|pid| Process(pid.parse().unwrap()))
            .collect()
    }

    /// Its children, their children, and so on.
    pub fn descendants(self) -> Vec<Process> {
        self.children()
            .into_iter()
            .flat_map(|child| std::iter::once(child).chain(child.descendants()))
            .collect()
    }

    pub fn exe(self) -> Option<PathBuf> {
        fs::read_link(self.path("exe")).ok()
    }

    pub fn root(self) -> PathBuf {
        fs::read_link(self.path("root")).unwrap()
    }

    pub fn cwd(self) -> PathBuf {
        fs::read_link(self.path("cwd")).unwrap()
    }

    pub fn command_line(self) -> Vec<String> {
        split_nul(&fs::read(self.path("cmdline")).unwrap_or_default())
    }

    /// The environment it was started with, `NAME=value`.
    pub fn environment(self) -> Vec<String> {
        split_nul(&self.read("environ"))
    }

    /// Descriptor number -> what it is (`socket:[123]`, `/dev/null`).
    pub fn descriptors(self) -> BTreeMap<i32, String> {
        let entries = fs::read_dir(self.path("fd")).unwrap();
        entries
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let target = fs::read_link(entry.path()).ok()?;
                Some((
                    entry.file_name().to_str()?.parse().ok()?,
                    target.to_string_lossy().into_owned(),
                ))
            })
            .collect()
    }

    /// Soft and hard limit by the name that /proc gives it, such as `Max open files`.
    pub fn limit(self, name: &str) -> (String, String) {
        let text = String::from_utf8_lossy(&self.read("limits")).into_owned();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_else(|| panic!("no limit {name:?} in {text}"));
        let mut words = line.split_whitespace().map(str::to_owned);
        (words.next().unwrap(), words.next().unwrap())
    }

    /// The number of the system call it is blocked in.
    pub fn blocked_in(self) -> Option<i64> {
        fs::read_to_string(self.path("syscall"))
            .ok()?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    }

    /// Whether it waits for input in poll or ppoll, so that nothing is going on in it.
    pub fn is_idle(self) -> bool {
        if is_root() {
            let call = self.blocked_in();
            call == Some(libc::SYS_poll) || call == Some(libc::SYS_ppoll)
        } else {
            // Which call it is only root may see. One that waits for its keeper sleeps as well.
            self.state() == Some('S')
        }
    }

    /// A figure of `/proc/PID/smaps_rollup` in KiB, such as `Private_Dirty`.
    pub fn smaps_kib(self, name: &str) -> u64 {
        let text = String::from_utf8_lossy(&self.read("smaps_rollup")).into_owned();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_else(|| panic!("no {name} in {text}"));
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Private memory (USS) in KiB, of a process that may have ended meanwhile.
    pub fn private_kib_if_alive(self) -> Option<u64> {
        let text = fs::read_to_string(self.path("smaps_rollup")).ok()?;
        let parts = text.lines().filter(|line| line.starts_with("Private_"));
        Some(parts.filter_map(kib).sum()).filter(|sum| *sum > 0)
    }

    /// A figure of `/proc/PID/status` in KiB, likewise.
    pub fn status_kib_if_alive(self, name: &str) -> Option<u64> {
        self.status_if_alive()?.first_number(name)
    }

    /// Its real uid, likewise.
    pub fn uid_if_alive(self) -> Option<u32> {
        self.status_if_alive()?.first_number("Uid")
    }

    /// What its descriptors are, likewise (nothing where it has ended).
    pub fn descriptors_if_alive(self) -> Vec<String> {
        let entries = fs::read_dir(self.path("fd"))
            .into_iter()
            .flatten()
            .flatten();
        let targets = entries.filter_map(|entry| fs::read_link(entry.path()).ok());
        targets
            .map(|target| target.to_string_lossy().into_owned())
            .collect()
    }

    /// The largest resident set so far, in KiB.
    pub fn peak_kib(self) -> u64 {
        self.status().kib("VmHWM")
    }

    /// The same, of a process that may have ended meanwhile.
    pub fn peak_kib_if_alive(self) -> Option<u64> {
        self.status_kib_if_alive("VmHWM")
    }

    /// Mappings of the program's own file that hold some of PT_GNU_RELRO (elf(5), of 64 bits) and can be written to.
    pub fn writable_relocated(self) -> Vec<String> {
        let program = self.read("exe");
        let number = |at: usize, size: usize| {
            let octets = program[at..at + size].iter().rev();
            octets.fold(0_u64, |all, octet| all << 8 | u64::from(*octet))
        };
        let (first, size, count) = (number(0x20, 8), number(0x36, 2), number(0x38, 2));
        let header = (0..count)
            .map(|index| usize::try_from(first + index * size).unwrap())
            .find(|at| number(*at, 4) == u64::from(nix::libc::PT_GNU_RELRO))
            .expect("a program with relocated data");
        let (start, length) = (number(header + 0x10, 8), number(header + 0x28, 8));
        let exe = self.exe().expect("a program");
        let maps = String::from_utf8(self.read("maps")).unwrap();
        let of_program = maps
            .lines()
            .filter(|line| line.ends_with(exe.to_str().unwrap()));
        let range = |line: &str| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            [start, end].map(|address| u64::from_str_radix(address, 16).unwrap())
        };
        let base = of_program.clone().map(|line| range(line)[0]).min();
        let relocated = base.unwrap() + start..(base.unwrap() + start + length) & !4095;
        assert!(!relocated.is_empty());
        of_program
            .filter(|line| {
                let [start, end] = range(line);
                start < relocated.end && end > relocated.start
            })
            .filter(|line| line.split(' ').nth(1).unwrap().contains('w'))
            .map(str::to_owned)
            .collect()
    }

    /// Which of `needles` are somewhere in its memory (every readable mapping; needs root). Panics if nothing could be
    /// read, so that "not found" means something.
    pub fn find_in_memory(self, needles: &[Vec<u8>]) -> Vec<bool> {
        // A process that ends meanwhile keeps nothing.
        let Ok(maps) = fs::read_to_string(self.path("maps")) else {
            assert!(!self.alive(), "the mappings of {self:?} cannot be read");
            return vec![false; needles.len()];
        };
        let Ok(memory) = fs::File::open(self.path("mem")) else {
            assert!(!self.alive(), "the memory of {self:?} cannot be opened");
            return vec![false; needles.len()];
        };
        let longest = needles.iter().map(Vec::len).max().unwrap_or(0);
        let mut found = vec![false; needles.len()];
        let mut total = 0;
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (start, end) = words.next().unwrap().split_once('-').unwrap();
            if !words.next().unwrap().starts_with('r')
                || line.ends_with("[vvar]")
                || line.ends_with("[vvar_vclock]")
                || line.ends_with("[vsyscall]")
            {
                continue;
            }
            let (start, end) = (
                u64::from_str_radix(start, 16).unwrap(),
                u64::from_str_radix(end, 16).unwrap(),
            );
            // In pieces that overlap by the longest needle, so that a large mapping needs no large buffer.
            let mut at = start;
            while at < end {
                let mut piece = vec![0; usize::try_from(end - at).unwrap().min(4 << 20)];
                let Ok(size) = memory.read_at(&mut piece, at) else {
                    break;
                };
                if size == 0 {
                    break;
                }
                total += size;
                piece.truncate(size);
                for (needle, found) in needles.iter().zip(&mut found) {
                    *found = *found || sys::contains(&piece, needle);
                }
                at += size as u64;
                if at < end {
                    at -= (longest.saturating_sub(1)).min(size - 1) as u64;
                }
            }
        }
        assert!(
            total > 4096 || !self.alive(),
            "nothing of the memory of {self:?} could be read"
        );
        found
    }
}

impl Status {
    /// Parses the text of a `/proc/PID/status`.
    pub fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
                .collect(),
        )
    }

    /// A line by its name, as it is written.
    pub fn field(&self, name: &str) -> &str {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in status"))
    }

    /// Numbers of a line: Uid (real, effective, saved, fs), Gid, Groups.
    pub fn numbers(&self, name: &str) -> Vec<u32> {
        self.field(name)
            .split_whitespace()
            .map(|word| word.parse().unwrap())
            .collect()
    }

    /// A hexadecimal mask: CapInh, CapPrm, CapEff, CapBnd, CapAmb, SigBlk, SigIgn, SigCgt.
    pub fn mask(&self, name: &str) -> u64 {
        u64::from_str_radix(self.field(name), 16).unwrap()
    }

    /// SigIgn without the two signals that glibc keeps for itself: whoever started the tests may have left them ignored, and
    /// no program can change that through its libc.
    pub fn ignored_signals(&self) -> u64 {
        self.mask("SigIgn") & !(3 << 31)
    }

    /// A size in KiB: VmHWM, VmRSS, VmPeak ...
    pub fn kib(&self, name: &str) -> u64 {
        self.first_number(name)
            .unwrap_or_else(|| panic!("no {name} in status"))
    }

    /// What a line begins with, if it is there: a zombie has no memory.
    fn first_number<T: std::str::FromStr>(&self, name: &str) -> Option<T> {
        self.0.get(name)?.split_whitespace().next()?.parse().ok()
    }
}

/// The number in a line of `Name:   123 kB`.
fn kib(line: &str) -> Option<u64> {
    line.split_whitespace().nth(1)?.parse().ok()
}

fn split_nul(bytes: &[u8]) -> Vec<String> {
    bytes
        .split(|byte| *byte == 0)
        .filter(|part| !part.is_empty())
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect()
}

/// All processes of the machine.
pub fn all() -> Vec<Process> {
    let names = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    names.map(Process).collect()
}
