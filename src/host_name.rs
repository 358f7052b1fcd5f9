//! A host name as TLS clients send it (RFC 6066 section 3): checked once, safe as a file name from then on.

use std::fmt;

/// A host name in lower case: labels of letters, digits, `-` and `_` (real names contain it), joined by single dots. So it
/// never contains `/`, never begins with a dot and is never empty. The first label may be `*` in a [`HostName::or_wildcard`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostName(String);

/// The longest host name in text form (RFC 1035 section 2.3.4).
pub(crate) const NAME_LIMIT: usize = 253;
/// The longest label (RFC 1035 section 2.3.4).
const LABEL_LIMIT: usize = 63;

impl HostName {
    /// The name, if it is one. Internationalised names come as A-labels (RFC 5890), which are such names too.
    pub fn new(name: &str) -> Option<Self> {
        let is_name = name.len() <= NAME_LIMIT && name.split('.').all(is_label);
        is_name.then(|| Self(name.to_ascii_lowercase()))
    }

    /// A name, or one whose first label is `*`: what the file of a wildcard certificate is called.
    pub fn or_wildcard(name: &str) -> Option<Self> {
        match name.strip_prefix("*.") {
            Some(parent) => Self::new(parent)
                .filter(|_| name.len() <= NAME_LIMIT)
                .map(|parent| parent.wildcard()),
            None => Self::new(name),
        }
    }

    fn wildcard(&self) -> Self {
        Self(format!("*.{self}"))
    }

    fn parent(&self) -> Option<Self> {
        let (_, parent) = self.0.split_once('.')?;
        // A certificate for a whole top-level domain is none that anybody issues (RFC 6125 section 7.2).
        parent.contains('.').then(|| Self(parent.to_owned()))
    }

    /// What a certificate for this name may be filed under: the name, its wildcard, and the wildcard's domain, which is what
    /// certbot calls the directory of a certificate for both.
    pub(crate) fn candidates(&self) -> impl Iterator<Item = Self> {
        let parent = self.parent();
        let wildcard = parent.as_ref().map(Self::wildcard);
        [Some(self.clone()), wildcard, parent].into_iter().flatten()
    }

    /// A name that this one, if it is a wildcard, covers.
    pub(crate) fn example(&self) -> Self {
        match self.0.strip_prefix("*.") {
            Some(parent) => Self(format!("example.{parent}")),
            None => self.clone(),
        }
    }

    /// Whether a certificate's name (`dNSName`) is this name's: equal, or its wildcard (RFC 6125 section 6.4.3: the whole
    /// left-most label and no other).
    pub(crate) fn is_covered_by(&self, pattern: &str) -> bool {
        match (pattern.strip_prefix("*."), self.0.split_once('.')) {
            (Some(parent), Some((_, own))) => parent.eq_ignore_ascii_case(own),
            (Some(_), None) => false,
            (None, _) => pattern.eq_ignore_ascii_case(&self.0),
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn is_label(label: &str) -> bool {
    !label.is_empty()
        && label.len() <= LABEL_LIMIT
        && label
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_be_a_path_is_no_name() {
        let long = ["a".repeat(63).as_str(); 4].join(".");
        for name in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "a.",
            "a/b",
            "../etc",
            "a\0",
            "a b",
            "*.a",
            "ü.example",
            "a*b",
            &"a".repeat(64),
            &long,
            "a\n",
            "a.b:143",
            "[::1]",
            "%2e",
        ] {
            assert_eq!(HostName::new(name), None, "{name:?}");
        }
        for name in [
            "a",
            "mail.example.org",
            "MAIL.Example",
            "xn--bcher-kva.example",
            "_imap.a-b.example",
            "192.0.2.1",
            &long[..253],
        ] {
            assert_eq!(
                HostName::new(name).unwrap().as_str(),
                name.to_ascii_lowercase()
            );
        }
        assert_eq!(
            HostName::or_wildcard("*.example.org").unwrap().as_str(),
            "*.example.org"
        );
        for name in ["*", "*.", "**.a.b", "a.*.b", "*a.b"] {
            assert_eq!(HostName::or_wildcard(name), None, "{name:?}");
        }
    }

    #[test]
    fn a_name_is_looked_for_from_near_to_far() {
        let candidates = |name: &str| -> Vec<_> {
            let name = HostName::new(name).unwrap();
            name.candidates().map(|candidate| candidate.0).collect()
        };
        assert_eq!(
            candidates("a.b.example"),
            ["a.b.example", "*.b.example", "b.example"]
        );
        assert_eq!(candidates("b.example"), ["b.example"]);
        assert_eq!(candidates("localhost"), ["localhost"]);
    }

    #[test]
    fn a_wildcard_covers_one_label() {
        let name = HostName::new("a.b.example").unwrap();
        for (pattern, expected) in [
            ("a.b.example", true),
            ("A.B.Example", true),
            ("*.b.example", true),
            ("*.B.EXAMPLE", true),
            ("*.example", false),
            ("b.example", false),
            ("*.a.b.example", false),
            ("*", false),
            ("", false),
        ] {
            assert_eq!(name.is_covered_by(pattern), expected, "{pattern}");
        }
    }
}
