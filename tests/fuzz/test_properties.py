"""The targets under hypothesis, which shrinks what it finds. HYPOTHESIS_PROFILE=long looks for hours."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import seeds, table_targets
from tests.fuzz.bundles import seal_manifest
from tests.fuzz.choices import Choices
from tests.fuzz.json_edits import NAMES, NUMBERS, edit, places
from tests.fuzz.outcomes import Broken, check_message
from tests.fuzz.targets import TARGETS

LEAVES = st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.sampled_from(NAMES) | st.integers() | st.text()
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    return {name: target.make(tmp_path_factory.mktemp(name)) for name, target in TARGETS.items()}


@pytest.mark.parametrize("name", sorted(TARGETS.keys() - {"bundle", "numbers", "card"}))
@given(data=st.binary(max_size=200))
def test_any_bytes(targets, name, data):
    targets[name](data)


@given(data=st.text(max_size=200))
def test_any_text_as_a_card(targets, data):
    targets["card"](f"---\n{data}\n---\n{data}".encode("utf-8", "replace"))


@pytest.mark.filterwarnings("ignore:.*newer:UserWarning")
@given(data=st.data())
def test_any_value_anywhere_in_a_manifest(data):
    document = json.loads(data.draw(st.sampled_from(seeds.valid_manifests())))
    holder, key = data.draw(st.sampled_from(places(document)))
    holder[key] = data.draw(JSON)
    table_targets.manifest(seal_manifest(json.dumps(document).encode()))


@pytest.mark.filterwarnings("ignore:.*newer:UserWarning")
@given(data=st.data())
def test_any_value_anywhere_in_a_table(data):
    seed = data.draw(st.sampled_from(table_targets.table_seeds()[::7]))
    try:
        document = json.loads(seed[1:])
    except ValueError:
        return
    found = places(document)
    if found:
        holder, key = data.draw(st.sampled_from(found))
        holder[key] = data.draw(JSON)
    table_targets.any_table(seed[:1] + json.dumps(document).encode())


@given(decisions=st.binary(min_size=1, max_size=40))
def test_edits_keep_a_document_json(decisions):
    document = json.loads(seeds.valid_manifests()[0])
    choices = Choices(decisions)
    while choices:
        edit(document, choices)
    json.loads(json.dumps(document))


def test_what_is_no_line_is_found():
    for message in ("", "a\nb", "a\x1b[0m", "a\u202eb", "a\u2028b", "x" * 5000, "a\ud800"):
        with pytest.raises(Broken):
            check_message(message)
    check_message("tâche 'é': fine")
