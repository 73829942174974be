"""Requests that no client should send, and those that two parsers could read differently (RFC 9112, 11.2)."""
from . import add, heads

SMUGGLED = b"0\r\n\r\nGET /ok?smuggled HTTP/1.1\r\nhost: main.test\r\n\r\n"


def post(bench, *fields):
    return bench.head("POST /s/echo HTTP/1.1", *fields)


heads("malformed", [
    ("length before chunked, smuggled request", 1, lambda b: post(b, "content-length: 6", "transfer-encoding: chunked") + SMUGGLED),
    ("chunked before length", 1, lambda b: post(b, "transfer-encoding: chunked", "content-length: 6") + SMUGGLED),
    ("two lengths that differ", 1, lambda b: post(b, "content-length: 1", "content-length: 2") + b"ab"),
    ("two lengths that agree", 1, lambda b: post(b, "content-length: 2", "content-length: 2") + b"ab"),
    ("list of lengths", 1, lambda b: post(b, "content-length: 2, 2") + b"ab"),
    ("length with a sign", 1, lambda b: post(b, "content-length: +2") + b"ab"),
    ("negative length", 1, lambda b: post(b, "content-length: -2") + b"ab"),
    ("length that is no number", 1, lambda b: post(b, "content-length: two") + b"ab"),
    ("length beyond 64 bits", 1, lambda b: post(b, "content-length: 99999999999999999999") + b"ab"),
    ("folded field", 1, lambda b: post(b, "x-folded: a", " b", "content-length: 0")),
    ("folded first field", 1, lambda b: b"GET /ok HTTP/1.1\r\n host: main.test\r\n\r\n"),
    ("bare LF ends lines", 1, lambda b: b.head("GET /ok HTTP/1.1").replace(b"\r\n", b"\n")),
    ("bare CR in a value", 1, lambda b: b.head("GET /ok HTTP/1.1", "x-a: a\rb")),
    ("NUL in a value", 1, lambda b: b.head("GET /ok HTTP/1.1", "x-a: a\0b")),
    ("space before the colon", 1, lambda b: post(b, "content-length : 2") + b"ab"),
    ("field without a colon", 1, lambda b: b.head("GET /ok HTTP/1.1", "nonsense")),
    ("empty field name", 1, lambda b: b.head("GET /ok HTTP/1.1", ": x")),
    ("field name with a slash", 1, lambda b: b.head("GET /ok HTTP/1.1", "a/b: x")),
    ("transfer-encoding identity", 1, lambda b: post(b, "transfer-encoding: identity")),
    ("transfer-encoding gzip, chunked", 1, lambda b: post(b, "transfer-encoding: gzip, chunked") + b"0\r\n\r\n"),
    ("transfer-encoding chunked, identity", 1, lambda b: post(b, "transfer-encoding: chunked, identity") + b"0\r\n\r\n"),
    ("transfer-encoding twice", 1, lambda b: post(b, "transfer-encoding: chunked", "transfer-encoding: chunked") + b"0\r\n\r\n"),
    ("transfer-encoding with a tab", 1, lambda b: post(b, "transfer-encoding:\tchunked") + b"0\r\n\r\n"),
    ("transfer-encoding xchunked", 1, lambda b: post(b, "transfer-encoding: xchunked") + b"0\r\n\r\n"),
    ("transfer-encoding in capitals", 1, lambda b: post(b, "transfer-encoding: CHUNKED") + b"0\r\n\r\n"),
    ("transfer-encoding in quotes", 1, lambda b: post(b, 'transfer-encoding: "chunked"') + b"0\r\n\r\n"),
    ("chunk size that is no number", 1, lambda b: post(b, "transfer-encoding: chunked") + b"zz\r\nab\r\n0\r\n\r\n"),
    ("chunk longer than its size", 1, lambda b: post(b, "transfer-encoding: chunked") + b"1\r\nab\r\n0\r\n\r\n"),
    ("chunk size beyond 64 bits", 1, lambda b: post(b, "transfer-encoding: chunked") + b"fffffffffffffffff\r\nab\r\n0\r\n\r\n"),
    ("chunk line ended by LF", 1, lambda b: post(b, "transfer-encoding: chunked") + b"2\nab\r\n0\r\n\r\n"),
    ("no host", 1, lambda b: b.head("GET /ok HTTP/1.1", host=None)),
    ("two hosts", 1, lambda b: b.head("GET /ok HTTP/1.1", "host: other.test")),
    ("empty host", 1, lambda b: b.head("GET /ok HTTP/1.1", host="")),
    ("host with a space", 1, lambda b: b.head("GET /ok HTTP/1.1", host="a b")),
    ("host with user information", 1, lambda b: b.head("GET /ok HTTP/1.1", host="user@main.test")),
    ("absolute form with another host", 1, lambda b: b.head("GET http://exact.test/ HTTP/1.1", host="suffix.test")),
    ("absolute form to the upstream", 1, lambda b: b.head("GET http://other.test/ok?x HTTP/1.1")),
    ("no target", 1, lambda b: b.head("GET HTTP/1.1")),
    ("target with a space", 1, lambda b: b.head("GET /o k HTTP/1.1")),
    ("target without a slash", 1, lambda b: b.head("GET ok HTTP/1.1")),
    ("target with a fragment", 1, lambda b: b.head("GET /ok#part HTTP/1.1")),
    ("target with a control character", 1, lambda b: b.head("GET /ok\x01 HTTP/1.1")),
    ("target with bytes above ASCII", 1, lambda b: b.head("GET /ok/\xfc HTTP/1.1")),
    ("two spaces after the method", 1, lambda b: b.head("GET  /ok HTTP/1.1")),
    ("method in small letters", 1, lambda b: b.head("get /ok HTTP/1.1")),
    ("method with a colon", 1, lambda b: b.head("GE:T /ok HTTP/1.1")),
    ("HTTP/1.2", 1, lambda b: b.head("GET /ok HTTP/1.2")),
    ("HTTP/2.0 in text", 1, lambda b: b.head("GET /ok HTTP/2.0")),
    ("HTTP/0.9", 1, lambda b: b"GET /ok\r\n\r\n"),
    ("no version number", 1, lambda b: b.head("GET /ok HTTP/x")),
    ("empty lines before the request", 1, lambda b: b"\r\n\r\n" + b.head("GET /ok HTTP/1.1")),
    ("CONNECT", 1, lambda b: b.head("CONNECT main.test:443 HTTP/1.1", host="main.test:443")),
    ("headers too large", 1, lambda b: b.head("GET /ok HTTP/1.1", "x-large: " + "a" * 62000)),
    ("101 headers", 1, lambda b: b.head("GET /ok HTTP/1.1", *(f"x-{n}: 1" for n in range(101)))),
    ("half a head, then gone", 1, lambda b: b"GET /ok HT"),
])
add("malformed", "garbage after a request",
    lambda b: b.send(b.head("GET /ok HTTP/1.1"), b"\x00\x01garbage\r\n\r\n", count=2), 2)
