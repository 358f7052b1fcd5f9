//! How long each thing may take, and what buys more time.

use std::time::{Duration, Instant};

use super::ending::Direction;
use crate::connector::CONNECT_LIMIT;

/// How long a client may take to close after its last byte from us, so that our close is no reset that eats it.
const LINGER_LIMIT: Duration = Duration::from_secs(2);
/// How long the rest may stand still once one side has ended: a backend that does not end, a client that does not read.
const ENDING_LIMIT: Duration = Duration::from_secs(60);
/// The same where we decided to end: there is a goodbye to deliver at most.
const CLOSING_LIMIT: Duration = Duration::from_secs(10);

/// When patience ends.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    pub(super) connect: Option<Instant>,
    pub(super) ending: Option<Instant>,
    /// Progress buys no time any more.
    pub(super) is_final: bool,
    pub(super) handshake: Option<Instant>,
    pub(super) linger: Option<Instant>,
    pub(super) login: Option<Instant>,
}

impl Deadlines {
    pub(super) fn next(&self) -> Option<Instant> {
        let all = [
            self.connect,
            self.ending,
            self.handshake,
            self.linger,
            self.login,
        ];
        all.into_iter().flatten().min()
    }

    pub(super) fn is_handshake_over(&self, now: Instant) -> bool {
        self.handshake.is_some_and(|deadline| deadline <= now)
    }

    /// A backend is being connected to.
    pub(super) fn begin_connecting(&mut self) {
        self.connect = Some(Instant::now() + CONNECT_LIMIT);
    }

    pub(super) fn begin_ending(&mut self, is_closing: bool) {
        let limit = if is_closing {
            CLOSING_LIMIT
        } else {
            ENDING_LIMIT
        };
        self.ending.get_or_insert_with(|| Instant::now() + limit);
    }

    /// We decided to end: nothing else is waited for, and progress buys no time.
    pub(super) fn begin_closing(&mut self) {
        self.connect = None;
        self.handshake = None;
        self.login = None;
        self.end_finally();
    }

    /// We have to end, and the rest has the time that a goodbye has.
    pub(super) fn end_finally(&mut self) {
        self.is_final = true;
        self.ending = Some(Instant::now() + CLOSING_LIMIT);
    }

    /// The client has everything; now it should close.
    pub(super) fn begin_linger(&mut self) {
        self.linger = Some(Instant::now() + LINGER_LIMIT);
    }

    /// A client that still sends to a backend that still reads is no client that forgot to close.
    pub(super) fn postpone_linger(&mut self, backend_input: Direction) {
        if backend_input == Direction::Open && self.linger.is_some() {
            self.begin_linger();
        }
    }

    /// Progress buys time, except where we decided to end.
    pub(super) fn postpone_ending(&mut self, is_closing: bool) {
        if !is_closing && !self.is_final && self.ending.is_some() {
            self.ending = Some(Instant::now() + ENDING_LIMIT);
        }
    }
}
