"""Upstreams that fail, time limits, retries."""
from . import add, asks

asks("failing", [
    ("reset before headers", "/s/reset"),
    ("garbage", "/s/garbage"),
    ("header name with a space", "/s/bad-header"),
    ("two lengths", "/s/bad-length"),
    ("length and chunked", "/s/length-and-chunked"),
    ("half a head", "/s/half-head"),
    ("breaks between chunks", "/s/short-chunk"),
    ("timeout after headers", "/timeout/stall"),
    ("idle after headers", "/idle/stall"),
    ("no timeout", "/unlimited/slow"),
    ("attempts time out", "/try/slow"),
    ("5xx, then well", "/5xx/flaky"),
    ("closed, then well, 5xx", "/5xx/flaky-close"),
    ("503 retried out under gateway-error", "/gateway/503"),
    ("500 is no gateway-error", "/gateway/500"),
    ("closed under reset", "/reset-retry/close"),
    ("500 under reset", "/reset-retry/500"),
    ("409 under retriable-4xx", "/4xx/409"),
    ("429 under retriable-4xx", "/4xx/429"),
    ("404 passes", "/s/404"),
    ("503 without a policy", "/s/503"),
    ("closed without a policy", "/s/close"),
    ("retried POST with a body", "/5xx/flaky", {"method": "POST", "body": b"again"}),
    ("refused, no retries allowed", "/closed/none"),
    ("refused with a body", "/closed", {"method": "POST", "body": b"x"}),
    ("HEAD to a closed upstream", "/closed", {"method": "HEAD"}),
    ("HEAD without a route", "/none", {"method": "HEAD"}),
    ("the client's own timeout", "/s/slow", "x-envoy-upstream-rq-timeout-ms: 200"),
    ("the client's own retries", "/s/503", "x-envoy-retry-on: 5xx", "x-envoy-max-retries: 2"),
])
for policy in ("s", "5xx", "gateway", "reset-retry", "4xx"):
    for status in (400, 408, 409, 425, 429, 500, 501, 502, 503, 504, 505, 507):
        add("retries", f"{status} on /{policy}/", lambda b, policy=policy, status=status: b.ask(f"/{policy}/status/{status}"))
add("failing", "client gone during a response", lambda b: b.abandon(b.head("GET /s/stall HTTP/1.1"), after_s=0.3))
add("failing", "client gone during its body",
    lambda b: b.abandon(b.head("POST /s/echo HTTP/1.1", "content-length: 10"), b"half", after_s=0.2))
