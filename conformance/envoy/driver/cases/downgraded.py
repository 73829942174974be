"""HTTP/2 requests that go on in HTTP/1.1: what a field could inject there (RFC 9113, 8.2.1 and 8.3)."""
import h2

from . import add


def ask(bench, *fields, path="/ok", method="GET", authority="main.test", scheme="http", body=b"", trailers=None):
    pseudo = [(":method", method), (":scheme", scheme), (":path", path), (":authority", authority)]
    head = [(name, value) for name, value in pseudo if value is not None]
    return h2.exchange(bench.proxy.main, [*head, ("x-case", bench.case), *fields], body, trailers)


def case(name, *fields, logs=1, **options):
    add("downgraded", name, lambda bench: ask(bench, *fields, **options), logs)


case("plain")
case("body with a length", ("content-length", "5"), path="/s/echo", method="POST", body=b"hello")
case("body without a length", path="/s/echo", method="POST", body=b"hello")
case("no route", path="/none")
case("connection refused", path="/closed")
case("direct response", path="/direct")
case("upstream breaks after 200", path="/s/short")
case("route timeout", path="/timeout/slow")
case("cookies in pieces", ("cookie", "a=1"), ("cookie", "b=2"))
case("te trailers", ("te", "trailers"))
case("host beside authority", ("host", "main.test"))


def refused(name, *requests):
    """Several requests that must not go on, as one case: what came of each."""
    def run(bench):
        outcomes = []
        for fields, options in requests:
            outcome = ask(bench, *fields, **options)
            if outcome["status"] is None:  # a reset stream and an ended connection both refuse it
                outcome["ended"] = "refused"
            outcomes.append(outcome)
        return outcomes
    add("downgraded", name, run, len(requests))


def field(name, value):
    return [(name, value)], {}


POST = {"path": "/s/echo", "method": "POST", "body": b"hello"}
refused("fields that would break an HTTP/1 head",
        field("x-a", "b\r\nx-smuggled: 1"), field("x-a", "b\nx-smuggled: 1"), field("x-a", "b\0c"),
        field("x-a\r\nx-smuggled", "1"), field("x-a:b", "1"), field("x a", "1"), field("X-Capital", "1"), field("", "1"),
        ([], {"path": "/ok HTTP/1.1\r\nx-smuggled: 1\r\n"}), ([], {"path": "/ok smuggled"}),
        ([], {"method": "GET /ok HTTP/1.1\r\nx: y"}), ([], {"authority": "main.test\r\nx-smuggled: 1"}))
refused("fields that HTTP/2 does not have",
        ([("transfer-encoding", "chunked")], {**POST, "body": b"0\r\n\r\n"}), field("connection", "x-secret"),
        ([("content-length", "5"), ("content-length", "4")], POST), ([], {"path": ""}), ([], {"path": None}), ([], {"method": None}),
        field(":unknown", "1"))
refused("lengths unlike the body", ([("content-length", "1")], POST), ([("content-length", "9")], POST))
refused("trailers that frame", ([], {**POST, "trailers": [("content-length", "1")]}))
for status in (201, 301, 401, 404, 429, 500, 503):
    case(f"status {status}", path=f"/s/status/{status}")
