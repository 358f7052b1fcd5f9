//! Who is being served: counts by source and in all, and what they allow.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::unistd::Pid;

use crate::cli::{Listening, Prefixes};

/// The part of an address that counts as one client: hosts of IPv6 have whole networks to choose their addresses from.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) struct Source(IpAddr);

/// Why a client cannot be taken on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Full {
    Altogether,
    Source,
}

/// The connections that have a process.
#[derive(Debug, Default)]
pub(super) struct Table {
    by_process: BTreeMap<Pid, Option<Source>>,
    by_source: BTreeMap<Source, usize>,
    pub(super) refused: u64,
    pub(super) served: u64,
}

impl Source {
    pub(super) fn of(address: IpAddr, prefixes: Prefixes) -> Self {
        // A shift by all bits is none; a prefix has at least one.
        Self(match address {
            IpAddr::V4(address) => {
                let mask = u32::MAX << (u32::BITS - u32::from(prefixes.v4));
                Ipv4Addr::from_bits(address.to_bits() & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX << (u128::BITS - u32::from(prefixes.v6));
                Ipv6Addr::from_bits(address.to_bits() & mask).into()
            }
        })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Table {
    /// Whether there is room for one more from there.
    pub(super) fn admit(&self, source: Option<Source>, limits: &Listening) -> Result<(), Full> {
        if self.by_process.len() >= limits.max_connections {
            return Err(Full::Altogether);
        }
        source.map_or(Ok(()), |source| self.admit_from(source, limits))
    }

    /// The same for a connection that is there already.
    pub(super) fn admit_from(&self, source: Source, limits: &Listening) -> Result<(), Full> {
        let count = self.by_source.get(&source);
        if count.is_some_and(|count| *count >= limits.max_per_source) {
            return Err(Full::Source);
        }
        Ok(())
    }

    pub(super) fn add(&mut self, process: Pid, source: Option<Source>) {
        self.served += 1;
        self.by_process.insert(process, None);
        if let Some(source) = source {
            self.settle(process, source);
        }
    }

    /// The source of a connection that was added without one has become known.
    pub(super) fn settle(&mut self, process: Pid, source: Source) {
        if let Some(place @ None) = self.by_process.get_mut(&process) {
            *place = Some(source);
            *self.by_source.entry(source).or_default() += 1;
        }
    }

    /// The process has ended; false if it was none of these.
    pub(super) fn remove(&mut self, process: Pid) -> bool {
        let Some(source) = self.by_process.remove(&process) else {
            return false;
        };
        if let Some(source) = source {
            if let Some(count) = self.by_source.get_mut(&source) {
                *count -= 1;
                if *count == 0 {
                    self.by_source.remove(&source);
                }
            }
        }
        true
    }

    pub(super) fn len(&self) -> usize {
        self.by_process.len()
    }

    pub(super) fn processes(&self) -> impl Iterator<Item = Pid> {
        self.by_process.keys().copied()
    }
}

/// As the supervisor shows it.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} connections from {} sources; {} served, {} refused",
            self.len(),
            self.by_source.len(),
            self.served,
            self.refused
        )
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::Refusal;

    const PREFIXES: Prefixes = Prefixes { v4: 24, v6: 64 };

    fn source(text: &str) -> Option<Source> {
        Some(Source::of(text.parse().unwrap(), PREFIXES))
    }

    #[test]
    fn neighbours_are_one_source() {
        assert_eq!(source("192.0.2.1"), source("192.0.2.255"));
        assert_ne!(source("192.0.2.1"), source("192.0.3.1"));
        assert_eq!(source("2001:db8::1"), source("2001:db8::ffff:0:0:1"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
        let whole = Prefixes { v4: 32, v6: 128 };
        assert_eq!(
            Source::of("192.0.2.1".parse().unwrap(), whole).to_string(),
            "192.0.2.1"
        );
    }

    #[test]
    fn limits_hold_for_a_source_and_altogether_until_processes_end() {
        let limits = Listening {
            addresses: Vec::new(),
            drain_timeout: Duration::ZERO,
            max_connections: 3,
            max_per_source: 2,
            prefixes: PREFIXES,
            refusal: Refusal::Silent,
            renewal: Duration::ZERO,
        };
        let mut table = Table::default();
        let (one, other) = (source("192.0.2.1"), source("198.51.100.1"));
        for number in 1..=2 {
            assert_eq!(table.admit(one, &limits), Ok(()));
            table.add(Pid::from_raw(number), one);
        }
        assert_eq!(table.admit(one, &limits), Err(Full::Source));
        assert_eq!(table.admit(other, &limits), Ok(()));
        assert_eq!(table.admit(None, &limits), Ok(()));
        table.add(Pid::from_raw(3), None);
        assert_eq!(table.admit(other, &limits), Err(Full::Altogether));
        assert!(!table.remove(Pid::from_raw(4)));
        assert!(table.remove(Pid::from_raw(1)));
        assert!(!table.remove(Pid::from_raw(1)));
        assert_eq!(table.admit(one, &limits), Ok(()));
        table.remove(Pid::from_raw(2));
        table.remove(Pid::from_raw(3));
        assert!(table.by_source.is_empty() && table.by_process.is_empty());
        assert_eq!(
            table.to_string(),
            "0 connections from 0 sources; 3 served, 0 refused"
        );
    }
}
