"""What tuning gains on unlabelled texts is worth: packed experts with and without `calibrate=`.

    python benchmarks/calibration.py --experts DIR [--limit 1000] [--texts 128] [--steps 30]

DIR holds fine-tunes of a text encoder: an `experts.py` that builds their checkpoints (`build OUT`) and finds the
encoder and the texts (`base_directory`, `test_split`), and a folder a task with its `head.safetensors` and `meta.json`.
The loss is the mean squared distance of the logits to the true expert's, on 32 texts a step that are not among the
scored ones.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fidelity import run_experts
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional
from transformers import BertConfig, BertModel

import tallstore

METHODS = {
    "SignedMask()": tallstore.SignedMask(),
    'Sign(scale="row")': tallstore.Sign(scale="row"),
    "Uniform(3)": tallstore.Uniform(3),
    'Sign(scale="tensor", gain="published")': tallstore.Sign(scale="tensor", gain="published"),
}
BATCH = 32
Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """Tokens, and their labels."""

    tokens: Sequence[Sequence[int]]
    labels: Tensor

    def batches(self, size: int) -> list[Texts]:
        """Texts of about the same length together."""
        order = sorted(range(len(self.tokens)), key=lambda place: len(self.tokens[place]))
        return [self.at(order[start : start + size]) for start in range(0, len(order), size)]

    def at(self, places: Sequence[int]) -> Texts:
        """Some of them."""
        return Texts([self.tokens[place] for place in places], self.labels[list(places)])


class Classifier:
    """One task: the encoder, the task's head, and its texts."""

    def __init__(self, experts: Any, task: Path, limit: int, texts: int) -> None:  # noqa: ANN401 - a module
        meta = json.loads((task / "meta.json").read_text())
        examples = experts.test_split(task)
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
        tokenizer = Tokenizer.from_file(str(experts.base_directory() / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(meta["max_len"])
        tokens = [found.ids for found in tokenizer.encode_batch([examples[place]["text"] for place in order])]
        every = Texts(tokens, torch.tensor([examples[place]["label"] for place in order]))
        self.scored = every.at(range(limit))
        self.seen = every.at(range(limit, min(limit + texts, len(order))))
        self._head = load_file(task / "head.safetensors")
        self._model = BertModel(BertConfig.from_pretrained(experts.base_directory()), add_pooling_layer=False).eval()
        self._model.requires_grad_(requires_grad=False)

    def logits(self, weights: Weights, texts: Texts) -> Tensor:
        """Of the encoder with these weights: [texts, classes]."""
        width = max(map(len, texts.tokens))
        ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in texts.tokens])
        keep = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in texts.tokens])
        inputs = {"input_ids": ids, "attention_mask": keep}
        hidden = functional_call(self._model, dict(weights), kwargs=inputs).last_hidden_state
        mean = (hidden * keep.unsqueeze(-1)).sum(1) / keep.sum(1, keepdim=True)
        features = functional.normalize(mean, dim=-1) * hidden.shape[-1] ** 0.5
        return features @ self._head["weight"].T + self._head["bias"]

    @torch.inference_mode()
    def outputs(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Logits of all scored texts, and their labels."""
        batches = self.scored.batches(64)
        return torch.cat([self.logits(weights, batch) for batch in batches]), torch.cat([b.labels for b in batches])


@dataclass(frozen=True)
class Row:
    """One method, with or without calibration: by task in %, and squared distances of logits."""

    method: str
    calibrated: bool
    agreement: Mapping[str, float]
    accuracy: Mapping[str, float]
    distance: Mapping[str, float]
    nbytes: int
    seconds: float


def load_experts(folder: Path) -> Any:  # noqa: ANN401 - a module
    """The module experts.py."""
    spec = importlib.util.spec_from_file_location("experts", folder / "experts.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"{folder}: has no experts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def distillation(classifiers: Mapping[str, Classifier], experts: Mapping[str, Weights]) -> Callable[..., Tensor]:
    """How far the logits are from the true expert's, on texts drawn anew at every call."""
    with torch.no_grad():
        expected = {task: found.logits(experts[task], found.seen) for task, found in classifiers.items()}

    def loss(task: str, weights: Weights) -> Tensor:
        chosen = torch.randperm(len(expected[task]))[:BATCH]
        found = classifiers[task]
        return functional.mse_loss(found.logits(weights, found.seen.at(chosen.tolist())), expected[task][chosen])

    return loss


def measure(
    checkpoints: Path, classifiers: Mapping[str, Classifier], calibration: tallstore.Calibration, scratch: Path
) -> list[Row]:
    """Pack by every method, with and without *calibration*, and score what is read back."""
    true = {
        task: found.outputs(load_file(checkpoints / task / "model.safetensors")) for task, found in classifiers.items()
    }
    rows = []
    for name, method in METHODS.items():
        for calibrate in (None, calibration):
            begun = time.perf_counter()
            report = tallstore.pack(
                checkpoints / "base",
                {task: checkpoints / task for task in classifiers},
                scratch / "bundle",
                method=method,
                calibrate=calibrate,
                overwrite=True,
            )
            seconds = time.perf_counter() - begun
            for line in report.advice:
                print(f"{name}: {line}", flush=True)
            with tallstore.open_bundle(scratch / "bundle", base=checkpoints / "base") as bundle:
                outputs = {task: found.outputs(bundle.state_dict(task))[0] for task, found in classifiers.items()}
            rows.append(
                Row(
                    method=name,
                    calibrated=calibrate is not None,
                    agreement={task: _share(outputs[task].argmax(1) == true[task][0].argmax(1)) for task in outputs},
                    accuracy={task: _share(outputs[task].argmax(1) == true[task][1]) for task in outputs},
                    distance={task: functional.mse_loss(outputs[task], true[task][0]).item() for task in outputs},
                    nbytes=report.bundle_nbytes,
                    seconds=seconds,
                )
            )
    return rows


def _share(matches: Tensor) -> float:
    return 100 * matches.float().mean().item()


def table(rows: Sequence[Row]) -> str:
    """Markdown: agreement in % and, in brackets, the squared distance of the logits."""
    tasks = list(rows[0].agreement)
    lines = [
        "| method | calibrated | "
        + " | ".join(tasks)
        + " | mean agreement | mean accuracy | mean distance | MB | pack s |",
        "|---" * (len(tasks) + 7) + "|",
    ]
    for row in rows:
        cells = " | ".join(f"{row.agreement[task]:.2f} ({row.distance[task]:.4f})" for task in tasks)
        agreement, accuracy, distance = (
            statistics.mean(values.values()) for values in (row.agreement, row.accuracy, row.distance)
        )
        lines.append(
            f"| {row.method} | {'yes' if row.calibrated else 'no'} | {cells} | {agreement:.2f} | {accuracy:.2f} |"
            f" {distance:.4f} | {row.nbytes / 1e6:.2f} | {row.seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Build, pack, score, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=Path, required=True, help="a folder with experts.py and the fine-tunes")
    parser.add_argument("--limit", type=int, default=1000, help="scored texts a task")
    parser.add_argument("--texts", type=int, default=128, help="texts a task to calibrate on, behind the scored ones")
    parser.add_argument("--steps", type=int, default=30, help="of Adam, a task")
    arguments = parser.parse_args()
    experts = load_experts(arguments.experts)
    with tempfile.TemporaryDirectory(prefix="tallstore-calibration-") as scratch_name:
        scratch = Path(scratch_name)
        run_experts(arguments.experts, "build", str(scratch / "checkpoints"))
        tasks = sorted(path.name for path in (scratch / "checkpoints").iterdir() if path.name != "base")
        make = functools.partial(Classifier, limit=arguments.limit, texts=arguments.texts)
        classifiers = {task: make(experts, arguments.experts / task) for task in tasks}
        weights = {task: load_file(scratch / "checkpoints" / task / "model.safetensors") for task in tasks}
        calibration = tallstore.Calibration(distillation(classifiers, weights), steps=arguments.steps)
        del weights
        print("Agreement with the true expert in % (squared distance of the logits):\n")
        print(table(measure(scratch / "checkpoints", classifiers, calibration, scratch)))


if __name__ == "__main__":
    main()
