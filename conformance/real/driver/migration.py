"""Are streams of a killed engine the streams they would have been? Kills real processes in mid-stream and compares with
what the other engine says to the same request, undisturbed.

The default run of the stage does not do this: an engine takes a minute to start, and is killed twice at least.
"""
import json
import os
import random
import signal
import threading
import time

import client
from fleet import health, wait_until
from mix import prose
from processes import session_members

KILLS = ("API server", "worker") * 3  # in turn, both at least once, until enough streams were cut
STREAMS = 36  # at once, over both engines
CUT_AT_ONCE = 12  # of them, told some of by the victim, before it is struck
TOKENS = 48
STALL_S = 30  # `stall_ms` of the migration filter, as shipped
TRIES_MIN = 20  # streams that are cut in the middle, over all kills


def requests(rng):
    """(path, body) of streams of all kinds that resume: chat and completions, with emoji, with stop strings."""
    emoji = "🙂🎉🚀🌊🐙" * 4
    for number in range(STREAMS):
        common = {"model": "smollm2", "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "stream": True,
                  "stream_options": {"include_usage": True}}
        kind = number % 4
        if kind == 0:
            yield "/v1/chat/completions", common | {"messages": [{"role": "user", "content": prose(rng, 30)}]}
        elif kind == 1:
            yield "/v1/completions", common | {"prompt": f"{prose(rng, 3)} {emoji}"}
        elif kind == 2:
            yield "/v1/completions", common | {"prompt": prose(rng, 30), "stop": ["\n\n\n", "zq", " the the"]}
        else:
            content = f"Say again: {emoji} {prose(rng, 5)}"
            yield "/v1/chat/completions", common | {"messages": [{"role": "user", "content": content}], "stop": ["🐙🐙"]}


class Told:
    """What a stream told its client, less what differs from request to request."""

    def __init__(self, reply):
        self.text, self.ids, self.roles, self.finished, self.usage, self.done = "", set(), 0, [], None, 0
        self.events, self.faults = 0, [reply.fault] if reply.fault else []
        for name, data in reply.events():
            if data == "[DONE]":
                self.done += 1
                continue
            value = json.loads(data) if name is None and data.startswith("{") else None
            if value is None or "error" in value:
                self.faults.append(data[:200])
                continue
            self.ids.add(value.get("id"))
            self.usage = value.get("usage") or self.usage
            for choice in value.get("choices") or []:
                delta = choice.get("delta") or {}
                piece = choice.get("text") or delta.get("content") or ""
                self.roles += "role" in delta
                self.events += bool(piece)
                self.text += piece
                self.finished += [choice["finish_reason"]] if choice.get("finish_reason") else []

    def differs(self, other):
        """What is not as in `other`, and what no stream may be like."""
        found = list(self.faults)
        for what in ("text", "roles", "finished", "done"):
            if getattr(self, what) != getattr(other, what):
                found.append((what, getattr(self, what), getattr(other, what)))
        tokens = [(x.usage or {}).get("completion_tokens") for x in (self, other)]
        if tokens[0] != tokens[1]:
            found.append(("completion_tokens", *tokens))
        if len(self.ids) != 1:
            found.append(("ids", sorted(map(str, self.ids))))
        return found


class Stream:
    """One request under way; its reply grows while it is looked at."""

    def __init__(self, proxy, path, body):
        self.path, self.body, self.reply = path, body, client.Reply()
        self.thread = threading.Thread(target=client.post, args=(proxy.address, path, body), kwargs={"reply": self.reply, "timeout_s": 240})
        self.thread.start()

    def is_at(self, engine):
        return (self.reply.header("x-outrigger-endpoint") or "").endswith(engine.address)

    def is_cut_by(self, engine):
        """Whether the engine has told some of it, and not all."""
        return self.reply.done is None and self.is_at(engine) and self.reply.body.count(b"\n\n") > 1


def strike(victim, proxy, blow, rng):
    """Streams that enter at the proxy of the other engine; deals the blow while the victim tells some of them."""
    streams = []
    for path, body in requests(rng):
        streams.append(Stream(proxy, path, body))
        time.sleep(rng.uniform(0, 0.25))
    wait_until(lambda: sum(s.is_cut_by(victim) for s in streams) >= CUT_AT_ONCE, 20, every_s=0.01)
    time.sleep(rng.uniform(0, 1))
    cut = [stream for stream in streams if stream.is_cut_by(victim)]
    told = [stream.reply.body.count(b"\n\n") for stream in cut]
    blow()
    for stream in streams:
        stream.thread.join()
    return streams, cut, told


def judge(report, label, other, streams, cut):
    """Compares each stream with what the other engine says to the same request when nothing happens to it. Gives those cut and found the same."""
    wrong, same, prefill = [], 0, 0
    replies = client.several(lambda stream: client.post(other.address, stream.path, stream.body, timeout_s=240), streams, at_once=10)
    for stream, reply in zip(streams, replies):
        prefill = max(prefill, reply.first - reply.sent if reply.first else 0)
        found = Told(stream.reply).differs(Told(reply))
        same += stream in cut and not found
        wrong += [(stream.path, found)] if found else []
    report.expect(f"migration {label}: all streams are as if nothing had happened", not wrong, wrong or f"{len(streams)}, {len(cut)} of them cut")
    return same, prefill


def comes_back(report, label, engine, proxies):
    back = [wait_until(lambda p=p: health(p, engine) == "healthy", 60) for p in proxies]
    report.expect(f"migration {label}: every proxy finds {engine.name} healthy", None not in back, back)


def killed(report, engines, proxies, rng):
    """Kills the API server and the worker in turn. An engine takes a minute to start, so many streams are cut at a time."""
    victim, other = engines
    figures, tries, same = [], 0, 0
    for number, what in enumerate(KILLS, 1):
        if number > 2 and tries >= TRIES_MIN:
            break
        label = f"{number}, {what} killed"
        pid = victim.child.pid if what == "API server" else victim.worker_pid()
        streams, cut, told = strike(victim, proxies[1], lambda pid=pid: victim.kill(pid), rng)
        tries += len(cut)
        same += judge(report, label, other, streams, cut)[0]
        figures.append({"killed": what, "streams": len(streams), "cut": len(cut), "events_told_when_cut": sorted(told)})
        victim.stop()
        victim.start()
        victim.wait_healthy()
        comes_back(report, label, victim, proxies)
    report.expect(f"migration: at least {TRIES_MIN} streams were cut, and all of them are identical", tries >= TRIES_MIN and same == tries, f"{same} of {tries}")
    return {"kills": figures, "cut": tries, "identical": same}


def stopped(report, engines, proxies, rng):
    """Stops the first engine as a whole for as long as its streams take to go elsewhere."""
    victim, other = engines
    members = session_members(victim.child.pid)

    def signal_all(number):
        for pid in members:
            os.kill(pid, number)

    try:
        streams, cut, told = strike(victim, proxies[1], lambda: signal_all(signal.SIGSTOP), rng)
    finally:
        signal_all(signal.SIGCONT)
    _, prefill = judge(report, "stopped", other, streams, cut)
    silence = max(stream.reply.silence for stream in streams)
    report.expect("migration: a stalled engine costs less than the stall limit and one prefill, give or take a second",
                  cut and silence < STALL_S + prefill + 1, f"{silence:.2f} s, prefill {prefill:.2f} s")
    comes_back(report, "stopped", victim, proxies)
    return {"cut": len(cut), "events_told_when_cut": sorted(told), "longest_silence_s": round(silence, 2), "prefill_s": round(prefill, 2)}


def run(report, engines, proxies):
    """The first engine is the victim; the proxies run with policy least_request."""
    rng = random.Random(5)
    for engine in engines:
        comes_back(report, "begins", engine, proxies)
    return {"stopped": stopped(report, engines, proxies, rng), "killed": killed(report, engines, proxies, rng)}
