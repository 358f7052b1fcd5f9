//! rustls's unbuffered connection: records in, plaintext out, and the reverse. It has the only buffer for what the client sent.

use std::sync::Arc;

use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{Error, ServerConfig};

use super::Progress;
use crate::buffer::Buffer;

/// How much of a record may be left over from one read to the next (RFC 8446 section 5.2, RFC 5246 section 6.2.3).
const RECORD_LIMIT: usize = 5 + 16_384 + 2048;

/// The library's connection, and what it has not worked on yet.
pub(super) struct Engine {
    /// Boxed, since it is large and handed up through frames of which each would keep a copy.
    pub(super) connection: Box<UnbufferedServerConnection>,
    /// Records, or parts of one, and room to read into.
    incoming: Buffer,
    has_sent_alert: bool,
    /// Our close_notify was sent: nothing may come after it (RFC 8446 section 6.1), though the library would send an alert.
    is_closed: bool,
    is_failed: bool,
    is_peer_closed: bool,
}

impl Engine {
    /// Expects a ClientHello.
    ///
    /// # Errors
    /// rustls's, if the configuration cannot be used.
    pub(super) fn new(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self {
            connection: Box::new(UnbufferedServerConnection::new(config)?),
            incoming: Buffer::default(),
            has_sent_alert: false,
            is_closed: false,
            is_failed: false,
            is_peer_closed: false,
        })
    }

    /// Where to read the next `size` octets from the client to.
    pub(super) fn room(&mut self, size: usize) -> &mut [u8] {
        self.incoming.prepare(size.saturating_add(RECORD_LIMIT));
        self.incoming.room(size)
    }

    /// The `count` octets that were just read, and are in the room.
    pub(super) fn arrived(&mut self, count: usize) -> &[u8] {
        self.incoming.room(count)
    }

    /// Takes `count` octets that were read to where [`Engine::room`] said; what the client said is appended to `plaintext`, what
    /// has to be sent to it to `outgoing`.
    ///
    /// # Errors
    /// rustls's, when the client broke the protocol; the alert for it is in `outgoing` then, unless close_notify was.
    pub(super) fn receive(
        &mut self,
        count: usize,
        plaintext: &mut Buffer,
        outgoing: &mut Buffer,
    ) -> Result<Progress, Error> {
        self.incoming.fill(count);
        self.work(plaintext, outgoing, |_, _| Ok(()))
    }

    /// Encrypts for the client: appends records to `outgoing`.
    ///
    /// # Errors
    /// rustls's: before the handshake is over, after close_notify, or when the keys are worn out.
    pub(super) fn send(&mut self, plaintext: &[u8], outgoing: &mut Buffer) -> Result<(), Error> {
        self.write(outgoing, |traffic, room| traffic.encrypt(plaintext, room))
    }

    /// Ends our side: appends close_notify to `outgoing`. The client may go on until it ends its own.
    ///
    /// # Errors
    /// rustls's, before the handshake is over or after an alert.
    pub(super) fn close(&mut self, outgoing: &mut Buffer) -> Result<(), Error> {
        self.write(outgoing, |traffic, room| traffic.queue_close_notify(room))?;
        self.is_closed = true;
        Ok(())
    }

    fn write(
        &mut self,
        outgoing: &mut Buffer,
        mut encrypt: impl FnMut(&mut WriteTraffic<'_>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> Result<(), Error> {
        let mut plaintext = Buffer::default();
        let mut is_written = false;
        self.work(&mut plaintext, outgoing, |mut traffic, outgoing| {
            is_written = true;
            append(outgoing, |room| match encrypt(&mut traffic, room) {
                Ok(count) => Ok(Ok(count)),
                Err(EncryptError::InsufficientSize(size)) => Ok(Err(size.required_size)),
                Err(error @ EncryptError::EncryptExhausted) => {
                    Err(Error::General(error.to_string()))
                }
            })
        })?;
        // `receive` leaves no complete record behind, so there is nothing to read here.
        if is_written && plaintext.is_empty() {
            Ok(())
        } else {
            Err(Error::HandshakeNotComplete)
        }
    }

    /// Drives the session as far as its input goes; where it can be written to, `write` does so.
    ///
    /// The library keeps places in `incoming` between calls, so it is always given the same bytes, less what it gave up.
    fn work(
        &mut self,
        plaintext: &mut Buffer,
        outgoing: &mut Buffer,
        mut write: impl FnMut(WriteTraffic<'_>, &mut Buffer) -> Result<(), Error>,
    ) -> Result<Progress, Error> {
        if self.is_failed {
            return Err(Error::General("the TLS session has failed".to_owned()));
        }
        let mut used = 0;
        let result = loop {
            let rest = self
                .incoming
                .filled_mut()
                .get_mut(used..)
                .unwrap_or_default();
            let UnbufferedStatus { mut discard, state } = self.connection.process_tls_records(rest);
            let step = match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
                    match traffic.next_record() {
                        Some(Ok(record)) => {
                            discard += record.discard;
                            plaintext.extend(record.payload);
                        }
                        Some(Err(error)) => break Err(error),
                        None => break Ok(None),
                    }
                },
                Ok(ConnectionState::EncodeTlsData(data)) => encode(data, outgoing).map(|()| None),
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    Ok(None)
                }
                Ok(ConnectionState::PeerClosed) => {
                    self.is_peer_closed = true;
                    Ok(None)
                }
                Ok(ConnectionState::Closed) => Ok(Some(Progress::PeerClosed)),
                Ok(ConnectionState::BlockedHandshake) => Ok(Some(Progress::Handshaking)),
                Ok(ConnectionState::WriteTraffic(traffic)) => write(traffic, outgoing)
                    // After the client's close_notify nothing that it sends counts (RFC 8446 section 6.1).
                    .map(|()| {
                        Some(if self.is_peer_closed {
                            Progress::PeerClosed
                        } else {
                            Progress::Open
                        })
                    }),
                // 0-RTT is never offered, and the library may grow states.
                Ok(_) => Err(Error::General(
                    "unexpected state of the TLS session".to_owned(),
                )),
                Err(error) => Err(error),
            };
            used += discard;
            match step {
                Ok(None) => {}
                Ok(Some(progress)) => break Ok(progress),
                Err(error) => break Err(error),
            }
        };
        if result.is_err() {
            self.is_failed = true;
            if !self.is_closed {
                // What is left of the session is the alert that tells the client; there may be none.
                let before = outgoing.len();
                let _ = self.encode_alert(outgoing);
                self.has_sent_alert = outgoing.len() > before;
            }
        }
        // After close_notify nothing that the client sends is read.
        self.incoming.consume(if self.is_peer_closed {
            usize::MAX
        } else {
            used
        });
        result
    }

    /// After a fault: what is still to be sent, the alert last. The session reads nothing any more; where it has something to
    /// send it says so before it looks at its input.
    fn encode_alert(&mut self, outgoing: &mut Buffer) -> Result<(), Error> {
        while self.connection.wants_write() {
            match self
                .connection
                .process_tls_records(self.incoming.filled_mut())
                .state?
            {
                ConnectionState::EncodeTlsData(data) => encode(data, outgoing)?,
                _ => return Ok(()),
            }
        }
        Ok(())
    }

    /// Gives memory back while no record is under way. Not after each: a buffer that is made anew for every read costs more
    /// than the cipher.
    pub(super) fn give_back_memory(&mut self) {
        if self.incoming.is_empty() {
            self.incoming = Buffer::default();
        }
    }

    /// Whether the client was told that the session has failed: some errors of the library's end it without an alert.
    pub(super) fn has_sent_alert(&self) -> bool {
        self.has_sent_alert
    }

    /// Whether there is memory that could be given back: not that of a record under way, for which it would be asked again and again.
    pub(super) fn holds_memory(&self) -> bool {
        self.incoming.capacity() > 0 && self.incoming.is_empty()
    }
}

type WriteTraffic<'a> = rustls::unbuffered::WriteTraffic<'a, ServerConnectionData>;
type EncodeTlsData<'a> = rustls::unbuffered::EncodeTlsData<'a, ServerConnectionData>;

fn encode(mut data: EncodeTlsData<'_>, outgoing: &mut Buffer) -> Result<(), Error> {
    append(outgoing, |room| match data.encode(room) {
        Ok(count) => Ok(Ok(count)),
        Err(EncodeError::InsufficientSize(size)) => Ok(Err(size.required_size)),
        Err(error @ EncodeError::AlreadyEncoded) => Err(Error::General(error.to_string())),
    })
}

/// Appends to `outgoing` what `encode` writes, asking it first how much room it needs.
fn append(
    outgoing: &mut Buffer,
    mut encode: impl FnMut(&mut [u8]) -> Result<Result<usize, usize>, Error>,
) -> Result<(), Error> {
    let mut room = 0;
    loop {
        match encode(outgoing.room(room))? {
            Ok(count) => {
                outgoing.fill(count);
                return Ok(());
            }
            Err(required) if required > room => room = required,
            Err(_) => {
                return Err(Error::General(
                    "the TLS library asks for no more room than it has".to_owned(),
                ));
            }
        }
    }
}
