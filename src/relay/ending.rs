//! Who closed first and what follows: a pure decision table.
//!
//! What must come out of it is DESIGN promise 7: every byte the backend wrote reaches the client, then close_notify, then end
//! of file; every byte the client sent reaches the backend, then end of file; and nobody waits for ever.

/// A direction that bytes can take.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Direction {
    /// There is nobody there yet: the backend starts when TLS stands.
    Absent,
    Open,
    /// Ended in order, or broken: nothing more can pass.
    Ended,
}

use Direction::{Ended, Open};

/// All that the decision depends on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Situation {
    /// From the client: ended by its end of file or close_notify, by a reset, or because we stopped waiting for either.
    pub(super) client_input: Direction,
    /// To the client.
    pub(super) client_output: Direction,
    /// To the backend.
    pub(super) backend_input: Direction,
    /// From the backend.
    pub(super) backend_output: Direction,
    /// The backend's process has not been reaped, and we have not stopped waiting for it.
    pub(super) is_backend_running: bool,
    /// Nothing passes to or from the client any more; what came from it before is the backend's.
    pub(super) is_client_broken: bool,
    /// We decided to end: a limit, a deadline, a fault.
    pub(super) is_closing: bool,
    /// The server is going down: what the client says is not heard any more, what the backend says is.
    pub(super) is_terminated: bool,
    pub(super) is_queued_for_backend: bool,
    pub(super) is_queued_for_client: bool,
}

/// What to do next.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Step {
    /// Half-close towards the backend: it has everything that the client sent.
    EndBackendInput,
    /// close_notify and half-close towards the client: it has everything that the backend wrote.
    EndClientOutput,
    /// All is done.
    Leave,
    /// Go on.
    Relay,
}

impl Situation {
    /// The next step; after taking it, ask again.
    pub(super) fn next(&self) -> Step {
        let is_client_done = self.client_input == Ended
            || self.is_client_broken
            || self.is_closing
            || self.is_terminated;
        if self.backend_input == Open && is_client_done && !self.is_queued_for_backend {
            return Step::EndBackendInput;
        }
        let is_backend_done =
            self.backend_output == Ended || self.is_client_broken || self.is_closing;
        if self.client_output == Open && is_backend_done && !self.is_queued_for_client {
            return Step::EndClientOutput;
        }
        let is_client_gone = self.client_output == Ended && self.client_input == Ended;
        // One that says nothing more may still listen.
        let is_backend_told = self.backend_input != Open;
        let is_backend_gone =
            is_backend_told && self.backend_output != Open && !self.is_backend_running;
        if is_client_gone && is_backend_gone {
            Step::Leave
        } else {
            Step::Relay
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Direction::Absent;
    use super::*;

    const RUNNING: Situation = Situation {
        client_input: Open,
        client_output: Open,
        backend_input: Open,
        backend_output: Open,
        is_backend_running: true,
        is_client_broken: false,
        is_closing: false,
        is_terminated: false,
        is_queued_for_backend: false,
        is_queued_for_client: false,
    };
    const BEFORE_TLS: Situation = Situation {
        backend_input: Absent,
        backend_output: Absent,
        is_backend_running: false,
        ..RUNNING
    };

    #[test]
    fn each_row_of_the_table() {
        let backend_done = Situation {
            backend_output: Ended,
            is_backend_running: false,
            ..RUNNING
        };
        let backend_told = Situation {
            client_output: Ended,
            ..backend_done
        };
        let client_gone = Situation {
            client_input: Ended,
            client_output: Ended,
            backend_input: Ended,
            ..RUNNING
        };
        for (situation, expected) in [
            (RUNNING, Step::Relay),
            (BEFORE_TLS, Step::Relay),
            // The client ended first.
            (
                Situation {
                    client_input: Ended,
                    is_queued_for_backend: true,
                    ..RUNNING
                },
                Step::Relay,
            ),
            (
                Situation {
                    client_input: Ended,
                    ..RUNNING
                },
                Step::EndBackendInput,
            ),
            (
                Situation {
                    client_input: Ended,
                    backend_input: Ended,
                    ..RUNNING
                },
                Step::Relay,
            ),
            // The backend ended first.
            (
                Situation {
                    is_queued_for_client: true,
                    ..backend_done
                },
                Step::Relay,
            ),
            (backend_done, Step::EndClientOutput),
            (backend_told, Step::Relay),
            (
                Situation {
                    client_input: Ended,
                    ..backend_told
                },
                Step::EndBackendInput,
            ),
            (
                Situation {
                    client_input: Ended,
                    backend_input: Ended,
                    ..backend_told
                },
                Step::Leave,
            ),
            // The backend closed its output but lives on.
            (
                Situation {
                    is_backend_running: true,
                    client_input: Ended,
                    backend_input: Ended,
                    ..backend_told
                },
                Step::Relay,
            ),
            // The client is gone, and the backend takes its time.
            (client_gone, Step::Relay),
            (
                Situation {
                    is_backend_running: false,
                    ..client_gone
                },
                Step::Relay,
            ),
            (
                Situation {
                    is_backend_running: false,
                    backend_output: Ended,
                    ..client_gone
                },
                Step::Leave,
            ),
            // The server is going down: the backend is told, and the client may speak until it has closed.
            (
                Situation {
                    is_terminated: true,
                    ..RUNNING
                },
                Step::EndBackendInput,
            ),
            (
                Situation {
                    is_terminated: true,
                    backend_input: Ended,
                    ..RUNNING
                },
                Step::Relay,
            ),
            (
                Situation {
                    is_terminated: true,
                    backend_input: Ended,
                    ..backend_told
                },
                Step::Relay,
            ),
            // TLS is broken: what was taken from the client is the backend's before that is told, and the client has its alert.
            (
                Situation {
                    is_client_broken: true,
                    is_queued_for_backend: true,
                    is_queued_for_client: true,
                    ..RUNNING
                },
                Step::Relay,
            ),
            (
                Situation {
                    is_client_broken: true,
                    is_queued_for_backend: true,
                    ..RUNNING
                },
                Step::EndClientOutput,
            ),
            (
                Situation {
                    is_client_broken: true,
                    is_queued_for_client: true,
                    ..RUNNING
                },
                Step::EndBackendInput,
            ),
            (
                Situation {
                    is_client_broken: true,
                    ..client_gone
                },
                Step::Relay,
            ),
            // We end it: before TLS, and with a backend.
            (
                Situation {
                    is_closing: true,
                    is_queued_for_client: true,
                    ..BEFORE_TLS
                },
                Step::Relay,
            ),
            (
                Situation {
                    is_closing: true,
                    ..BEFORE_TLS
                },
                Step::EndClientOutput,
            ),
            (
                Situation {
                    is_closing: true,
                    client_output: Ended,
                    ..BEFORE_TLS
                },
                Step::Relay,
            ),
            (
                Situation {
                    is_closing: true,
                    client_output: Ended,
                    client_input: Ended,
                    ..BEFORE_TLS
                },
                Step::Leave,
            ),
            (
                Situation {
                    is_closing: true,
                    ..RUNNING
                },
                Step::EndBackendInput,
            ),
            (
                Situation {
                    is_closing: true,
                    backend_input: Ended,
                    ..RUNNING
                },
                Step::EndClientOutput,
            ),
        ] {
            assert_eq!(situation.next(), expected, "{situation:?}");
        }
    }

    /// Taking each step changes what it is about, so asking again comes to an end, and nothing is cut off on the way.
    #[test]
    fn no_situation_cuts_bytes_off_or_goes_in_circles() {
        let directions = [Absent, Open, Ended];
        let flags = [false, true];
        for client_input in [Open, Ended] {
            for client_output in [Open, Ended] {
                for backend_input in directions {
                    for backend_output in directions {
                        for bits in 0..64 {
                            let flag = |bit: usize| flags[(bits >> bit) & 1];
                            let situation = Situation {
                                client_input,
                                client_output,
                                backend_input,
                                backend_output,
                                is_backend_running: flag(0),
                                is_client_broken: flag(5),
                                is_closing: flag(1),
                                is_terminated: flag(4),
                                is_queued_for_backend: flag(2),
                                is_queued_for_client: flag(3),
                            };
                            match situation.next() {
                                Step::EndBackendInput => assert!(!situation.is_queued_for_backend),
                                Step::EndClientOutput => assert!(!situation.is_queued_for_client),
                                Step::Leave => {
                                    assert!(client_output == Ended && backend_output != Open);
                                    assert!(
                                        backend_input != Open || !situation.is_queued_for_backend
                                    );
                                }
                                Step::Relay => {}
                            }
                        }
                    }
                }
            }
        }
    }
}
