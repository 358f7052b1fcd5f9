#!/usr/bin/env python3
"""seeds.py DIRECTORY - makes a first corpus for each target that reads IMAP from tests/transcripts."""
import hashlib
import pathlib
import re
import sys

SETTINGS = ["required", "optional", "implicit", "starttls", "starttls-kept"]
# What src/imap is not told: for the others see preauth_cuts.rs (steps) and connection.rs (events).
CLIENT, BACKEND, CLIENT_END, BACKEND_END, TLS_UNAVAILABLE = 0, 6, 12, 13, 14


def unescape(text):
    text, end = (text[:-2], b"") if text.endswith("\\c") else (text, b"\r\n")
    escapes = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\"}
    parts = re.split(r"\\(x..|.)", text)
    out = parts[0].encode()
    for escape, rest in zip(parts[1::2], parts[2::2]):
        out += bytes.fromhex(escape[1:]) if escape[0] == "x" else escapes[escape]
        out += rest.encode()
    return out + end


def events(steps):
    """The same session for a relay, with the backend that is a descriptor, and TLS where it begins."""
    for kind, text in steps:
        if kind in (CLIENT, BACKEND):
            for start in range(0, len(text), 255):
                piece = text[start : start + 255]
                yield bytes([4 if kind == CLIENT else 10, len(piece)]) + piece
        else:
            yield {CLIENT_END: b"\x30", BACKEND_END: b"\x13", TLS_UNAVAILABLE: b"\x15"}[kind]


def main():
    out = pathlib.Path(sys.argv[1])

    def write(target, seed):
        directory = out / target
        directory.mkdir(parents=True, exist_ok=True)
        (directory / hashlib.sha1(seed).hexdigest()).write_bytes(seed)

    transcripts = pathlib.Path(__file__).parent.parent / "transcripts"
    for file in sorted(transcripts.glob("*.txt")):
        steps = []
        for line in file.read_text().splitlines():
            mark, _, rest = line.partition(" ")
            if mark == "policy":
                setting = SETTINGS.index(rest)
            elif mark in ("C:", "B>"):
                steps.append((CLIENT if mark == "C:" else BACKEND, unescape(rest)))
            elif mark in ("C!", "B!"):
                steps.append((CLIENT_END if mark == "C!" else BACKEND_END, b""))
            elif line == "! tls-unavailable":
                steps.append((TLS_UNAVAILABLE, b""))
        write("preauth_cuts", bytes([setting]) + b"\xff".join(bytes([kind]) + text for kind, text in steps))
        for kind, text in steps:
            if kind == BACKEND:
                write("capability", text.removesuffix(b"\r\n"))
        write("imap_codec", b"".join(text for kind, text in steps if kind == CLIENT))
        session = b"".join(events(steps))
        if setting < 2:
            for source in range(3):
                # Then TLS, in case it is asked for, and a login in it.
                rest = b"\x0c" + events_after_tls()
                write("connection", bytes([setting + 3 * source, 0]) + connected(source) + session + rest)
        else:
            policy = {2: 2, 3: 0, 4: 1}[setting]
            begin = b"\x0c" if policy == 2 else b"\x2c" if policy == 0 else b"\x06\x00\x2c"
            for source in range(3):
                write("connection", bytes([policy + 3 * source, 0]) + begin + connected(source) + session)


def connected(source):
    """Where the backend is connected to, it is there."""
    return b"\x1d\x01" if source == 2 else b""


def events_after_tls():
    return b"\x1d\x01\x06\x00\x00\x02\x06\x01\x05\x20\x0b\x20\x10\x13"


if __name__ == "__main__":
    main()
