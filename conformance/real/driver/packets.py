"""Do streams survive a network that loses packets between two proxies? Drops them by the kernel's filter: TCP is to notice, not we.

By hand, and as root: `iptables` on the loopback interface, for the one port of the victim's proxy.
"""
import contextlib
import random
import subprocess
import threading

from migration import STALL_S, comes_back, judge, strike

SHORT_S = 3  # TCP repeats what was lost before anybody calls it a stall
SHARE = "0.2"
MARK = "outrigger-real"


class Drop:
    """Rules for packets from and to one port: of those that come by, all, or a share."""

    def __init__(self, port, share=None):
        chance = ["-m", "statistic", "--mode", "random", "--probability", share] if share else []
        self.rules = [["INPUT", "-i", "lo", "-p", "tcp", side, port, *chance, "-m", "comment", "--comment", MARK, "-j", "DROP"]
                      for side in ("--dport", "--sport")]
        self.lock, self.set = threading.Lock(), []

    def begin(self):
        with self.lock:
            for rule in self.rules:
                subprocess.run(["iptables", "-A", *rule], check=True, capture_output=True)
                self.set.append(rule)

    def end(self):
        with self.lock:
            while self.set:
                subprocess.run(["iptables", "-D", *self.set.pop()], check=True, capture_output=True)

    def begin_for(self, seconds):
        self.begin()
        threading.Timer(seconds, self.end).start()


def one(report, label, drop, blow, engines, proxies, rng):
    victim, other = engines
    with contextlib.ExitStack() as always:
        always.callback(drop.end)  # no rule outlives its use
        streams, cut, told = strike(victim, proxies[1], blow, rng)
    _, prefill = judge(report, label, other, streams, cut)
    silence = max(stream.reply.silence for stream in streams)
    report.expect(f"packets {label}: streams were under way between the proxies", len(cut) >= 3, len(cut))
    report.expect(f"packets {label}: it costs less than the stall limit and one prefill, give or take a second",
                  silence < STALL_S + prefill + 1, f"{silence:.2f} s, prefill {prefill:.2f} s")
    comes_back(report, label, victim, proxies)
    return {"cut": len(cut), "streams": len(streams), "longest_silence_s": round(silence, 2), "events_told_when_cut": sorted(told),
            "migrated_so_far": sum(v for _, _, v in proxies[1].metrics("outrigger_migrations_total"))}


def run(report, engines, proxies):
    """The first engine's streams pass its proxy's inbound port; the proxies run with policy least_request."""
    rng, port = random.Random(6), proxies[0].inbound.rsplit(":", 1)[1]
    for engine in engines:
        comes_back(report, "begins", engine, proxies)
    figures = {}
    short, none, some = Drop(port), Drop(port), Drop(port, SHARE)
    figures["for_a_while"] = one(report, f"all dropped for {SHORT_S} s", short, lambda: short.begin_for(SHORT_S), engines, proxies, rng)
    figures["a_share"] = one(report, "one in five dropped", some, some.begin, engines, proxies, rng)
    figures["for_good"] = one(report, "all dropped from then on", none, none.begin, engines, proxies, rng)
    return figures
