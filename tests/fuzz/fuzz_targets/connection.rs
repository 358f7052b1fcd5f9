//! A whole connection: clients, backends, ends, faults and time in any order against the relay, and a model of what must come out.
//!
//! The relay is the program's, with real sockets and real TLS; all other ends are here. After each event it runs until it would
//! wait, and then every stream is compared: each byte in order, none too many, none held back, nothing from before STARTTLS after
//! it. What a line of IMAP causes is not decided here (`preauth_cuts` has a second opinion on that): the model has a protocol core
//! of its own, and knows whose bytes go where, when, and what an end means.
#![no_main]

mod connection_model;
mod connection_peers;

use connection_model::Model;
use connection_peers::{Client, Peer};
use imap_tls::fuzzing::driven::{Driven, Peers, Setup, Source, Stage, drive};
use imap_tls::imap::Policy;
use libfuzzer_sys::fuzz_target;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

fuzz_target!(
    init: {
        // As in the program, where Rust's runtime does it: who writes to nobody is told so.
        // SAFETY: nothing else in this process has an opinion on this signal.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    },
    |input: &[u8]| play(input)
);

fn play(input: &[u8]) {
    let mut script = Script(input);
    let (Some(first), Some(second)) = (script.byte(), script.byte()) else {
        return;
    };
    let setup = Setup {
        buffer: (first & 0x80 != 0).then_some(2048),
        policy: [Policy::Required, Policy::Optional, Policy::Implicit][usize::from(first % 3)],
        source: [Source::Launchers, Source::Descriptor, Source::Connectors]
            [usize::from(first / 3 % 3)],
    };
    drive(&setup, |driven, peers| {
        let mut world = World::new(driven, peers, &setup, second);
        for _ in 0..EVENTS {
            let Some(event) = script.byte() else { break };
            world.happen(event, &mut script);
        }
        world.end(second >> 6);
    });
}

/// Events of one input at most: longer ones say nothing new.
const EVENTS: usize = 96;
/// Octets of one input at most. Below what the protocol core may hold (`limits::HELD_INPUT_MAXIMUM`).
const OCTETS: usize = 400 * 1024;
/// What a relay may have queued for a side: one queue, one read or all that the protocol core held, and TLS around it.
const QUEUE_MAXIMUM: usize = (64 + 512 + 128) * 1024 * 9 / 8;
/// The same where the protocol core is out of it.
const OPAQUE_QUEUE_MAXIMUM: usize = (64 + 64) * 1024 * 9 / 8;
/// Time passes at most so often until a connection whose client is gone is over.
const PATIENCE: usize = 12;
/// In a LOGIN; never in the log.
const PASSWORD: &[u8] = b"hunter2";
const GREETING_NOTE: &[u8] = b": it greets with '";

const CLIENT_LINES: [&[u8]; 24] = [
    b"z STARTTLS\r\n",
    b"a NOOP\r\n",
    b"a LOGIN u hunter2\r\n",
    b"a AUTHENTICATE PLAIN\r\n",
    b"aHVudGVyMg==\r\n",
    b"*\r\n",
    b"a LOGIN {1}\r\n",
    b"a LOGIN {1+}\r\nu {7+}\r\nhunter2\r\n",
    b"u {7}\r\n",
    b"hunter2\r\n",
    b"a COMPRESS DEFLATE\r\n",
    b"a LOGOUT\r\n",
    b"a CAPABILITY\r\n",
    b"a ID NIL\r\n",
    b"a NOOP\r\nz STARTTLS\r\n",
    b"a NOOP\r\nb NOOP\r\nc NOOP\r\n",
    b"z STARTTLS\r\na LOGIN u hunter2\r\n",
    b"z starttls\n",
    b"z STARTTLS x\r\n",
    b"a NO",
    b"OP\r\n",
    b"\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"a FETCH 1 BODY[]\r\n",
];

const BACKEND_LINES: [&[u8]; 24] = [
    b"* OK hello\r\n",
    b"a OK done\r\n",
    b"a NO no\r\n",
    b"+ go on\r\n",
    b"* OK [CAPABILITY IMAP4rev1 STARTTLS AUTH=PLAIN] hello\r\n",
    b"* CAPABILITY IMAP4rev1 LITERAL+ AUTH=PLAIN\r\n",
    b"a OK [CAPABILITY IMAP4rev1 STARTTLS] in\r\n",
    b"* PREAUTH hello\r\n",
    b"* BYE bye\r\n",
    b"* BYE bye\r\na OK out\r\n",
    b"b OK done\r\n",
    b"c OK done\r\n",
    b"a OK done\r\nb OK done\r\n",
    b"* 1 FETCH (BODY[] {5}\r\n",
    b"hello)\r\n",
    b"* OK he",
    b"llo\r\n",
    b"\r\n",
    b"220 hello\r\n",
    b"* OK hello\r\na OK too early\r\n",
    b"z OK not yours\r\n",
    b"+ ",
    b"* 3 EXISTS\n",
    b"a BAD what\r\n",
];

/// The bytes of an input, taken from the front.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self) -> Vec<u8> {
        let count = usize::from(self.byte().unwrap_or(0)).min(self.0.len());
        let (taken, rest) = self.0.split_at(count);
        self.0 = rest;
        taken.to_vec()
    }

    fn line(&mut self, lines: &[&[u8]]) -> Vec<u8> {
        lines[usize::from(self.byte().unwrap_or(0)) % lines.len()].to_vec()
    }
}

/// The relay, and all that is around it.
struct World<'a, 'b> {
    driven: &'a mut Driven<'b>,
    model: Model,
    client: Client,
    /// Of the cleartext phase (or the only one), and of the TLS phase.
    backends: [Option<Peer>; 2],
    controls: [Option<OwnedFd>; 2],
    keeper: Option<OwnedFd>,
    log: UnixDatagram,
    octets: usize,
    /// What the next bulk begins with, so that none is like the one before.
    bulk: u8,
    /// A backend has acted since the relay last ran.
    has_backend_acted: bool,
    is_over: bool,
    exit: Option<u8>,
}

impl<'a, 'b> World<'a, 'b> {
    fn new(driven: &'a mut Driven<'b>, peers: Peers, setup: &Setup, options: u8) -> Self {
        let (secured, secured_control) = match peers.secured {
            Some(start) => (Some(Peer::new(start.backend)), start.control),
            None => (None, None),
        };
        let mut world = Self {
            driven,
            model: Model::new(setup),
            client: Client::new(peers.client, options & 1 != 0, options & 2 != 0),
            backends: [Some(Peer::new(peers.cleartext.backend)), secured],
            controls: [peers.cleartext.control, secured_control],
            keeper: Some(peers.keeper),
            log: peers.log,
            octets: 0,
            bulk: 0,
            has_backend_acted: false,
            is_over: false,
            exit: None,
        };
        world.client.peer.is_lazy = options & 4 != 0;
        for backend in world.backends.iter_mut().flatten() {
            backend.is_lazy = options & 8 != 0;
        }
        world.run();
        world
    }

    fn happen(&mut self, event: u8, script: &mut Script<'_>) {
        match event & 0x1f {
            0..=3 => {
                let line = script.line(&CLIENT_LINES);
                self.client_says(line);
            }
            4 => {
                let bytes = script.bytes();
                self.client_says(bytes);
            }
            5 => {
                let bytes = self.bulk(script, b"f ");
                self.client_says(bytes);
            }
            6..=9 => {
                let line = script.line(&BACKEND_LINES);
                self.backend_says(line);
            }
            10 => {
                let bytes = script.bytes();
                self.backend_says(bytes);
            }
            11 => {
                let bytes = self.bulk(script, b"* ");
                self.backend_says(bytes);
            }
            12..=14 => self.client_begins_tls(event & 0x20 != 0),
            15 => {
                let bytes = script.bytes();
                self.inject(bytes);
            }
            16 => self.client_ends(event & 0x20 != 0),
            17 => {
                self.run();
                self.client_leaves();
            }
            18 => self.backend_ends(false),
            19 => self.backend_ends(true),
            20 => {
                self.run();
                self.backend_exits(script.byte().unwrap_or(0));
            }
            21 => {
                self.run();
                self.keeper = None;
                self.model.keeper_ends();
            }
            22 => {
                self.run();
                self.terminate();
            }
            23 => {
                self.run();
                self.pass_time();
            }
            24 => self.driven.idle(),
            25 => self.client.peer.is_lazy ^= true,
            26 => {
                for backend in self.backends.iter_mut().flatten() {
                    backend.is_lazy ^= true;
                }
            }
            27 => {
                let count = 1 + 64 * usize::from(script.byte().unwrap_or(0));
                self.client.peer.pull(count);
            }
            28 => {
                let count = 1 + 64 * usize::from(script.byte().unwrap_or(0));
                for backend in self.backends.iter_mut().flatten() {
                    backend.pull(count);
                }
            }
            29 | 30 => {
                self.run();
                self.connector_answers(script.byte().unwrap_or(0));
            }
            _ => self.client.is_stepping ^= true,
        }
        // Several events at once, now and then.
        if event & 0x80 == 0 || self.octets > OCTETS {
            self.run();
        }
    }

    /// A line longer than any socket's buffer, or many octets that are no lines.
    fn bulk(&mut self, script: &mut Script<'_>, start: &[u8]) -> Vec<u8> {
        let count = 701 * usize::from(script.byte().unwrap_or(0));
        self.bulk = self.bulk.wrapping_add(1);
        let pattern = (0..count).map(|at| b'A' + u8::try_from((at + at / 26) % 26).unwrap_or(0));
        let mut bytes = start.to_vec();
        bytes.push(b'a' + self.bulk % 26);
        bytes.extend(pattern);
        bytes.extend(b"\r\n");
        bytes
    }

    fn may_say(&mut self, bytes: &[u8]) -> bool {
        self.octets += bytes.len();
        self.octets <= OCTETS && !bytes.is_empty()
    }

    fn client_says(&mut self, bytes: Vec<u8>) {
        if !self.may_say(&bytes) || !self.client.peer.may_send() {
            return;
        }
        // What would make an end of half a record: see `inject`.
        if self.client.is_poisoned && self.driven.has_closed_tls() {
            return;
        }
        self.client_acts();
        if self.client.tls.is_some() && self.model.speaks_tls() {
            // In TLS 1.2 the server is done first, and what the client says then, it can send only when it has seen that.
            if !self.client.is_established() && !self.model.awaits_tls() {
                self.model.is_in_order = false;
            }
            self.client.say_inside(&bytes);
            self.model.client_says_inside(&bytes);
        } else {
            self.client.peer.send(&bytes);
            self.model.client_sends(&bytes, false);
        }
    }

    /// The relay reads the client first; what it is to read in another order is beyond the model.
    fn client_acts(&mut self) {
        if self.has_backend_acted {
            self.run();
        }
    }

    /// A ClientHello: where it is due, or pipelined behind STARTTLS, or where there is none to be.
    fn client_begins_tls(&mut self, is_pipelined: bool) {
        if !self.client.peer.may_send() || !self.model.is_in_order {
            return;
        }
        self.client_acts();
        let is_due = if self.model.is_clear() {
            is_pipelined
        } else {
            self.model.needs_hello()
        };
        if !is_due {
            return;
        }
        let hello = self.client.begin();
        let before: &[u8] = if self.model.is_clear() {
            b"z STARTTLS\r\n"
        } else {
            b""
        };
        let bytes = [before, &hello].concat();
        self.client.peer.send(&bytes);
        self.model.client_sends(before, false);
        self.model.client_sends(&hello, true);
    }

    /// Octets that are no record of the client's, or not where they are.
    fn inject(&mut self, bytes: Vec<u8>) {
        self.run();
        // rustls has an assertion, in builds like this one, that there is no alert after close_notify, and then wants to send one
        // (rustls issue 959).
        let may_send = self.client.peer.may_send()
            && !self.client.has_unsent()
            && !self.driven.has_closed_tls();
        if !self.may_say(&bytes) || !may_send || !self.model.has_begun_tls() {
            return;
        }
        self.client.peer.send(&bytes);
        self.model.poison();
        self.client.is_poisoned = true;
    }

    fn client_ends(&mut self, with_notify: bool) {
        if !self.client.peer.may_send() {
            return;
        }
        self.run();
        if with_notify && self.client.is_established() && !self.client.is_poisoned {
            self.client.notify_close();
        }
        self.client.peer.finish();
        self.model.client_ends();
        if self.client.has_unsent() {
            self.model.is_in_order = false;
        }
    }

    fn client_leaves(&mut self) {
        if self.client.has_unsent() {
            self.model.is_cut = true;
        }
        self.client.peer.leave();
        self.model.client_leaves();
    }

    /// The backend that the relay has or will have; any other where there is none.
    fn backend(&self) -> usize {
        let index = self.model.backend();
        if self.backends[index].is_some() {
            index
        } else {
            0
        }
    }

    fn backend_says(&mut self, bytes: Vec<u8>) {
        let index = self.backend();
        let is_sending = self.backends[index].as_ref().is_some_and(Peer::may_send);
        if !self.may_say(&bytes) || !is_sending {
            return;
        }
        self.has_backend_acted = true;
        if let Some(backend) = &mut self.backends[index] {
            backend.send(&bytes);
        }
        self.model.backend_says(index, &bytes);
    }

    fn backend_ends(&mut self, is_leaving: bool) {
        let index = self.backend();
        self.has_backend_acted = true;
        let Some(backend) = self.backends[index].as_mut().filter(|peer| peer.is_there()) else {
            return;
        };
        if is_leaving {
            backend.push();
            if !backend.outbox.is_empty() {
                self.model.backend_breaks_off();
            }
            backend.leave();
            self.model.backend_leaves(index);
        } else if backend.may_send() {
            backend.finish();
        } else {
            return;
        }
        self.model.backend_ends(index);
        if !self.backends[index]
            .as_ref()
            .is_none_or(|peer| peer.outbox.is_empty())
        {
            self.model.is_in_order = false;
        }
    }

    fn backend_exits(&mut self, status: u8) {
        let Some(index) = self.model.process() else {
            return;
        };
        if let Some(backend) = &mut self.backends[index] {
            if !backend.outbox.is_empty() {
                self.model.backend_breaks_off();
                backend.outbox.clear();
            }
            // The socket may be a grandchild's, who holds it and says nothing.
            backend.is_finished = true;
        }
        self.driven.end_backend_process(index == 1, status);
        self.exit = Some(status);
        self.model.backend_exits(index);
    }

    fn terminate(&mut self) {
        self.driven.terminate();
        self.model.terminate();
    }

    fn pass_time(&mut self) {
        if self.is_over {
            return;
        }
        let was_closing = self.driven.is_closing();
        if self.driven.pass_time() {
            self.model.is_cut = true;
        }
        if self.driven.is_closing() && !was_closing {
            self.model.time_is_up();
        }
    }

    fn connector_answers(&mut self, how: u8) {
        let Some(index) = self.model.connecting() else {
            return;
        };
        let is_connected = how & 3 != 0;
        let answer: &[u8] = match how & 15 {
            0 => &[],
            4 => b"\x64cannot",
            8 => b"\x6flater\n\x1b[31m",
            12 => b"\x07where",
            _ => b"\0there",
        };
        if answer.is_empty() {
            self.controls[index] = None;
        } else if let Some(control) = &self.controls[index] {
            let _ = nix_send(control, answer);
        }
        // What the backend said before it was heard counts from now on.
        self.has_backend_acted |= is_connected;
        self.model.connector_answers(is_connected);
    }

    /// Lets everything run until nothing moves, and compares.
    fn run(&mut self) {
        for round in 0.. {
            assert!(round < 10_000, "no end of it");
            let mut has_moved = self.client.write();
            for backend in self.backends.iter_mut().flatten() {
                has_moved |= backend.push();
            }
            self.is_over = self.driven.settle();
            self.follow();
            self.client.is_poisoned |= self.model.is_poisoned();
            let clear = self
                .model
                .clear_length()
                .filter(|_| self.model.speaks_tls());
            has_moved |= self.client.read(clear);
            for backend in self.backends.iter_mut().flatten() {
                has_moved |= !backend.is_lazy && backend.pull(usize::MAX);
            }
            if !has_moved {
                break;
            }
        }
        self.has_backend_acted = false;
        self.model.burst = 0;
        self.compare();
    }

    /// When TLS stands is for the engine to say, once the client has it too.
    fn follow(&mut self) {
        if self.model.awaits_tls() && matches!(self.driven.stage(), Stage::Secured | Stage::Opaque)
        {
            assert!(!self.client.is_poisoned, "TLS out of rubbish");
            assert!(
                self.model.is_in_order && self.client.has_agreed(),
                "TLS that the client knows nothing of"
            );
            self.model.secure(self.client.is_established());
        }
        if let Some(control) = &self.controls[1] {
            let may_start = self.model.has_begun_secured();
            let is_told = nix_peek(control);
            assert!(may_start || !is_told, "the backend was started too early");
        }
        // What cannot be read now may be read in another order than it was written.
        let queued = self.driven.queued();
        let is_opaque = self.driven.stage() == Stage::Opaque;
        let maximum = if is_opaque {
            OPAQUE_QUEUE_MAXIMUM
        } else {
            QUEUE_MAXIMUM
        };
        // What the protocol core let go of may still be there.
        let maximum = if self.model.became_opaque {
            QUEUE_MAXIMUM
        } else {
            maximum
        };
        assert!(
            queued.for_client <= maximum && queued.for_backend <= maximum,
            "{queued:?}"
        );
        let is_full = queued.for_client >= 64 * 1024 || queued.for_backend >= 64 * 1024;
        if is_full && !self.model.is_opaque() {
            self.model.is_in_order = false;
        }
    }

    fn compare(&mut self) {
        if self.client.has_unsent() && !self.model.is_opaque() {
            self.model.is_in_order = false;
        }
        let is_unsent =
            |peer: &Option<Peer>| peer.as_ref().is_some_and(|peer| !peer.outbox.is_empty());
        if self.backends.iter().any(is_unsent) && !self.model.is_opaque() {
            self.model.is_in_order = false;
        }
        self.model.compare_client(&self.client, self.is_over);
        for (index, backend) in self.backends.iter().enumerate() {
            if let Some(backend) = backend {
                self.model.compare_backend(index, backend);
            }
        }
        self.read_log();
    }

    /// No peer's octets but those that are fit to be read, and no password.
    fn read_log(&mut self) {
        let mut line = [0; 8192];
        while let Ok(length) = self.log.recv(&mut line) {
            let line = &line[..length];
            assert!(
                line.iter().all(|octet| (b' '..=b'~').contains(octet)),
                "{line:?}"
            );
            // What a backend greets with it says before it has heard the client.
            let has = |text: &[u8]| line.windows(text.len()).any(|part| part == text);
            assert!(!has(PASSWORD) || has(GREETING_NOTE), "{line:?}");
        }
    }

    fn end(&mut self, how: u8) {
        self.run();
        if how < 2 {
            self.client.peer.is_lazy = false;
            for backend in self.backends.iter_mut().flatten() {
                backend.is_lazy = false;
            }
            self.client.is_stepping = false;
            self.run();
            if how == 0 {
                self.all_backends_end();
                self.client_ends(true);
            } else {
                self.client_ends(true);
                self.run();
                self.all_backends_end();
            }
            self.run();
            if self.model.must_be_over() {
                assert!(self.is_over, "everybody has ended, but the relay has not");
                if let Some(exit) = self.exit.filter(|_| self.model.process_counts()) {
                    assert_eq!(self.driven.exit_status(), exit);
                }
            }
        } else if how == 3 {
            for _ in 0..PATIENCE {
                self.pass_time();
                self.run();
            }
        }
        self.client_leaves();
        self.run();
        for _ in 0..PATIENCE {
            self.pass_time();
            self.run();
        }
        assert!(self.is_over, "a connection without a client goes on");
        assert!(self.driven.report().is_ascii() && !self.driven.report().contains('\n'));
    }

    fn all_backends_end(&mut self) {
        self.backend_ends(true);
        self.run();
        self.backend_exits(7);
    }
}

fn nix_send(control: &OwnedFd, bytes: &[u8]) -> isize {
    // SAFETY: the pointer and the length are those of `bytes`.
    unsafe {
        libc::send(
            control.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
        )
    }
}

/// Whether there is a message, which stays.
fn nix_peek(control: &OwnedFd) -> bool {
    let mut octet = [0_u8; 1];
    // SAFETY: there is room for one octet.
    let count = unsafe {
        libc::recv(
            control.as_raw_fd(),
            octet.as_mut_ptr().cast(),
            1,
            libc::MSG_DONTWAIT | libc::MSG_PEEK,
        )
    };
    count > 0
}
