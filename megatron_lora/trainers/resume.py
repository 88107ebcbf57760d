"""From which checkpoint of its folder a run goes on, and whether it may."""

from collections.abc import Callable, Mapping
from typing import Any

from megatron_lora.checksums import describe_changed, find_changed, read_checksums
from megatron_lora.config.schema import Recipe
from megatron_lora.config.schema_policy import PolicyConfig
from megatron_lora.data.loader import GroupLoader
from megatron_lora.errors import UserError
from megatron_lora.lora.layout import ADAPTER_FILE, AdapterSpec
from megatron_lora.policy.adapter_start import check_same_adapter, planned_adapter
from megatron_lora.policy.weights_check import local_fingerprint
from megatron_lora.trainers.changed_keys import ROW_KEYS, algorithm_of, changed_keys
from megatron_lora.trainers.identity import RunIdentity
from megatron_lora.trainers.run_folder import LATEST, METRICS, RunFolder, Step, is_read_on_resume

# A rank's findings -> those of all ranks.
Gather = Callable[[dict[str, str]], dict[str, str]]


def find_checkpoint(
    folder: RunFolder, gather: Gather = lambda mine: mine, rank: int = 0, size: int = 1
) -> tuple[Step | None, list[str]]:
    """The newest checkpoint that is as it was written, and warnings; None where the folder holds no run yet.

    Damaged ones are passed over where an older one is whole. Ranks share out the reading (file number `rank` of every
    `size`); gather is collective. Raises UserError where there are checkpoints and none is whole: a run never starts
    again at step 1 over what is there.
    """
    damaged: list[str] = []
    for step in folder.steps():
        problem, warnings = _verify(step, gather, rank, size)
        if problem is None:
            return step, [*_passed_over(damaged, step), *warnings, *_other_latest(folder, step, damaged)]
        damaged.append(f"{step.path} {problem}")
    if damaged:
        reasons = "; ".join(damaged)
        raise UserError(
            f"checkpointing.checkpoint_dir={str(folder.path)!r} holds no checkpoint to go on from: {reasons}. "
            "Nothing was changed. Put the files back from a copy, or name another checkpoint_dir (to start from a "
            "whole hf_adapter/ of this folder, set init_adapter to it), or remove the damaged step folders to start "
            "at step 1"
        )
    _refuse_lost(folder)
    return None, _foreign(folder)


def _verify(step: Step, gather: Gather, rank: int, size: int) -> tuple[str | None, list[str]]:
    """(why the step cannot be used, warnings about files that a run does not read)."""
    if step.problem is not None:
        return f"is not complete ({step.problem})", []
    try:
        checksums = read_checksums(step.path)
    except UserError as error:
        return f"is damaged ({error})", []
    if checksums is None:
        return None, [f"{step.path} has no checksums.json, as an older release wrote it: only sizes were compared"]
    # As they were listed when written, the largest first: every rank has about as much to read.
    names = sorted(checksums, key=lambda name: (-step.info["files"].get(name, 0), name))
    problems = gather(find_changed(step.path, checksums, names[rank::size]))
    fatal = {name: problem for name, problem in problems.items() if is_read_on_resume(name)}
    if fatal:
        return f"is damaged ({describe_changed(fatal)})", []
    others = {name: problem for name, problem in problems.items() if name not in fatal}
    return None, [f"{step.path}: {describe_changed(others)}; not read by a run that goes on"] if others else []


def _passed_over(damaged: list[str], step: Step) -> list[str]:
    return [
        f"{what}; skipped: the run goes on from step {step.number}, takes the steps after it again and writes their "
        "checkpoints anew. Stop now to put the files back from a copy instead"
        for what in damaged
    ]


def _other_latest(folder: RunFolder, step: Step, damaged: list[str]) -> list[str]:
    """latest_step.txt is for people and other tools; where it says something else than the folders do, they win."""
    named = folder.latest_written()
    if named == step.number or damaged:
        return []
    if named is None:
        return [f"{folder.path / LATEST} is missing or holds no number; the run goes on from the newest, {step.path}"]
    lost = "is not there" if not (folder.path / f"step_{named}").is_dir() else "is older"
    return [f"{folder.path / LATEST} names step {named}, which {lost}; the run goes on from the newest, {step.path}"]


def _refuse_lost(folder: RunFolder) -> None:
    """Checkpoints were written here once and none is left under its name."""
    strays, named = folder.strays(), folder.latest_written()
    if named is None and not strays:
        return
    found = f"; {', '.join(path.name for path in strays[:3])} looks like one under another name" if strays else ""
    says = f"its {LATEST} names step {named}" if named is not None else "it has been written to by a run"
    gone = f"move {strays[0].name} elsewhere" if strays and named is None else f"remove {LATEST} and {METRICS}"
    raise UserError(
        f"checkpointing.checkpoint_dir={str(folder.path)!r} holds no step_N folder, but {says}{found}; put step_N back "
        f"under its name, or name another checkpoint_dir, or {gone} to start at step 1"
    )


def _foreign(folder: RunFolder) -> list[str]:
    """What a fresh start should know of its folder."""
    if not folder.path.is_dir():
        return []
    notices = []
    if (folder.path / METRICS).exists():
        notices.append(
            f"{folder.path / METRICS} is of a start that ended before its first checkpoint: the run starts at step 1 "
            "and writes it anew"
        )
    other = sorted(path.name for path in folder.path.glob("checkpoint-*") if path.is_dir())
    if other:
        notices.append(
            f"{folder.path} holds {', '.join(other[:3])}, of another tool: not read, the run starts at step 1"
        )
    return notices


def check_goes_on(found: Step, recipe: Recipe, identity: RunIdentity, loader: GroupLoader[Any]) -> list[str]:
    """Whether a run of this recipe can go on from the checkpoint, as far as its files tell before weights load;
    returns notices, the changed keys in one of them.

    Raises UserError for a checkpoint of another algorithm, model, adapter, start or data.
    """
    stored: Mapping[str, Any] | None = found.info.get("run")
    algorithm = stored["algorithm"] if stored is not None else algorithm_of(found.path / "config.yaml")
    compared = (*ROW_KEYS, r"policy\.model_name") if stored is not None and identity.base is not None else ()
    changed = changed_keys(found.path / "config.yaml", recipe, compared)
    line = changed.describe(found.number) if changed is not None else ""
    try:
        identity.check_algorithm(algorithm, found.path)
        check_adapter(found, recipe.policy)
        notices = _compare(identity, stored, found)
        notices += loader.check_state(_loader_state(found))
    except UserError as error:
        raise UserError(f"{error}. The {line}" if line else str(error)) from error
    if changed is None:
        line = f"{found.path / 'config.yaml'} cannot be read by this release: changed keys are not told"
    return [*notices, *([line] if line else [])]


def _compare(identity: RunIdentity, stored: Mapping[str, Any] | None, found: Step) -> list[str]:
    try:
        return identity.check_goes_on(stored, found.path)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{found.path}: its training_info.json does not tell what the checkpoint is of ({error!r}); it was "
            "edited: put it back from a copy, or choose another checkpointing.checkpoint_dir"
        ) from error


def _loader_state(found: Step) -> Mapping[str, Any]:
    state = found.info.get("loader")
    if not isinstance(state, Mapping) or not {"epoch", "position", "seed", "num_items"} <= state.keys():
        raise UserError(
            f"{found.path}: its training_info.json does not tell the data's position; it is not of this project, or "
            "was edited: choose another checkpointing.checkpoint_dir"
        )
    return state


def check_adapter(found: Step, policy: PolicyConfig) -> None:
    """Raise UserError for an adapter where a whole model is trained or the other way round, for an adapter of another
    base, and for one of other linears, ranks or scales."""
    has_adapter = (found.weights / ADAPTER_FILE).is_file()
    if has_adapter != policy.adapter.enabled:
        kinds = {True: "an adapter", False: "a whole model"}
        raise UserError(
            f"{found.path} holds {kinds[has_adapter]}, this run trains {kinds[not has_adapter]}; choose another "
            "checkpointing.checkpoint_dir"
        )
    if not has_adapter:
        return
    stored = AdapterSpec.load(found.weights / ADAPTER_FILE)
    fingerprint = local_fingerprint(policy.model_name)
    wanted = planned_adapter(policy)
    assert wanted is not None
    check_same_adapter(wanted.spec, stored, found.path)
    if None not in (fingerprint, stored.base_fingerprint) and fingerprint != stored.base_fingerprint:
        raise UserError(
            f"{found.path} was trained on another model ({stored.base_model_name}): its weights differ from those in "
            f"policy.model_name={policy.model_name!r}; name that model, or choose another checkpointing.checkpoint_dir"
        )
