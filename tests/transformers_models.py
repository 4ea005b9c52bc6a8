"""Small models of real architectures, built from configs, with tokenizers that were trained here; and their bundles."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import constants as hub_constants
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, WordLevelTrainer

import tallstore

SENTENCES = [
    "the quick brown fox jumps over the lazy dog",
    "win a free phone now, call this number",
    "a film that is quiet, odd and very good",
    "zażółć gęślą jaźń: 重み 🦊",
]
TASKS = ("one", "two", "three")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 48,
}
IMAGES = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": 16, "width": 16},
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}
NAMED = {"one": ["ham", "spam"], "two": ["dull", "fair", "good"], "three": ["a", "b", "c", "d"]}


def word_tokenizer():
    """A tokenizer of words, as BERT has it, trained here."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))  # noqa: S106 - a token of text
    model.normalizer, model.pre_tokenizer = Lowercase(), Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model.train_from_iterator(SENTENCES, WordLevelTrainer(special_tokens=special))
    model.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, model.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **named)


def byte_tokenizer():
    """A byte-level BPE with a chat template, as Llama has it, trained here."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer, model.decoder = ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=ByteLevel.alphabet())
    model.train_from_iterator(SENTENCES, trainer)
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **named)
    tokenizer.chat_template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
    return tokenizer


def bert(**options):
    return transformers.BertConfig(vocab_size=64, **SIZES, **options)


def llama(**options):
    return transformers.LlamaConfig(vocab_size=320, num_key_value_heads=2, **SIZES, **options)


def vit_config(**options):
    return transformers.ViTConfig(
        image_size=16, patch_size=4, **{key: SIZES[key] for key in list(SIZES)[:4]}, **options
    )


def labels(task):
    return {"id2label": dict(enumerate(NAMED[task])), "label2id": {name: i for i, name in enumerate(NAMED[task])}}


# --- what a model takes, and what turns text and pictures into it ----------------------------------------------------


def ids(_dtype):
    return {"input_ids": torch.arange(24).reshape(2, 12) + 5}


def pixels(dtype):
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).to(dtype)}


def words(directory):
    word_tokenizer().save_pretrained(directory)


def bytes_of_text(directory):
    byte_tokenizer().save_pretrained(directory)


def images(directory):
    (directory / "preprocessor_config.json").write_text(json.dumps(IMAGES))


def words_and_images(directory):
    words(directory)
    names = {"image_processor_type": "CLIPImageProcessor", "processor_class": "CLIPProcessor"}
    content = IMAGES | names | {"do_center_crop": False}
    (directory / "preprocessor_config.json").write_text(json.dumps(content))


# --- families ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A kind of model: how the base is made, how a task's, what loads it, what lies beside its weights, what it takes.

    A model's tensors have the same names in files and in modules, or `names_are_the_modules` is False.
    """

    base: Callable
    expert: Callable
    auto_class: type
    beside: Callable = words
    batch: Callable = ids
    names_are_the_modules: bool = True


FAMILIES = {
    "bert-classifier": Family(
        lambda: transformers.BertForMaskedLM(bert()),
        lambda task: transformers.BertForSequenceClassification(bert(**labels(task))),
        transformers.AutoModelForSequenceClassification,
    ),
    "bert-tied": Family(
        lambda: transformers.BertForMaskedLM(bert(tie_word_embeddings=True)),
        lambda _task: transformers.BertForMaskedLM(bert(tie_word_embeddings=True)),
        transformers.AutoModelForMaskedLM,
    ),
    "bert-untied": Family(
        lambda: transformers.BertForMaskedLM(bert(tie_word_embeddings=False)),
        lambda _task: transformers.BertForMaskedLM(bert(tie_word_embeddings=False)),
        transformers.AutoModelForMaskedLM,
    ),
    "llama": Family(
        lambda: transformers.LlamaForCausalLM(llama()),
        lambda _task: transformers.LlamaForCausalLM(llama()),
        transformers.AutoModelForCausalLM,
        bytes_of_text,
    ),
    "vit": Family(
        lambda: transformers.ViTForImageClassification(vit_config()),
        lambda task: transformers.ViTForImageClassification(vit_config(**labels(task))),
        transformers.AutoModelForImageClassification,
        images,
        pixels,
        names_are_the_modules=False,
    ),
}


def t5(_task=None):
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=80, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def whisper(_task=None):
    sides = {
        f"{side}_{key}": value
        for side in ("encoder", "decoder")
        for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 80}.items()
    }
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            vocab_size=64, d_model=64, num_mel_bins=8, max_source_positions=16, max_target_positions=24, **sides,
            **{f"{token}_token_id": 1 for token in ("pad", "bos", "eos", "decoder_start")},
        )
    )  # fmt: skip
    model.generation_config.max_length, model.generation_config.num_beams = 9, 3
    return model


def clip(_task=None):
    layers = {key: SIZES[key] for key in list(SIZES)[:4]}
    config = transformers.CLIPConfig(
        text_config=layers | {"vocab_size": 64, "max_position_embeddings": 48, "eos_token_id": 3},
        vision_config=layers | {"image_size": 16, "patch_size": 4},
        projection_dim=32,
    )
    return transformers.CLIPModel(config)


def mixtral(_task=None):
    config = transformers.MixtralConfig(vocab_size=320, num_key_value_heads=2, num_local_experts=3, **SIZES)
    return transformers.MixtralForCausalLM(config)


def ids_for_both(dtype):
    return ids(dtype) | {"decoder_input_ids": torch.arange(8).reshape(2, 4)}


def sound(dtype):
    features = torch.linspace(-1, 1, 2 * 8 * 32).reshape(2, 8, 32).to(dtype)
    return {"input_features": features, "decoder_input_ids": torch.arange(8).reshape(2, 4)}


def text_and_pictures(dtype):
    return ids(dtype) | pixels(dtype)


LARGER_FAMILIES = {
    "t5": Family(t5, t5, transformers.AutoModelForSeq2SeqLM, batch=ids_for_both),
    "whisper": Family(whisper, whisper, transformers.AutoModelForSpeechSeq2Seq, batch=sound),
    "clip": Family(clip, clip, transformers.AutoModel, words_and_images, text_and_pictures),
    "mixtral": Family(mixtral, mixtral, transformers.AutoModelForCausalLM, bytes_of_text, names_are_the_modules=False),
}
"""Two stacks, three names for one tensor, tables that are never trained, scalars; weights that the model fuses."""


def save(family, model, directory, **options):
    """Everything of a model, as its maker would save it."""
    model.save_pretrained(directory, **options)
    family.beside(directory)


def tuned(family, task, base, dtype):
    """A fine-tune of *base*: its own head, every weight of the rest moved."""
    model = family.expert(task).to(dtype)
    generator = torch.Generator().manual_seed(len(task))
    known = base.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            step = 0.02 * torch.randn(parameter.shape, generator=generator)
            start = known[name] if name in known and known[name].shape == parameter.shape else parameter
            parameter.copy_((start.float() + step).to(dtype))
    return model.eval()


@dataclass(frozen=True)
class Packed:
    """Fine-tunes on disk, and their bundle."""

    family: Family
    dtype: torch.dtype
    root: Path

    @property
    def base(self):
        return self.root / "base"

    def open(self, **options):
        return tallstore.open_bundle(self.root / "bundle", base=self.base, **options)


def pack(family, dtype, root, **options):
    """Three fine-tunes of one family in one dtype, packed; the base by reference; *options* are of its save."""
    torch.manual_seed(1)
    base = family.base().to(dtype)
    save(family, base, root / "base", **options)
    for task in TASKS:
        save(family, tuned(family, task, base, dtype), root / task)
    report = tallstore.pack(root / "base", {task: root / task for task in TASKS}, root / "bundle")
    assert report.advice == ()
    return Packed(family, dtype, root)


def each(*families, dtypes=("float32",)):
    """Run a test on packed fine-tunes of *families*, in each of *dtypes*: its fixture ``packed`` is given the pair."""
    pairs = [(name, dtype) for name in families for dtype in dtypes]
    return pytest.mark.parametrize("packed", pairs, indirect=True, ids="-".join)


def go_offline(monkeypatch):
    """Nothing may ask the Hub; its client has read its settings long before."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    transformers.utils.logging.disable_progress_bar()


def assert_same_outputs(found, expected):
    """Every tensor that two models gave is the same, bit for bit."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[key], value), key
