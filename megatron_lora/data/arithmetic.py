"""The built-in `arithmetic` data set: every sum and difference of two small numbers, nothing to download."""

import random

# The split is cut with this seed whatever seed a run has, so that training and validation never share a question.
_SPLIT_SEED = 20240607
VALIDATION_SHARE = 0.1


def arithmetic_rows(split: str, max_operand: int = 99) -> list[dict[str, str]]:
    """The rows of `train` or `validation` (also called `test`), in a fixed random order.

    All a+b and all a-b >= 0 with operands up to `max_operand`, each in one of the two splits, 10 % of them in
    validation. A row is plain text (`prompt` "12+7=", `completion` "19") and a question (`question`, `answer`) at
    once; name the latter with input_key and output_key to use the chat template. Raises ValueError for another split.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split {split!r}")
    operands = range(max_operand + 1)
    problems = [(f"{a}+{b}", a + b) for a in operands for b in operands]
    problems += [(f"{a}-{b}", a - b) for a in operands for b in range(a + 1)]
    random.Random(_SPLIT_SEED).shuffle(problems)
    cut = int(len(problems) * VALIDATION_SHARE)
    chosen = problems[cut:] if split == "train" else problems[:cut]
    return [
        {
            "prompt": f"{problem}=",
            "completion": str(result),
            "question": f"What is {problem}?",
            "answer": str(result),
        }
        for problem, result in chosen
    ]
