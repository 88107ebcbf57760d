"""Where the prompt of a preference pair ends and its answers begin."""

from collections.abc import Sequence

from megatron_lora.data.messages import Message, Turns
from megatron_lora.data.values import RowError

PROMPT_ROLES = ("system", "developer", "user")


def split_pair(prompt: Turns | None, pair: Sequence[Turns], names: Sequence[str]) -> tuple[Turns, list[Turns]]:
    """(the prompt of both, each answer's messages after it).

    prompt: the row's own; None where the conversations hold it, which then is what they have in common up to an
    answer. An answer may be a whole conversation beside a prompt: it must then hold that prompt, which counts once.
    names: of the two columns, for messages. Raises RowError where the two have different prompts.
    """
    if prompt is None:
        return _common_start(pair, names)
    split = [_after_prompt(prompt, answer, name) for answer, name in zip(pair, names, strict=True)]
    (first, chosen), (second, rejected) = split
    if not _same_all(first.messages, second.messages):
        raise RowError(f"{names[0]!r} and {names[1]!r} have different prompts; wanted one conversation, answered twice")
    # What both answers begin with is no choice between them.
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and _same(chosen.messages[same], rejected.messages[same]):
        same += 1
    while same and not all(turns.messages[same]["role"] == "assistant" for turns in (chosen, rejected)):
        same -= 1
    return first + chosen[:same], [chosen[same:], rejected[same:]]


def split_text_pair(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two whole texts: the prompt is what they have in common, up to a space (TRL's
    implicit prompt). Raises RowError where they have nothing in common, or one has nothing more."""
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    while length and not (chosen[length - 1].isspace() or rejected[length - 1].isspace()):
        length -= 1
    length = len(chosen[:length].rstrip(" "))
    if not length:
        raise RowError("field 'prompt' is missing, and 'chosen' and 'rejected' do not begin alike: no common prompt")
    if not chosen[length:].strip() or not rejected[length:].strip():
        raise RowError("field 'prompt' is missing, and one of 'chosen' and 'rejected' is all of the other's beginning")
    return chosen[:length], chosen[length:], rejected[length:]


def _after_prompt(prompt: Turns, answer: Turns, name: str) -> tuple[Turns, Turns]:
    """(prompt, what comes after it) of one answer."""
    size = len(prompt)
    if len(answer) > size and _same_all(answer.messages[:size], prompt.messages):
        return prompt, answer[size:]
    if answer.messages[0]["role"] not in PROMPT_ROLES:
        return prompt, answer
    # A conversation with its own system message in front, or with more turns before the prompt.
    asked = [message for message in prompt.messages if message["role"] != "system"]
    for end in range(len(answer) - 1, 0, -1):
        before = answer.messages[:end]
        if answer.messages[end]["role"] == "assistant" and _same_all(before[end - len(asked) :], asked):
            if len(asked) < size and not _same_all(before[:1], prompt.messages[:1]):
                break
            return answer[:end], answer[end:]
    raise RowError(
        f"{name!r} is a conversation that begins with another prompt than the row's own; wanted the answer alone, or "
        "the prompt and the answer"
    )


def _common_start(pair: Sequence[Turns], names: Sequence[str]) -> tuple[Turns, list[Turns]]:
    chosen, rejected = pair
    shortest = min(len(chosen), len(rejected)) - 1
    same = 0
    while same < shortest and _same(chosen.messages[same], rejected.messages[same]):
        same += 1
    roles = [turns.messages[same]["role"] for turns in pair]
    if not same and roles == ["assistant", "assistant"]:
        raise RowError(f"the row has no prompt: {names[0]!r} and {names[1]!r} begin with the answer")
    if roles != ["assistant", "assistant"]:
        raise RowError(
            f"{names[0]!r} and {names[1]!r} have different prompts (they part at message {same + 1}, which is no "
            "answer in both); wanted one conversation, answered twice"
        )
    return chosen[:same], [chosen[same:], rejected[same:]]


def _same_all(these: Sequence[Message], those: Sequence[Message]) -> bool:
    return len(these) == len(those) and all(map(_same, these, those))


def _same(one: Message, other: Message) -> bool:
    """Whether two messages say the same; blanks around the text do not count, nor ids."""
    return all(
        one.get("content", "").strip() == other.get("content", "").strip()
        if key == "content"
        else one.get(key) == other.get(key)
        for key in ("role", "content", "tool_calls")
    )
