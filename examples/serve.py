"""Serve experts by name: one model that becomes each in turn, and a model of its own for every expert that is hot.

    python examples/serve.py [--hot rotated]               # serves, asks itself 400 times at once, says how that went
    python examples/serve.py [--hot rotated] --port 8000   # serves until it is stopped
    curl localhost:8000/experts/rotated --json "[0$(printf ',0.5%.0s' $(seq 63))]"

Needs the extra `examples` (FastAPI and uvicorn).
"""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import digits
import fastapi
import uvicorn
from lanes import Lane
from pydantic import Field

import tallstore

Pixels = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=64, max_length=64)]


def make_lanes(bundle: tallstore.Bundle, hot: Sequence[str]) -> dict[str, Lane]:
    """One model for all experts, and one each for the hot ones, which never switches."""
    model = digits.network()
    shared = [expert for expert in bundle.tasks if expert not in hot]
    lanes = dict.fromkeys(shared, Lane(shared, model, bundle.attach(model).using))
    for expert in hot:
        replica = digits.network()
        bundle.load_into(replica, expert)
        lanes[expert] = Lane([expert], replica, nullcontext)
    return lanes


def make_app(lanes: dict[str, Lane]) -> fastapi.FastAPI:
    app = fastapi.FastAPI()

    @app.post("/experts/{expert}")
    def ask(expert: str, pixels: Pixels) -> list[float]:  # not async: FastAPI runs it in one of its threads
        if expert not in lanes:
            raise fastapi.HTTPException(404, f"no expert {expert!r}; there are {', '.join(lanes)}")
        return lanes[expert].ask(expert, pixels)

    return app


def ask_many(url: str, tasks: tuple[str, ...], count: int) -> int:
    """Ask for the experts in turn, 32 at a time; return how many answers were right."""
    tests = {task: digits.examples(task)[1] for task in tasks}

    def is_right(number: int) -> bool:
        task = tasks[number % len(tasks)]
        images, labels = tests[task]
        body = json.dumps(images[number].tolist()).encode()
        request = urllib.request.Request(url + task, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            answer = json.load(response)
        return answer.index(max(answer)) == labels[number]

    with ThreadPoolExecutor(32) as pool:
        return sum(pool.map(is_right, range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=digits.OUT, help="folder for checkpoints and bundle")
    parser.add_argument("--hot", action="append", default=[], help="expert with a model of its own; again for more")
    parser.add_argument("--port", type=int, help="serve there until stopped; 0 takes a free one")
    arguments = parser.parse_args()

    base, experts = digits.checkpoints(arguments.out)
    path, method = arguments.out / "bundle", tallstore.Uniform(levels=3, scale="tensor")
    tallstore.pack(base, experts, path, method=method, embed_base=True, overwrite=True)
    with tallstore.open_bundle(path) as bundle, socket.create_server(("127.0.0.1", arguments.port or 0)) as listening:
        lanes = make_lanes(bundle, arguments.hot)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/experts/"
        print(f"{', '.join(lanes)}: POST 64 pixels to {url}NAME", flush=True)
        server = uvicorn.Server(uvicorn.Config(make_app(lanes), log_level="warning"))
        if arguments.port is not None:
            server.run([listening])
            return
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            start = time.perf_counter()
            right = ask_many(url, bundle.tasks, 400)
            print(f"400 requests, 32 at a time, in {time.perf_counter() - start:.1f} s; {right} answers are right")
        finally:
            server.should_exit = True
            thread.join()
        for lane in dict.fromkeys(lanes.values()):
            print(f"  model for {', '.join(lane.waiting)}: {lane.answered / lane.turns:.1f} requests a turn")


if __name__ == "__main__":
    main()
