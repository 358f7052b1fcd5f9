//! The figures, and the Markdown that tells them.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::contestant::{Contestant, Role};
use crate::floor::Floors;
use crate::growth::Step;
use crate::memory::Memory;
use crate::workspace::Workspace;
use crate::{Cipher, Key, Options};

/// What was noted down about one contestant.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    /// By concurrency.
    pub(crate) set_up: BTreeMap<usize, Load>,
    pub(crate) down: Vec<Bulk>,
    pub(crate) up: Vec<Bulk>,
    pub(crate) idle: Vec<Memory>,
    pub(crate) idle_after_traffic: Vec<Memory>,
    /// Milliseconds per connection, one figure per round.
    pub(crate) resumed: Vec<f64>,
    pub(crate) growth: Vec<Step>,
    pub(crate) facts: String,
    pub(crate) failures: usize,
    /// Sessions that ended without close_notify, or by a reset.
    pub(crate) cut: usize,
}

/// Short sessions.
#[derive(Debug, Default)]
pub(crate) struct Load {
    /// Milliseconds per connection, one figure per round.
    pub(crate) processor: Vec<f64>,
    /// Milliseconds, one figure per connection.
    pub(crate) wall: Vec<f64>,
}

/// One long transfer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bulk {
    pub(crate) megabytes_per_second: f64,
    pub(crate) processor_per_gib: f64,
}

/// The middle one; 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "an index, in range"
)]
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        count => values[((count - 1) as f64 * share).round() as usize],
    }
}

/// Medians of what the table shows; `None` where nothing was measured.
#[derive(Clone, Copy, Debug, Default)]
struct Summary {
    processor: [Option<f64>; 2],
    wall: [Option<f64>; 2],
    wall_p95: [Option<f64>; 2],
    down_speed: Option<f64>,
    down_processor: Option<f64>,
    up_speed: Option<f64>,
    up_processor: Option<f64>,
    processes: Option<f64>,
    unique: Option<f64>,
    unique_after_traffic: Option<f64>,
    page_tables: Option<f64>,
}

impl Summary {
    fn of(figures: &Figures) -> Self {
        let middle = |values: Vec<f64>| (!values.is_empty()).then(|| median(&values));
        let load = |concurrency| figures.set_up.get(&concurrency);
        let both = |value: fn(&Load) -> f64| {
            [1, 8].map(|concurrency| {
                load(concurrency)
                    .filter(|load| !load.processor.is_empty())
                    .map(value)
            })
        };
        let bulk =
            |list: &[Bulk], value: fn(&Bulk) -> f64| middle(list.iter().map(value).collect());
        let memory =
            |list: &[Memory], value: fn(&Memory) -> f64| middle(list.iter().map(value).collect());
        Self {
            processor: both(|load| median(&load.processor)),
            wall: both(|load| median(&load.wall)),
            wall_p95: both(|load| quantile(&load.wall, 0.95)),
            down_speed: bulk(&figures.down, |bulk| bulk.megabytes_per_second),
            down_processor: bulk(&figures.down, |bulk| bulk.processor_per_gib),
            up_speed: bulk(&figures.up, |bulk| bulk.megabytes_per_second),
            up_processor: bulk(&figures.up, |bulk| bulk.processor_per_gib),
            processes: memory(&figures.idle, |memory| memory.processes),
            unique: memory(&figures.idle, |memory| memory.unique),
            unique_after_traffic: memory(&figures.idle_after_traffic, |memory| memory.unique),
            page_tables: memory(&figures.idle, |memory| memory.page_tables),
        }
    }
}

fn number(value: Option<f64>, digits: usize) -> String {
    value.map_or("-".to_owned(), |value| format!("{value:.digits$}"))
}

fn pair(values: [Option<f64>; 2], digits: usize) -> String {
    values.map(|value| number(value, digits)).join(" / ")
}

fn ratio(value: Option<f64>, base: Option<f64>) -> String {
    match (value, base) {
        (Some(value), Some(base)) if base > 0.0 => format!("{:.2}", value / base),
        _ => "-".to_owned(),
    }
}

/// What is known besides the contestants' figures.
pub(crate) struct Report {
    pub(crate) floors: Floors,
    head: String,
}

impl Report {
    /// Notes down what must be known from before the load.
    pub(crate) fn begin(
        options: &Options,
        workspace: &Workspace,
        programs: &[(String, PathBuf)],
    ) -> Self {
        let mut head = String::from("# What a connection costs\n\n");
        let mut line = |name: &str, value: &str| {
            let _ = writeln!(head, "- {name}: {value}");
        };
        line("Date", &output("date", &["-u", "+%Y-%m-%d %H:%M UTC"]));
        line("Machine", &machine());
        line("Kernel", read("/proc/sys/kernel/osrelease").trim());
        line("Load average before", read("/proc/loadavg").trim());
        line(
            "Versions",
            &output(
                "dpkg-query",
                &[
                    "-W",
                    "-f",
                    "${Package} ${Version}, ",
                    "ucspi-tcp",
                    "stunnel4",
                    "libssl3",
                    "tlswrapper",
                    "courier-base",
                ],
            ),
        );
        for (name, program) in programs {
            line(name, &describe_program(program));
        }
        let key = match options.key {
            Key::P256 => "ECDSA P-256",
            Key::Rsa2048 => "RSA-2048",
        };
        let cipher = match options.cipher {
            Cipher::Aes128 => "AES-128-GCM only",
            Cipher::Aes256 => "AES-256-GCM only",
            Cipher::Any => "all its ciphers",
            Cipher::Chacha20 => "ChaCha20-Poly1305 only",
        };
        line(
            "Work",
            &format!(
                "{key} certificate; the client (rustls, aws-lc-rs) offers X25519MLKEM768 first and {cipher}, and resumes nothing unless that is what is measured"
            ),
        );
        line("Static C programs compiled by", workspace.static_compiler);
        line("Processor time from", workspace.accounting.describe());
        Self {
            floors: Floors::default(),
            head,
        }
    }

    /// The whole text.
    pub(crate) fn finish(mut self, contestants: &[Contestant], figures: &[Figures]) -> String {
        let _ = writeln!(
            self.head,
            "- Load average after: {}\n",
            read("/proc/loadavg").trim()
        );
        let floors = &self.floors;
        let _ = writeln!(
            self.head,
            "In-process floors: one handshake's server half {:.3} ms (aws-lc-rs, X25519MLKEM768; the handshake floor), {:.3} ms (ring, X25519); \
             the cipher alone {:.3} s/GiB to encrypt, {:.3} to decrypt (ring, records of 16 KiB).\n",
            median(&floors.handshake),
            median(&floors.handshake_classical),
            median(&floors.encryption),
            median(&floors.decryption),
        );
        let rows: Vec<_> = contestants
            .iter()
            .zip(figures)
            .map(|(contestant, figures)| (contestant, figures, Summary::of(figures)))
            .collect();
        self.head
            + &figures_table(&rows)
            + &self.floors.ratios_table(&rows)
            + &resumption_table(&rows)
            + &growth_table(&rows)
            + &facts_table(&rows)
            + NOTES
    }
}

type Row<'a> = (&'a Contestant, &'a Figures, Summary);

fn figures_table(rows: &[Row<'_>]) -> String {
    let mut text = String::from(
        "| | CPU ms a connection, C=1 / C=8 | wall ms, median C=1 / C=8 | wall ms, p95 C=1 / C=8 | down MB/s | down CPU s/GiB | up MB/s | up CPU s/GiB | processes when idle | USS KiB idle | USS KiB after 30 MiB | page tables KiB |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
    );
    for (contestant, _, summary) in rows {
        let cells = [
            contestant.name.clone(),
            pair(summary.processor, 2),
            pair(summary.wall, 2),
            pair(summary.wall_p95, 2),
            number(summary.down_speed, 0),
            number(summary.down_processor, 2),
            number(summary.up_speed, 0),
            number(summary.up_processor, 2),
            number(summary.processes, 0),
            number(summary.unique, 0),
            number(summary.unique_after_traffic, 0),
            number(summary.page_tables, 0),
        ];
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text + "\n"
}

/// A floor of a contestant's and one of the mathematics, one on the other.
fn plus(floor: Option<f64>, values: &[f64]) -> Option<f64> {
    floor.map(|floor| floor + median(values))
}

impl Floors {
    fn ratios_table(&self, rows: &[Row<'_>]) -> String {
        let of_role = |role| {
            rows.iter()
                .find(|(contestant, ..)| contestant.role == role)
                .map_or(Summary::default(), |(.., summary)| *summary)
        };
        let (floor, static_floor) = (of_role(Role::Floor), of_role(Role::StaticFloor));
        let confined = of_role(Role::ConfinedFloor);
        let confined_listener = of_role(Role::ConfinedListenerFloor);
        let backend = of_role(Role::Backend);
        let peers: Vec<_> = rows
            .iter()
            .filter(|(contestant, ..)| contestant.role == Role::Peer)
            .collect();
        let least = |value: &dyn Fn(&Summary) -> Option<f64>| {
            let values = peers.iter().filter_map(|(.., summary)| value(summary));
            values.min_by(f64::total_cmp)
        };
        let stunnel = peers
            .iter()
            .find(|(contestant, ..)| contestant.name.starts_with("stunnel4 implicit"))
            .map_or(Summary::default(), |(.., summary)| *summary);
        let mut text = String::from(
            "Ratios (the best peer is the best in that figure; below 1 is better, for MB/s above 1):\n\n\
             | | CPU a connection / (copy floor + handshake floor), C=1 / C=8 | CPU a connection / (static copy floor + handshake floor) | CPU a connection / (confinement floor + handshake floor) | CPU a connection / (backend alone + handshake floor) | CPU a connection / best peer | wall median / best peer | wall p95 / best peer | CPU down / (copy floor + cipher) | CPU up / (copy floor + cipher) | MB/s down / stunnel4 | MB/s up / stunnel4 |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        );
        for (contestant, _, own) in rows {
            if contestant.role.is_floor() {
                continue;
            }
            let confined = if contestant.role.listens() {
                &confined_listener
            } else {
                &confined
            };
            let both = |cell: &dyn Fn(usize) -> String| [0, 1].map(cell).join(" / ");
            let over_floor = |at: usize, floor: &Summary| {
                ratio(
                    own.processor[at],
                    plus(floor.processor[at], &self.handshake),
                )
            };
            let cells = [
                contestant.name.clone(),
                both(&|at| over_floor(at, &floor)),
                both(&|at| over_floor(at, &static_floor)),
                both(&|at| over_floor(at, confined)),
                both(&|at| over_floor(at, &backend)),
                both(&|at| ratio(own.processor[at], least(&|peer| peer.processor[at]))),
                both(&|at| ratio(own.wall[at], least(&|peer| peer.wall[at]))),
                both(&|at| ratio(own.wall_p95[at], least(&|peer| peer.wall_p95[at]))),
                ratio(
                    own.down_processor,
                    plus(floor.down_processor, &self.encryption),
                ),
                ratio(own.up_processor, plus(floor.up_processor, &self.decryption)),
                ratio(own.down_speed, stunnel.down_speed),
                ratio(own.up_speed, stunnel.up_speed),
            ];
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        text + "\n"
    }
}

fn resumption_table(rows: &[Row<'_>]) -> String {
    let mut text = String::new();
    for (contestant, figures, summary) in rows {
        if let (false, Some(full)) = (figures.resumed.is_empty(), summary.processor[0]) {
            let resumed = median(&figures.resumed);
            let _ = writeln!(
                text,
                "- {}: {full:.2} ms CPU a connection with a full handshake, {resumed:.2} resumed: {:.2} cheaper",
                contestant.name,
                full - resumed
            );
        }
    }
    if text.is_empty() {
        return text;
    }
    format!("Resumption (one connection at a time):\n\n{text}\n")
}

fn growth_table(rows: &[Row<'_>]) -> String {
    let mut text = String::new();
    for (contestant, figures, _) in rows {
        for step in &figures.growth {
            let cells = [
                contestant.name.clone(),
                step.open.to_string(),
                number(step.processor, 2),
                number(Some(step.memory.unique), 0),
                number(Some(step.memory.page_tables), 0),
                number(Some(step.kernel), 0),
            ];
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
    }
    if text.is_empty() {
        return text;
    }
    format!(
        "Growth, beside so many that are open and idle:\n\n\
         | | open | CPU ms for one more | USS KiB each | page tables KiB each | kernel KiB each, IMAP server and tcpserver's process included |\n\
         | --- | --- | --- | --- | --- | --- |\n{text}\n"
    )
}

fn facts_table(rows: &[Row<'_>]) -> String {
    let mut text = String::from(
        "Who does what:\n\n| | negotiated | what it is | sessions cut (no close_notify) | failed measurements |\n| --- | --- | --- | --- | --- |\n",
    );
    for (contestant, figures, _) in rows {
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} |",
            contestant.name, figures.facts, contestant.notes, figures.cut, figures.failures
        );
    }
    text + "\n"
}

const NOTES: &str = "\
How to read it: every contestant, unless it listens by itself, runs under its own tcpserver with the same certificate and the same tiny static IMAP server. \
A connection is connect, (STARTTLS,) full handshake, LOGIN, LOGOUT, end of file; C is how many at a time. \
CPU is of the whole process tree: tcpserver's fork, the contestant and the IMAP server, not the client; the median of the rounds. \
Wall is over all connections of all rounds, the client's own work included. \
Bulk figures are of one connection, without its set-up; the client shares the machine's processors. \
USS is what a connection's processes have to themselves (Private_* in smaps_rollup), without tcpserver, keeper service and IMAP server, after one second of idleness; \
page tables come on top, as does the kernel's own memory (kernel stacks, page tables and slab, by what /proc/meminfo gained).
";

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A tool's standard output, or what there is of it.
fn output(tool: &str, arguments: &[&str]) -> String {
    let output = Command::new(tool).args(arguments).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default()
        .trim_end_matches([' ', ',', '\n'])
        .to_owned()
}

fn machine() -> String {
    let text = read("/proc/cpuinfo");
    let model = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |rest| rest.trim_start_matches(['\t', ' ', ':']));
    let count = std::thread::available_parallelism().map_or(0, Into::into);
    let kind = if text.contains(" hypervisor") {
        ", virtual"
    } else {
        ""
    };
    format!("{count} x {model}{kind}")
}

/// How a program is linked decides how fast it starts.
fn describe_program(path: &Path) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let interpreter = b"/ld-";
    let is_dynamic = bytes
        .get(..4096)
        .unwrap_or_default()
        .windows(interpreter.len())
        .any(|window| window == interpreter);
    let linking = if is_dynamic { "dynamic" } else { "static" };
    format!("{linking}, {} KiB", bytes.len() / 1024)
}
