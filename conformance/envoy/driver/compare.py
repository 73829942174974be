"""What of an exchange is compared, and what is not: names that are ours, and values that differ in every exchange."""
import re

UUID = re.compile(r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$")


class Additions:
    """Headers of ours that Envoy has not. Each must be met, or it need not be listed."""

    def __init__(self, reasons):
        self.reasons, self.met = reasons, set()

    def drop(self, headers):
        for name, value in headers:
            if name.lower() in self.reasons:
                self.met.add(name.lower())
            else:
                yield name.lower(), value

    def unmet(self):
        return sorted(set(self.reasons) - self.met)


def fields(headers):
    """Names and values in order of names; values that no two exchanges share are named by their kind."""
    return sorted([name, value_of(name, value)] for name, value in headers)


def value_of(name, value):
    if name == "x-request-id" and UUID.match(value) and not value.startswith("11111111"):
        return "a new UUID"
    if name == "date" and not value.startswith("Thu, 01 Jan 2026 00:00:00"):
        return "now"
    if name == "x-forwarded-for" and value.rsplit(",", 1)[-1].count(".") == 3:
        # Envoy writes the machine's own address where a client on loopback came from.
        kept, comma, _ = value.rpartition(",")
        return f"{kept}{comma}an address"
    if name == "x-envoy-original-dst-host":
        return "an address"  # each proxy has an upstream of its own
    if name == "x-envoy-expected-rq-timeout-ms":
        return f"about {round(int(value), -3)}"  # further attempts have what is left
    if name == "x-envoy-upstream-service-time":
        return "milliseconds"
    return value


def response(answer, drop):
    if answer is None:
        return None
    # Who says "close" may take a second over it (delayed_close_timeout).
    connection = "closed" if answer.get("connection") == "close" else answer.connection
    return {"interim": answer.interim, "status": answer.status, "ended": answer.ended, "connection": connection,
            "headers": fields(drop(answer.headers)), "body": answer.body.decode("latin-1")}


def observation(answers, seen, entries, drop=lambda headers: headers):
    """One exchange as plain values."""
    if not isinstance(answers, list):
        answers = [answers]
    upstream = [{"line": request.line, "headers": fields(drop((n.lower(), v) for n, v in request.headers)),
                 "body": request.body.decode("latin-1")} for request in seen]
    log = [log_entry(entry) for entry in entries]
    return {"response": [response(answer, drop) if hasattr(answer, "status") or answer is None else answer for answer in answers],
            "upstream": upstream, "log": log}


def log_entry(entry):
    """How often it was tried is not known of a request that was dropped: flag DC."""
    keys = ("code", "flags", "details") if "DC" in (entry["flags"] or "") else ("code", "flags", "details", "attempts")
    return {key: entry.get(key) for key in keys}


def differences(envoy, ours, place=""):
    """Places where two observations differ: {place: [Envoy's, ours]}."""
    if isinstance(envoy, dict) and isinstance(ours, dict):
        found = {}
        for key in sorted(envoy.keys() | ours.keys()):
            found |= differences(envoy.get(key), ours.get(key), f"{place}.{key}" if place else key)
        return found
    if place.endswith("headers"):
        return header_differences(envoy, ours, place)
    if isinstance(envoy, list) and isinstance(ours, list) and len(envoy) == len(ours):
        found = {}
        for index, (theirs, mine) in enumerate(zip(envoy, ours)):
            found |= differences(theirs, mine, f"{place}[{index}]")
        return found
    return {} if envoy == ours else {place: [envoy, ours]}


def header_differences(envoy, ours, place):
    names = sorted({name for name, _ in envoy} | {name for name, _ in ours})
    found = {}
    for name in names:
        theirs, mine = ([value for key, value in side if key == name] for side in (envoy, ours))
        if theirs != mine:
            found[f"{place}.{name}"] = [theirs, mine]
    return found
