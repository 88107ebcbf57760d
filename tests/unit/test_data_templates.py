"""Loss falls on the answers' tokens and what ends them, exactly, with the templates of the model families."""

import pytest
from data_tokenizers import HEADER_ONLY, MISTRAL, UNCLOSED, build_tokenizer, family_template, target_texts

from megatron_lora.data.examples import ChatExample, PromptExample, TextExample
from megatron_lora.data.tokenize import Encoder, EncodingOptions
from megatron_lora.data.values import RowError

NEMO_RL_SFT = (
    "{% for message in messages %}{%- if message['role'] == 'system' %}{{'Context: ' + message['content'].strip()}}"
    "{%- elif message['role'] == 'user' %}{{' Question: ' + message['content'].strip() + ' Answer:'}}"
    "{%- elif message['role'] == 'assistant' %}{{' ' + message['content'].strip()}}{%- endif %}{% endfor %}"
)


def chat(*contents: str, system: str | None = None) -> ChatExample:
    """A conversation: user, assistant, user, assistant, ..."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, content in enumerate(contents):
        messages.append({"role": "assistant" if number % 2 else "user", "content": content})
    return ChatExample(messages)


def encode(tokenizer, example, **options):
    encoded = Encoder(tokenizer, EncodingOptions(**options)).encode(example, 1)
    return encoded, target_texts(tokenizer, encoded.ids, encoded.mask)


TWO_TURNS = ("What is 12+7?", "The answer is 19.", "Hello there!", "I am fine.\n\nthank you")
THINK = "<think>\n\n</think>\n\n"
FAMILIES = {
    "qwen2_5": (family_template("qwen2_5"), "<|im_end|>", None, [f"{a}<|im_end|>" for a in TWO_TURNS[1::2]]),
    "qwen3": (
        family_template("qwen3"),
        "<|im_end|>",
        None,
        [f"{TWO_TURNS[1]}<|im_end|>", f"{THINK}{TWO_TURNS[3]}<|im_end|>"],
    ),
    "llama3": (
        family_template("llama3"),
        "<|eot_id|>",
        "<|begin_of_text|>",
        [f"{a}<|eot_id|>" for a in TWO_TURNS[1::2]],
    ),
    "mistral": (MISTRAL, "</s>", "<s>", [f" {a}</s>" for a in TWO_TURNS[1::2]]),
    "gemma": (family_template("gemma"), "<end_of_turn>", "<bos>", [f"{a}<end_of_turn>" for a in TWO_TURNS[1::2]]),
    "gemma3": (family_template("gemma3"), "<end_of_turn>", "<bos>", [f"{a}<end_of_turn>" for a in TWO_TURNS[1::2]]),
    "header only": (HEADER_ONLY, "<|im_end|>", None, [f"{a}<|im_end|>" for a in TWO_TURNS[1::2]]),
}


@pytest.mark.parametrize("trim_offsets", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_carries_loss_and_tokens_are_the_templates(family: str, trim_offsets: bool) -> None:
    template, eos, bos, expected = FAMILIES[family]
    tokenizer = build_tokenizer(template, eos, bos, adds_bos=bos is not None, trim_offsets=trim_offsets)
    encoded, targets = encode(tokenizer, chat(*TWO_TURNS))
    assert targets == expected
    # The template's own tokens, nothing added: in particular one BOS.
    whole = tokenizer.apply_chat_template(chat(*TWO_TURNS).messages, tokenize=True, return_dict=False)
    assert encoded.ids.tolist() == whole


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_turn(family: str) -> None:
    template, eos, bos, expected = FAMILIES[family]
    _, targets = encode(build_tokenizer(template, eos, bos), chat(*TWO_TURNS), only_unmask_final=True)
    assert targets == expected[-1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_tokens_are_the_start_of_the_row(family: str) -> None:
    """What generation starts from is what stands before the first target token."""
    template, eos, bos, _ = FAMILIES[family]
    if template == HEADER_ONLY:
        template += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    tokenizer = build_tokenizer(template, eos, bos, adds_bos=bos is not None)
    encoder = Encoder(tokenizer, EncodingOptions())
    row = encoder.encode(chat(*TWO_TURNS[:2]), 1)
    ids, _ = encoder.encode_prompt(PromptExample(chat(TWO_TURNS[0]).messages, ""))
    first = row.mask.tolist().index(True)
    assert row.ids.tolist()[:first] == ids


def test_qwen3_thinking_belongs_to_the_last_answer_and_is_stripped_from_earlier_ones() -> None:
    tokenizer = build_tokenizer(family_template("qwen3"), "<|im_end|>")
    thought = "<think>\nFirst, second.\n</think>\n\n"
    _, targets = encode(tokenizer, chat("How?", thought + "One", "And?", thought + "Two"))
    assert targets == ["One<|im_end|>", thought + "Two<|im_end|>"]


def test_qwen3_without_thinking_masks_the_empty_block_that_the_prompt_holds() -> None:
    tokenizer = build_tokenizer(family_template("qwen3"), "<|im_end|>")
    _, targets = encode(
        tokenizer, chat("How?", "< One", "And?", "<Two"), chat_template_kwargs={"enable_thinking": False}
    )
    assert targets == ["< One<|im_end|>", "<Two<|im_end|>"]


@pytest.mark.parametrize("answer", ["a", "assistant", "user", "<|im_end|", "\n", "  padded  ", "19", "日本語 🙂"])
def test_answers_that_look_like_the_scaffolding(answer: str) -> None:
    tokenizer = build_tokenizer(family_template("qwen2_5"), "<|im_end|>")
    _, targets = encode(tokenizer, chat(answer, answer, answer, answer))
    assert targets == [f"{answer}<|im_end|>"] * 2


def test_system_message_and_stripping_template() -> None:
    tokenizer = build_tokenizer(NEMO_RL_SFT, "</s>")
    encoded, targets = encode(tokenizer, chat("Who? ", " The fox ", "When?", "Today", system="A dog."))
    assert targets == [" The fox", " Today</s>"]
    text = "Context: A dog. Question: Who? Answer: The fox Question: When? Answer: Today</s>"
    assert tokenizer.decode(encoded.ids) == text


def test_add_eos_follows_an_end_of_turn_token_that_is_not_eos() -> None:
    tokenizer = build_tokenizer(family_template("qwen2_5"), "<|endoftext|>")
    encoded, targets = encode(tokenizer, chat("How?", "Fine"))
    assert targets == ["Fine<|im_end|><|endoftext|>"]
    assert encoded.ids[-1] == tokenizer.eos_token_id
    _, targets = encode(tokenizer, chat("How?", "Fine"), add_eos=False)
    assert targets == ["Fine<|im_end|>"]


def test_a_special_token_that_opens_the_next_turn_carries_no_loss() -> None:
    tokenizer = build_tokenizer(UNCLOSED, "</s>")
    _, targets = encode(tokenizer, chat("How?", "Fine", "And?", "Good"))
    assert targets == ["Fine", "Good</s>"]


def test_plain_template_where_the_tokenizer_has_none() -> None:
    tokenizer = build_tokenizer(None, "</s>", "<s>", adds_bos=True)
    encoded, targets = encode(tokenizer, chat("How?", "Fine", "And?", "Good", system="Be brief."))
    assert targets == [" Fine</s>", " Good</s>"]
    assert tokenizer.decode(encoded.ids) == (
        "<s>System: Be brief.\nUser: How?\nAssistant: Fine</s>\nUser: And?\nAssistant: Good</s>\n"
    )


def test_marked_answers_of_training_templates() -> None:
    tokenizer = build_tokenizer(family_template("qwen3_training"), "<|im_end|>")
    assert "generation" in tokenizer.chat_template
    _, targets = encode(tokenizer, chat(*TWO_TURNS))
    assert targets == [f"{THINK}{answer}<|im_end|>" for answer in TWO_TURNS[1::2]]
    _, targets = encode(tokenizer, chat(*TWO_TURNS), only_unmask_final=True)
    assert targets == [f"{THINK}{TWO_TURNS[3]}<|im_end|>"]


def test_marked_answers_take_their_end_of_turn_token() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
        "{{ '<|im_end|>\\n' }}{% endfor %}"
    )
    _, targets = encode(build_tokenizer(template, "<|im_end|>"), chat("How?", "Fine", "And?", "Good"))
    assert targets == ["Fine<|im_end|>", "Good<|im_end|>"]


def test_tool_calls_carry_loss() -> None:
    tokenizer = build_tokenizer(family_template("qwen2_5"), "<|im_end|>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "Let me.", "tool_calls": [call]},
        {"role": "tool", "content": "19"},
        {"role": "assistant", "content": "19."},
    ]
    _, targets = encode(tokenizer, ChatExample(messages))
    assert targets[1:] == ["19.<|im_end|>"]
    assert targets[0].startswith("Let me.") and '"name": "add"' in targets[0] and targets[0].endswith("<|im_end|>")


def test_a_conversation_that_the_template_refuses_is_a_row_error() -> None:
    tokenizer = build_tokenizer(family_template("gemma"), "<eos>", "<bos>")
    with pytest.raises(RowError, match="System role not supported"):
        encode(tokenizer, chat("How?", "Fine", system="Be brief."))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_plain_text_is_prompt_then_answer_then_eos(adds_bos: bool) -> None:
    tokenizer = build_tokenizer(family_template("qwen3"), "</s>", "<s>", adds_bos=adds_bos)
    encoded, targets = encode(tokenizer, TextExample("12+7=", "19"))
    prompt = tokenizer("12+7=")["input_ids"]
    answer = tokenizer("19", add_special_tokens=False)["input_ids"]
    assert (prompt[0] == tokenizer.bos_token_id) == adds_bos
    assert encoded.ids.tolist() == prompt + answer + [tokenizer.eos_token_id]
    assert targets == ["19</s>"]
    without, _ = encode(tokenizer, TextExample("12+7=", "19"), add_bos=False, add_eos=False)
    assert without.ids.tolist() == prompt[adds_bos:] + answer
