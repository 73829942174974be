"""What is taken off, made and appended, in both directions."""
from . import add, asks

ID = "x-request-id: 11111111-2222-4333-8444-555555555555"
asks("headers", [
    ("plain request", "/ok"),
    ("plain request at the edge", "/ok", {"port": "edge", "host": "edge.test"}),
    ("request id kept", "/ok", ID),
    ("request id replaced at the edge", "/ok", ID, {"port": "edge", "host": "edge.test"}),
    ("forwarded-for kept", "/ok", "x-forwarded-for: 1.2.3.4"),
    ("forwarded-for appended at the edge", "/ok", "x-forwarded-for: 1.2.3.4", {"port": "edge", "host": "edge.test"}),
    ("two lines of forwarded-for at the edge", "/ok", "x-forwarded-for: 1.2.3.4", "x-forwarded-for: 5.6.7.8",
     {"port": "edge", "host": "edge.test"}),
    ("forwarded-proto kept", "/ok", "x-forwarded-proto: https"),
    ("forwarded-proto replaced at the edge", "/ok", "x-forwarded-proto: https", {"port": "edge", "host": "edge.test"}),
    ("hop-by-hop of the request", "/ok", "connection: keep-alive", "keep-alive: timeout=5", "proxy-connection: keep-alive", "te: gzip"),
    ("named by connection", "/ok", "connection: x-secret", "x-secret: 1"),
    ("te trailers", "/ok", "te: trailers", "connection: te"),
    ("te with trailers in a list", "/ok", "te: gzip, trailers", "connection: te"),
    ("hop-by-hop of the response", "/s/hop"),
    ("server and date of the upstream", "/s/served"),
    ("server and date at the edge", "/served", {"port": "edge", "host": "edge.test"}),
    ("via passes", "/ok", "via: 1.1 other"),
    ("several lines of one header", "/s/cookies", "x-list: 1", "x-list: 2", "cookie: a=1", "cookie: b=2"),
    ("header without a value", "/ok", "x-empty:"),
    ("header with bytes above ASCII", "/ok", "x-odd: gr\xfc\xdf"),
    ("authorization passes", "/ok", "authorization: Bearer x", "proxy-authorization: Basic eA=="),
    ("envoy's own headers from inside", "/s/500", "x-envoy-upstream-rq-timeout-ms: 7000"),
    ("envoy's own headers at the edge", "/ok", "x-envoy-internal: true", "x-envoy-max-retries: 3",
     {"port": "edge", "host": "edge.test"}),
    ("names in capitals", "/ok", "X-Kind: A", "ACCEPT: */*"),
    ("host with a port", "/ok", {"host": "main.test:8080"}),
    ("HEAD", "/ok", {"method": "HEAD"}),
    ("204", "/s/204"),
    ("304", "/s/304", 'if-none-match: "a"'),
    ("early hints", "/s/early-hints"),
    ("until the upstream closes", "/s/until-close"),
    ("HTTP/1.0 of the upstream", "/s/http10"),
    ("the upstream's last response", "/s/goes"),
    ("connection close of the client", "/ok", "connection: close"),
    ("chunked response", "/s/chunked"),
    ("body with a length", "/s/echo", {"method": "POST", "body": b"hello"}),
    ("length 0", "/s/echo", "content-length: 0", {"method": "POST"}),
    ("POST without a length", "/s/echo", {"method": "POST"}),
    ("GET with a body", "/s/echo", {"body": b"hello"}),
    ("upgrade to websocket", "/ok", "connection: upgrade", "upgrade: websocket", "sec-websocket-key: x", "sec-websocket-version: 13"),
    ("upgrade to h2c", "/ok", "connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AAMAAABkAAQAAP__"),
])
for status in (201, 202, 206, 299, 301, 302, 307, 308, 401, 403, 405, 410, 413, 416, 418, 421, 426, 431, 451, 511, 599):
    add("headers", f"status {status} passes", lambda b, status=status: b.ask(f"/s/status/{status}"))
CHUNKS = b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
add("headers", "chunked request",
    lambda b: b.send(b.head("POST /s/echo HTTP/1.1", "transfer-encoding: chunked") + CHUNKS))
add("headers", "chunks in pieces, with extensions",
    lambda b: b.send(b.head("POST /s/echo HTTP/1.1", "transfer-encoding: chunked"), b"3;a=b\r\non", b"e\r\n0\r", b"\n\r\n"))
add("headers", "trailers both ways",
    lambda b: b.send(b.head("POST /s/trailers HTTP/1.1", "transfer-encoding: chunked", "trailer: x-sum", "te: trailers")
                     + b"3\r\none\r\n0\r\nx-sum: 1\r\n\r\n"))
add("headers", "expect 100-continue",
    lambda b: b.send(b.head("POST /s/echo HTTP/1.1", "content-length: 5", "expect: 100-continue"), b"hello", pause_s=0.2))
add("headers", "expect something else",
    lambda b: b.send(b.head("POST /s/echo HTTP/1.1", "content-length: 5", "expect: a-miracle"), b"hello", pause_s=0.2))
add("headers", "two requests in one write", lambda b: b.send(b.head("GET /ok?1 HTTP/1.1") + b.head("GET /ok?2 HTTP/1.1"), count=2), 2)
add("headers", "client half-closes", lambda b: b.send(b.head("GET /ok HTTP/1.1"), half_close=True))
add("headers", "blank line before the request", lambda b: b.send(b"\r\n" + b.head("GET /ok HTTP/1.1")))
add("headers", "field name in capitals", lambda b: b.send(b.head("POST /s/echo HTTP/1.1", "CONTENT-LENGTH: 5", "X-SHOUTED: yes") + b"hello"))
