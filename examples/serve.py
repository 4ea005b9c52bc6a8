"""Serve experts by name: one model that becomes each in turn, and a model of its own for every expert that is hot.

    python examples/serve.py [--hot rotated]            # serves, asks itself 400 times at once, says how that went
    python examples/serve.py [--hot rotated] --port 8000                                  # serves until it is stopped
    curl localhost:8000/experts/rotated --json "[0$(printf ',0.5%.0s' $(seq 63))]"

Needs the extra `examples` (FastAPI and uvicorn).
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated

import digits
import fastapi
import torch
import uvicorn
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

import tallstore

BATCH = 16
Pixels = Annotated[list[Annotated[float, Field(ge=0, le=1)]], Field(min_length=64, max_length=64)]


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """BATCH rows at a time, padded: rounding depends on shapes, and an answer must not depend on who asks beside it."""
    padded = functional.pad(images, (0, 0, 0, -len(images) % BATCH))
    return torch.cat([model(rows) for rows in padded.split(BATCH)])[: len(images)]


class Lane:
    """A model and those who wait for it: whoever's turn it is answers all who wait for the same expert."""

    def __init__(
        self, experts: Sequence[str], model: nn.Module, using: Callable[[str], AbstractContextManager[object]]
    ) -> None:
        self.waiting = {expert: queue.SimpleQueue() for expert in experts}
        self.model, self.using = model, using
        self.turn, self.turns, self.answered = threading.Lock(), 0, 0

    def ask(self, expert: str, pixels: list[float]) -> list[float]:
        """Return the logits of *expert*; for many threads at once."""
        waiting, mine = self.waiting[expert], Future()
        waiting.put((pixels, mine))
        with self.turn:
            if asked := [waiting.get() for _ in range(waiting.qsize())]:
                self._answer(expert, *zip(*asked, strict=True))
        return mine.result()

    def _answer(self, expert: str, images: tuple[list[float], ...], futures: tuple[Future, ...]) -> None:
        self.turns, self.answered = self.turns + 1, self.answered + len(images)
        try:
            with self.using(expert):  # in this block, no other thread can switch the model
                answers = logits(self.model, torch.tensor(images)).tolist()
            for future, answer in zip(futures, answers, strict=True):
                future.set_result(answer)
        except Exception as error:  # noqa: BLE001 - all who wait hear of it
            for future in futures:
                future.set_exception(error)


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

    def is_right(number: int) -> bool:
        task = tasks[number % len(tasks)]
        images, labels = digits.examples(task)[1]
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
