"""How much memory a model takes while it is made, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import tallstore

#: What threads work in, and what the allocator keeps of it; torch's operations take more than compiled functions do.
BESIDE_NBYTES = 32 << 20 if importlib.util.find_spec("llvmlite") else 96 << 20
CHILD = """
import gc, json, sys
from pathlib import Path

import transformers

import tallstore
from tallstore.transformers import from_bundle
from tests import vllm_llama

def told(kind):
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith(kind))

root, how, dtype = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
config = transformers.AutoConfig.from_pretrained(root / "one")
small = {**config.to_dict(), "hidden_size": 8, "intermediate_size": 8, "vocab_size": 8, "head_dim": 4}
transformers.LlamaForCausalLM(transformers.LlamaConfig(**small | {"num_hidden_layers": 1}))  # imports what it needs
if how == "server":
    server = vllm_llama.LlamaForCausalLM(config)
with tallstore.open_bundle(root / "bundle", base=root / "base") as bundle:
    bundle.tensor("one", "model.layers.0.self_attn.q_proj.weight", dtype=dtype)  # compiles what decodes
    gc.collect()
    before = told("VmRSS")
    if how == "server":
        model = server
        model.load_weights(bundle.items("one"))
    elif how == "bundle":
        model = from_bundle(bundle, "one", dtype=dtype)
    else:  # as one would without
        config.dtype = None
        model = transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=bundle.state_dict("one"), dtype=dtype
        )
nbytes = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"model": nbytes, "beyond": told("VmHWM") - before}))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of a process's memory"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A Llama of 416 MB in float32, and two fine-tunes of it."""
    root = tmp_path_factory.mktemp("memory")
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=3, num_attention_heads=8
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(root / "base", max_shard_size="150MB")
    generator = torch.Generator().manual_seed(2)
    for task in ("one", "two"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        model.save_pretrained(root / task)
    tallstore.pack(root / "base", {task: root / task for task in ("one", "two")}, root / "bundle")
    return root


def measured(root, how, dtype):
    environment = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TALLSTORE_COMPILE": "1",
        "PYTHONPATH": str(Path(tallstore.__file__).parents[1]),
    }
    child = subprocess.run(
        [sys.executable, "-c", CHILD, root, how, dtype], capture_output=True, text=True, env=environment, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_takes_little_more_than_its_own_memory(dtype, root):
    found = measured(root, "bundle", dtype)
    assert found["model"] == {"float32": 416_313_344, "bfloat16": 208_156_672}[dtype]
    assert found["beyond"] <= 1.1 * found["model"] + BESIDE_NBYTES


def test_that_test_would_see_a_state_dict(root):
    found = measured(root, "state dict", "bfloat16")
    assert found["beyond"] > 2 * found["model"]


def test_a_server_that_is_there_already_takes_one_tensor_more(root):
    """The largest is 131 MB, and two may be there at a time; a state dict would be 416 MB."""
    found = measured(root, "server", "float32")
    assert found["beyond"] <= 2 * 131_072_000 + BESIDE_NBYTES
