"""What a checkpoint says it is of, compared with the run that goes on from it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from megatron_lora.data.batch import Row
from megatron_lora.data.dataset import Prompt
from megatron_lora.data.fingerprint import block_size, fingerprint_rows, first_difference
from megatron_lora.errors import UserError
from megatron_lora.trainers.identity import RunIdentity


def rows(count: int, **changed: int) -> list[list[Row]]:
    """One row an item; `at` is the item whose last token is another one, `mask` the one whose mask is."""
    made = []
    for number in range(count):
        ids, mask = torch.arange(4) + number, torch.tensor([False, False, True, True])
        if number == changed.get("at"):
            ids[-1] += 1
        if number == changed.get("mask"):
            mask[1] = True
        made.append([Row(ids, mask, number)])
    return made


@pytest.mark.parametrize("change", [{"at": 7}, {"mask": 7}])
@pytest.mark.parametrize("count", [20, 256, 1000])
def test_the_first_block_that_differs_is_found(count: int, change: dict[str, int]):
    ours, theirs = fingerprint_rows(rows(count)), fingerprint_rows(rows(count, **change))
    assert len(ours) == -(-count // block_size(count)) <= 256
    found = first_difference(theirs, ours, count)
    assert found is not None and found[0] <= 8 <= found[1] and found[1] - found[0] == block_size(count) - 1
    assert first_difference(ours, fingerprint_rows(rows(count)), count) is None


def test_a_prompts_answer_and_fields_count():
    prompt = Prompt(torch.tensor([1, 2]), "x", "4", 1, {"level": 2, "tags": ["a"]})
    whole = fingerprint_rows([prompt])
    assert whole == fingerprint_rows([replace(prompt, extra={"tags": ["a"], "level": 2}, text="not read")])
    for other in (replace(prompt, answer="5"), replace(prompt, extra={"level": 3, "tags": ["a"]})):
        assert fingerprint_rows([other]) != whole


IDENTITY = RunIdentity(
    algorithm="sft",
    rows={"train": ["a", "b"], "validation": ["c"]},
    num_rows={"train": 2, "validation": 1},
    tokenizer="t",
    base="w",
    init_adapter=None,
    has_reference=False,
    model_config={"rope_theta": 1.0, "new_field": 3},
)
DPO = replace(IDENTITY, algorithm="dpo", has_reference=True)


def stored(identity: RunIdentity = IDENTITY, **changes: object) -> dict:
    """As training_info.json gives it back."""
    return json.loads(json.dumps(asdict(identity) | changes))


def test_the_same_run_goes_on_without_a_word(tmp_path: Path):
    IDENTITY.check_algorithm("sft", tmp_path)
    assert IDENTITY.check_goes_on(stored(), tmp_path) == []
    # A field that only one release of transformers knows is no difference.
    assert IDENTITY.check_goes_on(stored(model_config={"rope_theta": 1.0, "old_field": 1}), tmp_path) == []


@pytest.mark.parametrize(
    ("ours", "changes", "said"),
    [
        (IDENTITY, {"rows": {"train": ["a", "x"]}}, "of 2 usable rows row 2 is the first that differs"),
        (IDENTITY, {"rows": {"train": ["x", "b"]}, "tokenizer": "u"}, "row 1 is the first .* chat template is another"),
        (IDENTITY, {"num_rows": {"train": 3}}, "num_items=3 rows, this run has num_items=2"),
        (IDENTITY, {"model_config": {"rope_theta": 2.0}}, r"config.json had other values \(rope_theta 2.0 -> 1.0\)"),
        (DPO, {"base": "v"}, "its weights differ from those in policy.model_name"),
        (DPO, {"init_adapter": "z"}, "DPO's reference policy is that adapter"),
    ],
)
def test_another_run_is_refused(ours: RunIdentity, changes: dict, said: str, tmp_path: Path):
    with pytest.raises(UserError, match=said):
        ours.check_goes_on(stored(ours, **changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer": "u"}, "the tokenizer is not the one of"),
        ({"init_adapter": "z"}, "not read, the checkpoint's is"),
        ({"base": "v"}, "its own are used"),
        ({"rows": {"train": ["a", "b"], "validation": ["x"]}}, "validation rows are not those"),
    ],
)
def test_what_does_no_harm_is_told(changes: dict, said: str, tmp_path: Path):
    [notice] = IDENTITY.check_goes_on(stored(**changes), tmp_path)
    assert said in notice


def test_a_reference_that_is_the_base_does_not_need_the_starting_adapter(tmp_path: Path):
    ours = replace(DPO, starts_at_reference=False)
    [notice] = ours.check_goes_on(stored(ours, init_adapter="z"), tmp_path)
    assert "not read, the checkpoint's is" in notice


def test_another_algorithm_is_refused_with_a_way_to_start_from_the_adapter(tmp_path: Path):
    with pytest.raises(UserError, match="is of a run of DPO, this recipe runs SFT") as found:
        IDENTITY.check_algorithm("dpo", tmp_path)
    assert "init_adapter" not in str(found.value)
    (tmp_path / "hf_adapter").mkdir()
    with pytest.raises(UserError, match=f"init_adapter={tmp_path}/hf_adapter"):
        IDENTITY.check_algorithm("dpo", tmp_path)
    IDENTITY.check_algorithm(None, tmp_path)
    assert "older release" in IDENTITY.check_goes_on(None, tmp_path)[0]
