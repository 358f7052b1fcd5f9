//! What the log and the superserver are told at the end of a session.

use std::fmt;
use std::time::Instant;

use crate::imap::{OpaqueReason, Policy};
use crate::sys::ChildEnd;
use crate::tls::Facts;

/// What the log and the superserver are told at the end.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) backend_end: Option<ChildEnd>,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    end: Option<String>,
    /// The client has ended while what it sent before was not read: how will show.
    is_end_provisional: bool,
    /// The exit status where there is none of a backend's: one that is no process of ours failed us, or the system did.
    pub(super) fault: Option<u8>,
    pub(super) facts: Option<Facts>,
    pub(super) failed_logins: u64,
    /// How the client came to be logged in, if it is.
    pub(super) login: Option<OpaqueReason>,
    policy: Policy,
    proxy: Option<String>,
    pub(super) start: Instant,
}

impl Report {
    pub(super) fn new(policy: Policy, proxy: Option<String>) -> Self {
        Self {
            backend_end: None,
            bytes_in: 0,
            bytes_out: 0,
            end: None,
            is_end_provisional: false,
            fault: None,
            facts: None,
            failed_logins: 0,
            login: None,
            policy,
            proxy,
            start: Instant::now(),
        }
    }

    /// Whether there is a cause already.
    pub(super) fn has_ended(&self) -> bool {
        self.end.is_some() && !self.is_end_provisional
    }

    /// Forgets how the backend ended, and why the session would have.
    pub(super) fn begin_anew(&mut self) {
        self.backend_end = None;
        self.end = None;
        self.is_end_provisional = false;
        self.fault = None;
    }

    /// The first cause is the one that counts.
    pub(super) fn ended(&mut self, end: String) {
        self.end.get_or_insert(end);
    }

    /// The client will send no more, but how it ended lies behind what there is no room for.
    pub(super) fn client_is_ending(&mut self) {
        self.is_end_provisional |= self.end.is_none();
        self.ended("client closed".to_owned());
    }

    /// How the client ended has shown, or we end before it can.
    pub(super) fn settle(&mut self, end: String) {
        if std::mem::take(&mut self.is_end_provisional) {
            self.end = None;
        }
        self.ended(end);
    }

    /// One side has ended, and the other stood still: how it ended will not show.
    pub(super) fn gave_up(&mut self, is_client_behind: bool) {
        if self.is_end_provisional {
            self.settle("client closed, and not all that it sent was read".to_owned());
        }
        let end = if is_client_behind {
            "client did not read to the backend's end"
        } else {
            "backend did not end"
        };
        self.ended(end.to_owned());
    }

    /// The backend's exit status; where there was no such process, 0 unless a backend could not be had or the system failed us:
    /// nothing that a client does is a failure.
    pub(crate) fn exit_status(&self) -> u8 {
        let started = self.backend_end.map(ChildEnd::exit_status);
        started.or(self.fault).unwrap_or(0)
    }

    /// Whether nothing was asked of a backend, and nothing was wrong with one: what a health check leaves.
    pub(crate) fn is_uneventful(&self) -> bool {
        self.bytes_in == 0 && self.exit_status() == 0
    }
}

/// The session line.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = match self.policy {
            Policy::Implicit => "implicit",
            Policy::Optional => "optional",
            Policy::Required => "required",
        };
        write!(f, "session policy={policy} ")?;
        if let Some(proxy) = &self.proxy {
            write!(f, "proxy={proxy} ")?;
        }
        match &self.facts {
            Some(facts) => write!(f, "{facts}")?,
            None => f.write_str("tls=none")?,
        }
        let login = match self.login {
            None => "no",
            Some(OpaqueReason::Authenticated) => "yes",
            Some(OpaqueReason::Preauthenticated) => "preauth",
        };
        write!(
            f,
            " in={} out={} login={login} failed_logins={} seconds={:.3}",
            self.bytes_in,
            self.bytes_out,
            self.failed_logins,
            self.start.elapsed().as_secs_f64()
        )?;
        if let Some(end) = self.backend_end {
            write!(f, " backend={end}")?;
        }
        write!(f, " end=\"{}\"", self.end.as_deref().unwrap_or("unknown"))
    }
}
