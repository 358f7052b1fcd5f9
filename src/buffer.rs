//! Bytes at whose end others write. What was cleared for them once is not cleared again: zeros that are only written over are
//! as much work as a copy.

/// Bytes, and room behind them that has been initialised.
#[derive(Debug, Default)]
pub(crate) struct Buffer {
    /// All that is initialised.
    bytes: Vec<u8>,
    filled: usize,
}

impl Buffer {
    /// The bytes that are there.
    pub(crate) fn filled(&self) -> &[u8] {
        self.bytes.get(..self.filled).unwrap_or_default()
    }

    /// The same, for whoever works on them in place.
    pub(crate) fn filled_mut(&mut self) -> &mut [u8] {
        self.bytes.get_mut(..self.filled).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.filled
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// For how many bytes there is memory.
    pub(crate) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Has memory for so many bytes, if it has none; from the system, which costs nothing until it is touched.
    pub(crate) fn prepare(&mut self, size: usize) {
        if self.bytes.is_empty() {
            self.bytes = vec![0; size];
        }
    }

    /// `size` octets behind those that are there, to be written to; [`Buffer::fill`] says how many were.
    pub(crate) fn room(&mut self, size: usize) -> &mut [u8] {
        let end = self.filled.saturating_add(size);
        self.prepare(end);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes.get_mut(self.filled..end).unwrap_or_default()
    }

    /// The first `count` octets of the room were written.
    pub(crate) fn fill(&mut self, count: usize) {
        self.filled = self.filled.saturating_add(count).min(self.bytes.len());
    }

    /// Adds bytes at the end.
    pub(crate) fn extend(&mut self, bytes: &[u8]) {
        let room = self.bytes.get_mut(self.filled..).unwrap_or_default();
        let (over, behind) = bytes.split_at(room.len().min(bytes.len()));
        if let Some(room) = room.get_mut(..over.len()) {
            room.copy_from_slice(over);
        }
        self.bytes.extend_from_slice(behind);
        self.filled = self.filled.saturating_add(bytes.len());
    }

    /// Forgets the first `count`.
    pub(crate) fn consume(&mut self, count: usize) {
        let count = count.min(self.filled);
        self.bytes.copy_within(count..self.filled, 0);
        self.filled -= count;
    }

    /// Forgets all but the first `length`.
    pub(crate) fn truncate(&mut self, length: usize) {
        self.filled = self.filled.min(length);
    }

    /// Forgets all of them.
    pub(crate) fn clear(&mut self) {
        self.filled = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_there_whichever_way() {
        let mut buffer = Buffer::default();
        assert_eq!(buffer.capacity(), 0);
        buffer.extend(b"abc");
        buffer.room(10).fill(b'x');
        buffer.fill(2);
        // Over the room that is left, and beyond it.
        buffer.extend(b"0123456789abcdef");
        assert_eq!(buffer.filled(), b"abcxx0123456789abcdef");
        buffer.consume(4);
        buffer.truncate(3);
        assert_eq!(buffer.filled(), b"x01");
        buffer.filled_mut().fill(b'y');
        buffer.extend(b"z");
        assert_eq!((buffer.filled(), buffer.len()), (b"yyyz".as_slice(), 4));
        buffer.consume(usize::MAX);
        assert!(buffer.is_empty() && buffer.capacity() > 0);
        buffer.extend(b"a");
        buffer.clear();
        assert_eq!(buffer.filled(), b"");
    }

    #[test]
    fn nobody_fills_more_than_there_is_room_for() {
        let mut buffer = Buffer::default();
        buffer.fill(5);
        assert!(buffer.is_empty());
        assert_eq!(buffer.room(3), [0; 3]);
        buffer.fill(usize::MAX);
        assert_eq!(buffer.filled(), [0; 3]);
    }
}
