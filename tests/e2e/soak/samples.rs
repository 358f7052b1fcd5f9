//! What is looked at over time, and in the end.

use super::places::{Place, sockets_on};
use super::{Limits, Soak};
use crate::harness::*;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// How much more the last quarter's largest value of a figure may be than the second one's. Load is random, and so are numbers of processes
/// and descriptors; memory that is lost for each connection is not.
const SLACKS: &[(&str, u64)] = &[
    ("processes, all", 60),
    ("processes of imap-tls", 40),
    ("zombies", 15),
    ("entries in the test's directory", 20),
    ("entries in the ticket directory", 3),
    ("entries in the chroot directory", 0),
    ("idle connection, largest USS KiB", 64),
    ("largest network process, RSS KiB", 2048),
    ("listener descriptors", 25),
    ("listener RSS KiB", 512),
    ("listener anonymous KiB", 64),
    ("listener USS KiB", 256),
    ("keeper descriptors", 40),
    ("keeper RSS KiB", 512),
    ("keeper anonymous KiB", 64),
    ("keeper USS KiB", 256),
];

/// Figures of the machine, on which others work, too: told and not judged.
const TOLD: &[&str] = &[
    "machine: slab KiB",
    "machine: unreclaimable slab KiB",
    "machine: TCP sockets in use",
];

/// At what age a zombie is one that nobody reaps.
const ZOMBIE_LIMIT: Duration = Duration::from_secs(30);

/// All figures of a soak, and when they were taken.
pub struct Samples {
    whole: Duration,
    series: BTreeMap<String, Vec<(Duration, u64)>>,
    zombies: BTreeMap<i32, Instant>,
    stuck: BTreeSet<i32>,
    told: Instant,
}

impl Samples {
    pub fn new(soak: &Soak) -> Self {
        Self {
            whole: soak.limits.whole,
            series: BTreeMap::new(),
            zombies: BTreeMap::new(),
            stuck: BTreeSet::new(),
            told: Instant::now(),
        }
    }

    /// Between two looks: some twenty a quarter at least, and no burden where it is long.
    pub fn interval(&self) -> Duration {
        (self.whole / 100).clamp(Duration::from_millis(250), Duration::from_secs(5))
    }

    fn note(&mut self, time: Duration, name: String, value: u64) {
        self.series.entry(name).or_default().push((time, value));
    }

    /// Takes one of each.
    pub fn take(&mut self, soak: &Soak) {
        let time = soak.began.elapsed();
        let test = soak.test;
        let all = test.descendants();
        test.reap_orphans(&all);
        let zombies: Vec<i32> = all
            .iter()
            .filter(|process| process.state() == Some('Z'))
            .map(|process| process.0)
            .collect();
        self.zombies.retain(|process, _| zombies.contains(process));
        for zombie in &zombies {
            let since = *self.zombies.entry(*zombie).or_insert_with(Instant::now);
            if since.elapsed() > ZOMBIE_LIMIT {
                self.stuck.insert(*zombie);
            }
        }
        let program = dir::run_path("imap-tls");
        let ours = all
            .iter()
            .filter(|process| process.exe().as_ref() == Some(&program));
        self.note(time, "processes, all".to_owned(), all.len() as u64);
        self.note(
            time,
            "processes of imap-tls".to_owned(),
            ours.count() as u64,
        );
        self.note(time, "zombies".to_owned(), zombies.len() as u64);
        for (name, path) in [
            ("entries in the test's directory", test.dir().to_owned()),
            ("entries in the ticket directory", test.path("tickets")),
            ("entries in the chroot directory", test.empty_dir()),
        ] {
            let count = std::fs::read_dir(path).map_or(0, Iterator::count);
            self.note(time, name.to_owned(), count as u64);
        }
        let idle = soak.idle.lock().unwrap().clone();
        let (mut idlest, mut largest) = (0, 0);
        for place in &soak.places {
            for (address, network) in place.connections() {
                largest = largest.max(network.status_kib_if_alive("VmRSS").unwrap_or(0));
                if idle.contains(&address) {
                    idlest = idlest.max(network.private_kib_if_alive().unwrap_or(0));
                }
            }
            if !place.server.is_listener() {
                continue;
            }
            let listener = Some(place.server.process());
            for (who, process) in [("listener", listener), ("keeper", place.server.keeper())] {
                let Some(process) = process else { continue };
                let figures = [
                    (
                        "descriptors",
                        Some(process.descriptors_if_alive().len() as u64),
                    ),
                    ("RSS KiB", process.status_kib_if_alive("VmRSS")),
                    // Whatever of it is shared with children.
                    ("anonymous KiB", process.status_kib_if_alive("RssAnon")),
                    ("USS KiB", process.private_kib_if_alive()),
                ];
                for (what, value) in figures {
                    if let Some(value) = value {
                        self.note(time, format!("{who} {what}: {}", place.name), value);
                    }
                }
            }
        }
        self.note(time, "idle connection, largest USS KiB".to_owned(), idlest);
        self.note(time, "largest network process, RSS KiB".to_owned(), largest);
        for (name, value) in TOLD.iter().zip(machine()) {
            self.note(time, (*name).to_owned(), value);
        }
        self.tell(soak, time);
    }

    /// A line a minute, for whoever watches.
    fn tell(&mut self, soak: &Soak, time: Duration) {
        if self.told.elapsed() < Duration::from_secs(60) {
            return;
        }
        self.told = Instant::now();
        let last = |name: &str| {
            let values = self
                .series
                .iter()
                .filter(|(series, _)| series.starts_with(name));
            let values = values.filter_map(|(_, values)| Some(values.last()?.1.to_string()));
            values.collect::<Vec<_>>().join("/")
        };
        let sum = |group: &str| -> u64 {
            let counts = soak.counts.lock().unwrap();
            counts
                .iter()
                .filter(|(name, _)| name.starts_with(group))
                .map(|(_, count)| count)
                .sum()
        };
        eprintln!(
            "soak: {:5.0} s: {} clients, {} enemies, {} faults; processes {}, listeners: fds {}, USS {} KiB; keepers: fds {}, USS {} KiB; idle USS {} KiB; load {}",
            time.as_secs_f64(),
            sum("client: "),
            sum("enemy: "),
            sum("fault: "),
            last("processes of imap-tls"),
            last("listener descriptors"),
            last("listener USS"),
            last("keeper descriptors"),
            last("keeper USS"),
            last("idle connection"),
            std::fs::read_to_string("/proc/loadavg")
                .unwrap_or_default()
                .trim()
        );
    }

    /// The largest value of a quarter (from 0) of the time.
    fn largest(&self, values: &[(Duration, u64)], quarter: u32) -> Option<u64> {
        let (from, to) = (self.whole * quarter / 4, self.whole * (quarter + 1) / 4);
        let in_time = values.iter().filter(|(time, _)| (from..to).contains(time));
        in_time.map(|(_, value)| *value).max()
    }

    /// What grew.
    pub fn growth(&self, has_stalled: bool) -> Vec<String> {
        let mut failures = Vec::new();
        for (name, values) in &self.series {
            let Some((_, slack)) = SLACKS.iter().find(|(prefix, _)| name.starts_with(prefix))
            else {
                continue;
            };
            match (self.largest(values, 1), self.largest(values, 3)) {
                (Some(second), Some(last)) if last <= second + slack => {}
                // There was no time to look.
                (None, _) | (_, None) if has_stalled => {
                    eprintln!("soak: {name}: not judged, since the machine stood still");
                }
                (second, last) => failures.push(format!(
                    "{name}: at most {last:?} in the last quarter, {second:?} in the second, slack {slack}"
                )),
            }
        }
        for (prefix, _) in SLACKS {
            if !self.series.keys().any(|name| name.starts_with(prefix)) {
                failures.push(format!("{prefix}: never looked at"));
            }
        }
        if !self.stuck.is_empty() {
            failures.push(format!(
                "zombies that nobody reaped in {ZOMBIE_LIMIT:?}: {:?}",
                self.stuck
            ));
        }
        failures
    }

    /// For the summary.
    pub fn describe(&self, text: &mut String) {
        let number = |value: Option<u64>| value.map_or("-".to_owned(), |value| value.to_string());
        for (name, values) in &self.series {
            let quarters: Vec<_> = (0..4)
                .map(|quarter| number(self.largest(values, quarter)))
                .collect();
            let slack = SLACKS.iter().find(|(prefix, _)| name.starts_with(prefix));
            let judged = slack.map_or("told only".to_owned(), |(_, slack)| {
                format!("slack {slack}")
            });
            let _ = writeln!(
                text,
                "  {name}: largest in each quarter {} ({judged})",
                quarters.join(", ")
            );
        }
    }
}

/// Slab and sockets, as TOLD names them.
fn machine() -> [u64; 3] {
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |name: &str| {
        let line = memory.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    let sockets = std::fs::read_to_string("/proc/net/sockstat").unwrap_or_default();
    let in_use = sockets
        .lines()
        .find_map(|line| line.strip_prefix("TCP: inuse "));
    let in_use = in_use.and_then(|line| line.split_whitespace().next()?.parse().ok());
    [kib("Slab:"), kib("SUnreclaim:"), in_use.unwrap_or(0)]
}

/// What a listener has while it has no connection.
pub struct Baseline {
    listener: Vec<String>,
    keeper: Vec<String>,
}

/// Kinds of descriptors, whatever their numbers.
fn kinds(process: Option<Process>) -> Vec<String> {
    let all = process
        .map(Process::descriptors_if_alive)
        .unwrap_or_default();
    let kind = |target: &String| target.split(":[").next().unwrap_or_default().to_owned();
    let mut kinds: Vec<String> = all.iter().map(kind).collect();
    kinds.sort();
    kinds
}

impl Baseline {
    pub fn of(place: &Place) -> Self {
        if !place.server.is_listener() {
            return Self {
                listener: Vec::new(),
                keeper: Vec::new(),
            };
        }
        // Its last word before it serves: all that it has is there.
        place.server.wait_log("listening on ");
        Self {
            listener: kinds(Some(place.server.process())),
            keeper: kinds(place.server.keeper()),
        }
    }

    /// Once all clients have gone: connections that do not end, and descriptors and processes that were not there at first.
    pub fn left_over(&self, place: &Place, limits: &Limits) -> Vec<String> {
        let began = Instant::now();
        let deadline = began + limits.login + limits.handshake + Duration::from_secs(30);
        loop {
            let mut left: Vec<String> = Vec::new();
            let keeper = place.server.keeper();
            let children = place.server.process().children();
            let children: Vec<Process> = children
                .into_iter()
                .filter(|child| Some(*child) != keeper)
                .collect();
            if !children.is_empty() {
                left.push(format!("{}: {}", place.name, describe(&children)));
            }
            if place.server.is_listener() {
                for (who, now, before) in [
                    (
                        "listener",
                        kinds(Some(place.server.process())),
                        &self.listener,
                    ),
                    ("keeper", kinds(keeper), &self.keeper),
                ] {
                    if now != *before {
                        left.push(format!(
                            "{who} of {}: {now:?} instead of {before:?}",
                            place.name
                        ));
                    }
                }
            }
            if left.is_empty() && began.elapsed() > Duration::from_secs(1) {
                let log = place.server.log();
                let last = log.lines().rfind(|line| line.contains(": session "));
                eprintln!(
                    "soak: {}: the last connection ended {:.1} s after all clients: {}",
                    place.name,
                    began.elapsed().as_secs_f64(),
                    last.unwrap_or_default()
                );
            }
            if left.is_empty() || Instant::now() > deadline {
                return left;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The mounts of the machine that a test made, by lines of mountinfo.
pub fn mounts_of(test: &Test) -> BTreeSet<String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let place = test.dir().display().to_string();
    text.lines()
        .filter(|line| line.contains(&place))
        .map(str::to_owned)
        .collect()
}

/// After everything was ended: what is left of it.
pub fn left_on_machine(test: &Test, ports: &[u16], mounts: &BTreeSet<String>) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let mut left = Vec::new();
        let processes = test.descendants();
        test.reap_orphans(&processes);
        let processes: Vec<Process> = processes
            .into_iter()
            .filter(|process| process.state().is_some())
            .collect();
        if !processes.is_empty() {
            left.push(format!("processes: {}", describe(&processes)));
        }
        for port in ports {
            // Those in TIME_WAIT have no inode: they are the kernel's.
            let open = sockets_on(*port)
                .into_keys()
                .filter(|socket| socket != "socket:[0]")
                .count();
            if open > 0 || is_listening(*port) {
                left.push(format!(
                    "port {port}: {open} sockets, listening: {}",
                    is_listening(*port)
                ));
            }
        }
        let sockets = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
        let place = test.dir().display().to_string();
        left.extend(
            sockets
                .lines()
                .filter(|line| line.contains(&place))
                .map(str::to_owned),
        );
        left.extend(mounts_of(test).difference(mounts).cloned());
        left.extend(files(&test.empty_dir()));
        let is_temporary =
            |name: &String| name.contains("tmp") || name.contains("new") || name.ends_with('~');
        left.extend(
            files(&test.path("tickets"))
                .into_iter()
                .filter(is_temporary),
        );
        if left.is_empty() || Instant::now() > deadline {
            return left;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}
