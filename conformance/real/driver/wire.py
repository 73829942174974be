"""7.1: is a reply through the proxy the reply of the engine? Sends each recorded request both ways and compares.

Compares what a client sees; does not look at the text of the recordings, which another model run has made.
"""
import glob
import json
import os
import re
import threading

import client
from fleet import cold

PATHS = [  # by the start of the recording's name; the first match counts
    ("chat_render", "POST", "/v1/chat/completions/render"), ("err_method", "GET", "/v1/chat/completions"),
    ("chat", "POST", "/v1/chat/completions"), ("err_", "POST", "/v1/chat/completions"), ("cmpl", "POST", "/v1/completions"),
    ("tokenize", "POST", "/tokenize"), ("detokenize", "POST", "/detokenize"), ("responses", "POST", "/v1/responses"),
    ("inference_generate", "POST", "/inference/v1/generate"), ("anthropic_messages", "POST", "/v1/messages"),
]
PLAIN = ["/health", "/ping", "/version", "/nonexistent"]
REFUSED = [
    ("POST", "/reset_prefix_cache"), ("POST", "/reset_mm_cache"), ("POST", "/reset_encoder_cache"),
    ("POST", "/collective_rpc"), ("GET", "/server_info"), ("POST", "/sleep?level=1"), ("POST", "/wake_up"),
    ("GET", "/is_sleeping"), ("POST", "/pause"), ("POST", "/resume"), ("GET", "/is_paused"), ("POST", "/abort_requests"),
    ("POST", "/release_kv_cache_memory"), ("POST", "/update_weights"), ("POST", "/scale_elastic_ep"),
    ("POST", "/start_weight_update"), ("POST", "/start_draft_weight_update"), ("POST", "/finish_weight_update"),
    ("POST", "/shutdown_weight_transfer_engine"), ("POST", "/weight_checker"), ("GET", "/weight_info"),
    ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
    # The same places in other spellings: the engine decodes the path before it looks it up.
    ("POST", "/%73leep?level=1"), ("POST", "/reset%5fprefix_cache"), ("POST", "/sleep/?level=1"), ("POST", "//sleep?level=1"),
]
MODEL_FIELDS = ("id", "object", "owned_by", "root", "parent", "max_model_len")

ID = re.compile(rb'("(?:id|request_id|item_id|response_id|call_id)":\s*")([^"]*)"')
RANDOM = re.compile(rb"[0-9a-f][0-9a-f-]{7,}")
OWNED = re.compile(rb"resp_[0-9a-f]{16}_(?=[0-9a-f]{32}\b)")  # a stored response tells its engine by its id (ADR 17)
TIME = re.compile(rb'("(?:created|created_at|completed_at)":\s*)[0-9.]+')
# What a stream hands out in pieces: text is joined, lists are appended; of anything else the last value counts.
TEXT = {"content", "text", "delta", "arguments", "reasoning", "reasoning_content", "thinking", "partial_json"}


def masked(body):
    """Ids (their random part) and times replaced."""
    body = ID.sub(lambda m: m[1] + RANDOM.sub(b"#", OWNED.sub(b"resp_", m[2])) + b'"', body)
    return TIME.sub(rb"\g<1>0", body)


def cases(folder):
    """(name, method, path, body) of each recorded generation, tokenise, render and error request."""
    found = [("err_method", "GET", "/v1/chat/completions", None)]
    for file in sorted(glob.glob(os.path.join(folder, "*.request.json"))):
        name = os.path.basename(file).removesuffix(".request.json")
        method, path = next((m, p) for start, m, p in PATHS if name.startswith(start))
        with open(file, "rb") as body:
            found.append((name, method, path, body.read()))
    return found


def merge(into, value, key=None):
    """Joins what a stream hands out in pieces into what a reply without streaming would hold."""
    if isinstance(value, dict) and isinstance(into, dict):
        for k, v in value.items():
            into[k] = merge(into.get(k), v, k)
        return into
    if isinstance(value, dict):
        return merge({}, value)
    if isinstance(value, list):
        if value and all(isinstance(x, dict) and "index" in x for x in value):
            slots = into if isinstance(into, dict) else {}
            for x in value:
                slots[x["index"]] = merge(slots.get(x["index"]), x)
            return slots
        return (into if isinstance(into, list) else []) + value
    if value is None:
        return into
    if isinstance(value, str) and isinstance(into, str) and key in TEXT:
        return into + value
    return value


def folded(events):
    """Events whose number may differ, joined: a run of events of one kind becomes one."""
    runs = []
    for name, data in events:
        value = json.loads(data) if data.startswith("{") else data
        if not isinstance(value, dict):
            runs.append([(name, value), value])
            continue
        value.pop("sequence_number", None)
        kind = (name, value.get("type"), value.get("object"), bool(value.get("choices")), "error" in value)
        if runs and runs[-1][0] == kind:
            runs[-1][1] = merge(runs[-1][1], value)
        else:
            runs.append([kind, merge({}, value)])
    return runs


def header_table(reply, ignored):
    table = {}
    for name, value in reply.headers:
        if name.lower() not in ignored:
            table.setdefault(name.lower(), []).append(value)
    if "content-length" in table:  # ids differ in length, so the figure may; that it is right is checked here
        table["content-length"] = ["right" if int(table["content-length"][0]) == len(reply.body) else "wrong"]
    return table


def differences(direct, through, additions):
    """[(part, engine's, proxy's)]; and whether the events were equal one by one."""
    found, one_by_one = [], True
    if direct.fault or through.fault:
        found.append(("exchange", direct.fault, through.fault))
    if direct.status != through.status:
        found.append(("status", direct.status, through.status))
    ours, theirs = header_table(through, {"date", *additions}), header_table(direct, {"date"})
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            found.append((f"header {name}", theirs.get(name), ours.get(name)))
    a, b = masked(direct.body), masked(through.body)
    if (direct.header("content-type") or "").startswith("text/event-stream"):
        a, b = client.sse_events(a), client.sse_events(b)
        one_by_one = a == b
        if not one_by_one:
            a, b = folded(a), folded(b)
    if a != b:
        found.append(("body", str(a)[:1500], str(b)[:1500]))
    return found, one_by_one


class Side:
    """An engine, a proxy with nothing but it, and one without an engine whose only peer is that proxy."""

    def __init__(self, engine, proxy, entry):
        self.engine, self.proxy, self.entry = engine, proxy, entry


class Comparison:
    """Recorded requests, each sent three ways with a cold cache: straight, through one proxy, and over two hops."""

    def __init__(self, report, rules):
        self.report, self.rules = report, rules
        self.requests = self.equal = self.one_by_one = self.two_hops_equal = 0
        self.used, self.added = set(), set()
        self.lock = threading.Lock()

    def excepted(self, name, part):
        """Whether a reviewed exception covers this difference; notes that it was needed."""
        rule = next((n for n, r in enumerate(self.rules["exceptions"]) if r["request"] in (name, "*") and r["part"] == part), None)
        if rule is not None:
            self.used.add(rule)
        return rule is not None

    def one(self, side, name, method, path, body):
        replies = []
        for address in (side.engine.address, side.proxy.address, side.entry.address):
            cold([side.engine])
            headers = {"content-type": "application/json"} if body is not None else {}
            replies.append(client.exchange(address, method, path, body, headers))
        with self.lock:
            self.judge(side.engine, name, *replies)

    def judge(self, engine, name, direct, through, twice):
        additions = self.rules["additions"]
        self.added |= {header.lower() for header, _ in through.headers} & additions.keys()
        found, same_events = differences(direct, through, additions)
        left = [x for x in found if not self.excepted(name, x[0])]
        if left:
            self.report.expect(f"7.1 {name} is equal", False, left)
        # Of headers only who served is looked at: each hop has its own.
        found, _ = differences(direct, twice, ())
        far = [x for x in found if x[0] in ("exchange", "status", "body")]
        if not (twice.header("x-outrigger-endpoint") or "").endswith(engine.address):
            far.append(("served by", engine.address, twice.header("x-outrigger-endpoint")))
        if far:
            self.report.expect(f"7.1 {name} is equal over two hops", False, far)
        self.requests += 1
        self.equal += not left
        self.one_by_one += same_events
        self.two_hops_equal += not far

    def run(self, sides, recorded):
        """Each side takes the next request when it is done with one: an engine uses one core."""
        left = list(reversed(recorded))

        def work(side):
            while True:
                with self.lock:
                    if not left:
                        return
                    case = left.pop()
                try:
                    self.one(side, *case)
                except Exception as error:  # noqa: BLE001 (it would die with its thread)
                    self.report.expect(f"7.1 {case[0]} was compared", False, f"{type(error).__name__}: {error}")

        threads = [threading.Thread(target=work, args=(side,)) for side in sides]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def compare_exchanges(report, sides, folder, rules):
    """Each recorded request, through one proxy and over two hops, against the engine's own answer."""
    recorded = cases(folder)
    report.expect("7.1 recorded requests found", len(recorded) >= 40, len(recorded))
    compared = Comparison(report, rules)
    compared.run(sides, recorded)
    report.expect("7.1 replies through the proxy equal the engine's", compared.equal == len(recorded), f"{compared.equal} of {len(recorded)}")
    report.expect("7.1 replies over two hops equal the engine's", compared.two_hops_equal == len(recorded), f"{compared.two_hops_equal} of {len(recorded)}")
    stale = [r for n, r in enumerate(rules["exceptions"]) if n not in compared.used]
    report.expect("7.1 every reviewed exception is needed", not stale, stale or len(compared.used))
    unseen = sorted(rules["additions"].keys() - compared.added)
    report.expect("7.1 every addition of the proxy was seen", not unseen, unseen or sorted(compared.added))
    return {"requests": len(recorded), "equal": compared.equal, "equal_event_by_event": compared.one_by_one,
            "exceptions_used": len(compared.used), "two_hops": compared.requests, "two_hops_equal": compared.two_hops_equal}


def compare_plain(report, engine, proxy, rules):
    """Requests that name no model stay on the node; their replies pass as they are."""
    for path in PLAIN:
        found, _ = differences(client.get(engine.address, path), client.get(proxy.address, path), rules["additions"])
        report.expect(f"7.1 GET {path} is the engine's", not found, found or "")
    names = [sorted({n for n, _, _ in client.metrics(x.address)}) for x in (engine, proxy)]
    report.expect("7.1 /metrics has the engine's names", names[0] and names[0] == names[1], f"{len(names[1])} names")
    keys = [sorted(client.get(x.address, "/load").json()) for x in (engine, proxy)]
    report.expect("7.1 /load has the engine's names", keys[0] == keys[1], keys[1])
    return {"metric_names": len(names[1])}


def models(address):
    """{model id: its entry} of /v1/models."""
    return {x["id"]: {k: x.get(k) for k in MODEL_FIELDS} for x in client.get(address, "/v1/models").json()["data"]}


def compare_refused(report, engine, proxy):
    """Development and admin paths are refused from outside, whatever way they are spelled."""
    let_through = []
    for method, path in REFUSED:
        reply = client.exchange(proxy.address, method, path, "{}" if method == "POST" else None)
        plain = "%" not in path and "//" not in path and "/?" not in path
        refused = reply.status == 403 if plain else reply.status in (400, 403, 404)
        if not refused or reply.header("x-outrigger-error") is None and reply.status == 403:
            let_through.append((method, path, reply.status, reply.header("x-outrigger-error")))
    report.expect("7.1 development paths are refused by the proxy", not let_through, let_through or len(REFUSED))
    state = client.get(engine.address, "/is_sleeping").json()
    report.expect("7.1 the engine has not been put to sleep", state == {"is_sleeping": False}, state)
    return {"refused_paths": len(REFUSED)}


def compare_surface(report, engine, proxy, groups):
    """Every path that the engine itself documents is either on the reviewed list of open ones, or refused by the proxy."""
    documented = client.get(engine.address, "/openapi.json").json()["paths"]
    reviewed = {path for group in groups.values() for path in group["paths"]}
    let_through, refused = [], 0
    for path, operations in sorted(documented.items()):
        if path in reviewed:
            continue
        for method in operations:
            where = re.sub(r"\{[^}]*\}", "x", path)
            reply = client.exchange(proxy.address, method.upper(), where, "{}" if method != "get" else None)
            if reply.status != 403 or reply.header("x-outrigger-error") is None:
                let_through.append((method.upper(), path, reply.status))
            refused += 1
    report.expect("7.1 every documented path is on the reviewed list or refused", len(documented) >= 40 and not let_through,
                  let_through or f"{len(documented)} paths, {refused} refused")
    gone = sorted(reviewed - documented.keys())
    report.expect("7.1 every path of the reviewed list is the engine's", not gone, gone or len(reviewed))
    return {"documented_paths": len(documented), "open_paths": len(reviewed)}


def run(report, sides, folder, rules, groups):
    """Recorded requests at all sides; the rest is asked of the first."""
    figures = compare_exchanges(report, sides, folder, rules)
    engine, proxy = sides[0].engine, sides[0].proxy
    figures |= compare_surface(report, engine, proxy, groups)
    figures |= compare_plain(report, engine, proxy, rules)
    report.expect("7.1 /v1/models of one engine is its own", models(engine.address) == models(proxy.address), models(proxy.address))
    return figures | compare_refused(report, engine, proxy)
