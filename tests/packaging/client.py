#!/usr/bin/env python3
"""IMAP clients: one that reads a mail, one that stays, many at once, and rude ones. Prints one line of findings."""

import asyncio
import imaplib
import socket
import ssl
import sys
import time


class ToAddress:
    """A client of the server that the certificate is for, wherever the name leads."""

    def __init__(self, address, certificate, *arguments, **named):
        self.address = address
        self.context = ssl.create_default_context(cafile=certificate)
        # The snakeoil certificate is for the machine that made it.
        names = ssl._ssl._test_decode_cert(certificate)["subjectAltName"]
        super().__init__(names[0][1], *arguments, **named)


class Clear(ToAddress, imaplib.IMAP4):
    def _create_socket(self, timeout):
        return socket.create_connection((self.address, self.port), timeout=30)


class Tls(Clear):
    def _create_socket(self, timeout):
        return self.context.wrap_socket(super()._create_socket(timeout), server_hostname=self.host)


def fetch(scheme, address, port, certificate, password):
    """Reads the first mail; scheme is imap (STARTTLS), imaps, or clear."""
    try:
        client = (Tls if scheme == "imaps" else Clear)(address, certificate, port=port)
        if scheme == "imap":
            client.starttls(client.context)
        client.login("user", password)
        client.select()
        print(client.fetch("1", "(BODY[TEXT])")[1][0][1].decode().strip())
        client.logout()
    except (imaplib.IMAP4.error, OSError) as error:
        print(f"{type(error).__name__}: {error}")


def append(address, port, certificate, password):
    """Puts a mail into the inbox, by implicit TLS."""
    client = Tls(address, certificate, port=port)
    client.login("user", password)
    client.append("INBOX", None, None, b"From: a@example.org\r\nSubject: t\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\n\r\nhello-body\r\n")
    client.logout()


def connect(port, source="127.0.0.1"):
    return socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))


def greeting(connection):
    """The first line, or nothing if the connection was closed."""
    try:
        return connection.makefile("rb").readline()
    except ConnectionResetError:
        return b""


def limit(port, count):
    """As many connections from one source as are allowed, one more, and one again when there is room."""
    held = [connect(port, "127.0.0.9") for _ in range(count)]
    greeted = sum(greeting(one).startswith(b"* OK") for one in held)
    refused = greeting(connect(port, "127.0.0.9")) == b""
    other = greeting(connect(port, "127.0.0.10")).startswith(b"* OK")
    held.pop().close()
    deadline = time.monotonic() + 20
    recovered = False
    while not recovered and time.monotonic() < deadline:
        # Not so many that they meet another limit, as xinetd's cps.
        time.sleep(0.05)
        recovered = greeting(connect(port, "127.0.0.9")).startswith(b"* OK")
    print(f"greeted={greeted} refused={refused} other={other} recovered={recovered}")


async def burst(port, count):
    """Many connections from different sources within two seconds; every one is either served to the end or closed at once."""
    start = time.monotonic()
    # All of them before anything else is done here.
    sockets = [connect(port, f"127.1.{number // 200}.{number % 200 + 1}") for number in range(count)]
    opened = time.monotonic() - start

    async def one(connection):
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            line = await asyncio.wait_for(reader.readline(), 120)
            if line == b"":
                return "dropped"
            writer.write(b"a LOGOUT\r\n")
            rest = await asyncio.wait_for(reader.read(), 120)
            return "served" if line.startswith(b"* OK") and b"a OK" in rest else "broken"
        except ConnectionResetError:
            return "dropped"
        finally:
            writer.close()

    results = await asyncio.gather(*(one(connection) for connection in sockets))
    counts = " ".join(f"{kind}={results.count(kind)}" for kind in ("served", "dropped", "broken"))
    print(f"opened={len(sockets)} quick={opened < 2} {counts}", f"({opened:.2f} s, {time.monotonic() - start:.1f} s in all)")


def session(port, certificate):
    """Logs in by STARTTLS, says so, and goes on when told to on standard input."""
    client = Clear("127.0.0.1", certificate, port=port)
    client.starttls(client.context)
    client.login("user", "sekret")
    client.select()
    print("ready", flush=True)
    sys.stdin.readline()
    body = client.fetch("1", "(BODY[TEXT])")[1][0][1]
    client.logout()
    print(body.decode().strip())


def rude(starttls, implicit):
    """Handshakes that fail in several ways."""
    for port in (starttls, implicit):
        for words in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"", b"\0" * 3000):
            for close_abruptly in (False, True):
                with connect(port) as connection:
                    if port == starttls:
                        reader = connection.makefile("rb")
                        reader.readline()
                        connection.sendall(b"a STARTTLS\r\n")
                        reader.readline()
                    connection.sendall(words)
                    if close_abruptly:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    else:
                        connection.shutdown(socket.SHUT_WR)
                        try:
                            connection.recv(1000)
                        except ConnectionResetError:
                            pass
    print("done")


def main(command, *arguments):
    numbers = [int(word) if word.isdigit() else word for word in arguments]
    result = {"append": append, "burst": burst, "fetch": fetch, "limit": limit, "rude": rude, "session": session}[command](*numbers)
    if result:
        asyncio.run(result)


main(*sys.argv[1:])
