"""Experts as models of Hugging Face's transformers, with their tokenizers and processors, straight from a bundle.

    from tallstore.transformers import from_bundle, tokenizer_from_bundle

    model = from_bundle("bundle", "spam", dtype="bfloat16", device_map="cuda")
    tokenizer = tokenizer_from_bundle("bundle", "spam")

A model is what `from_pretrained` makes of the exported expert, bit for bit, and nothing is written for it. Config and
tokenizer are the files that the task carries; where it carries none, those of the base's directory. No code that comes
with them is ever run.
"""

from __future__ import annotations

from tallstore.transformers.files import processor_from_bundle, tokenizer_from_bundle
from tallstore.transformers.models import from_bundle

__all__ = ["from_bundle", "processor_from_bundle", "tokenizer_from_bundle"]
