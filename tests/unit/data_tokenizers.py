"""A small real tokenizer for tests, with the special tokens of the model families, and chat templates."""

from functools import cache
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip
TEXT = [
    "The quick brown fox jumps over the lazy dog. What is 12+7? The answer is 19.",
    "user assistant system model Question: Answer: Context: think",
    "Hello there! How are you? I am fine, thank you.\n\nLet me think.\nFirst, second, third.",
] * 20

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Roles as special tokens and nothing that closes a turn.
UNCLOSED = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '\\n' + message['content'] + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\\n' }}{% endif %}"
)
# A template that ignores add_generation_prompt.
HEADER_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
)


def family_template(name: str) -> str:
    """A template as the model family publishes it (from trl's collection)."""
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text()


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def build_tokenizer(
    template: str | None = None,
    eos: str = "</s>",
    bos: str | None = None,
    adds_bos: bool = False,
    trim_offsets: bool = True,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `adds_bos` puts its beginning-of-sequence token before every text."""
    tokenizer = Tokenizer.from_str(_trained())
    steps: list = [processors.ByteLevel(trim_offsets=trim_offsets)]
    if adds_bos:
        steps.append(
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))])
        )
    tokenizer.post_processor = processors.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, pad_token="<pad>")
    fast.chat_template = template
    return fast


def target_texts(tokenizer, ids, mask) -> list[str]:
    """The decoded text of each run of tokens that carry loss."""
    runs: list[list[int]] = []
    previous = False
    for token, target in zip(ids, mask, strict=True):
        if target and not previous:
            runs.append([])
        if target:
            runs[-1].append(int(token))
        previous = bool(target)
    return [tokenizer.decode(run) for run in runs]
