"""The real stage: two unmodified vLLM servers, a proxy beside each, and what §7 of the issue wants shown.

Started by ../run, which installs the engine and builds the proxy. Prints one JSON object as its last line.
"""
import argparse
import json
import os
import signal
import sys
import tempfile

import canary
import failures
import golden
import migration
import mix
import nixl
import packets
import prediction
import wire
from fleet import health, wait_until
from processes import Engine, Process, Proxy
from report import Report

HERE = os.path.dirname(os.path.abspath(__file__))
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PARTS = ("wire", "routing", "prediction", "failures")
BY_HAND = ("canary", "migration", "packets", "nixl", "golden")  # what takes too long for every run
OWN_ENGINES = ("nixl",)  # it starts engines in a way of their own


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", required=True, help="directory of engine/install.sh")
    parser.add_argument("--proxy", required=True, help="the outrigger-proxy binary")
    parser.add_argument("--recordings", required=True, help="directory with NAME.request.json files")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts to run, of {','.join(PARTS + BY_HAND)}; default {','.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=60, help="how long canaries look at well engines; default 60")
    parser.add_argument("--logs", help="keep the logs here (default: a temporary directory, named when something fails)")
    return parser.parse_args()


def reviewed(name):
    """A list that people keep beside the stage."""
    with open(os.path.join(HERE, "..", name)) as file:
        return json.load(file)


class Stage:
    """The processes, and the parts that use them."""

    def __init__(self, args):
        self.report = Report()
        self.args, self.parts = args, args.only.split(",")
        self.logs = args.logs or tempfile.mkdtemp(prefix="outrigger-real-")
        os.makedirs(self.logs, exist_ok=True)
        self.engines = [Engine(f"engine-{x}", args.engines, self.logs) for x in "ab"]
        self.proxies = [Proxy(f"proxy-{x}", args.proxy, engine, self.logs) for x, engine in zip("ab", self.engines)]
        self.sides = [wire.Side(engine, Proxy(f"proxy-lone-{x}", args.proxy, engine, self.logs),
                                Proxy(f"proxy-entry-{x}", args.proxy, None, self.logs)) for x, engine in zip("ab", self.engines)]
        self.kept = []

    def start_engines(self, _report):
        for engine in self.engines:
            engine.start()
        for engine in self.engines:
            engine.wait_healthy()

    def restart_proxies(self, policy, *flags):
        for proxy in self.proxies:
            proxy.stop()
        for proxy in self.proxies:
            proxy.start(policy, [p for p in self.proxies if p is not proxy], flags)
        for proxy in self.proxies:
            proxy.wait_ready()  # it listens; its engines may still be unknown to it
            for engine in self.engines:
                if wait_until(lambda proxy=proxy, engine=engine: health(proxy, engine) == "healthy", 20) is None:
                    raise RuntimeError(f"{proxy.name} does not find {engine.name} healthy")

    def wire(self, report):
        rules, groups = (reviewed(name) for name in ("exceptions.json", "open_paths.json"))
        proxies = [proxy for side in self.sides for proxy in (side.entry, side.proxy)]
        try:
            for side in self.sides:
                side.proxy.start()
                side.entry.start(peers=[side.proxy])
            for proxy in proxies:
                proxy.wait_ready()
            for side in self.sides:
                if wait_until(lambda side=side: health(side.entry, side.engine) == "healthy", 20) is None:
                    raise RuntimeError("the proxy without an engine does not hear of its peer's")
            return wire.run(report, self.sides, self.args.recordings, rules, groups)
        finally:
            for proxy in proxies:
                proxy.stop()

    def routing(self, report):
        figures, self.kept = mix.run(report, self.engines, self.proxies, self.restart_proxies)
        return figures

    def prediction(self, report):
        if not self.kept:
            self.restart_proxies("kv")
        return prediction.run(report, self.engines, self.proxies, self.kept)

    def failures(self, report):
        self.restart_proxies("kv")
        return failures.run(report, self.engines, self.proxies)

    def migration(self, report):
        self.restart_proxies("least_request")
        return migration.run(report, self.engines, self.proxies)

    def canary(self, report):
        self.restart_proxies("kv", "--canary", "on")
        return canary.run(report, self.engines, self.proxies, self.args.minutes)

    def packets(self, report):
        self.restart_proxies("least_request")
        return packets.run(report, self.engines, self.proxies)

    def nixl(self, report):
        return nixl.run(report, self.args.engines, self.args.proxy, self.logs)

    def golden(self, report):
        for proxy in self.proxies:
            proxy.stop()
        return golden.run(report, self.engines, self.args.engines, self.args.proxy, self.logs)

    def run(self):
        shared = [part for part in self.parts if part not in OWN_ENGINES]
        if shared:
            self.report.part("start", self.start_engines)
        if all(engine.alive() for engine in self.engines):
            for part in shared:
                self.report.part(part, getattr(self, part))
        for process in (*self.proxies, *self.engines):
            process.stop(grace_s=5)  # memory may allow for no more than two engines
        for part in self.parts:
            if part in OWN_ENGINES:
                self.report.part(part, getattr(self, part))
        return self.report.close(engine="vllm 0.32.0", model="SmolLM2-135M-Instruct", logs=self.logs)

    def stop(self):
        for number in ENDING:  # one signal is enough; the next must not keep processes alive
            signal.signal(number, signal.SIG_IGN)
        for process in reversed(Process.started):
            process.stop(grace_s=5)


def main():
    # A signal unwinds like an error, so that everything started is ended.
    for number in ENDING:
        signal.signal(number, lambda *_: sys.exit(130))
    stage = Stage(arguments())
    try:
        passed = stage.run()
    finally:
        sys.stdout.flush()
        stage.stop()
    sys.exit(0 if passed else 1)


main()
