//! The commands that need a selected mailbox: FETCH, SEARCH, STORE, EXPUNGE, CLOSE (RFC 3501 section 6.4).

use super::mailbox::{Item, Key, Numbers, Selection};
use super::syntax::Argument;
use super::{Access, MALFORMED, Outcome, Refusal, Session, State, flags_of, text_at};

impl Session {
    pub(super) fn close(&mut self) -> Outcome {
        // CLOSE removes silently, and nothing from a mailbox that was only examined (RFC 3501 section 6.4.2).
        if self.state == State::Selected(Access::ReadWrite) {
            self.inbox.expunge(None);
        }
        self.state = State::Authenticated;
        Ok("Closed".into())
    }

    pub(super) fn expunge(&mut self, uids: Option<&str>) -> Outcome {
        self.require_write_access()?;
        let selection = uids
            .map(|uids| self.selection(uids, Numbers::Uids))
            .transpose()?;
        for place in self.inbox.expunge(selection.as_ref()) {
            self.client.untagged(&format!("{place} EXPUNGE"))?;
        }
        Ok("Gone".into())
    }

    pub(super) fn fetch(&mut self, arguments: &[Argument], numbers: Numbers) -> Outcome {
        let selection = self.selection(text_at(arguments, 0)?, numbers)?;
        let mut items = Vec::new();
        for name in arguments
            .get(1)
            .and_then(Argument::texts)
            .ok_or(MALFORMED)?
        {
            if name.eq_ignore_ascii_case("FAST") {
                items.extend([Item::Flags, Item::InternalDate, Item::Size]);
            } else {
                items.push(
                    Item::parse(name).ok_or(Refusal::Bad("This small server cannot fetch that"))?,
                );
            }
        }
        // UID FETCH answers with the UID, asked for or not (RFC 3501 section 6.4.8).
        if numbers == Numbers::Uids && !items.contains(&Item::Uid) {
            items.insert(0, Item::Uid);
        }
        if self.state == State::Selected(Access::ReadWrite) && items.iter().any(Item::marks_as_seen)
        {
            for (_, message) in self
                .inbox
                .numbered()
                .filter(|(place, message)| selection.contains(*place, message))
            {
                message.flags.insert(r"\Seen".into());
            }
            // Changed flags belong into the answer (RFC 3501 section 6.4.5).
            if !items.contains(&Item::Flags) {
                items.push(Item::Flags);
            }
        }
        for (place, message) in self.inbox.numbered() {
            if selection.contains(place, message) {
                let mut answer = format!("{place} FETCH (").into_bytes();
                for (index, item) in items.iter().enumerate() {
                    if index > 0 {
                        answer.push(b' ');
                    }
                    item.write(message, &mut answer);
                }
                answer.push(b')');
                self.client.untagged_octets(&answer)?;
            }
        }
        Ok("Fetched".into())
    }

    pub(super) fn search(&mut self, arguments: &[Argument], numbers: Numbers) -> Outcome {
        let mut keys = Vec::new();
        let mut words = arguments
            .iter()
            .map(|argument| argument.text().ok_or(MALFORMED));
        while let Some(word) = words.next().transpose()? {
            let word = word.to_ascii_uppercase();
            keys.push(match word.as_str() {
                // Nothing here is searched for text, so the character set does not matter.
                "CHARSET" => {
                    words.next().ok_or(MALFORMED)??;
                    Key::All
                }
                "UID" => {
                    Key::Selected(self.selection(words.next().ok_or(MALFORMED)??, Numbers::Uids)?)
                }
                _ if word.starts_with(|first: char| first.is_ascii_digit() || first == '*') => {
                    Key::Selected(self.selection(&word, Numbers::Sequence)?)
                }
                _ => Key::parse(&word)
                    .ok_or(Refusal::Bad("This small server cannot search for that"))?,
            });
        }
        let mut answer = String::from("SEARCH");
        for (place, message) in self.inbox.numbered() {
            if keys.iter().all(|key| key.matches(place, message)) {
                let number = match numbers {
                    Numbers::Sequence => place,
                    Numbers::Uids => message.uid,
                };
                answer.push_str(&format!(" {number}"));
            }
        }
        self.client.untagged(&answer)?;
        Ok("Searched".into())
    }

    pub(super) fn store(&mut self, arguments: &[Argument], numbers: Numbers) -> Outcome {
        self.require_write_access()?;
        let selection = self.selection(text_at(arguments, 0)?, numbers)?;
        let item = text_at(arguments, 1)?.to_ascii_uppercase();
        let (action, silent) = match item.strip_suffix(".SILENT") {
            Some(action) => (action, true),
            None => (item.as_str(), false),
        };
        let flags = flags_of(arguments.get(2..).ok_or(MALFORMED)?)?;
        for (place, message) in self.inbox.numbered() {
            if !selection.contains(place, message) {
                continue;
            }
            match action {
                "+FLAGS" => message.flags.extend(flags.iter().cloned()),
                "-FLAGS" => message.flags.retain(|flag| !flags.contains(flag)),
                "FLAGS" => message.flags.clone_from(&flags),
                _ => return Err(MALFORMED),
            }
            if !silent {
                let mut answer = format!("{place} FETCH (FLAGS {}", message.flag_list());
                if numbers == Numbers::Uids {
                    answer.push_str(&format!(" UID {}", message.uid));
                }
                answer.push(')');
                self.client.untagged(&answer)?;
            }
        }
        Ok("Stored".into())
    }

    fn require_write_access(&self) -> Result<(), Refusal> {
        if self.state == State::Selected(Access::ReadWrite) {
            Ok(())
        } else {
            Err(Refusal::No("The mailbox was only examined"))
        }
    }

    fn selection(&self, text: &str, numbers: Numbers) -> Result<Selection, Refusal> {
        self.inbox.selection(text, numbers).ok_or(MALFORMED)
    }
}
