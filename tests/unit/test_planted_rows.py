"""Planted faults: what was planted in rows, and what is printed, before any weight is loaded.

Each of these trained on something else than what was written, without a word, or ended in a traceback.
"""

import gzip
import re
from pathlib import Path

import pytest
from row_recipes import ANSWERED, TOOL, assistant, calling, encode_rows, run_show, user

# Qwen2.5's template without the roles that it knows: everything else is left out.
SKIPS = (
    "{% for m in messages %}{% if m['role'] in ['user', 'assistant'] %}{{ '<|im_start|>' + m['role'] + '\\n' + "
    "m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TALK = [user("What?"), assistant("fox")]
PAIR = {"chosen": "fox", "rejected": "dog"}

# (algorithm, row, what the message says)
REFUSED = {
    "two forms": (
        "sft",
        {"prompt": "P", "completion": "C", "messages": TALK},
        "2 forms at once: messages .* prompt-completion",
    ),
    "two forms, one of them text": ("sft", {"text": "P", "messages": TALK}, "2 forms at once.*form=messages"),
    "two questions": ("dpo", {"question": "P", "prompt": "Q", **PAIR}, "2 forms at once"),
    "no answer": ("sft", {"messages": [user("What?")]}, "no assistant message, so nothing carries loss"),
    "an answer under another role": (
        "sft",
        {"messages": [user("1"), {"role": "model", "content": "2"}]},
        "role 'model'.*write 'assistant'",
    ),
    "a null answer": ("sft", {"prompt": "P", "completion": None}, "field 'completion' is null"),
    "a null message": ("sft", {"messages": [user("What?"), None]}, "message 2 of 'messages' is NoneType"),
    "NaN": ("sft", {"prompt": "P", "completion": float("nan")}, "field 'completion' holds NaN"),
    "infinity deep inside": ("sft", {"messages": [user("1"), calling({"a": [float("inf")]})]}, "holds infinity"),
    "half a surrogate pair": ("sft", {"prompt": "P\ud83d", "completion": "C"}, r"'prompt' holds half a surrogate pair"),
    "half a pair in an argument": ("sft", {"messages": [user("1"), calling({"a": "\udc00"})]}, "half a surrogate pair"),
    "half a weight": ("sft", {"messages": [user("1"), assistant("2", weight=0.5)]}, "'weight' of message 2.*is 0.5"),
    "two weights": ("sft", {"messages": [user("1"), assistant("2", weight=0, train=True)]}, "keep one key"),
    "too few switches": (
        "sft",
        {"messages": TALK, "loss_mask": [1]},
        "has 1 values; wanted one value, or one for each of 2",
    ),
    "an image": (
        "sft",
        {"messages": [user([{"type": "image_url", "image_url": {}}]), assistant("2")]},
        "type 'image_url'",
    ),
    "arguments that are no JSON": (
        "sft",
        {"messages": [user("1"), calling("{a: 12")]},
        "'arguments' of tool call 1.*no JSON",
    ),
    "arguments that are a list": (
        "sft",
        {"messages": [user("1"), calling([12])]},
        "'arguments' of tool call 1.*is list",
    ),
    "a tool without a name": (
        "sft",
        {"messages": TALK, "tools": [{"type": "function"}]},
        "tool 1 of 'tools' has no 'name'",
    ),
    "tools that are no JSON": ("sft", {"messages": TALK, "tools": "add"}, "field 'tools' is text, but no JSON"),
    "two system messages": (
        "sft",
        {"system": "Be long.", "messages": [{"role": "system", "content": "Be brief."}, *TALK]},
        "two system messages",
    ),
    "variables that a run sets": ("sft", {"messages": TALK, "chat_template_kwargs": {"tools": []}}, "sets .'tools'."),
    "role and from": (
        "sft",
        {"messages": [{**user("1"), "from": "gpt"}, assistant("2")]},
        "has both 'role' and 'from'",
    ),
    "content and value": (
        "sft",
        {"messages": [{**user("1"), "value": "3"}, assistant("2")]},
        "both 'content' and 'value'",
    ),
    "two prompts": (
        "dpo",
        {"chosen": [user("1"), assistant("2")], "rejected": [user("3"), assistant("4")]},
        "different prompts",
    ),
    "another prompt beside conversations": (
        "dpo",
        {"prompt": "0", "chosen": [user("1"), assistant("2")], "rejected": [user("1"), assistant("4")]},
        "begins with another prompt than the row's own",
    ),
    "no prompt": ("dpo", {"chosen": [assistant("2")], "rejected": [assistant("4")]}, "the row has no prompt"),
    "a null beside a pair": ("dpo", {"prompt": "P", "chosen": "C", "rejected": None}, "field 'rejected' is null"),
    "a pair of weight 0": ("dpo", {"prompt": "P", **PAIR, "weight": 0}, "weight is 0, but every pair counts"),
    "a pair without a winner": (
        "dpo",
        {"context": [user("1")], "completions": [{"rank": 1, "completion": [assistant(a)]} for a in "23"]},
        "both have rank 1",
    ),
    "three completions": (
        "dpo",
        {"context": [user("1")], "completions": [{"rank": r, "completion": [assistant("2")]} for r in range(3)]},
        "wanted two objects with 'rank' and 'completion', got 3",
    ),
    "unpaired preferences": ("dpo", {"prompt": "P", "completion": "C", "label": True}, "field 'chosen' is missing"),
    "an empty answer": ("sft", {"messages": [user("1"), assistant(" ")]}, "answer in message 2 is empty"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_row(name: str) -> None:
    algorithm, row, says = REFUSED[name]
    shown = encode_rows(algorithm, [row])
    assert shown.status == 2 and not shown.rows
    assert re.search(f"data.jsonl, row 1: .*{says}", shown.said), shown.said


# (algorithm, row, template, what the notice says); the row is trained on
NAMED = {
    "columns": (
        "sft",
        {"question": "Q", "answer": 1, "choices": ["a", "b"]},
        "qwen2_5",
        "nothing reads: 'choices' (row 1)",
    ),
    "a system column beside plain text": (
        "sft",
        {"prompt": "P", "completion": "C", "system": "S"},
        "qwen2_5",
        "nothing reads: 'system'",
    ),
    "message keys": (
        "sft",
        {"messages": [user("1", mood="glad"), assistant("2")]},
        "qwen2_5",
        "does not render: 'mood' (row 1)",
    ),
    "ids of tool answers": (
        "sft",
        {"messages": [user("1"), calling({"a": 1}), ANSWERED, assistant("2")]},
        "qwen2_5",
        "does not render: 'tool_call_id'",
    ),
    "thinking of earlier turns": (
        "sft",
        {"messages": [user("1"), assistant("<think>\nLong.\n</think>\n\n2"), user("3"), assistant("4")]},
        "qwen3",
        "thinking that the chat template strips, so that it is not trained: 'content'",
    ),
    "thinking in a key": (
        "sft",
        {"messages": [user("1"), assistant("2", reasoning_content="Long."), user("3"), assistant("4")]},
        "qwen3",
        "so that it is not trained: 'reasoning_content'",
    ),
    "thinking in a template without any": (
        "sft",
        {"messages": [user("1"), assistant("2", reasoning_content="Long.")]},
        "qwen2_5",
        "so that it is not trained: 'reasoning_content'",
    ),
    "tools in a template without tools": (
        "sft",
        {"messages": TALK, "tools": [TOOL]},
        SKIPS,
        "tools that the chat template does not render",
    ),
    "text beside a tool call": (
        "sft",
        {"messages": [user("1"), calling({"a": 1}, "Let me."), ANSWERED, assistant("2")], "tools": [TOOL]},
        "llama3_1",
        "drops or changes: 'assistant beside tool_calls'",
    ),
    "an unknown template variable": (
        "sft",
        {"messages": TALK, "chat_template_kwargs": {"mood": 1}},
        "qwen2_5",
        "does not read: 'mood'",
    ),
    "loss on a user's message": (
        "sft",
        {"messages": [user("1", weight=1), assistant("2")]},
        "qwen2_5",
        "where none is given: 'user'",
    ),
    "loss inside the prompt": (
        "sft",
        {"prompt": [user("1"), assistant("2", train=True), user("3")], "completion": [assistant("4")]},
        "qwen2_5",
        "where none is given: 'prompt'",
    ),
    "special tokens in a text": (
        "sft",
        {"messages": [user("<|im_start|>"), assistant("2")]},
        "qwen2_5",
        "special tokens written in messages",
    ),
    "an end token in an answer": (
        "sft",
        {"messages": [user("1"), assistant("2<|im_end|>")]},
        "qwen2_5",
        "end with an end token of their own",
    ),
    "answers that repeat the prompt": (
        "dpo",
        {"prompt": "The", "chosen": "The fox", "rejected": "The dog"},
        "qwen2_5",
        "repeat the prompt",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_once(name: str) -> None:
    algorithm, row, template, says = NAMED[name]
    shown = encode_rows(algorithm, [row], template=template)
    assert shown.status == 0 and says in shown.said, shown.said
    assert shown.trained("row" if algorithm == "sft" else "chosen")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "system", "content": "Be brief."}, *TALK], "does not render message 1 .role 'system'"),
        ([user("1"), calling({"a": 1}), assistant("2")], "does not render .* tool calls of message 2"),
        ([user("1"), assistant("2"), {"role": "critic", "content": "3"}, assistant("4")], "message 3 .role 'critic'"),
    ],
)
def test_messages_that_a_template_leaves_out(messages: list, says: str) -> None:
    shown = encode_rows("sft", [{"messages": messages}], template=SKIPS)
    assert shown.status == 2 and re.search(says, shown.said), shown.said


# (file, content, what the message says)
FILES = {
    "NaN": ("data.jsonl", '{"prompt": "P", "completion": NaN}\n', "row 1: NaN is no JSON value"),
    "infinity": ("data.json", '[{"prompt": "P", "completion": -Infinity}]', "-Infinity is no JSON value"),
    "half a surrogate pair": (
        "data.jsonl",
        '{"prompt": "P\\ud83d", "completion": "A"}\n',
        "row 1: field 'prompt' holds half",
    ),
    "a field twice": (
        "data.jsonl",
        '{"prompt": "P", "prompt": "Q", "completion": "A"}\n',
        "row 1: the field 'prompt' is there twice",
    ),
    "a blank line within": ("data.jsonl", '{"prompt": "P", "completion": "A"}\n\n{}\n', "row 2: the row is empty"),
    "an object in one line too many": (
        "data.json",
        '{"version": 1, "data": [{"prompt": "P"}]}',
        "beside its rows under 'data'",
    ),
    "a broken archive": ("data.jsonl.gz", b"no gzip", "cannot be read"),
    "a cut archive": ("data.jsonl.gz", gzip.compress(b'{"prompt": "P", "completion": "A"}\n')[:-9], "cannot be read"),
    "a broken table": ("data.parquet", b"PAR1", "cannot be read"),
    "a cell too many": ("data.csv", "prompt,completion\nP,A,B\n", "row 1: 3 cells for 2 columns"),
    "a column twice": ("data.csv", "prompt,prompt\nP,A\n", "must name every column, each once"),
    "another encoding": ("data.jsonl", b'{"prompt": "\xe9", "completion": "A"}\n', "UTF-8"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    file, content, says = FILES[name]
    shown = run_show(tmp_path, "sft", content, file=file)
    assert shown.status == 2 and says in shown.said, shown.said
    assert shown.said.startswith("error: ") and len(shown.said.splitlines()) == 1
