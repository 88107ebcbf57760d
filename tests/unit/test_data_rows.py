"""Rows as people have them: what is trained on is what they wrote, with the templates of the model families."""

import json

import pytest
from row_recipes import ANSWERED, TOOL, assistant, calling, encode_rows, user

THOUGHT = "<think>\nFirst, second.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>'


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3"])
@pytest.mark.parametrize("text", [None, "", "Let me think."])
@pytest.mark.parametrize("arguments", [{"a": 12}, '{"a": 12}', {"a": 12, "b": None}])
def test_tool_calls_with_and_without_text(template: str, text, arguments) -> None:
    rows = [{"messages": [user("12?"), calling(arguments, text), ANSWERED, assistant("It is 19.")], "tools": [TOOL]}]
    shown = encode_rows("sft", rows, template=template)
    assert shown.status == 0, shown.said
    first, last = shown.trained("row")
    assert first == (f"{text}\n" if text else "") + f"{CALL}<|im_end|>"
    assert last.endswith("It is 19.<|im_end|>")
    assert "# Tools" in shown.part("row")["text"] and '"name": "add"' in shown.part("row")["text"]


def test_a_tool_call_before_earlier_turns_in_a_template_that_treats_the_last_turn_otherwise() -> None:
    turns = [
        user("12?"),
        calling({"a": 12}),
        ANSWERED,
        assistant("It is 19."),
        user("And?"),
        calling({"a": 7}, "Let me."),
    ]
    shown = encode_rows("sft", [{"messages": turns}], template="qwen3")
    targets = shown.trained("row")
    assert [target.count("<|im_end|>") for target in targets] == [1, 1, 1]
    assert targets[0] == f"{CALL}<|im_end|>" and targets[1] == "It is 19.<|im_end|>" and '{"a": 7}' in targets[2]


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], [json.dumps(TOOL)]])
def test_tools_reach_the_template_whatever_they_are_written_as(tools) -> None:
    pair = {"prompt": [user("12?")], "chosen": [assistant("19")], "rejected": [assistant("7")], "tools": tools}
    shown = encode_rows("dpo", [pair])
    assert all(f"<tools>\n{json.dumps(TOOL)}\n</tools>" in shown.part(part)["text"] for part in ("chosen", "rejected"))
    shown = encode_rows("grpo", [{"prompt": [user("12?")], "answer": "19", "tools": tools}])
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in shown.part("prompt")["text"]


@pytest.mark.parametrize("key", ["weight", "train", "training", "trainable", "loss", "loss_mask", "loss_weight"])
@pytest.mark.parametrize("no", [0, False, "false", 0.0])
def test_a_message_that_says_no_carries_no_loss(key: str, no) -> None:
    rows = [{"messages": [user("1?"), assistant("BAD", **{key: no}), user("2?"), assistant("GOOD")]}]
    shown = encode_rows("sft", rows)
    assert shown.trained("row") == ["GOOD<|im_end|>"] and "BAD" in shown.part("row")["text"], shown.said


@pytest.mark.parametrize("column", ["loss_mask", "message_loss_mask", "weights"])
def test_a_list_of_the_rows_has_one_switch_a_message(column: str) -> None:
    turns = [user("1?"), assistant("BAD"), user("2?"), assistant("GOOD")]
    shown = encode_rows("sft", [{"messages": turns, column: [0, 0, 0, 1]}])
    assert shown.trained("row") == ["GOOD<|im_end|>"] and shown.said.count("not") == 0, shown.said
    shown = encode_rows("sft", [{"messages": turns, column: [1, 0, 0, 1]}])
    assert "loss asked for where none is given: 'user' (row 1)" in shown.said


def test_the_last_answer_is_closed_even_where_it_carries_no_loss() -> None:
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    rows = [{"messages": [user("1?"), assistant("GOOD"), user("2?"), assistant("BAD", weight=0)]}]
    shown = encode_rows("sft", rows, template=template)
    assert "".join(shown.trained("row")).strip() == "GOOD"
    assert shown.part("row")["input_ids"][-1] == shown.tokenizer.eos_token_id


@pytest.mark.parametrize("template", ["qwen2_5_training", "qwen3_training"])
def test_switches_hold_in_templates_that_mark_answers(template: str) -> None:
    rows = [{"messages": [user("1?"), assistant("BAD", weight=0), user("2?"), assistant("GOOD")]}]
    [target] = encode_rows("sft", rows, template=template).trained("row")
    assert target.endswith("GOOD<|im_end|>") and "BAD" not in target


def test_rows_of_weight_0_stay_without_loss() -> None:
    rows = [{"prompt": "Q", "completion": "A", "weight": 0}, {"prompt": "Q", "completion": "B", "weight": 1}]
    shown = encode_rows("sft", rows)
    assert shown.trained("row", 1) == [] and shown.trained("row", 2) == ["B<|im_end|>"]
    assert "1 rows carry no loss, as they say themselves" in shown.said


def test_a_prompts_own_answers_carry_no_loss() -> None:
    row = {"prompt": [user("1?"), assistant("OLD"), user("2?")], "completion": [assistant("NEW")]}
    assert encode_rows("sft", [row]).trained("row") == ["NEW<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "user_text", "answer"),
    [
        ({"instruction": "Sum up", "input": "the dog", "output": "fox"}, "Sum up\nthe dog", "fox"),
        ({"instruction": "Sum up", "input": "", "output": "fox"}, "Sum up", "fox"),
        ({"instruction": "Sum up", "input": None, "output": "fox", "history": [["1?", "2!"]]}, "Sum up", "fox"),
        ({"instruction": "Sum up", "context": "the dog", "response": "fox"}, "Sum up\nthe dog", "fox"),
        ({"query": "What?", "response": "fox", "history": [["1?", "2!"]]}, "What?", "fox"),
        ({"system_prompt": "Be brief.", "question": "What?", "response": "fox"}, "What?", "fox"),
        ({"question": "What?", "answer": 19}, "What?", "19"),
        ({"problem": "What?", "solution": "fox"}, "What?", "fox"),
        ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "fox"}]}, "What?", "fox"),
        ({"conversations": json.dumps([user("What?"), assistant("fox")])}, "What?", "fox"),
        ({"messages": [user([{"type": "text", "text": "What?"}]), assistant(["fox"])]}, "What?", "fox"),
        ({"messages": [user("What?"), assistant("fox")], "prompt": None, "completion": ""}, "What?", "fox"),
        ({"messages": [{"role": "User", "content": "What?"}, {"role": "ASSISTANT", "content": "fox"}]}, "What?", "fox"),
    ],
)
def test_forms_of_training_rows(row: dict, user_text: str, answer: str) -> None:
    shown = encode_rows("sft", [row])
    assert shown.status == 0, shown.said
    text = shown.part("row")["text"]
    assert f"<|im_start|>user\n{user_text}<|im_end|>" in text
    assert shown.trained("row")[-1] == f"{answer}<|im_end|>"
    if "system_prompt" in row:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    if "history" in row:
        assert "user\n1?<|im_end|>\n<|im_start|>assistant\n2!<|im_end|>" in text
    assert "not" not in shown.said.replace("nothing", "nought"), shown.said


def test_language_modelling_trains_on_the_whole_text() -> None:
    shown = encode_rows("sft", [{"text": "The quick brown fox"}], bos="<s>")
    assert shown.trained("row") == ["The quick brown fox<|im_end|>"]
    assert shown.part("row")["text"].startswith("<s>The")


def test_sharegpt_tools() -> None:
    turns = [
        {"from": "human", "value": "12?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 12}}'},
        {"from": "observation", "value": "19"},
        {"from": "gpt", "value": "It is 19."},
    ]
    row = {"conversations": turns, "system": "Be brief.", "tools": json.dumps([TOOL["function"]])}
    shown = encode_rows("sft", [row])
    assert shown.trained("row") == [f"{CALL}<|im_end|>", "It is 19.<|im_end|>"]
    text = shown.part("row")["text"]
    assert (
        text.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and "<tool_response>\n19\n</tool_response>" in text
    )


WHOLE = {"chosen": [user("What?"), assistant("fox")], "rejected": [user("What?"), assistant("dog")]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [user("What?")], **WHOLE},
        {"prompt": "What?", **WHOLE},
        {"prompt": "What?", "question": None, **WHOLE},
        WHOLE,
        {"prompt": None, **WHOLE},
        {"prompt": [user("What?")], "chosen": assistant("fox"), "rejected": "dog"},
        {"question": "What?", "chosen": "fox", "rejected": "dog"},
        {"instruction": "What?", "input": "", "chosen": "fox", "rejected": "dog"},
        {"query": "What?", "response": "fox", "rejected_response": "dog"},
        {"messages": [user("What?"), assistant("fox")], "rejected_response": "dog"},
        {
            "conversations": [{"from": "human", "value": "What?"}],
            "chosen": {"from": "gpt", "value": "fox"},
            "rejected": {"from": "gpt", "value": "dog"},
        },
        {
            "input": {"messages": [user("What?")], "tools": [], "parallel_tool_calls": None},
            "preferred_output": [assistant("fox")],
            "non_preferred_output": [assistant("dog")],
        },
        {
            "context": [user("What?")],
            "completions": [
                {"rank": 1, "completion": [assistant("dog")]},
                {"rank": 0, "completion": [assistant("fox")]},
            ],
        },
    ],
)
def test_forms_of_pairs(row: dict) -> None:
    shown = encode_rows("dpo", [row])
    assert shown.status == 0, shown.said
    assert shown.trained("chosen") == ["fox<|im_end|>"] and shown.trained("rejected") == ["dog<|im_end|>"]
    assert shown.part("chosen")["text"].count("What?") == 1


def test_pairs_of_whole_texts_share_their_beginning() -> None:
    shown = encode_rows("dpo", [{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    assert shown.trained("chosen") == [" blue.<|im_end|>"] and shown.part("rejected")["text"].startswith("The sky is")


def test_an_answer_of_several_messages_carries_loss_on_all_its_answers() -> None:
    row = {
        "prompt": [user("12?"), assistant("OLD"), user("7?")],
        "chosen": [calling({"a": 12}), ANSWERED, assistant("It is 19.")],
        "rejected": [assistant("dog")],
    }
    shown = encode_rows("dpo", [row])
    assert shown.trained("chosen") == [f"{CALL}<|im_end|>", "It is 19.<|im_end|>"]


def test_what_both_answers_begin_with_belongs_to_the_prompt() -> None:
    start = [user("1?"), assistant("OLD"), user("2?")]
    row = {"prompt": "1?", "chosen": [*start, assistant("fox")], "rejected": [*start, assistant("dog")]}
    assert encode_rows("dpo", [row]).trained("chosen") == ["fox<|im_end|>"]


def test_a_system_message_in_front_of_whole_conversations() -> None:
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": "What?", **{k: [system, user("What?"), assistant(k)] for k in ("chosen", "rejected")}}
    shown = encode_rows("dpo", [row])
    assert shown.trained("chosen") == ["chosen<|im_end|>"]
    assert shown.part("chosen")["text"].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat?")


@pytest.mark.parametrize(
    ("reader", "row", "keys"),
    [
        ("ResponseDataset", {"prompt": "What?", "completion": "fox"}, ("prompt", "completion")),
        ("ResponseDataset", {"input": "What?", "output": "fox", "question": "No", "answer": "No"}, (None, None)),
        ("BinaryPreferenceDataset", {"prompt": "What?", "chosen": "fox", "rejected": "dog"}, (None, None)),
        ("BinaryPreferenceDataset", {"q": "What?", "chosen": "fox", "rejected": "dog"}, ("q", None)),
    ],
)
def test_nemo_rl_classes_always_make_messages(reader: str, row: dict, keys: tuple) -> None:
    algorithm, trained = ("sft", "row") if reader == "ResponseDataset" else ("dpo", "chosen")
    shown = encode_rows(algorithm, [row], reader=reader, input_key=keys[0], output_key=keys[1])
    assert shown.trained(trained) == ["fox<|im_end|>"], shown.said
    assert "<|im_start|>user\nWhat?<|im_end|>" in shown.part(trained)["text"]


def test_a_prompt_that_ends_with_an_answer_is_gone_on_with() -> None:
    shown = encode_rows("grpo", [{"prompt": [user("1+1"), assistant("The answer is")], "answer": "2"}])
    assert shown.part("prompt")["text"].endswith("<|im_start|>assistant\nThe answer is")
    assert shown.part("prompt")["answer"] == "2"


def test_row_level_template_variables() -> None:
    row = {"prompt": [user("1+1")], "answer": "2", "chat_template_kwargs": {"enable_thinking": False}}
    shown = encode_rows("grpo", [row], template="qwen3")
    assert shown.part("prompt")["text"].endswith("assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_goes_under_the_templates_own_name(key: str) -> None:
    shown = encode_rows(
        "sft", [{"messages": [user("1?"), assistant("2", **{key: "First, second."})]}], template="qwen3"
    )
    assert shown.trained("row") == [f"{THOUGHT}2<|im_end|>"] and "not" not in shown.said, shown.said


@pytest.mark.parametrize(
    ("ends", "target"),
    [
        ((), "fox<|im_end|><|endoftext|>"),
        ((5, 4), "fox<|im_end|>"),
        ((90,), "fox<|im_end|><|endoftext|>"),
    ],
)
def test_one_end_token_where_the_model_stops_at_several(ends: tuple[int, ...], target: str) -> None:
    rows = [{"messages": [user("What?"), assistant("fox")]}]
    shown = encode_rows("sft", rows, eos="<|endoftext|>", end_token_ids=ends)
    assert shown.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [5, 4]
    assert shown.trained("row") == [target]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("What?"), assistant("fox<|im_end|>\n")]},
        {"prompt": "What?", "completion": "fox<|im_end|>"},
        {"prompt": "What?", "completion": "fox<|im_end|>\n\n"},
    ],
)
def test_an_answer_that_ends_with_its_end_token_has_one(row: dict) -> None:
    assert encode_rows("sft", [row]).trained("row") == ["fox<|im_end|>"]


def test_messages_as_json_text_are_messages_in_every_column() -> None:
    ask, good, bad = (json.dumps([turn]) for turn in (user("1?"), assistant("GOOD"), assistant("BAD")))
    assert encode_rows("sft", [{"prompt": ask, "completion": good}]).trained("row") == ["GOOD<|im_end|>"]
    assert encode_rows("sft", [{"text": json.dumps([user("1?"), assistant("GOOD")])}]).trained("row") == [
        "GOOD<|im_end|>"
    ]
    pair = encode_rows("dpo", [{"prompt": ask, "chosen": good, "rejected": bad}])
    assert (pair.trained("chosen"), pair.trained("rejected")) == (["GOOD<|im_end|>"], ["BAD<|im_end|>"])
    assert "role" not in encode_rows("grpo", [{"prompt": ask, "answer": "1"}]).part("prompt")["text"]


@pytest.mark.parametrize("answer", ['{"city": "Rome"}', '[{"city": "Rome"}]', "[1, 2]", "[]"])
def test_json_that_is_an_answer_stays_text(answer: str) -> None:
    assert encode_rows("sft", [{"question": "As JSON?", "answer": answer}]).trained("row") == [f"{answer}<|im_end|>"]


@pytest.mark.parametrize("column", ["tools", "history", "chat_template_kwargs"])
def test_a_column_whose_json_text_is_null_is_absent(column: str) -> None:
    rows = [{"messages": [user("1?"), assistant("GOOD")], column: "null"}]
    shown = encode_rows("sft", rows)
    assert shown.status == 0 and shown.trained("row") == ["GOOD<|im_end|>"], shown.said


def test_text_that_is_no_text_and_no_messages_is_refused() -> None:
    shown = encode_rows("sft", [{"text": ["all of it"]}])
    assert shown.status == 2 and "message 1 of 'text' is str" in shown.said
