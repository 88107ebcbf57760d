"""Which messages and rows a data set keeps out of the loss: `weight`, `train`, `loss_mask` and their synonyms."""

from typing import Any

from megatron_lora.data.values import Fields, RowError, from_json_text

# OpenAI's and Together's `weight`; Axolotl's `train` and `training`; ms-swift's and XTuner's `loss`; the rest is
# common. All say yes with 1 or true and no with 0 or false.
LOSS_KEYS = ("weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight")
# As columns, a value for the row or a list with one for each message. `message_loss_mask` is NeMo RL's.
LOSS_COLUMNS = (*LOSS_KEYS, "message_loss_mask", "weights", "sample_weight")
# Columns that may as well mean something else; they count where they say yes or no.
AMBIGUOUS_COLUMNS = ("train", "training", "trainable", "loss")
_WORDS = {"0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def loss_switch(value: Any, what: str) -> bool:
    """A yes or no. Raises RowError for a weight in between: tokens carry loss or they do not."""
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise RowError(f"{what} is {value!r}; tokens carry loss or not here, wanted 0 or 1 (or false, true)")


def _is_switch(value: Any) -> bool:
    try:
        for part in value if isinstance(value, list) else [value]:
            loss_switch(part, "")
    except RowError:
        return False
    return True


def message_switch(message: dict[str, Any], what: str) -> bool | None:
    """What the message's own keys say of its loss, taken out of it; None where it has none. Raises RowError."""
    found = {key: loss_switch(message.pop(key), f"{key!r} of {what}") for key in LOSS_KEYS if key in message}
    if len(set(found.values())) > 1:
        raise RowError(f"{what} says of its loss {found}; keep one key")
    return next(iter(found.values()), None)


def row_switches(fields: Fields, count: int | None) -> bool | list[bool] | None:
    """What the row's columns say: for the whole row, or one for each of its `count` messages (None: a row without
    messages). Raises RowError."""
    found: dict[str, bool | list[bool]] = {}
    for name in LOSS_COLUMNS:
        if not fields.has(name):
            continue
        value = fields.take(name)
        if isinstance(value, str) and value.lstrip().startswith("["):
            value = from_json_text(value, f"field {name!r}")
        if name in AMBIGUOUS_COLUMNS and not _is_switch(value):
            fields.read.discard(name)  # something else of that name: it is told as not read
        elif not isinstance(value, list):
            found[name] = loss_switch(value, f"field {name!r}")
        elif count is None or len(value) != count:
            wanted = (
                "one value, as the row has no messages" if count is None else f"one value, or one for each of {count}"
            )
            raise RowError(f"field {name!r} has {len(value)} values; wanted {wanted} messages")
        else:
            found[name] = [loss_switch(part, f"field {name!r}") for part in value]
    if len({str(value) for value in found.values()}) > 1:
        raise RowError(f"the row says of its loss {found}; keep one column")
    return next(iter(found.values()), None)
