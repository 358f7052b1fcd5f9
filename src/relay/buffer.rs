//! A byte queue whose reader and writer agree on a limit, and that holds no memory while it is empty and idle.

use crate::buffer::Buffer;

/// Bytes waiting to be written to a peer.
#[derive(Debug, Default)]
pub(super) struct Queue {
    bytes: Buffer,
    /// Octets at the start that are written already.
    done: usize,
}

/// A side is read from only while the other side's queue holds less than this, so a queue never grows far beyond it:
/// by one read, and what TLS adds to that.
pub(super) const QUEUE_LIMIT: usize = 64 * 1024;

impl Queue {
    /// Adds bytes at the end.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// The end of the queue, for those who write there themselves.
    pub(super) fn tail(&mut self) -> &mut Buffer {
        &mut self.bytes
    }

    /// What is to be written next: everything.
    pub(super) fn front(&self) -> &[u8] {
        self.bytes.filled().get(self.done..).unwrap_or_default()
    }

    /// Takes away what was written.
    pub(super) fn consume(&mut self, count: usize) {
        self.done = self.done.saturating_add(count).min(self.bytes.len());
        if self.done == self.bytes.len() {
            self.clear();
        } else if self.done >= QUEUE_LIMIT {
            // A slow peer's queue may never be empty, and what was written must not pile up before what was not.
            self.bytes.consume(self.done);
            self.done = 0;
        }
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.done = 0;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.front().is_empty()
    }

    /// Whether more may be read for this queue.
    pub(super) fn has_room(&self) -> bool {
        self.front().len() < QUEUE_LIMIT
    }

    /// Gives memory back while nothing is queued.
    pub(super) fn give_back(&mut self) {
        if self.is_empty() {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_in_order() {
        let mut queue = Queue::default();
        queue.push(b"abc");
        queue.consume(2);
        queue.tail().extend(b"def");
        assert_eq!(queue.front(), b"cdef");
        queue.consume(usize::MAX);
        assert!(queue.is_empty() && queue.front().is_empty());
    }

    #[test]
    fn a_full_queue_asks_for_no_more() {
        let mut queue = Queue::default();
        queue.push(&[0; QUEUE_LIMIT]);
        assert!(!queue.has_room());
        queue.consume(1);
        assert!(queue.has_room());
    }

    #[test]
    fn a_queue_that_is_never_empty_does_not_grow() {
        let mut queue = Queue::default();
        queue.push(&[0; 1000]);
        let mut last = 0_u8;
        for round in 0..10_000_u32 {
            last = u8::try_from(round % 251).unwrap();
            queue.push(&[last; 1000]);
            queue.consume(1000);
        }
        assert_eq!(queue.front(), [last; 1000]);
        assert!(queue.tail().capacity() < 4 * QUEUE_LIMIT);
    }

    #[test]
    fn an_idle_queue_holds_no_memory() {
        let mut queue = Queue::default();
        queue.push(&[0; QUEUE_LIMIT]);
        queue.give_back();
        assert_eq!(queue.front().len(), QUEUE_LIMIT);
        queue.consume(QUEUE_LIMIT);
        queue.give_back();
        assert_eq!(queue.tail().capacity(), 0);
    }
}
