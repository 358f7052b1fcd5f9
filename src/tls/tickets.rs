//! Session tickets (RFC 5077, RFC 8446 section 4.6.1): sealed and opened by the keeper, whose keys this process never has.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustls::server::ProducesTickets;

use super::AsksKeeper;
use super::expiry::Expiry;
use super::resolver::Heard;

/// rustls's `ticketer` for one connection.
#[derive(Debug)]
pub(super) struct Ticketer {
    pub(super) expiry: Arc<Expiry>,
    pub(super) heard: Arc<Heard>,
    pub(super) keeper: Arc<dyn AsksKeeper>,
    pub(super) lifetime: u32,
    /// How many of the client's tickets may still be tried: the keeper ends where it is asked too often.
    pub(super) opens: AtomicU8,
    pub(super) seals: AtomicU8,
}

impl ProducesTickets for Ticketer {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.lifetime
    }

    fn encrypt(&self, session: &[u8]) -> Option<Vec<u8>> {
        use_up(&self.seals)?;
        let session = self.expiry.seal(session, self.lifetime);
        self.keeper.seal(self.heard.name().as_ref(), &session)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        use_up(&self.opens)?;
        let opened = self.keeper.open(self.heard.name().as_ref(), ticket)?;
        self.expiry.open(&opened)
    }
}

fn use_up(left: &AtomicU8) -> Option<()> {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
        left.checked_sub(1)
    })
    .map(drop)
    .ok()
}
