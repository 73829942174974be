"""Do canaries leave well engines alone, and find one that is not? Real traffic of three kinds for as long as is asked,
then a worker that is stopped.

By hand: an hour is what it takes to believe the first.
"""
import collections
import json
import os
import random
import signal
import threading
import time

import client
from fleet import endpoints, health, wait_until
from mix import prose
from report import quantile

# (name, seconds, clients, pause of a client between its requests in seconds, words of a prompt)
PHASES = (("idle", 150, 0, 0, ()),
          ("light", 120, 1, 4, (10, 60)),
          ("burst of long prompts", 60, 8, 0, (400, 700)),
          ("idle", 45, 0, 0, ()),
          ("busy", 75, 4, 0, (10, 200)))
QUESTIONS = 3  # of each length; asked again and again, so that each answer is known
TOKENS = 12
ANSWER_S = 240  # a burst on a slow machine, before a request is called lost
FOUND_S, BACK_S = 180, 120  # three probes of 30 s at most each, and the pause before readmission, on a loaded machine


class Traffic:
    """Clients of both proxies; what they are told is compared with what an engine said to the same, alone."""

    def __init__(self, engines, proxies):
        self.engines, self.proxies, self.rng = engines, proxies, random.Random(9)
        self.answers, self.questions, self.faults = {}, {}, []
        self.sent, self.seconds = collections.Counter(), collections.defaultdict(list)

    def questions_of(self, words):
        if words not in self.questions:
            self.questions[words] = [prose(self.rng, self.rng.randrange(*words)) for _ in range(QUESTIONS)]
        return self.questions[words]

    def learn(self):
        """Asks each engine every question before there is any traffic. Gives what they do not agree on."""
        return [question for *_, words in PHASES if words for question in self.learn_of(words)]

    def learn_of(self, words):
        apart = []
        for question in self.questions_of(words):
            if question not in self.answers:
                told = [self.ask(engine.address, question, False) for engine in self.engines]
                apart += [question[:40]] * (len(set(told)) > 1)
                self.answers[question] = told[0]
        return apart

    def ask(self, address, question, stream):
        body = {"model": "smollm2", "prompt": question, "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "stream": stream}
        reply = client.post(address, "/v1/completions", body, timeout_s=ANSWER_S)
        if reply.status != 200 or reply.fault:
            return f"failed: {reply.status} {reply.fault or ''} {reply.body[:120]!r}"
        if not stream:
            return reply.json()["choices"][0]["text"]
        return "".join(text_of(data) for _, data in reply.events())

    def client(self, phase, until, pause_s, words, seed):
        rng = random.Random(seed)
        while time.monotonic() < until:
            question, begun = rng.choice(self.questions[words]), time.monotonic()
            told = self.ask(rng.choice(self.proxies).address, question, rng.random() < 0.5)
            self.sent[phase] += 1
            self.seconds[phase].append(time.monotonic() - begun)
            if told != self.answers[question]:
                self.faults.append((phase, question[:40], told, self.answers[question]))
            time.sleep(pause_s * rng.uniform(0.5, 1.5))

    def phase(self, name, seconds, clients, pause_s, words):
        until = time.monotonic() + seconds
        threads = [threading.Thread(target=self.client, args=(name, until, pause_s, words, self.rng.random())) for _ in range(clients)]
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        for thread in threads:
            thread.join()


def text_of(data):
    if not data.startswith("{"):
        return ""
    choices = json.loads(data).get("choices") or [{}]
    return choices[0].get("text") or ""


class Watch:
    """What every proxy says of every engine, looked at twice a second: each answer that is not the one before."""

    def __init__(self, engines, proxies):
        self.engines, self.proxies, self.begun = engines, proxies, time.monotonic()
        self.changes, self.ended = [], threading.Event()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def look(self):
        last = {}
        while not self.ended.wait(0.5):
            for proxy in self.proxies:
                for x in endpoints(proxy):
                    engine = next((e.name for e in self.engines if x.get("engine_id", "").endswith(e.address)), None)
                    now = (x.get("health"), x.get("health_flags"), x.get("health_reason"))
                    if engine and last.get((proxy.name, engine)) != now:
                        last[proxy.name, engine] = now
                        self.changes.append({"at_s": round(time.monotonic() - self.begun, 1), "proxy": proxy.name, "engine": engine, "now": now})

    def stop(self):
        self.ended.set()
        self.thread.join()
        return [change for change in self.changes if change["now"][1] != "healthy"]


def counted(proxies, name, *by):
    """Samples of a counter of the canaries, summed by some of its labels."""
    sums = collections.Counter()
    for proxy in proxies:
        for _, labels, value in proxy.metrics(f"outrigger_canary_{name}_total"):
            sums[" ".join(labels[label] for label in by)] += int(value)
    return dict(sums)


def probe_times(proxies, elapsed_s):
    """Of the probes that went well: how long they took, by the bounds of the histogram's buckets, and their share of an engine's time."""
    buckets, total, count = collections.Counter(), 0, 0
    for proxy in proxies:
        for name, labels, value in proxy.metrics("outrigger_canary_probe_seconds"):
            if name.endswith("_bucket"):
                buckets[float(labels["le"])] += value
            total += value if name.endswith("_sum") else 0
            count += value if name.endswith("_count") else 0
    within = {f"p{share * 100:g}_at_most_s": next((le for le in sorted(buckets) if buckets[le] >= share * count), None) for share in (0.5, 0.99)}
    return {"well": int(count), **within, "mean_s": round(total / count, 3) if count else None,
            "share_of_an_engines_time": round(total / len(proxies) / elapsed_s, 5)}


def well(report, traffic, engines, proxies, minutes):
    """One phase after the other for some minutes, beside engines that are well."""
    begun, phases = time.monotonic(), 0
    watch = Watch(engines, proxies)
    try:
        while time.monotonic() - begun < minutes * 60:
            traffic.phase(*PHASES[phases % len(PHASES)])
            phases += 1
            report.say(f"phase {phases}: {dict(traffic.sent)} {counted(proxies, 'probes', 'outcome')} {counted(proxies, 'golden', 'outcome')}")
    finally:
        ill = watch.stop()
    elapsed = time.monotonic() - begun
    verdicts, golden = counted(proxies, "verdicts", "to", "reason"), counted(proxies, "golden", "outcome")
    probes = counted(proxies, "probes", "outcome")
    report.expect("canary: no verdict against a well engine", not any(n for name, n in verdicts.items() if "unhealthy" in name), verdicts)
    report.expect("canary: no proxy ever called a well engine anything else", not ill, ill)
    report.expect("canary: no answer of a well engine was called wrong", not golden.get("wrong"), golden)
    report.expect("canary: both were looked at", probes.get("well", 0) >= minutes / 2 and golden.get("right", 0) >= minutes / 4, (probes, golden))
    report.expect("canary: every client was told what an engine says alone", not traffic.faults, traffic.faults[:5] or sum(traffic.sent.values()))
    figures = {"minutes": round(elapsed / 60, 1), "phases": phases, "requests": dict(traffic.sent),
            "request_s": {name: {"p50": round(quantile(s, 0.5), 2), "max": round(max(s), 2)} for name, s in traffic.seconds.items()},
            "probes": probes, "golden": golden, "verdicts": verdicts, "probe_seconds": probe_times(proxies, elapsed), "ill": ill}
    report.say(json.dumps(figures))  # an hour's work, whatever comes of the rest
    return figures


def stopped(report, traffic, engines, proxies):
    """Stops the first engine's worker under light traffic, until it is found; then lets it go on."""
    victim, pid = engines[0], engines[0].worker_pid()
    before = len(traffic.faults)
    clients = threading.Thread(target=traffic.phase, args=("stopped", FOUND_S / 2, 2, 1, (10, 60)))
    clients.start()
    time.sleep(5)
    os.kill(pid, signal.SIGSTOP)
    try:
        found = [wait_until(lambda p=p: health(p, victim) == "/failed_active_hc", FOUND_S) for p in proxies]
        reasons = [x.get("health_reason") for p in proxies for x in endpoints(p) if x.get("engine_id", "").endswith(victim.address)]
    finally:
        os.kill(pid, signal.SIGCONT)
    back = [wait_until(lambda p=p: health(p, victim) == "healthy", BACK_S) for p in proxies]
    clients.join()
    verdicts = counted(proxies, "verdicts", "to", "reason")
    report.expect("canary: an engine that stands still is ejected by every proxy", None not in found, (found, reasons))
    report.expect("canary: for the reason that it does not answer", verdicts.get("unhealthy no_answer") == 1, verdicts)
    report.expect("canary: it comes back when it goes on", None not in back, back)
    report.expect("canary: its clients were told the same as ever", len(traffic.faults) == before, traffic.faults[before:][:3] or traffic.sent["stopped"])
    return {"found_s": found, "reasons": reasons, "back_s": back, "verdicts": verdicts, "requests": traffic.sent["stopped"]}


def run(report, engines, proxies, minutes):
    """The proxies run with `--canary on`."""
    traffic = Traffic(engines, proxies)
    apart = traffic.learn()
    report.expect("canary: the engines agree on what they are asked", not apart, apart or len(traffic.answers))
    return {"well": well(report, traffic, engines, proxies, minutes), "stopped": stopped(report, traffic, engines, proxies)}
