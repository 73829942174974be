"""How does the stage speak HTTP? One exchange per connection, with the times and faults that a client would see.

Does not judge what it reads.
"""
import concurrent.futures
import http.client
import json
import re
import time

SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Reply:
    """What came back. `fault` says how the exchange broke off; times are monotonic seconds."""

    def __init__(self):
        self.status, self.headers, self.body, self.fault = 0, [], b"", None
        self.sent = time.monotonic()
        self.first = self.done = None
        self.silence = 0  # the longest between two pieces, or before the end

    def header(self, name):
        return next((value for key, value in self.headers if key.lower() == name), None)

    def json(self):
        return json.loads(self.body)

    def events(self):
        return sse_events(self.body)


def exchange(address, method, path, body=None, headers=None, timeout_s=60, reply=None):
    """Sends one request and reads its whole reply. `timeout_s` bounds each wait for bytes.

    A given `reply` is filled as it comes in, for another thread to look at.
    """
    reply = reply or Reply()
    host, port = address.rsplit(":", 1)
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout_s)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        reply.status, reply.headers = response.status, response.getheaders()
        heard = None
        while True:
            part = response.read1(65536)
            now = time.monotonic()
            reply.silence = max(reply.silence, now - (heard or now))
            if not part:
                break
            heard = now
            reply.first = reply.first or now
            reply.body += part
        if response.length:
            reply.fault = f"truncated: {response.length} bytes missing"
    except (OSError, http.client.HTTPException) as error:
        reply.fault = f"{type(error).__name__}: {error}"
    finally:
        connection.close()
    reply.done = time.monotonic()
    return reply


def post(address, path, value, headers=None, timeout_s=60, reply=None):
    headers = {"content-type": "application/json", **(headers or {})}
    return exchange(address, "POST", path, json.dumps(value), headers, timeout_s, reply)


def several(ask, items, at_once=8):
    """Replies to all items, in their order, some of them asked for at a time."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as clients:
        return list(clients.map(ask, items))


def get(address, path, timeout_s=10):
    return exchange(address, "GET", path, timeout_s=timeout_s)


def status(address, path):
    """Status of a GET, 0 when nobody answers."""
    return get(address, path, timeout_s=2).status


def sse_events(body):
    """[(event name or None, data)] of an event stream; text that is no whole event is an event called "garbage"."""
    events = []
    blocks = body.split(b"\n\n")
    for block in blocks[:-1]:
        name, data = None, []
        for line in block.decode(errors="replace").split("\n"):
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif field:
                events.append(("garbage", line))
        events.append((name, "\n".join(data)))
    if blocks[-1]:
        events.append(("garbage", blocks[-1].decode(errors="replace")))
    return events


def metrics(address):
    """[(name, labels, value)] of an engine's page; empty when nobody answers."""
    return samples(get(address, "/metrics").body)


def samples(page):
    """[(name, labels, value)] of a Prometheus page."""
    found = []
    for line in page.decode(errors="replace").splitlines():
        match = SAMPLE.match(line)
        if match:
            name, labels, value = match.groups()
            found.append((name, dict(LABEL.findall(labels or "")), float(value)))
    return found


def total(samples, name, **labels):
    """Sum of the samples of one name whose labels include the given ones."""
    return sum(v for n, have, v in samples if n == name and all(have.get(k) == x for k, x in labels.items()))
