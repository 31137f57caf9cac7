"""Cold start of every Space and seconds per action, for 1 user and 20 at once, written as JSON.

    python tests/browser/measure_latency.py [--output FILE] [--rounds 10] [--spaces NAME ...]

Users are gradio clients, without a browser; an action counts from the request to its last result.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from gradio_client import Client, handle_file

sys.path.insert(0, str(Path(__file__).parent))
from running_spaces import CHROMIUM, RunningSpace, chromium, demo_outputs

from hf_dpssl.pages.demo_outputs import example_pictures
from hf_dpssl.runs.atomic_files import write_json
from hf_dpssl.runs.results import environment

USERS = (1, 20)
# Milliseconds at which the map that is shown changes.
UPDATES = """count => new Promise(done => {
  const times = [], step = () => document.querySelector(".numbers b")?.innerText;
  let last = step();
  new MutationObserver(() => {
    if (step() && step() !== last) { last = step(); times.push(performance.now()); }
    if (times.length > count) done(times);
  }).observe(document.body, {childList: true, subtree: true, characterData: true}); })"""
SETTINGS = ["neighbours", 20, "student_t", "joint", 1, 1, "kl", 0.5]


def actions(name: str) -> dict[str, tuple]:
    """{action: (arguments, api name)} of a Space."""
    if name == "matching_lab":
        return {"update, 256 points in both maps, 4 steps": (SETTINGS, "/update")}
    if name == "image_generator":
        drawn = {"draw 4, DiT, 25 steps": (["dit", "7", 4, 0, 2, 25, 1, 0], "/draw")}
        if os.environ.get("DPSSL_TOKENS") or (demo_outputs() / "ar").is_dir():
            drawn["draw 4, token transformer"] = (["token transformer", "7", 4, 0, 2, 25, 1, 0], "/draw")
        return drawn
    first, second = (handle_file(path) for path in example_pictures(2))
    if name == "latent_lab":
        return {"compare": ([first], "/compare"), "morph": ([first, second, True], "/morph")}
    return {"explore, 10 neighbours": ([first, 10], "/explore")}


def cpu_seconds(process: int) -> float:
    """Processor seconds that a process and its children have used."""
    parent = psutil.Process(process)
    return sum(sum(one.cpu_times()[:2]) for one in [parent, *parent.children(recursive=True)])


def seconds_of_user(url: str, name: str, arguments: list, endpoint: str, rounds: int) -> list[float]:
    """Seconds of each round of one user."""
    client = Client(url, verbose=False)
    if name == "matching_lab":
        client.predict("digits", 0, *SETTINGS, api_name="/restart")
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        client.predict(*arguments, api_name=endpoint)
        seconds.append(time.perf_counter() - start)
    return seconds


def seconds_between_updates(url: str, count: int = 50) -> dict:
    """Of the live map as one visitor sees it in Chromium."""
    with chromium() as browser:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_function("document.querySelector('.numbers b')?.innerText > 40")
        times = page.evaluate(UPDATES, count)
    median, p95 = np.percentile(np.diff(times) / 1000, [50, 95])
    return {"median": round(float(median), 3), "p95": round(float(p95), 3), "updates": count}


def measure(name: str, rounds: int) -> dict:
    """Cold start and latencies of a Space."""
    with tempfile.TemporaryDirectory() as folder:
        space = RunningSpace(name, Path(folder), {})
        found: dict = {"cold_start": round(space.cold_start, 1), "actions": {}}
        try:
            if name == "matching_lab" and CHROMIUM:
                found["between_two_updates_in_chromium"] = seconds_between_updates(space.url)
            for action, (arguments, endpoint) in actions(name).items():
                seconds_of_user(space.url, name, arguments, endpoint, 1)  # the first of all does not count
                for users in USERS:
                    used = cpu_seconds(space.process.pid)
                    each = rounds if users == 1 else max(1, rounds // 5)
                    with ThreadPoolExecutor(users) as pool:
                        jobs = [
                            pool.submit(seconds_of_user, space.url, name, arguments, endpoint, each)
                            for _ in range(users)
                        ]
                        seconds = np.concatenate([job.result() for job in jobs])
                    median, p95 = np.percentile(seconds, [50, 95])
                    used = (cpu_seconds(space.process.pid) - used) / len(seconds)
                    entry = {"median": round(float(median), 3), "p95": round(float(p95), 3), "requests": len(seconds)}
                    entry["processor_seconds_of_the_server_per_request"] = round(used, 3)
                    found["actions"].setdefault(action, {})[f"{users} users"] = entry
                    print(name, action, users, entry, flush=True)
        finally:
            space.stop()
    return found


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["matching_lab", "image_generator", "latent_lab", "encoder_explorer"]
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "latency.json"), help="JSON file")
    parser.add_argument("--rounds", type=int, default=10, help="requests of the single user; of 20, a fifth each")
    parser.add_argument("--spaces", nargs="+", default=names, choices=names, help="which ones")
    options = parser.parse_args(argv)
    busy = psutil.cpu_percent(interval=2)
    found = {name: measure(name, options.rounds) for name in options.spaces}
    path = Path(options.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0))
    note = "seconds, by clients on the same cores; of these, so many percent were busy before the first Space started"
    facts = {"note": note, "busy_percent_at_start": busy, "cores": cores, "environment": environment()}
    write_json(path, {"spaces": found} | facts)


if __name__ == "__main__":
    main()
