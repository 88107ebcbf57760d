"""DAPO's answer check (Yu et al. 2025): the text after the last `Answer:` and the reference are equal, normalised.

The rules of normalisation are those of Minerva's evaluation (Lewkowycz et al. 2022, appendix D.1), as verl's and NeMo
RL's `dapo_math_verify` have them: texts are compared, not values, so `0.5` is not `\\frac{1}{2}`.
"""

import re

from megatron_lora.rollout.rewards.functions import GSM8K_MARKER

TAIL_CHARACTERS = 300
NO_ANSWER = "[INVALID]"
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)
# In order; later ones see what earlier ones left.
_REPLACED = (
    ("an ", ""), ("a ", ""), (".$", "$"), ("\\$", ""), ("\\ ", ""), (" ", ""), ("mbox", "text"),
    (",\\text{and}", ","), ("\\text{and}", ","), ("\\text{m}", "\\text{}"),
)  # fmt: skip
_UNITS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots",
)  # fmt: skip
_UNWRAPPED = tuple(
    re.compile(pattern)
    for pattern in (r"\\text\{(.*?)\}", r"\\textbf\{(.*?)\}", r"\\overline\{(.*?)\}", r"\\boxed\{(.*)\}")
)


def dapo_math_match(prompt: str, completion: str, answer: str, extra: dict) -> float:
    """1 where the completion's last `Answer:` (in its last 300 characters) is the reference; 0 where it has none."""
    found = _ANSWER.findall(completion[-TAIL_CHARACTERS:])
    return float(normalized(found[-1] if found else NO_ANSWER) == normalized(answer.rpartition(GSM8K_MARKER)[2]))


def normalized(answer: str) -> str:
    """A final answer without units, spaces, wrappers and separators of thousands."""
    answer = answer.split("=")[-1]
    for before, after in _REPLACED:
        answer = answer.replace(before, after)
    for unit in _UNITS:
        answer = answer.replace(unit, "")
    answer = re.sub(r".*?\$(.*?)\$.*", r"$\1$", answer)
    for wrapper in _UNWRAPPED:
        answer = wrapper.sub(r"\1", answer)
    # \frac and \sqrt with bare arguments.
    answer = re.sub(r"(frac)([^{])(.)", r"frac{\2}{\3}", answer)
    answer = re.sub(r"(sqrt)([^{])", r"sqrt{\2}", answer)
    answer = answer.replace("$", "")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()
