"""A server that misbehaves as its path says, and remembers what it was asked.

Speaks just enough HTTP/1.1. `x-case` of a request says which case it belongs to.
"""
import collections
import socket
import struct
import threading
import time


class Seen:
    """One request as it arrived."""

    def __init__(self, line, headers, body):
        self.line, self.headers, self.body = line, headers, body

    def get(self, name, default=""):
        return next((value for key, value in self.headers if key.lower() == name), default)


class Upstream:
    """Listens on a port of its own until the process ends."""

    def __init__(self):
        self.lock, self.by_case = threading.Lock(), collections.defaultdict(list)
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def seen(self, case):
        with self.lock:
            return list(self.by_case[case])

    def _accept(self):
        while True:
            connection, _ = self.listener.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        reader = connection.makefile("rb")
        try:
            while True:
                request = read_request(reader, connection)
                if request is None:
                    break
                case = request.get("x-case", "?")
                with self.lock:
                    self.by_case[case].append(request)
                    attempt = len(self.by_case[case])
                if not behaviour(request)(connection, request, attempt):
                    break
        except (OSError, ValueError):
            pass
        finally:
            connection.close()


def read_request(reader, connection):
    line = reader.readline()
    if not line:
        return None
    headers = []
    while (field := reader.readline().rstrip(b"\r\n")):
        name, _, value = field.decode("latin-1").partition(":")
        headers.append((name, value.strip()))
    seen = Seen(line.decode("latin-1").rstrip("\r\n"), headers, b"")
    if seen.get("expect"):
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    if seen.get("transfer-encoding").lower() == "chunked":
        while (size := int(reader.readline().split(b";")[0], 16)):
            seen.body += reader.read(size)
            reader.readline()
        while (field := reader.readline().rstrip(b"\r\n")):
            name, _, value = field.decode("latin-1").partition(":")
            seen.headers.append(("trailer " + name, value.strip()))
    elif seen.get("content-length"):
        seen.body = reader.read(int(seen.get("content-length")))
    return seen


def answer(connection, status, body=b"", headers=()):
    """A response with a length; true, since the connection goes on."""
    fields = "".join(f"{name}: {value}\r\n" for name, value in headers)
    head = f"HTTP/1.1 {status}\r\n{fields}content-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode("latin-1") + body)
    return True


def behaviour(request):
    """The first part of the path that names one; the parts before it choose the route."""
    names = request.line.split(" ")[1].split("?")[0].split("/")
    return next((BEHAVIOURS[name] for name in names if name in BEHAVIOURS), not_found)


def not_found(connection, _request, _attempt):
    return answer(connection, "404 Not Found", b"upstream: not found")


def ok(connection, request, _attempt):
    body = b"" if request.line.startswith("HEAD") else b"fine"
    if request.line.startswith("HEAD"):
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 4\r\n\r\n")
        return True
    return answer(connection, "200 OK", body, [("content-type", "text/plain")])


def close(*_):
    """Not at once: what ends within 100 ms our proxy takes for a connection that was closed while idle."""
    time.sleep(0.15)
    return False


def reset(connection, *_):
    time.sleep(0.15)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def raw(text):
    """Sends these bytes and closes."""
    def behave(connection, *_):
        connection.sendall(text)
        return False
    return behave


def breaks(text, rest=b""):
    """A head and the beginning of a body, then what breaks it; apart, so that the first part is on its way."""
    def behave(connection, *_):
        connection.sendall(text)
        time.sleep(0.06)
        connection.sendall(rest)
        return False
    return behave


def kept(text):
    """Sends these bytes and keeps the connection."""
    def behave(connection, *_):
        connection.sendall(text)
        return True
    return behave


def status(line, body=b"no"):
    return lambda connection, *_: answer(connection, line, body)


def any_status(connection, request, _attempt):
    """The status that the path names."""
    return answer(connection, request.line.split("status/")[1].split(" ")[0] + " Said", b"so", [("location", "/elsewhere")])


def slow(connection, *_):
    time.sleep(1)
    return answer(connection, "200 OK", b"late")


def stall(connection, *_):
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    time.sleep(1)
    connection.sendall(b"-whole")
    return True


def flaky(connection, request, attempt):
    """Well from its second request on."""
    if attempt == 1:
        return answer(connection, "503 Service Unavailable", b"not yet")
    return ok(connection, request, attempt)


def flaky_close(connection, request, attempt):
    return ok(connection, request, attempt) if attempt > 1 else close()


def echo_body(connection, request, _attempt):
    return answer(connection, "200 OK", b"got " + request.body)


BEHAVIOURS = {
    "ok": ok,
    "echo": echo_body,
    "close": close,
    "reset": reset,
    "garbage": raw(b"\x00\x01garbage, not a response\r\n\r\n"),
    "bad-header": raw(b"HTTP/1.1 200 OK\r\nbad header: 1\r\ncontent-length: 0\r\n\r\n"),
    "bad-length": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nabc"),
    "length-and-chunked": raw(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"),
    "half-head": raw(b"HTTP/1.1 200 OK\r\ncontent-le"),
    "short": breaks(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf"),
    "short-chunk": breaks(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n"),
    "bad-chunk": breaks(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n", b"zz\r\n"),
    "until-close": raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nall of it"),
    "http10": raw(b"HTTP/1.0 200 OK\r\ncontent-length: 4\r\n\r\nfine"),
    "chunked": kept(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"),
    "trailers": kept(b"HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\nx-sum: 1\r\n\r\n"),
    "204": kept(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "304": kept(b'HTTP/1.1 304 Not Modified\r\netag: "a"\r\n\r\n'),
    "early-hints": kept(b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
    "served": lambda connection, *_: answer(connection, "200 OK", b"", [("server", "uvicorn"), ("date", "Thu, 01 Jan 2026 00:00:00 GMT")]),
    "hop": lambda connection, *_: answer(connection, "200 OK", b"", [
        ("connection", "x-secret"), ("x-secret", "1"), ("keep-alive", "timeout=5"), ("proxy-connection", "keep-alive"), ("x-kept", "1")]),
    "cookies": lambda connection, *_: answer(connection, "200 OK", b"", [("set-cookie", "a=1"), ("set-cookie", "b=2"), ("x-list", "1"), ("x-list", "2")]),
    "goes": lambda connection, *_: answer(connection, "200 OK", b"bye", [("connection", "close")]) and False,
    "400": status("400 Bad Request"),
    "404": status("404 Not Found"),
    "409": status("409 Conflict"),
    "429": status("429 Too Many Requests"),
    "500": status("500 Internal Server Error"),
    "502": status("502 Bad Gateway"),
    "503": status("503 Service Unavailable"),
    "status": any_status,
    "slow": slow,
    "stall": stall,
    "flaky": flaky,
    "flaky-close": flaky_close,
}
