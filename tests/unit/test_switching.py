"""Switcher: one expert after another in one model, in place; after any failure the old one, the new one, or none."""

from __future__ import annotations

import itertools
import json
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tallstore
from tallstore.format.dtypes import CHUNK_NUMEL
from tallstore.loading.compiled import CompiledElements
from tallstore.loading.resident import ResidentBase, _ResidentPayload
from tests.bundle_builder import Bundle, Group, Task
from tests.few_files import few_files
from tests.reference import same_bits

KINDS = ("mask", "signed", "two-level", "sign", "sparse", "uniform", "private")
TASKS = ("a", "b", "c")
WIDTH = 5


class Net(nn.Module):
    """A tensor of every kind, a tie, buffers, a convolution, and what the base has in another shape or not at all."""

    def __init__(self, tied: bool = True, classes: int = 3, rows: int = 9) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, WIDTH)
        self.rows = nn.Embedding(rows, WIDTH)
        self.conv = nn.Conv2d(1, 3, 2)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.layers = nn.ModuleDict({kind: nn.Linear(WIDTH, WIDTH, bias=False) for kind in (*KINDS, "same", "late")})
        self.decoder = nn.Linear(WIDTH, 7, bias=False)
        if tied:
            self.decoder.weight = self.embed.weight
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens):
        hidden = self.embed(tokens) + self.rows(tokens)
        for layer in self.layers.values():
            hidden = torch.tanh(layer(hidden))
        return self.head(self.norm(hidden)).sum() + self.decoder(hidden).sum() + self.conv.weight.sum()


def write(task: Task, random_: np.random.Generator, classes: int = 3) -> None:
    """All tensors of a task; the first two tasks have the same kinds, the third has others."""
    other = task.name == "c"
    for kind in KINDS:
        name, numel = f"layers.{kind}.weight", WIDTH * WIDTH
        values = torch.from_numpy(random_.standard_normal(numel).astype(np.float32))
        if kind == "private" or (other and kind in {"mask", "uniform"}):
            task.private(name, values.view(WIDTH, WIDTH))
        elif other and kind == "sign":
            task.same(name)
        else:
            options = {"sparse": {"own": values[: numel // 2]}, "uniform": {"levels": 4}}.get(kind, {})
            codes = {
                "sparse": random_.permutation(np.arange(numel) < numel // 2).astype(int),
                "uniform": random_.integers(0, 4, numel),
                "signed": random_.integers(-1, 2, numel),
            }.get(kind, random_.integers(0, 2, numel))
            task.coded(kind, name, codes, gain=0.25, **options)
    task.same("layers.same.weight")
    task.same("layers.late.weight", dtype=torch.bfloat16 if other else None)
    task.signed("embed.weight", random_.integers(-1, 2, 7 * WIDTH), gains=random_.choice([0.5, 1.0, 2.0], 7).tolist())
    task.alias("decoder.weight", "embed.weight")
    task.mask("conv.weight", random_.integers(0, 2, 12), gain=2.0)
    task.private("conv.bias", torch.from_numpy(random_.standard_normal(3).astype(np.float32)))
    further = torch.from_numpy(random_.standard_normal((3, WIDTH)).astype(np.float32))
    task.extended("rows.weight", "mask", further, 6, random_.integers(0, 2, 6 * WIDTH), gain=0.5)
    for name in ("norm.weight", "norm.bias", "norm.running_mean"):
        task.private(name, torch.from_numpy(random_.standard_normal(WIDTH).astype(np.float32)))
    task.same("norm.running_var")
    task.private("norm.num_batches_tracked", torch.tensor(int(random_.integers(1, 9))))
    task.private("head.weight", torch.from_numpy(random_.standard_normal((classes, WIDTH)).astype(np.float32)))
    task.private("head.bias", torch.from_numpy(random_.standard_normal(classes).astype(np.float32)))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bundle of three tasks in two groups; not to be changed."""
    return pack(tmp_path_factory.mktemp("packed") / "bundle")


def pack(root, classes=(3, 3, 3)):
    root.mkdir()
    torch.manual_seed(0)
    random_ = np.random.default_rng(0)
    base = {
        name: tensor.clone()
        for name, tensor in Net(tied=False, rows=6).state_dict().items()
        if not name.startswith("head.")
    }
    base["decoder.weight"] = base["embed.weight"]
    groups = [Group(root, base, number) for number in (1, 2)]
    for group in groups:
        for name in ("layers.mask.weight", "layers.signed.weight", "embed.weight", "conv.weight", "rows.weight"):
            group.vector(name, "F16", random_.standard_normal(base[name].numel()))
        for role in ("merged", "merged_lo"):
            codes = random_.integers(-127, 128, WIDTH * WIDTH)
            group.vector("layers.two-level.weight", "I8", codes, steps=[0.25] * WIDTH, role=role)
        group.vector("layers.sign.weight", "F32", random_.standard_normal(WIDTH * WIDTH), role="centre")
    tasks = [Task(groups[name == "c"], name) for name in TASKS]
    for task, count in zip(tasks, classes, strict=True):
        write(task, random_, count)
    return Bundle(root, base, groups, tasks, {"decoder.weight": "embed.weight"}).seal()


@pytest.fixture
def bundle(packed):
    with tallstore.open_bundle(packed) as opened:
        yield opened


def fresh(**options) -> Net:
    torch.manual_seed(1)
    return Net(**options).eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def is_expert(model: nn.Module, bundle, task: str) -> bool:
    found = model.state_dict()
    return all(same_bits(found[name], tensor.to(found[name].dtype)) for name, tensor in bundle.state_dict(task).items())


def is_same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(same_bits(tensor, before[name]) for name, tensor in model.state_dict().items())


def base_of(bundle) -> dict[str, torch.Tensor]:
    pinned = bundle._pinned()
    return {
        name: pinned.read(name, 0, max(1, int(np.prod(table.shape)))).view(table.shape).clone()
        for name, table in bundle._files.base.items()
    }


def is_base(model: nn.Module, bundle, own: dict[str, torch.Tensor]) -> bool:
    """The base where it has a tensor of that shape, *own* elsewhere."""
    base = base_of(bundle)
    for name, tensor in model.state_dict().items():
        at_rest = base[name] if name in base and base[name].shape == tensor.shape else own[name]
        if not same_bits(tensor, at_rest.to(tensor.dtype)):
            return False
    return True


TOKENS = torch.tensor([0, 3, 1, 5, 2, 4])


class Interrupted:
    """Reads of what is in memory that fail from the *first* on, *count* of them."""

    def __init__(self, monkeypatch, error: type[BaseException], first: int, count: float) -> None:
        self.raised = False
        calls = itertools.count(1)

        def failing(read):
            def fail_or_read(*arguments):
                if first <= next(calls) < first + count:
                    self.raised = True
                    raise error("no luck")
                return read(*arguments)

            return fail_or_read

        monkeypatch.setattr(ResidentBase, "read", failing(ResidentBase.read))
        monkeypatch.setattr(_ResidentPayload, "chunk", failing(_ResidentPayload.chunk))
        monkeypatch.setattr(CompiledElements, "read", failing(CompiledElements.read))


# --- right, in place, and for good ---


@pytest.mark.parametrize("frozen", [True, False])
def test_every_kind_bit_for_bit_and_nothing_adds_up(bundle, frozen):
    model = fresh().requires_grad_(not frozen)
    own, switcher = snapshot(model), bundle.attach(model)
    tries = np.random.default_rng(0)
    for _ in range(60):
        task = tries.choice([*TASKS, None])
        switcher.set_expert(task)
        assert switcher.active_expert == task
        assert is_expert(model, bundle, task) if task else is_base(model, bundle, own)


def small_bundle(root):
    """Three tasks of one layer, and the tensors of each and of the base."""
    base = {"0.weight": torch.randn(4, 4), "0.bias": torch.randn(4)}
    group, random_ = Group(root, base), np.random.default_rng(0)
    group.vector("0.weight", "F32", random_.standard_normal(16))
    tasks = [Task(group, name) for name in TASKS]
    for task in tasks:
        task.mask("0.weight", random_.integers(0, 2, 16), gain=0.75)
        task.private("0.bias", torch.randn(4))
    bundle = tallstore.open_bundle(Bundle(root, base, [group], tasks).seal())
    return bundle, {task.name: task.expected for task in tasks} | {None: base}


def test_thousands_of_switches(tmp_path):
    bundle, expected = small_bundle(tmp_path)
    model = nn.Sequential(nn.Linear(4, 4))
    switcher, tries = bundle.attach(model), np.random.default_rng(0)
    for _ in range(3000):
        task = tries.choice([*TASKS, None])
        switcher.set_expert(task)
        assert torch.equal(model[0].weight, expected[task]["0.weight"])
        assert torch.equal(model[0].bias, expected[task]["0.bias"])


def test_the_memory_stays_where_it_is_and_optimisers_keep_their_state(bundle):
    model = fresh()
    switcher = bundle.attach(model)
    before = {name: (tensor, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    optimizer = torch.optim.AdamW(model.parameters())
    switcher.set_expert("a")
    model(TOKENS).backward()
    optimizer.step()
    moments = {key: state["exp_avg"].clone() for key, state in optimizer.state.items()}
    switcher.set_expert("b")
    assert is_expert(model, bundle, "b")
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert tensor.data_ptr() == before[name][1]
    assert all(torch.equal(state["exp_avg"], moments[key]) for key, state in optimizer.state.items())
    optimizer.step()
    assert not is_expert(model, bundle, "b")
    assert model.decoder.weight is model.embed.weight


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_what_training_moved_is_the_base_again_after_a_switch(bundle, options):
    """Also what two experts have from the base, which a switch need not write otherwise."""
    model = fresh()
    switcher = bundle.attach(model)
    for task in ("a", "b", None, "a"):
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        model(TOKENS).backward()
        optimizer.step()
        optimizer.zero_grad()
        switcher.set_expert(task)
        assert task is None or is_expert(model, bundle, task)


def test_buffers_that_a_forward_pass_moves(bundle):
    model = fresh().requires_grad_(requires_grad=False).train()
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    model.norm(torch.randn(4, WIDTH))
    assert not is_expert(model, bundle, "a")
    switcher.set_expert("b")
    assert is_expert(model, bundle, "b")  # running_var is the base's in both


def test_frozen_parameters_that_are_the_bases_in_both_are_left_alone(bundle):
    model = fresh().requires_grad_(requires_grad=False)
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    switcher.set_expert("b")
    left = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor._version == versions[name]}
    assert left == {"layers.same.weight", "layers.late.weight"}
    with torch.no_grad():
        model.layers["same"].weight.add_(1)
    switcher.set_expert("a")
    assert is_expert(model, bundle, "a")
    switcher.set_expert("c")  # has another dtype of what is the base's, and from the base what the others have not
    assert is_expert(model, bundle, "c")


def test_graphs_that_hold_old_weights_notice(bundle):
    model = fresh()
    switcher = bundle.attach(model)
    loss = (model.layers["private"].weight ** 2).sum()
    with torch.inference_mode():
        switcher.set_expert("a")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nothing_happens_before_the_first_switch(bundle):
    model = fresh()
    before = snapshot(model)
    switcher = bundle.attach(model)
    assert switcher.active_expert is None
    assert is_same(model, before)
    assert repr(switcher) == "<Switcher active_expert=None>"


# --- models of other sorts ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_take_the_finished_expert_cast_once(bundle, dtype):
    model = fresh().to(dtype)
    own, switcher = snapshot(model), bundle.attach(model)
    for task in ("a", "c", None, "b"):
        switcher.set_expert(task)
        assert is_expert(model, bundle, task) if task else is_base(model, bundle, own)
    assert model.norm.num_batches_tracked.dtype == torch.int64


def test_a_model_that_changes_its_memory_between_switches(bundle):
    model = fresh()
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    model.to(torch.bfloat16)
    switcher.set_expert("a")
    assert is_expert(model, bundle, "a")
    model.float()
    model.norm.register_buffer("running_mean", torch.zeros(WIDTH))
    switcher.set_expert("b")
    assert is_expert(model, bundle, "b")


def test_tensors_that_are_not_rebuilt_in_place_are_staged(bundle):
    """What is not contiguous goes the way of what is on another device."""
    model = fresh()
    model.conv = model.conv.to(memory_format=torch.channels_last)
    model.layers["mask"].weight = nn.Parameter(model.layers["mask"].weight.detach().t())
    strides = [model.conv.weight.stride(), model.layers["mask"].weight.stride()]
    own, switcher = snapshot(model), bundle.attach(model)
    for task in ("a", "c", None, "b"):
        switcher.set_expert(task)
        assert is_expert(model, bundle, task) if task else is_base(model, bundle, own)
    assert [model.conv.weight.stride(), model.layers["mask"].weight.stride()] == strides
    assert not model.layers["mask"].weight.is_contiguous()


def test_an_untied_model_has_both(bundle):
    model = fresh(tied=False)
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    assert torch.equal(model.decoder.weight, model.embed.weight)
    assert is_expert(model, bundle, "a")


def test_parameters_of_one_storage_are_one(bundle):
    model = fresh(tied=False)
    model.decoder.weight = nn.Parameter(model.embed.weight.detach())
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    switcher.set_expert("b")
    assert is_expert(model, bundle, "b")
    assert model.decoder.weight.data_ptr() == model.embed.weight.data_ptr()


def test_a_tie_that_the_base_does_not_have_is_refused(tmp_path):
    base = {"0.weight": torch.zeros(3, 3), "1.weight": torch.ones(3, 3)}
    task = Task(Group(tmp_path, base), "a")
    task.same("0.weight")
    task.same("1.weight")
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [task.group], [task]).seal())
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    bundle.attach(model)
    model[1].weight = model[0].weight
    with pytest.raises(tallstore.OptionError, match=r"ties '0\.weight' and '1\.weight', which differ in the base"):
        bundle.attach(model)


def test_tensors_that_the_base_has_under_another_name(tmp_path):
    base = {"0.weight": torch.randn(3, 3), "0.bias": torch.randn(3)}
    group = Group(tmp_path, base)
    group.vector("0.weight", "F32", np.ones(9))
    task = Task(group, "a")
    task.mask("weight", np.ones(9), base="0.weight")
    task.same("bias", base="0.bias")
    model = nn.Linear(3, 3)
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], [task]).seal())
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    assert torch.equal(model.weight, base["0.weight"] + 1)
    switcher.set_expert(None)
    assert torch.equal(model.weight, base["0.weight"])
    assert torch.equal(model.bias, base["0.bias"])


def test_names_that_only_a_later_task_gives(tmp_path):
    """Before it, the tensor is nobody's but the model's."""
    base = {"0.weight": torch.randn(3, 3), "0.bias": torch.randn(3)}
    group = Group(tmp_path, base)
    tasks = [Task(group, "less"), Task(group, "whole")]
    for task in tasks:
        task.same("bias", base="0.bias")
    tasks[1].private("head", torch.ones(1))
    tasks[1].same("weight", base="0.weight")
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], tasks).seal())
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    switcher = bundle.attach(model, strict=False)
    for task, weight in (("less", before), (None, before), ("whole", base["0.weight"]), (None, base["0.weight"])):
        switcher.set_expert(task)
        assert torch.equal(model.weight, weight)
    switcher.set_expert("less")
    assert torch.equal(model.weight, base["0.weight"])


def test_in_inference_mode(bundle):
    with torch.inference_mode():
        model = fresh()
        switcher = bundle.attach(model)
        switcher.set_expert("a")
        switcher.set_expert("b")
    assert is_expert(model, bundle, "b")
    with pytest.raises(tallstore.OptionError, match="was made in inference mode"):
        switcher.set_expert("a")
    assert is_expert(model, bundle, "b")


# --- what does not fit is refused before anything is written ---


def test_a_head_of_another_shape_is_refused_with_task_tensor_and_both_shapes(tmp_path):
    bundle = tallstore.open_bundle(pack(tmp_path / "bundle", classes=(3, 4, 3)))
    model = fresh()
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    with pytest.raises(tallstore.OptionError, match=r"'head\.weight' is \[3, 5\] in the model, \[4, 5\] in task 'b'"):
        switcher.set_expert("b")
    assert switcher.active_expert == "a"
    assert is_expert(model, bundle, "a")
    switcher.set_expert("c")
    assert is_expert(model, bundle, "c")


def test_other_names_are_refused_unless_they_may_differ(bundle):
    model = fresh()
    model.more = nn.Linear(2, 2, bias=False)
    before = snapshot(model)
    strict = bundle.attach(model)
    with pytest.raises(tallstore.OptionError, match=r"task 'a' lacks 1 of the other's tensors: 'more\.weight'"):
        strict.set_expert("a")
    assert strict.active_expert is None
    assert is_same(model, before)
    del model.conv
    bundle.attach(model, strict=False).set_expert("a")
    assert torch.equal(model.more.weight, before["more.weight"])
    assert torch.equal(model.head.weight, bundle.tensor("a", "head.weight"))


def test_what_an_expert_lacks_is_the_bases_or_the_models_own(tmp_path):
    """Whatever expert came before."""
    base = {"weight": torch.randn(3, 3), "bias": torch.randn(3)}
    group = Group(tmp_path, base)
    whole, less = Task(group, "whole"), Task(group, "less")
    whole.private("weight", torch.ones(3, 3))
    whole.private("bias", torch.ones(3))
    whole.private("head", torch.ones(2))
    less.private("weight", torch.zeros(3, 3))
    less.dropped("bias")
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], [whole, less]).seal())
    model = nn.Linear(3, 3)
    model.register_parameter("head", nn.Parameter(torch.tensor([5.0, 6.0])))
    switcher = bundle.attach(model, strict=False)
    for _ in range(2):
        switcher.set_expert("less")
        assert torch.equal(model.bias, base["bias"])
        assert model.head.tolist() == [5, 6]
        switcher.set_expert("whole")
        assert model.head.tolist() == [1, 1]


def test_a_model_of_something_else_is_refused(bundle):
    with pytest.raises(tallstore.OptionError, match=r"no tensor of the base's: it has 'weight', 'bias', the base"):
        bundle.attach(nn.Linear(3, 3))
    with pytest.raises(tallstore.OptionError, match="cache_nbytes is -1"):
        bundle.attach(fresh(), cache_nbytes=-1)


def test_tensors_without_memory_are_refused(bundle):
    with torch.device("meta"):
        model = Net()
    switcher = bundle.attach(model)
    for task in ("a", None):
        with pytest.raises(tallstore.OptionError, match="has no memory"):
            switcher.set_expert(task)


def test_a_base_in_the_models_own_memory_is_refused(packed):
    """It would be gone after the first switch."""
    with tallstore.open_bundle(packed) as bundle:
        base = base_of(bundle)
    model = fresh(rows=6)
    model.load_state_dict(base, strict=False)
    bundle = tallstore.open_bundle(packed, base=model.state_dict())
    before = snapshot(model)
    with pytest.raises(tallstore.OptionError, match=r"is in the memory of the base's 'embed\.weight'"):
        bundle.attach(model, strict=False).set_expert(None)
    assert is_same(model, before)
    switcher = tallstore.open_bundle(packed, base=snapshot(model)).attach(model, strict=False)
    switcher.set_expert(None)
    assert is_same(model, before)


# --- blocks, and several at once ---


def test_blocks_nest_and_give_back_what_was_there(bundle):
    model = fresh()
    own, switcher = snapshot(model), bundle.attach(model)
    switcher.set_expert("a")
    with switcher.using("b"):
        assert is_expert(model, bundle, "b")
        with switcher.disable_expert():
            assert switcher.active_expert is None
            assert is_base(model, bundle, own)
            with switcher.using("c"):
                assert is_expert(model, bundle, "c")
            assert is_base(model, bundle, own)
        assert switcher.active_expert == "b"
        assert is_expert(model, bundle, "b")
        switcher.set_expert("c")
    assert switcher.active_expert == "a"
    assert is_expert(model, bundle, "a")


def test_blocks_give_back_after_exceptions_and_refusals(bundle):
    model = fresh()
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    with pytest.raises(ZeroDivisionError), switcher.using("b"):
        raise ZeroDivisionError
    with pytest.raises(tallstore.UnknownTaskError), switcher.using("nobody"):
        raise AssertionError
    assert switcher.active_expert == "a"
    assert is_expert(model, bundle, "a")


def test_threads_each_see_their_own_expert(bundle):
    model = fresh().requires_grad_(requires_grad=False)
    switcher = bundle.attach(model, cache_nbytes=0)
    expected = {}
    for task in TASKS:
        with switcher.using(task):
            expected[task] = model(TOKENS)
    assert len({value.item() for value in expected.values()}) == len(TASKS)
    wrong = []

    def work(seed: int) -> None:
        tries = np.random.default_rng(seed)
        for _ in range(15):
            task, following = tries.choice(TASKS, 2).tolist()
            switcher.prefetch(following)
            with switcher.using(task):
                if not torch.equal(model(TOKENS), expected[task]):
                    wrong.append(task)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert switcher.active_expert is None


def test_two_switchers_of_one_bundle(bundle):
    first, second = fresh(), fresh().to(torch.bfloat16)
    switchers = [bundle.attach(first), bundle.attach(second)]
    switchers[0].set_expert("a")
    switchers[1].set_expert("b")
    assert is_expert(first, bundle, "a")
    switchers[0].set_expert("c")
    assert is_expert(second, bundle, "b")


def test_compiled_models_keep_their_graphs(bundle):
    model = fresh().requires_grad_(requires_grad=False)
    switcher = bundle.attach(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    switcher.set_expert("a")
    compiled(TOKENS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for task in ("b", "c", None, "a"):
            switcher.set_expert(task)
            assert torch.equal(compiled(TOKENS), model(TOKENS))


# --- memory and reading ---


def test_a_second_visit_reads_nothing(bundle):
    switcher = bundle.attach(fresh())
    for task in (*TASKS, None):
        switcher.set_expert(task)
    read = bundle.bytes_read
    for task in (*TASKS, None):
        switcher.set_expert(task)
    assert bundle.bytes_read == read


def test_what_was_prefetched_is_not_read_at_the_switch(bundle):
    model = fresh()
    switcher = bundle.attach(model, cache_nbytes=0)
    switcher.set_expert("a")
    switcher.prefetch("c").result()
    read = bundle.bytes_read
    switcher.set_expert("c")
    assert bundle.bytes_read == read
    assert is_expert(model, bundle, "c")
    assert switcher.cached_tasks == ("c",)


def test_a_prefetch_says_what_is_wrong(packed, tmp_path):
    root = damaged(packed, tmp_path, "tasks/b", 0)
    bundle = tallstore.open_bundle(root)
    switcher = bundle.attach(fresh())
    with pytest.raises(tallstore.UnknownTaskError, match="did you mean"):
        switcher.prefetch("bb")
    with pytest.raises(tallstore.FormatError):
        switcher.prefetch("b").result()
    switcher.set_expert("a")


def test_masks_in_memory_are_bounded(bundle):
    switcher = bundle.attach(fresh())
    switcher.set_expert("a")
    one, shared = switcher.cached_nbytes, switcher.shared_nbytes
    assert one > 0 < shared
    switcher.set_expert("b")
    assert switcher.shared_nbytes == shared  # of one group
    switcher.set_expert("c")
    other = switcher.shared_nbytes - shared
    assert 0 < other < shared  # of another group, of which fewer tensors are needed
    everything = switcher.cached_nbytes
    assert switcher.cached_tasks == ("a", "b", "c")

    tight = bundle.attach(fresh(), cache_nbytes=everything - 1)
    for task in ("a", "b", "a", None, "c"):
        tight.set_expert(task)
    assert tight.cached_tasks == ("a", "c")  # b was used least recently
    assert tight.cached_nbytes < everything

    none = bundle.attach(fresh(), cache_nbytes=0)
    for task in TASKS:
        none.set_expert(task)
        assert none.cached_tasks == (task,)
    assert none.shared_nbytes == other
    none.set_expert(None)
    assert (none.cached_tasks, none.cached_nbytes, none.shared_nbytes) == ((), 0, 0)
    with none.using("a"), none.using("c"), none.disable_expert():
        assert none.cached_tasks == ("a", "c")  # they come back


def test_every_read_is_checked_if_asked_for(packed, tmp_path):
    """Then nothing of the base is kept, and damage that comes later is found."""
    root = copied(packed, tmp_path)
    bundle = tallstore.open_bundle(root, verify="always")
    model = fresh()
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    flip(root / "base" / "model.safetensors", -1)
    with pytest.raises(tallstore.TallstoreError):
        switcher.set_expert("b")
    assert switcher.active_expert == "a"
    assert is_expert(model, tallstore.open_bundle(packed), "a")


# --- failures ---


def copied(packed, tmp_path):
    root = tmp_path / "copy"
    for path in packed.rglob("*"):
        if path.is_file():
            target = root / path.relative_to(packed)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return root


def flip(path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


def payload_places(path) -> list[int]:
    """A byte of each tensor of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return [8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"]


def damaged(packed, tmp_path, directory: str, number: int):
    """A copy with one payload of *directory* changed."""
    root = copied(packed, tmp_path)
    places = [
        (path, place) for path in sorted(root.glob(f"{directory}/*.safetensors")) for place in payload_places(path)
    ]
    flip(*places[number])
    return root


def test_damage_anywhere_leaves_the_old_expert(packed, bundle, tmp_path):
    """In any payload of the task and its group: found before anything is written."""
    found = 0
    for directory in ("tasks/c", "groups/g0002"):
        places = sum(len(payload_places(path)) for path in packed.glob(f"{directory}/*.safetensors"))
        for number in range(places):
            root = damaged(packed, tmp_path, directory, number)
            model = fresh()
            switcher = tallstore.open_bundle(root).attach(model)
            switcher.set_expert("a")
            with pytest.raises(tallstore.IntegrityError):
                switcher.set_expert("c")
            assert switcher.active_expert == "a"
            assert is_expert(model, bundle, "a")
            found += 1
    assert found > 4


ERRORS = [OSError, RuntimeError, KeyboardInterrupt]


@pytest.mark.parametrize("error", ERRORS)
def test_a_write_that_fails_is_taken_back(bundle, monkeypatch, error):
    """At each read of a switch in turn; what follows works."""
    model = fresh()
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    for first in itertools.count(1):
        with monkeypatch.context() as patch:
            interrupted = Interrupted(patch, error, first, 1)
            if interrupted_switch(switcher, error):
                assert not interrupted.raised
                break
        assert switcher.active_expert == "a"
        assert is_expert(model, bundle, "a")
        model(TOKENS)
    assert first > 10
    assert is_expert(model, bundle, "b")


def interrupted_switch(switcher, error) -> bool:
    """Whether a switch to b went through."""
    try:
        switcher.set_expert("b")
    except error as caught:
        assert str(caught) == "no luck"  # noqa: PT017 - what was raised is raised again
        return False
    return True


@pytest.mark.parametrize("error", ERRORS)
def test_a_model_that_is_neither_refuses_to_run(bundle, monkeypatch, error):
    """At each read in turn, from which on all fail; a switch that works heals it."""
    raised = tallstore.SwitchError if issubclass(error, Exception) else error
    for first in (1, 2, 7, 12):
        model = fresh()
        switcher = bundle.attach(model)
        switcher.set_expert("b")
        switcher.set_expert("a")
        with monkeypatch.context() as patch:
            Interrupted(patch, error, first, float("inf"))
            for _ in range(2):
                with pytest.raises(raised):
                    switcher.set_expert("b")
        neither = r"^the model is neither expert 'a' nor expert 'b': .*no luck.*call set_expert again"
        for module in (model, model.embed, model.layers["mask"]):
            with pytest.raises(tallstore.SwitchError, match=neither):
                module(TOKENS)
        with pytest.raises(tallstore.SwitchError, match=neither):
            _ = switcher.active_expert
        assert repr(switcher) == "<Switcher of no expert: a switch failed>"
        switcher.set_expert("b")
        assert switcher.active_expert == "b"
        assert is_expert(model, bundle, "b")
        model(TOKENS)
        assert not model._forward_pre_hooks


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_refuses_too(tmp_path, monkeypatch, in_place):
    """Its graphs do not look for hooks that come later."""
    bundle, _ = small_bundle(tmp_path)
    model, tokens = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
    switcher = bundle.attach(model)
    torch._dynamo.reset()
    if in_place:
        model.compile(backend="aot_eager")
    compiled = model if in_place else torch.compile(model, backend="aot_eager")
    switcher.set_expert("b")
    switcher.set_expert("a")
    compiled(tokens)
    with monkeypatch.context() as patch:
        Interrupted(patch, OSError, 2, float("inf"))
        with pytest.raises(tallstore.SwitchError):
            switcher.set_expert("b")
    with pytest.raises(tallstore.SwitchError, match="neither"):
        compiled(tokens)
    switcher.set_expert("b")
    assert torch.equal(compiled(tokens), model.forward(tokens))


def test_a_failure_at_the_first_switch_leaves_the_model_as_it_was_or_the_base(bundle, monkeypatch):
    seen = set()
    for first in itertools.count(1):
        model = fresh()
        own, switcher = snapshot(model), bundle.attach(model)
        with monkeypatch.context() as patch:
            Interrupted(patch, OSError, first, 1)
            if interrupted_switch(switcher, OSError):
                break
        assert switcher.active_expert is None
        untouched = is_same(model, own)
        assert untouched or is_base(model, bundle, own)
        seen.add(untouched)
    assert seen == {True, False}


def test_a_failure_between_the_chunks_of_a_tensor(tmp_path, monkeypatch):
    numel = 2 * CHUNK_NUMEL + 5
    base = {"weight": torch.randn(numel)}
    group, random_ = Group(tmp_path, base, codec="zstd"), np.random.default_rng(0)
    group.vector("weight", "I8", random_.integers(-127, 128, numel), steps=[0.125])
    tasks = [Task(group, name, codec="zstd") for name in TASKS]
    for task in tasks:
        task.mask("weight", random_.random(numel) < 0.2, expect=False)
    bundle = tallstore.open_bundle(Bundle(tmp_path, base, [group], tasks).seal())
    model = nn.ParameterDict({"weight": torch.zeros(numel)})
    switcher = bundle.attach(model)
    switcher.set_expert("a")
    expected = bundle.tensor("a", "weight")
    for first in (1, 2, 3):
        with monkeypatch.context() as patch:
            Interrupted(patch, OSError, first, 1)
            with pytest.raises(OSError, match="no luck"):
                switcher.set_expert("b")
        assert torch.equal(model["weight"], expected)
    switcher.set_expert("b")
    assert torch.equal(model["weight"], bundle.tensor("b", "weight"))


def test_a_failure_in_a_block_gives_back_what_was_there(bundle, monkeypatch):
    model = fresh()
    switcher = bundle.attach(model)
    switcher.set_expert("c")
    switcher.set_expert("a")
    with switcher.using("b"):
        with monkeypatch.context() as patch:
            Interrupted(patch, OSError, 2, float("inf"))
            with pytest.raises(tallstore.SwitchError):
                switcher.set_expert("c")
        with pytest.raises(tallstore.SwitchError):
            model(TOKENS)
    assert switcher.active_expert == "a"
    assert is_expert(model, bundle, "a")
    model(TOKENS)


def test_a_base_of_more_mappings_than_a_process_may_have_files_open(tmp_path, monkeypatch):
    base = {f"w{number}": torch.full((1 << 16,), float(number)) for number in range(80)}  # too large to be copied
    experts = {task: {name: tensor + step for name, tensor in base.items()} for task, step in (("a", 1), ("b", 2))}
    save_file(base, tmp_path / "base.safetensors")
    tallstore.pack(tmp_path / "base.safetensors", experts, tmp_path / "bundle", method=tallstore.Sign())
    model = nn.Module()
    for name, tensor in base.items():
        model.register_buffer(name, tensor.clone())
    with (
        few_files(monkeypatch, 60),
        tallstore.open_bundle(tmp_path / "bundle", base=tmp_path / "base.safetensors") as bundle,
    ):
        switcher = bundle.attach(model)
        for task in ("a", "b", "a"):
            switcher.set_expert(task)
            assert is_expert(model, bundle, task)
