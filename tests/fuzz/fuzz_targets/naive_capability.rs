//! Capability lists rewritten as simply as it can be written: words, each with the separators before it.

/// A list of capabilities on a line: where it begins and ends.
pub fn list(line: &[u8]) -> Option<(usize, usize)> {
    let mut at = 0;
    if line.first() == Some(&b'+') {
        return code(line, 1);
    }
    let first = word(line, &mut at).to_vec();
    let second = word(line, &mut at).to_ascii_uppercase();
    if first == b"*" && second == b"CAPABILITY" {
        return Some((at, line.len()));
    }
    let conditions: [&[u8]; 5] = [b"OK", b"NO", b"BAD", b"BYE", b"PREAUTH"];
    conditions.contains(&second.as_slice()).then_some(())?;
    code(line, at)
}

/// The list in a response code, which has to come next.
fn code(line: &[u8], mut at: usize) -> Option<(usize, usize)> {
    while at < line.len() && line[at] <= b' ' {
        at += 1;
    }
    if line.get(at) != Some(&b'[') {
        return None;
    }
    at += 1;
    let end = at + line[at..].iter().position(|&byte| byte == b']')?;
    let name = word(&line[..end], &mut at);
    name.eq_ignore_ascii_case(b"CAPABILITY")
        .then_some((at, end))
}

/// The next word, and past it.
fn word<'a>(line: &'a [u8], at: &mut usize) -> &'a [u8] {
    while *at < line.len() && line[*at] <= b' ' {
        *at += 1;
    }
    let start = *at;
    while *at < line.len() && line[*at] > b' ' {
        *at += 1;
    }
    &line[start..*at]
}

/// The line as a client is to see it.
pub fn rewrite(line: &[u8], is_offered: bool, is_external_kept: bool) -> Vec<u8> {
    let Some((start, end)) = list(line) else {
        return line.to_vec();
    };
    let mut out = line[..start].to_vec();
    let mut has_starttls = false;
    let mut at = start;
    loop {
        let before = at;
        let name = word(&line[..end], &mut at).to_ascii_uppercase();
        if name.is_empty() {
            if is_offered && !has_starttls {
                out.extend(b" STARTTLS");
            }
            // Whatever separates the list from what follows.
            out.extend(&line[before..]);
            return out;
        }
        let is_bound = name.starts_with(b"AUTH=") && name[5..].ends_with(b"-PLUS");
        let is_external = name == b"AUTH=EXTERNAL" && !is_external_kept;
        let is_unwanted = name == b"STARTTLS" && (!is_offered || has_starttls);
        if !is_bound && !is_external && !is_unwanted {
            out.extend(&line[before..at]);
            has_starttls |= name == b"STARTTLS";
        }
    }
}
