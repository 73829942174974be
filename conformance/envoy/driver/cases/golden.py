"""The table of situations that Envoy's operators know by their response flags."""
from . import add, asks, heads

asks("golden", [
    ("no route", "/none"),
    ("no virtual host", "/ok", {"port": "edge", "host": "other.test"}),
    ("cluster missing", "/missing"),
    ("no endpoints", "/empty"),
    ("connection refused", "/closed"),
    ("connection refused after retries", "/closed/retry"),
    ("upstream closes before headers", "/s/close"),
    ("breaker", "/breaker"),
    ("route timeout", "/timeout/slow"),
    ("route idle timeout", "/idle/slow"),
    ("direct response", "/direct"),
    ("5xx retried out", "/5xx/500"),
    ("upstream breaks after 200", "/s/short"),
    ("upstream breaks the chunk framing after 200", "/s/bad-chunk"),
])
add("golden", "route idle timeout, request incomplete",
    lambda bench: bench.send(bench.head("POST /idle/echo HTTP/1.1", "content-length: 10") + b"half"))
add("golden", "client gone", lambda bench: bench.abandon(bench.head("GET /s/slow HTTP/1.1"), after_s=0.2))
heads("golden", [
    ("content-length and chunked", 1, lambda b: b.head("POST /s/ok HTTP/1.1", "content-length: 4", "transfer-encoding: chunked")
     + b"0\r\n\r\n"),
    ("garbage", 1, lambda b: b"\x16\x03\x01 garbage\r\n\r\n"),
    ("HTTP/1.0", 1, lambda b: b.head("GET /ok HTTP/1.0")),
])
