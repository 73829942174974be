"""The cases: what is sent, in which order, and how many access-log entries that makes.

A case never says what must come back: that is what the other proxy is for.
"""
import time

import wire

CASES = []


class Case:
    """One exchange. `run` gets a `Bench` and returns what it read."""

    def __init__(self, group, name, run, logs, drains):
        self.group, self.name, self.run, self.logs, self.drains = group, f"{group}: {name}", run, logs, drains


class Bench:
    """One proxy, one case: sends what carries the case's name."""

    def __init__(self, proxy, case):
        self.proxy, self.case = proxy, case.name.replace(" ", "-")

    def head(self, line, *fields, host="main.test"):
        """A request head: the line, `host` (unless None), the case's name, and these fields."""
        hosts = [] if host is None else [f"host: {host}"]
        return "\r\n".join([line, *hosts, f"x-case: {self.case}", *fields, "", ""]).encode("latin-1")

    def ask(self, path, *fields, method="GET", body=b"", host="main.test", port="main"):
        length = [f"content-length: {len(body)}"] if body else []
        head = self.head(f"{method} {path} HTTP/1.1", *fields, *length, host=host)
        return wire.exchange(getattr(self.proxy, port), head + body)

    def send(self, *parts, port="main", **options):
        return wire.exchange(getattr(self.proxy, port), *parts, **options)

    def abandon(self, *parts, after_s):
        """Sends and goes away without reading."""
        with wire.connect(self.proxy.main) as connection:
            for part in parts:
                connection.sendall(part)
            time.sleep(after_s)
        return None


def add(group, name, run, logs=1, drains=False):
    CASES.append(Case(group, name, run, logs, drains))


def asks(group, table):
    """Cases that are one request each: (name, path[, fields][, options])."""
    for name, path, *rest in table:
        fields = [item for item in rest if isinstance(item, str)]
        options = next((item for item in rest if isinstance(item, dict)), {})
        add(group, name, lambda bench, path=path, fields=fields, options=options: bench.ask(path, *fields, **options))


def heads(group, table):
    """Cases that are bytes: (name, logs, function of a bench to the parts that are sent)."""
    for name, logs, parts in table:
        add(group, name, lambda bench, parts=parts: bench.send(*as_parts(parts(bench))), logs)


def as_parts(parts):
    return [parts] if isinstance(parts, bytes) else parts
