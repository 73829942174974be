"""The Envoy stage: the same configuration, the same bytes, two proxies; every difference is listed or fails the stage.

Started by ../run, which installs Envoy and builds the proxy. Prints one JSON object as its last line.
"""
import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback

import compare
import h2spec
import processes
from cases import CASES, Bench, downgraded, draining, failing, golden, headers, malformed, mapped, original, routing  # noqa: F401 (they register)
from upstream import Upstream

HERE = os.path.dirname(os.path.abspath(__file__))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envoy", required=True)
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--h2spec", help="the h2spec binary")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--all", action="store_true", help="also print what was the same")
    parser.add_argument("--logs", help="keep configuration and logs here")
    return parser.parse_args()


def drive(proxy, upstream, cases, results):
    """All cases against one proxy; what a case raises is its result."""
    for case in cases:
        try:
            answers = case.run(Bench(proxy, case))
            entries = proxy.entries(case.logs)
            results[case.name] = (answers, upstream.seen(case.name.replace(" ", "-")), entries)
        except Exception:  # noqa: BLE001 (the other cases go on)
            results[case.name] = traceback.format_exc(limit=3)


def run(args, directory):
    cases = sorted((case for case in CASES if args.only in case.name), key=lambda case: case.drains)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # never listens: whoever connects is refused
        closed = held.getsockname()[1]
        sides = []
        for name, argv in (("envoy", processes.envoy(args.envoy)), ("outrigger", [args.proxy])):
            upstream = Upstream()
            sides.append((processes.Proxy(name, argv, os.path.join(directory, name), "main.yaml", upstream, closed), upstream, {}))
        try:
            for proxy, _, _ in sides:
                proxy.start()
            for proxy, _, _ in sides:
                proxy.wait_ready()
            threads = [threading.Thread(target=drive, args=(proxy, upstream, cases, results)) for proxy, upstream, results in sides]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for proxy, _, _ in sides:
                proxy.stop()
    return cases, sides[0][2], sides[1][2]


def run_h2spec(args, directory):
    with open(os.path.join(HERE, "..", "h2spec.json")) as file:
        reasons = json.load(file)
    proxy = processes.Proxy("h2spec", [args.proxy], os.path.join(directory, "h2spec"), "h2spec.yaml", Upstream(), 0)
    return h2spec.run(args.h2spec, proxy, reasons)


def judge(cases, envoy, ours, reviewed, show_all):
    """Compares, prints, and returns the figures."""
    additions = compare.Additions(reviewed["additions"])
    accepted, unneeded, unreviewed, agreeing = reviewed["differences"], [], [], 0
    for case in cases:
        if isinstance(envoy[case.name], str) or isinstance(ours[case.name], str):
            print(f"FAIL {case.name}: did not run:\n{envoy[case.name]}\n{ours[case.name]}")
            unreviewed.append(case.name)
            continue
        theirs = compare.observation(*envoy[case.name], drop=additions.drop)
        mine = compare.observation(*ours[case.name], drop=additions.drop)
        found = compare.differences(theirs, mine)
        if show_all:
            print(json.dumps({case.name: theirs}))
        listed = set(accepted.get(case.name, {}).get("places", []))
        if not found:
            agreeing += 1
        news = {place: values for place, values in found.items() if place not in listed}
        if listed and not listed & set(found):
            unneeded.append(case.name)
        if found:
            print(f"{'DIFFERS ' if news else 'reviewed'} {case.name}: {json.dumps(news or sorted(found))}")
        if news:
            unreviewed.append(case.name)
    return {"agreeing": agreeing, "unreviewed": unreviewed, "unneeded": unneeded, "additions_unmet": additions.unmet()}


def main():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(130))
    args = arguments()
    begun = time.monotonic()
    with open(os.path.join(HERE, "..", "differences.json")) as file:
        reviewed = json.load(file)
    directory = args.logs or tempfile.mkdtemp(prefix="outrigger-envoy-")
    cases, envoy, ours = run(args, directory)
    figures = judge(cases, envoy, ours, reviewed, args.all)
    limit = len(cases) // 20
    http2 = run_h2spec(args, directory) if args.h2spec and not args.only else {"holds": True, "ran": False}
    strays = [] if args.only else [*figures["unneeded"], *figures["additions_unmet"]]
    passed = not (figures["unreviewed"] or strays) and len(cases) - figures["agreeing"] <= limit and http2["holds"]
    print(json.dumps({"stage": "envoy", "passed": passed, "envoy": "1.40.0", "cases": len(cases), "differences_max": limit, **figures, "h2spec": http2,
                      "seconds": round(time.monotonic() - begun, 1), "logs": directory}))
    sys.exit(0 if passed else 1)


main()
