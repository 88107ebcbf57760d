"""Planted faults in a run's folder, or in the recipe that goes on from it: what is planted, and what is printed.

One short run is made; every fault is planted in a copy of its folder, and `--dry-run` says what a start would say,
before any weight is loaded.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.end_to_end.conftest import Job
from tests.support.runs import arithmetic_preferences, assert_names_are_known
from tests.support.trainer import read_metrics, run_commands, write_rows

PEFT = "policy.megatron_cfg.peft"
NO_VALIDATION = "data.validation=null"


@dataclass(frozen=True)
class Place:
    """run: the copy of the run's folder that is spoilt. root: a folder for what else a fault needs. job: base and
    rows."""

    run: Path
    root: Path
    job: Job

    @property
    def step(self) -> Path:
        """The newest checkpoint."""
        return self.run / "step_4"


@dataclass(frozen=True)
class Fault:
    """plant: spoils a place; returns overrides for the start. said: what is printed. refused: status 2 and one message;
    else the start goes on and tells it in one line."""

    plant: Callable[[Place], list[str] | None]
    said: tuple[str, ...]
    refused: bool = True


def flip(*patterns: str) -> Callable[[Place], None]:
    """One bit in the middle of the largest file that fits each pattern, below the run's folder."""

    def plant(place: Place) -> None:
        for pattern in patterns:
            path = max(place.run.glob(pattern), key=lambda path: path.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    return plant


def only_newest(plant: Callable[[Place], None]) -> Callable[[Place], None]:
    def both(place: Place) -> None:
        shutil.rmtree(place.run / "step_2")
        plant(place)

    return both


def change(plant: Callable[[Place], object]) -> Callable[[Place], None]:
    """For expressions."""

    def run(place: Place) -> None:
        plant(place)

    return run


def override(*overrides: str) -> Callable[[Place], list[str]]:
    return lambda place: list(overrides)


def edit_json(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | values))


def edit_row(place: Place) -> list[str]:
    """Another answer of the same length in row 7."""
    data = place.root / "data"
    shutil.copytree(place.job.data, data)
    rows = (data / "train.jsonl").read_text().splitlines(keepends=True)
    rows[6] = re.sub(r"#### (\d)", lambda match: f"#### {(int(match[1]) + 1) % 10}", rows[6])
    (data / "train.jsonl").write_text("".join(rows))
    return [f"data.train.data_path={data}"]


def move_rows(place: Place) -> list[str]:
    shutil.copytree(place.job.data, place.root / "elsewhere")
    return [f"data.train.data_path={place.root / 'elsewhere'}"]


def another_base(**config: object) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        shutil.copytree(place.job.base, place.root / "base")
        edit_json(place.root / "base" / "config.json", **config)
        return [f"policy.model_name={place.root / 'base'}"]

    return plant


def another_template(place: Place) -> list[str]:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    (place.root / "chat.jinja").write_text(template)
    return [f"policy.tokenizer.chat_template={place.root / 'chat.jinja'}"]


def preferences(place: Place) -> list[str]:
    """A DPO recipe on the same base, with the same adapter."""
    recipe = yaml.safe_load(place.job.recipe.read_text())
    del recipe["sft"]
    recipe["defaults"] = recipe["defaults"].replace("sft.yaml", "dpo.yaml")
    rows = write_rows(place.root / "pairs.jsonl", arithmetic_preferences(64))
    recipe["data"] |= {"train": {"dataset_name": None, "data_path": str(rows)}, "validation": None}
    (place.root / "dpo.yaml").write_text(yaml.safe_dump(recipe))
    return [str(place.root / "dpo.yaml")]


def adapter_of_rank(rank: int, place: Place) -> Path:
    """The run's adapter with the first ranks only, as another tool would save it."""
    folder = place.root / "adapter"
    shutil.copytree(place.step / "hf_adapter", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    cut = {name: value[:rank] if "lora_A" in name else value[:, :rank] for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in cut.items()}, folder / "adapter_model.safetensors")
    edit_json(folder / "adapter_config.json", r=rank)
    return folder


def fresh(overrides: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
    """A start in a folder of its own."""
    return lambda place: [*overrides(place), f"checkpointing.checkpoint_dir={place.root / 'fresh'}"]


def start_from_spoilt(place: Place) -> list[str]:
    flip("step_4/hf_adapter/adapter_model.safetensors")(place)
    shutil.copytree(place.step / "hf_adapter", place.root / "alone")
    return [f"{PEFT}.init_adapter={place.root / 'alone'}"]


def swap_adapters(place: Place) -> None:
    shutil.rmtree(place.step / "hf_adapter")
    shutil.copytree(place.run / "step_2" / "hf_adapter", place.step / "hf_adapter")


def start_from_swapped(place: Place) -> list[str]:
    swap_adapters(place)
    return [f"{PEFT}.init_adapter={place.step / 'hf_adapter'}"]


def forget_fields(place: Place) -> None:
    """As an older release wrote it."""
    for step in ("step_2", "step_4"):
        (place.run / step / "checksums.json").unlink()
        info = json.loads((place.run / step / "training_info.json").read_text())
        del info["run"]
        info["loader"] = {key: info["loader"][key] for key in ("epoch", "position", "seed", "num_items")}
        (place.run / step / "training_info.json").write_text(json.dumps(info))


def nemo_rls(place: Place) -> None:
    """A NeMo RL checkpoint in place of ours."""
    shutil.rmtree(place.run / "step_2")
    (place.step / "checksums.json").unlink()
    (place.step / "training_info.json").write_text(json.dumps({"step": 4, "val_loss": 1.5, "consumed_samples": 32}))


def lose_all(place: Place) -> None:
    shutil.rmtree(place.run / "step_2")
    place.step.rename(place.run / "best")


FAULTS = {
    # The rows and their order.
    "a row was edited": Fault(edit_row, ("training rows are not those of", "of 64 usable rows row 7 is the first")),
    "rows lie elsewhere": Fault(move_rows, ("without influence", "data.train.data_path", "elsewhere"), refused=False),
    "shuffle off in mid-epoch": Fault(override("data.shuffle=false"), ("data.shuffle=true", "32 of 64 rows")),
    "another seed": Fault(override("sft.seed=43"), ("seed=42", "seed=43")),
    "another batch size": Fault(
        override("policy.train_global_batch_size=16"), ("was 8, is 16", "goes on at the same row"), refused=False
    ),
    "shorter rows": Fault(
        override("policy.max_total_sequence_length=110", "policy.sequence_packing.train_mb_tokens=110", NO_VALIDATION),
        ("training rows are not those of", "policy.max_total_sequence_length 512 -> 110"),
    ),
    "another chat template": Fault(another_template, ("training rows are not those", "its chat template is another")),
    "other validation rows": Fault(override(NO_VALIDATION), ("validation rows are not those of",), refused=False),
    # The recipe.
    "a DPO recipe": Fault(preferences, ("is of a run of SFT, this recipe runs DPO", "init_adapter=")),
    "another learning rate": Fault(
        override("policy.megatron_cfg.optimizer.lr=5e-4", "logger.log_dir=elsewhere"),
        ("keys changed since step 4", "numbers: logger.log_dir", "changing the run: policy.megatron_cfg.optimizer.lr"),
        refused=False,
    ),
    "another rank": Fault(override(f"{PEFT}.dim=4"), ("holds other adapters", f"{PEFT}.dim 8 -> 4")),
    "a metric that is not logged": Fault(
        override("checkpointing.metric_name=val:accuracy"), ("val:accuracy", "no validation line of SFT", "loss")
    ),
    "a metric misspelt": Fault(override("checkpointing.metric_name=val:los"), ("did you mean val:loss?",)),
    "a metric without validation": Fault(
        override(NO_VALIDATION), ("has no validation: the latest checkpoints are kept",), refused=False
    ),
    "init_adapter in full fine-tuning": Fault(
        lambda place: [f"{PEFT}.init_adapter={place.step / 'hf_adapter'}", f"{PEFT}.enabled=false"],
        ("init_adapter=", "peft.enabled=true: full fine-tuning reads no adapter"),
    ),
    "init_adapter of the other backend": Fault(
        lambda place: [f"{PEFT}.init_adapter=null", f"policy.dtensor_cfg.lora_cfg.init_adapter={place.step}"],
        ("policy: dtensor_cfg.lora_cfg.init_adapter", "megatron_cfg.peft.init_adapter is what is read"),
    ),
    "init_adapter of another rank": Fault(
        fresh(lambda place: [f"{PEFT}.init_adapter={adapter_of_rank(4, place)}"]),
        ("decides what is adapted", "rank 4", "rank 8", "are not used"),
        refused=False,
    ),
    "init_adapter when going on": Fault(
        lambda place: [f"{PEFT}.init_adapter={place.run / 'step_2' / 'hf_adapter'}"],
        ("init_adapter is not the adapter from which", "not read"),
        refused=False,
    ),
    "init_adapter with a flipped bit": Fault(fresh(start_from_spoilt), ("is not as it was written", "fingerprint")),
    "init_adapter that was swapped": Fault(
        fresh(start_from_swapped), ("is not as it was written", "hf_adapter/adapter_model.safetensors has another")
    ),
    # The model.
    "another rope base": Fault(
        another_base(rms_norm_eps=1e-5), ("trained on another model", "rms_norm_eps 1e-06 -> 1e-05")
    ),
    # Files of the newest checkpoint, beside a whole older one.
    "a bit of the weights": Fault(
        flip("step_4/policy/weights/*.distcp"),
        ("step_4 is damaged", "distcp has another content", "from step 2"),
        False,
    ),
    "a bit of the optimizer": Fault(
        flip("step_4/policy/optimizer/*.distcp"), ("step_4 is damaged", "policy/optimizer/", "from step 2"), False
    ),
    "a bit of adapter.json": Fault(
        flip("step_4/policy/weights/adapter.json"), ("step_4 is damaged", "adapter.json", "from step 2"), False
    ),
    "an edited step count": Fault(
        change(lambda place: edit_json(place.step / "training_info.json", metric=0.1)),
        ("step_4 is damaged", "training_info.json", "from step 2"),
        False,
    ),
    "damaged checksums": Fault(
        change(lambda place: (place.step / "checksums.json").write_text("{")),
        ("step_4 is damaged", "checksums.json is damaged", "from step 2"),
        False,
    ),
    "a bit of hf_adapter": Fault(
        flip("step_4/hf_adapter/*.safetensors"), ("step_4", "another content", "not read by a run that goes on"), False
    ),
    "a swapped hf_adapter": Fault(
        swap_adapters, ("step_4", "hf_adapter/adapter_model.safetensors has another", "not read"), False
    ),
    "a renamed step": Fault(
        change(lambda place: place.step.rename(place.run / "step_40")), ("says step 4: the folder was renamed",), False
    ),
    "an older release": Fault(
        forget_fields, ("has no checksums.json, as an older release", "rows, tokenizer and algorithm"), False
    ),
    # Nothing whole is left.
    "the only weights are damaged": Fault(
        only_newest(flip("step_4/policy/weights/*.distcp")), ("holds no checkpoint to go on from", "step_4 is damaged")
    ),
    "the only shard was cut": Fault(
        only_newest(lambda place: os.truncate(next(place.step.glob("policy/optimizer/*.distcp")), 100)),
        ("holds no checkpoint to go on from", "step_4 is not complete", "has 100 bytes of"),
    ),
    "both are damaged": Fault(
        flip("step_4/policy/weights/*.distcp", "step_2/policy/weights/.metadata"),
        ("holds no checkpoint to go on from", "step_4 is damaged", "step_2 is damaged"),
    ),
    "of another format": Fault(nemo_rls, ("holds no checkpoint", "training_info.json is not of this project")),
    "the only step under another name": Fault(
        lose_all, ("holds no step_N folder", "names step 4", "best looks like one under another name")
    ),
    # The other files of the run.
    "latest_step.txt names another": Fault(
        change(lambda place: (place.run / "latest_step.txt").write_text("9\n")),
        ("names step 9, which is not there",),
        False,
    ),
    "latest_step.txt is missing": Fault(
        change(lambda place: (place.run / "latest_step.txt").unlink()), ("latest_step.txt is missing",), False
    ),
    "metrics.jsonl is missing": Fault(
        change(lambda place: (place.run / "metrics.jsonl").unlink()),
        ("metrics.jsonl is missing", "anew at step 5"),
        False,
    ),
    "metrics.jsonl ends early": Fault(
        change(lambda place: (place.run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')),
        ("metrics.jsonl ends at step 1",),
        False,
    ),
    "metrics.jsonl is a folder": Fault(
        change(lambda place: [(place.run / "metrics.jsonl").unlink(), (place.run / "metrics.jsonl").mkdir()]),
        ("metrics.jsonl cannot be read", "mend or move"),
    ),
    "a file with a checkpoint's name": Fault(
        change(lambda place: (place.run / "step_6").write_text("")), ("holds step_6, which is no folder",)
    ),
    "an identity edited away": Fault(
        change(
            lambda place: [
                (place.step / "checksums.json").unlink(),
                edit_json(place.step / "training_info.json", run={"algorithm": "sft"}),
            ]
        ),
        ("training_info.json does not tell what the checkpoint is of",),
    ),
    "metrics.jsonl is damaged": Fault(
        change(lambda place: (place.run / "metrics.jsonl").write_text('[1]\n{"kind": "train", "step": 1}\n')),
        ("metrics.jsonl, line 1", "mend or move"),
    ),
    "another tool's checkpoints": Fault(
        fresh(lambda place: [(place.root / "fresh" / "checkpoint-500").mkdir(parents=True), "data.num_workers=1"][1:]),
        ("holds checkpoint-500, of another tool",),
        refused=False,
    ),
}
NAMES = list(FAULTS)


@dataclass(frozen=True)
class Answers:
    """by_name: what each start answered. made: how the run itself went. before, after: content of all places."""

    by_name: dict[str, dict]
    run: Path
    unchanged: bool


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Another process that holds the folder."""
    code = (
        "import sys, pathlib; from megatron_lora.trainers.run_lock import RunLock; lock = "
        "RunLock(pathlib.Path(sys.argv[1]))\n"
        "lock.take(); print('taken', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "taken\n"
        yield
    finally:
        holder.communicate()


@pytest.fixture(scope="module")
def answers(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    root = tmp_path_factory.mktemp("faults")
    options = ["sft.max_num_steps=4", "checkpointing.save_period=2"]
    made = [str(job.recipe), f"checkpointing.checkpoint_dir={root / 'run'}", *options]
    ended = run_commands(root, {"run": made})["run"]
    assert ended["status"] == 0, ended["stderr"]
    commands = {}
    for number, (name, fault) in enumerate(FAULTS.items()):
        place = Place(root / str(number) / "run", root / str(number), job)
        shutil.copytree(root / "run", place.run)
        planted = fault.plant(place) or []
        recipe = planted.pop(0) if planted and planted[0].endswith(".yaml") else str(job.recipe)
        own = [] if recipe != str(job.recipe) else options
        commands[name] = [recipe, f"checkpointing.checkpoint_dir={place.run}", *own, *planted, "--dry-run"]
    shutil.copytree(root / "run", root / "busy")
    commands["busy"] = [str(job.recipe), f"checkpointing.checkpoint_dir={root / 'busy'}", *options, "--dry-run"]
    with _locked(root / "busy"):
        before = _content(root)
        found = run_commands(root, commands)
        after = _content(root)
    return Answers(found, root / "run", before == after)


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_planted_fault_is_told(answers: Answers, name: str):
    fault, answer = FAULTS[name], answers.by_name[name]
    if fault.refused:
        assert answer["status"] == 2, answer["stdout"]
        text = answer["stderr"].strip()
        assert text.startswith("error: ") and len(text.splitlines()) == 1, text
    else:
        assert answer["status"] == 0, answer["stderr"]
        text = answer["stdout"]
    for part in fault.said:
        assert part in text, text


def test_a_folder_in_use_is_refused(answers: Answers):
    answer = answers.by_name["busy"]
    assert answer["status"] == 2 and "is in use by another run (process " in answer["stderr"]


def test_nothing_was_changed(answers: Answers):
    assert answers.unchanged


def test_the_run_itself_is_whole(answers: Answers):
    assert [record["step"] for record in read_metrics(answers.run)] == [1, 2, 3, 4]
    info = json.loads((answers.run / "step_4" / "training_info.json").read_text())
    assert info["run"]["algorithm"] == "sft" and info["run"]["num_rows"] == {"train": 64, "validation": 16}
    # No validation at step 2: no metric ranks it.
    assert json.loads((answers.run / "step_2" / "training_info.json").read_text())["metric"] is None
    assert info["metric"] == pytest.approx(read_metrics(answers.run, "validation")[-1]["loss"])
    assert not (answers.run / ".run_lock").exists()
    assert_names_are_known(answers.run)
