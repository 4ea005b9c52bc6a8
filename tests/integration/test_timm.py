"""Models of timm: loaded into, switched in place, and read by timm from an export."""

from __future__ import annotations

import pytest
import torch

from tallstore import SignedMask, open_bundle, pack
from tallstore.exporting import export

timm = pytest.importorskip("timm")

# Small ones of each kind: attention; batch normalisation, whose counters are integers; depthwise convolution.
MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "depth": 2},
    "resnet10t": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
}
TASKS = "one", "two"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
pytestmark = pytest.mark.parametrize("name", MODELS)


def new_model(name: str, **options: object) -> torch.nn.Module:
    return timm.create_model(name, num_classes=5, **MODELS[name], **options).eval()


@pytest.fixture
def bundle(name, tmp_path):
    """Two fine-tunes of a model, packed: every parameter is another, and what batches are counted with."""
    torch.manual_seed(0)
    base = new_model(name).state_dict()
    experts = {}
    for task in TASKS:
        experts[task] = {
            key: value + 0.01 * torch.randn_like(value) if value.is_floating_point() else value + len(experts) + 1
            for key, value in base.items()
        }
    pack(base, experts, tmp_path / "bundle", method=SignedMask(), embed_base=True)
    with open_bundle(tmp_path / "bundle") as bundle:
        yield bundle


@torch.inference_mode()
def outputs(model: torch.nn.Module) -> torch.Tensor:
    device = next(model.parameters()).device
    return model(torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(device)).cpu()


def assert_holds(model: torch.nn.Module, expert: dict[str, torch.Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == expert.keys()
    assert all(torch.equal(found[key].cpu(), value) for key, value in expert.items())


@pytest.mark.parametrize("device", DEVICES)
def test_experts_are_loaded_and_switched_in_place(name, device, bundle):
    model, attached = new_model(name).to(device), new_model(name).to(device)
    switcher = bundle.attach(attached)
    seen = []
    for task in (*TASKS, TASKS[0]):
        bundle.load_into(model, task)
        switcher.set_expert(task)
        assert_holds(model, bundle.state_dict(task))
        assert_holds(attached, bundle.state_dict(task))
        assert torch.equal(outputs(model), outputs(attached))
        seen.append(outputs(model))
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


def test_timm_reads_an_export(name, bundle, tmp_path):
    export(bundle, "two", tmp_path / "out")
    model = new_model(name, checkpoint_path=str(tmp_path / "out" / "model.safetensors"))
    assert_holds(model, bundle.state_dict("two"))
    bundle.load_into(expected := new_model(name), "two")
    assert torch.equal(outputs(model), outputs(expected))
