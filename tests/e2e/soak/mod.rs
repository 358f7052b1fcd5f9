//! The soak: for E2E_SOAK seconds real mail clients, hostile ones and faults side by side, and whether everything stays flat meanwhile
//! and nothing is left afterwards.
//!
//! Every policy is there, in processes of their own under tcpserver (and xinetd, where it is installed) and under the listener, in front of
//! mailutils' imap4d, Dovecot and the scripted server. All choices come from one seed, which is printed; E2E_SEED repeats them (what happens at
//! the same time is the kernel's choice). What is asserted:
//!
//! - Every well-behaved client succeeds, and gets back byte for byte what it sent, but for those whose process we killed: they have an
//!   end, and no wrong byte.
//! - From the second quarter of the time to the last, no figure of [`samples`] grows by more than its slack.
//! - In the end all processes, sockets, files and mounts are gone, and the listener and its keeper have the descriptors they began with.

mod clients;
mod enemies;
mod faults;
mod places;
mod samples;

use crate::connect_servers::Dovecot;
use crate::harness::*;
use libtest_mimic::Trial;
use places::Place;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const NEEDS: &[Need] = &[
    Need::Root,
    Need::EachStarted,
    Need::Command("curl", "curl"),
    Need::Command("dovecot", "dovecot-imapd"),
    Need::Command("gnutls-cli", "gnutls-bin"),
    Need::Command("imap4d", "mailutils-imap4d"),
    Need::Command("mbsync", "isync"),
    Need::Command("openssl", "openssl"),
    Need::Command("python3", "python3"),
    Need::Command("tcpserver", "ucspi-tcp"),
    Need::Command("unshare", "util-linux"),
];

pub fn tests() -> Vec<Trial> {
    vec![test(
        "soak: clients, enemies and faults side by side leave everything flat, and nothing behind",
        NEEDS,
        soak,
    )]
}

/// How many of each work at the same time, and how long each rests on average between two connections: together, some fifteen connections a
/// second.
const CLIENTS: (usize, Duration) = (6, Duration::from_millis(700));
const TOOLS: (usize, Duration) = (2, Duration::from_secs(4));
const ENEMIES: (usize, Duration) = (8, Duration::from_millis(400));
const FAULTS: Duration = Duration::from_millis(2000);
/// In a short run they come thicker: so many in all.
const FAULTS_AT_LEAST: u32 = 25;
/// On a machine where nobody runs for so long, nobody can be in time: what fails meanwhile is counted, told, and proves nothing.
const STALL: Duration = Duration::from_secs(1);
/// After so many failures there is no more to be learned.
const FAILURES: usize = 25;
/// What is printed of a list.
const SHOWN: usize = 25;

/// A source of choices (splitmix64).
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.roll() % end as u64) as usize
    }

    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high - low + 1)
    }

    pub fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    pub fn bytes(&mut self, size: usize) -> Vec<u8> {
        client::Pattern::new(self.roll()).take(size)
    }

    /// A size of any magnitude: small ones are as frequent as large ones.
    pub fn size(&mut self, most_bits: usize) -> usize {
        let bits = self.between(0, most_bits);
        self.between(1, 1 << bits)
    }

    /// Between nothing and twice the mean.
    pub fn time(&mut self, mean: Duration) -> Duration {
        mean.mul_f64(self.below(2001) as f64 / 1000.0)
    }
}

/// What all threads share.
pub struct Soak<'a> {
    pub test: &'a Test,
    pub places: Vec<Place>,
    pub limits: Limits,
    pub began: Instant,
    seed: u64,
    is_over: AtomicBool,
    /// Connections that may be killed, by the client's address, and what of theirs was killed.
    killable: Mutex<BTreeMap<SocketAddr, Option<&'static str>>>,
    /// Those that are held for the whole time.
    pub idle: Mutex<BTreeSet<SocketAddr>>,
    counts: Mutex<BTreeMap<String, u64>>,
    pub up: AtomicU64,
    pub down: AtomicU64,
    failures: Mutex<Vec<String>>,
    /// When this test did not get the processor for [`STALL`], although it had asked for it.
    stalls: Mutex<Vec<(Instant, Instant)>>,
}

/// Times of this run.
#[derive(Clone, Copy)]
pub struct Limits {
    pub whole: Duration,
    /// `--handshake-timeout`
    pub handshake: Duration,
    /// `--login-timeout`
    pub login: Duration,
    pub renewal: Duration,
}

impl Limits {
    fn of(whole: Duration) -> Self {
        let seconds = whole.as_secs();
        Self {
            whole,
            handshake: Duration::from_secs((seconds / 2).clamp(10, 30)),
            login: Duration::from_secs((seconds / 2).clamp(12, 60)),
            renewal: Duration::from_secs((seconds / 12).clamp(3, 120)),
        }
    }
}

impl Soak<'_> {
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    /// Rests, unless it is over. A pace to be kept, not something to wait for.
    pub fn rest(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.is_over() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            std::thread::sleep(left.min(Duration::from_millis(200)));
        }
    }

    pub fn count(&self, what: impl Into<String>) {
        *self.counts.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    pub fn counted(&self, what: &str) -> u64 {
        self.counts.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    pub fn carried(&self, up: usize, down: usize) {
        self.up.fetch_add(up as u64, Ordering::Relaxed);
        self.down.fetch_add(down as u64, Ordering::Relaxed);
    }

    pub fn fail(&self, what: String) {
        eprintln!(
            "soak: {:.1} s: FAILED: {what}",
            self.began.elapsed().as_secs_f64()
        );
        let mut failures = self.failures.lock().unwrap();
        failures.push(what);
        if failures.len() >= FAILURES {
            self.is_over.store(true, Ordering::Relaxed);
        }
    }

    /// Notes when the machine is too busy for this test to be in time.
    fn watch_for_stalls(&self) {
        const TICK: Duration = Duration::from_millis(100);
        while !self.is_over() {
            let before = Instant::now();
            std::thread::sleep(TICK);
            if before.elapsed() > TICK + STALL {
                self.stalls.lock().unwrap().push((before, Instant::now()));
            }
        }
    }

    /// Whether the machine stood still at some time since then, or stands still now.
    pub fn has_stalled_since(&self, since: Instant) -> bool {
        let stalls = self.stalls.lock().unwrap();
        stalls.iter().any(|(_, end)| *end >= since)
    }

    fn stalled(&self) -> Duration {
        let stalls = self.stalls.lock().unwrap();
        stalls.iter().map(|(begin, end)| *end - *begin).sum()
    }

    /// A failure, unless it has to do with time and the machine stood still meanwhile. Wrong bytes have no excuse.
    pub fn fail_since(&self, since: Instant, what: String) {
        // Whoever watches may be the last to wake up.
        std::thread::sleep(Duration::from_millis(300));
        if self.has_stalled_since(since) && !what.contains("WRONG BYTES") {
            eprintln!("soak: while the machine stood still: {what}");
            self.count("ended: while the machine stood still");
        } else {
            self.fail(what);
        }
    }

    pub fn may_be_killed(&self, address: SocketAddr) {
        self.killable.lock().unwrap().insert(address, None);
    }

    /// The connection is over; what of it was killed, if anything.
    pub fn was_killed(&self, address: SocketAddr) -> Option<&'static str> {
        self.killable.lock().unwrap().remove(&address).flatten()
    }

    /// Runs something of a thread; a panic is a failure like any other.
    pub fn guarded(
        &self,
        what: &str,
        run: impl FnOnce() -> Result<(), String>,
    ) -> Result<(), String> {
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or(panic.downcast_ref::<&str>().copied());
            Err(format!("{what}: panic: {}", text.unwrap_or("?")))
        })
    }

    /// Repeats `turn` in a thread of its own until it is over.
    fn repeat<'scope>(
        &'scope self,
        scope: &'scope std::thread::Scope<'scope, '_>,
        name: &'static str,
        number: usize,
        mean: Duration,
        mut turn: impl FnMut(&Self, &mut Dice) + Send + 'scope,
    ) {
        let mut dice = Dice::new(self.seed);
        // Each thread has choices of its own.
        dice.0 ^= name.bytes().fold(number as u64 + 1, |all, byte| {
            all.wrapping_mul(0x100_0000_01b3) ^ u64::from(byte)
        });
        scope.spawn(move || {
            while !self.is_over() {
                let run = || {
                    turn(self, &mut dice);
                    Ok(())
                };
                if let Err(error) = self.guarded(name, run) {
                    self.fail(error);
                }
                let pause = dice.time(mean);
                self.rest(pause);
            }
        });
    }
}

/// An address of loopback's that few others have.
pub fn somebody(dice: &mut Dice) -> Ipv4Addr {
    let [high, low] = (dice.below(1 << 16) as u16).to_be_bytes();
    Ipv4Addr::new(127, 1, high, low.clamp(1, 254))
}

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap())
}

fn now_in_nanoseconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.unwrap().as_nanos() as u64
}

fn soak(test: &Test) {
    let limits = Limits::of(Duration::from_secs(number("E2E_SOAK", 20)));
    let seed = number("E2E_SEED", now_in_nanoseconds());
    eprintln!("soak: {} s, E2E_SEED={seed}", limits.whole.as_secs());
    let mounts = samples::mounts_of(test);
    let dovecot = Dovecot::start(test);
    let places = places::start(test, &limits, &dovecot);
    let baselines: Vec<_> = places.iter().map(samples::Baseline::of).collect();
    let soak = Soak {
        test,
        places,
        limits,
        began: Instant::now(),
        seed,
        is_over: AtomicBool::new(false),
        killable: Mutex::default(),
        idle: Mutex::default(),
        counts: Mutex::default(),
        up: AtomicU64::new(0),
        down: AtomicU64::new(0),
        failures: Mutex::default(),
        stalls: Mutex::default(),
    };
    let mut samples = samples::Samples::new(&soak);
    std::thread::scope(|scope| {
        let soak = &soak;
        for number in 0..CLIENTS.0 {
            let user = format!("soak{number}");
            soak.repeat(scope, "client", number, CLIENTS.1, move |soak, dice| {
                clients::visit_somewhere(soak, dice, &user);
            });
        }
        for number in 0..TOOLS.0 {
            let mut desk = clients::Desk::new(soak, number);
            soak.repeat(scope, "tool", number, TOOLS.1, move |soak, dice| {
                desk.visit_somewhere(soak, dice);
            });
        }
        for number in 0..ENEMIES.0 {
            let mut enemies = enemies::Enemies::new();
            soak.repeat(scope, "enemy", number, ENEMIES.1, move |soak, dice| {
                enemies.attack(soak, dice);
            });
        }
        soak.repeat(scope, "late", 0, Duration::ZERO, clients::log_in_late);
        let mut injector = faults::Injector::new(test);
        let pause = FAULTS.min(limits.whole / FAULTS_AT_LEAST);
        soak.repeat(scope, "fault", 0, pause, move |soak, dice| {
            injector.inject(soak, dice);
        });
        scope.spawn(|| soak.watch_for_stalls());
        let mut idlers = clients::Idlers::default();
        scope.spawn(move || idlers.hold(soak, &mut Dice::new(seed)));
        while soak.began.elapsed() < limits.whole && !soak.is_over() {
            samples.take(soak);
            let next = samples.interval();
            soak.rest(next.min(limits.whole.saturating_sub(soak.began.elapsed())));
        }
        soak.is_over.store(true, Ordering::Relaxed);
    });
    let lasted = soak.began.elapsed();
    let has_stalled = soak.has_stalled_since(soak.began);
    let mut summary = summary_of(&soak, lasted);
    samples.describe(&mut summary);
    let Soak {
        places,
        counts,
        failures,
        ..
    } = soak;
    let mut failures = failures.into_inner().unwrap();
    failures.extend(samples.growth(has_stalled));
    failures.extend(missing_kinds(&counts.into_inner().unwrap(), limits.whole));
    let mut left = Vec::new();
    for (place, baseline) in places.iter().zip(&baselines) {
        left.extend(baseline.left_over(place, &limits));
    }
    let ports: Vec<u16> = places
        .iter()
        .map(|place| place.server.port)
        .chain([dovecot.port])
        .collect();
    left.extend(places.into_iter().filter_map(|place| place.end(test)));
    drop(dovecot);
    left.extend(samples::left_on_machine(test, &ports, &mounts));
    let _ = writeln!(
        summary,
        "  leftovers (processes, sockets, files, mounts, descriptors): {}",
        if left.is_empty() {
            "none".to_owned()
        } else {
            left.join("; ")
        }
    );
    failures.extend(left);
    let _ = writeln!(summary, "  failures: {}", failures.len());
    eprintln!("{summary}");
    failures.truncate(SHOWN);
    assert!(
        failures.is_empty(),
        "E2E_SEED={seed}:\n{}",
        failures.join("\n")
    );
}

fn summary_of(soak: &Soak, lasted: Duration) -> String {
    let mut text = String::new();
    let mib = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed) as f64 / f64::from(1 << 20);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let _ = writeln!(
        text,
        "soak: summary: {:.0} s, E2E_SEED={}, load average at the end {}",
        lasted.as_secs_f64(),
        soak.seed,
        load.trim()
    );
    let names: Vec<_> = soak
        .places
        .iter()
        .map(|place| place.name.as_str())
        .collect();
    let _ = writeln!(text, "  servers: {}", names.join("; "));
    let _ = writeln!(
        text,
        "  messages and bulk of well-behaved clients: {:.1} MiB up, {:.1} MiB down, all compared",
        mib(&soak.up),
        mib(&soak.down)
    );
    let _ = writeln!(
        text,
        "  processor time of all (clients, enemies, servers, this test): {:.0} s",
        processor_seconds()
    );
    let _ = writeln!(
        text,
        "  the machine stood still for (in which nobody can be in time): {:.1} s",
        soak.stalled().as_secs_f64()
    );
    let counts = soak.counts.lock().unwrap();
    for group in ["client", "session", "enemy", "fault", "ended"] {
        let of_group: Vec<_> = counts
            .iter()
            .filter_map(|(name, count)| Some((name.strip_prefix(&format!("{group}: "))?, count)))
            .collect();
        let sum: u64 = of_group.iter().map(|(_, count)| **count).sum();
        let list: Vec<_> = of_group
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        let _ = writeln!(text, "  {group}: {sum}: {}", list.join(", "));
    }
    text
}

/// Of this process and all that were waited for.
fn processor_seconds() -> f64 {
    use nix::sys::resource::{UsageWho, getrusage};
    let of = |who| {
        let usage = getrusage(who).unwrap();
        [usage.user_time(), usage.system_time()]
            .map(|time| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6)
            .iter()
            .sum::<f64>()
    };
    of(UsageWho::RUSAGE_SELF) + of(UsageWho::RUSAGE_CHILDREN)
}

/// A soak that did not do what it is there for proves nothing: in its time, everything must have happened.
fn missing_kinds(counts: &BTreeMap<String, u64>, whole: Duration) -> Vec<String> {
    let has = |prefix: &str| counts.keys().any(|name| name.starts_with(prefix));
    let mut wanted: Vec<String> = ["client: ", "enemy: ", "fault: ", "session: resumed"]
        .map(str::to_owned)
        .to_vec();
    if whole >= Duration::from_secs(120) {
        wanted.extend(clients::KINDS.iter().map(|kind| format!("client: {kind}")));
        wanted.extend(enemies::names().map(|name| format!("enemy: {name}")));
        wanted.extend(faults::KINDS.iter().map(|kind| format!("fault: {kind}")));
    }
    wanted
        .into_iter()
        .filter(|kind| !has(kind))
        .map(|kind| format!("there was no '{kind}'"))
        .collect()
}
