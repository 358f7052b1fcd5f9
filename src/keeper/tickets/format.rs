//! Key sets as bytes, which is how we keep ours, and as text, which is how an administrator hands one to a fleet (pure).

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};

use super::{KEYS_LIMIT, Key, Origin, SECRET_LENGTH, TicketKeys};

/// The first octets of our file: what it is, and which version.
const MAGIC: &[u8] = b"imap-tls ticket keys 1\n";
/// A time in seconds and a secret.
const ENTRY_LENGTH: usize = 8 + SECRET_LENGTH;
/// The longest of our files.
pub(super) const SET_LIMIT: usize = MAGIC.len() + 1 + KEYS_LIMIT * ENTRY_LENGTH + SHA256_OUTPUT_LEN;

impl TicketKeys {
    /// The set as bytes: magic, number of keys, for each its time (big-endian) and its secret, SHA-256 of all that.
    pub fn encode(&self) -> Vec<u8> {
        let keys = || self.keys.iter().take(KEYS_LIMIT);
        let mut bytes = MAGIC.to_vec();
        bytes.extend(u8::try_from(keys().count()));
        for key in keys() {
            bytes.extend_from_slice(&key.created.to_be_bytes());
            bytes.extend_from_slice(&key.secret);
        }
        let checksum = digest(&SHA256, &bytes);
        bytes.extend_from_slice(checksum.as_ref());
        bytes
    }

    /// The set in `bytes`, if every octet is as [`encode`](Self::encode) makes it. The checksum finds accidents, not attacks:
    /// who can write the file can read it.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, checksum) = bytes.split_last_chunk::<SHA256_OUTPUT_LEN>()?;
        if digest(&SHA256, body).as_ref() != checksum {
            return None;
        }
        let (&count, entries) = body.strip_prefix(MAGIC)?.split_first()?;
        let count = usize::from(count);
        if !(1..=KEYS_LIMIT).contains(&count) || entries.len() != count * ENTRY_LENGTH {
            return None;
        }
        let keys = entries
            .chunks_exact(ENTRY_LENGTH)
            .map(|entry| {
                let (created, secret) = entry.split_first_chunk()?;
                Key::new(u64::from_be_bytes(*created), secret.try_into().ok()?)
            })
            .collect::<Option<_>>()?;
        let origin = Origin::Directory;
        Some(Self { keys, origin })
    }

    /// The fixed set in `text`: 64 hexadecimal digits a line, the sealing key first; blank lines and those that start with `#`
    /// do not count.
    ///
    /// # Errors
    /// What is wrong in which line, in words. The line itself is not repeated: it is a secret, or nearly one.
    pub fn from_text(text: &[u8]) -> Result<Self, String> {
        let mut keys = Vec::new();
        for (line, number) in text.split(|octet| *octet == b'\n').zip(1_usize..) {
            let line = line.trim_ascii();
            if line.is_empty() || line.starts_with(b"#") {
                continue;
            }
            let secret = parse_hex(line).ok_or_else(|| {
                format!("line {number} is not 64 hexadecimal digits ('openssl rand -hex 32' makes such a line)")
            })?;
            let key = Key::new(0, secret).ok_or_else(|| {
                format!("line {number} repeats one octet, which is no secret: make it with 'openssl rand -hex 32'")
            })?;
            if keys.len() == KEYS_LIMIT {
                return Err(format!(
                    "it has more than {KEYS_LIMIT} keys: remove the oldest"
                ));
            }
            keys.push(key);
        }
        if keys.is_empty() {
            return Err(
                "there is no key in it: 'openssl rand -hex 32' makes a line for it".to_owned(),
            );
        }
        let origin = Origin::File;
        Ok(Self { keys, origin })
    }
}

fn parse_hex(digits: &[u8]) -> Option<[u8; SECRET_LENGTH]> {
    let digit = |octet: u8| char::from(octet).to_digit(16).map(u8::try_from)?.ok();
    if digits.len() != 2 * SECRET_LENGTH {
        return None;
    }
    let octets: Option<Vec<u8>> = digits
        .chunks_exact(2)
        .map(|pair| match pair {
            [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
            _ => None,
        })
        .collect();
    octets?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1B1C1D1E1F";

    fn resealed(mut body: Vec<u8>) -> Vec<u8> {
        body.truncate(body.len() - SHA256_OUTPUT_LEN);
        let checksum = digest(&SHA256, &body);
        body.extend_from_slice(checksum.as_ref());
        body
    }

    #[test]
    fn a_set_survives_its_bytes() {
        let keys: Vec<_> = (0..16)
            .map(|created| Key::generate(created).unwrap())
            .collect();
        let secrets: Vec<_> = keys.iter().map(|key| key.secret).collect();
        let bytes = TicketKeys {
            keys,
            origin: Origin::Directory,
        }
        .encode();
        assert_eq!(bytes.len(), SET_LIMIT);
        let decoded = TicketKeys::decode(&bytes).unwrap();
        assert!(decoded.origin == Origin::Directory);
        for (created, (key, secret)) in decoded.keys.iter().zip(secrets).enumerate() {
            assert_eq!((key.created, key.secret), (created as u64, secret));
        }
        assert_eq!(decoded.encode(), bytes);
    }

    #[test]
    fn a_damaged_or_cut_set_is_none() {
        let bytes = TicketKeys::renewed(None, 1, 1).unwrap().encode();
        for length in 0..bytes.len() {
            assert!(TicketKeys::decode(&bytes[..length]).is_none());
            let mut damaged = bytes.clone();
            damaged[length] ^= 0x40;
            assert!(TicketKeys::decode(&damaged).is_none());
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(TicketKeys::decode(&longer).is_none());
    }

    #[test]
    fn a_set_whose_checksum_is_right_may_still_be_none() {
        let good = TicketKeys::renewed(None, 1, 1).unwrap().encode();
        assert_eq!(resealed(good.clone()), good);
        let count = MAGIC.len();
        for (at, octet) in [(0, b'I'), (count - 2, b'2'), (count, 0), (count, 2)] {
            let mut bytes = good.clone();
            bytes[at] = octet;
            assert!(TicketKeys::decode(&resealed(bytes)).is_none());
        }
        let mut empty = [MAGIC, &[0; 33]].concat();
        assert!(TicketKeys::decode(&resealed(empty.clone())).is_none());
        empty.truncate(MAGIC.len());
        empty.push(17);
        for _ in 0..17 {
            empty.extend_from_slice(&good[count + 1..count + 1 + ENTRY_LENGTH]);
        }
        empty.extend_from_slice(&[0; SHA256_OUTPUT_LEN]);
        assert!(TicketKeys::decode(&resealed(empty)).is_none());
    }

    #[test]
    fn an_all_zero_key_is_refused_in_both_forms() {
        let mut bytes = TicketKeys::renewed(None, 1, 1).unwrap().encode();
        bytes[MAGIC.len() + 9..][..SECRET_LENGTH].fill(0);
        assert!(TicketKeys::decode(&resealed(bytes)).is_none());
        for zeros in ["0".repeat(64), "f".repeat(64)] {
            let why = TicketKeys::from_text(format!("{LINE}\n{zeros}\n").as_bytes()).unwrap_err();
            assert!(why.starts_with("line 2 repeats one octet"), "{why}");
            assert!(!why.contains(&zeros));
        }
    }

    #[test]
    fn a_fixed_set_is_read_in_its_order_whatever_the_comments() {
        let other = LINE.replace('0', "7");
        let text = format!("# fleet\r\n\n  {LINE}\r\n\t#\u{e9}\n{other}");
        let keys = TicketKeys::from_text(text.as_bytes()).unwrap().keys;
        assert_eq!(keys.len(), 2);
        assert_eq!(
            keys[0].secret,
            std::array::from_fn(|at| u8::try_from(at).unwrap())
        );
        assert_eq!(keys[1].secret[..2], [0x77, 0x71]);
    }

    #[test]
    fn a_fixed_set_that_is_no_set_is_refused_in_words() {
        let sixteen = [LINE; 16].join("\n");
        assert!(TicketKeys::from_text(sixteen.as_bytes()).is_ok());
        let refusals = [
            (format!("{sixteen}\n{LINE}"), "more than 16 keys"),
            (String::new(), "no key in it"),
            ("# nothing\n\n".to_owned(), "no key in it"),
            (format!("{LINE}0"), "line 1 is not 64"),
            (LINE[1..].to_owned(), "line 1 is not 64"),
            (format!("#\n{}", LINE.replace('a', "g")), "line 2 is not 64"),
            (format!("{LINE} # new"), "line 1 is not 64"),
            (LINE.replace("0a", "+a"), "line 1 is not 64"),
        ];
        for (text, expected) in refusals {
            let why = TicketKeys::from_text(text.as_bytes()).unwrap_err();
            assert!(why.contains(expected), "{why}");
            assert!(!why.contains(&LINE[20..30]), "{why}");
        }
    }
}
