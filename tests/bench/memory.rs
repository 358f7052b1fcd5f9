//! The memory that a connection's processes have to themselves, from /proc.

use std::collections::HashMap;
use std::fs;
use std::ops::AddAssign;
use std::path::Path;

use nix::unistd::Pid;

/// Memory of some processes, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Memory {
    pub(crate) processes: f64,
    /// Unique set size: private pages, clean and dirty.
    pub(crate) unique: f64,
    pub(crate) page_tables: f64,
}

impl AddAssign for Memory {
    fn add_assign(&mut self, other: Self) {
        self.processes += other.processes;
        self.unique += other.unique;
        self.page_tables += other.page_tables;
    }
}

impl Memory {
    /// Of all our descendants except the IMAP servers, which are the same for all, and those of `others`, which are there without
    /// a connection as well: tcpserver and the keeper service; divided by `connections`.
    pub(crate) fn per_connection(others: &[Pid], imapd: &Path, connections: usize) -> Self {
        let mut sum = Self::default();
        for process in descendants() {
            let is_imapd = fs::read_link(format!("/proc/{process}/exe"))
                .is_ok_and(|executable| executable == imapd);
            if !others.contains(&process) && !is_imapd {
                sum += Self::of(process);
            }
        }
        let share = connections as f64;
        Self {
            processes: sum.processes / share,
            unique: sum.unique / share,
            page_tables: sum.page_tables / share,
        }
    }

    /// Of one process; nothing if it has ended.
    fn of(process: Pid) -> Self {
        let unique = field_sum(process, "smaps_rollup", "Private_");
        Self {
            processes: if unique > 0.0 { 1.0 } else { 0.0 },
            unique,
            page_tables: field_sum(process, "status", "VmPTE"),
        }
    }
}

/// What the kernel keeps for all processes and sockets, in KiB (`/proc/meminfo`).
pub(crate) fn kernel_memory() -> f64 {
    const FIELDS: [&str; 3] = ["KernelStack:", "PageTables:", "Slab:"];
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    text.lines()
        .filter(|line| FIELDS.iter().any(|field| line.starts_with(field)))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
        .sum()
}

/// The sum of the fields with this prefix, which are in kB.
fn field_sum(process: Pid, file: &str, prefix: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{process}/{file}")).unwrap_or_default();
    text.lines()
        .filter(|line| line.starts_with(prefix) && !line.starts_with("Private_Hugetlb"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok())
        .sum()
}

/// Every process below this one.
pub(crate) fn descendants() -> Vec<Pid> {
    descendants_of(Pid::this())
}

/// The same below another.
pub(crate) fn descendants_of(process: Pid) -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(process) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        if let Some(parent) = parent(process) {
            children.entry(parent).or_default().push(process);
        }
    }
    let mut found = Vec::new();
    let mut next = vec![process.as_raw()];
    while let Some(process) = next.pop() {
        for child in children.remove(&process).unwrap_or_default() {
            found.push(Pid::from_raw(child));
            next.push(child);
        }
    }
    found
}

fn parent(process: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, in parentheses, may contain anything.
    stat.rsplit(')')
        .next()?
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}
