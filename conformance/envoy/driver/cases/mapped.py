"""Answers of the proxy's own that are changed, requests from inside, and headers that are not let through."""
from . import asks

THERE = {"port": "mapped", "host": "mapped.test"}
asks("mapped", [
    ("format of all", "/empty", THERE),
    ("first mapper that fits", "/empty", "x-asked: 1", THERE),
    ("flag, and an empty body", "/missing", THERE),
    ("no virtual host", "/", {"port": "mapped", "host": "other.test"}),
    ("direct response", "/direct", THERE),
    ("direct response that is an error", "/gone", THERE),
    ("redirect", "/redirect", THERE),
    ("HEAD", "/empty", {**THERE, "method": "HEAD"}),
    ("gRPC", "/empty", "content-type: application/grpc", {**THERE, "method": "POST"}),
    ("answers of the upstream", "/s/500", THERE),
    ("from inside", "/ok", "x-request-id: 11111111-1111-4111-8111-111111111111", "x-envoy-internal: no", THERE),
    ("from inside, but told of somebody", "/ok", "x-forwarded-for: 127.0.0.1", "x-envoy-internal: true", THERE),
    ("client certificate of an earlier hop", "/ok", "x-forwarded-client-cert: Hash=1;URI=spiffe://a/b", THERE),
    ("client certificate where nobody is believed", "/ok", "x-forwarded-client-cert: Hash=1"),
    ("underscores are dropped", "/ok", "x_odd: 1", "x-even: 2", THERE),
])
