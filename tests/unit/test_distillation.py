"""On-policy distillation around its loss: what is refused before weights load, an adapter's shapes, servers that teach.

The servers are small ones that answer in vLLM's form and fail on command."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lora.config.loader import load_recipe
from megatron_lora.config.schema import Recipe
from megatron_lora.errors import UserError
from megatron_lora.policy.heads import MostLikely
from megatron_lora.policy.other_adapter import other_adapter
from megatron_lora.rollout.generator import RolloutError
from megatron_lora.rollout.teacher import TeacherServers
from megatron_lora.runtime.world import World
from megatron_lora.trainers.distillation import Distillation
from tests.support.http_server import JsonServer
from tests.support.models import save_model
from tests.support.reference import save_adapter
from tools.tiny_model import build_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "distillation-quickstart-megatron.yaml"
PEFT = "policy.megatron_cfg.peft"
TOP = "distillation.topk_logits_k"
URLS = ("teacher.adapter=null", "teacher.urls=[http://a:1]")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distillation")
    save_model(folder / "base", "qwen3")
    save_adapter(folder / "base", folder / "teacher")
    return folder


def recipe(room: Path, *overrides: str) -> Recipe:
    own = [
        f"policy.model_name={room / 'base'}",
        f"teacher.adapter={room / 'teacher'}",
        f"{PEFT}.dim=4",
        f"{PEFT}.alpha=8",
    ]
    return load_recipe(RECIPE, [*own, "policy.generation.backend=megatron", *overrides]).recipe


def check(found: Recipe) -> None:
    Distillation().check(found, World(rank=0, size=2, local_rank=0, device=torch.device("cpu")))


def test_the_recipe_and_its_other_teachers_are_accepted(room: Path) -> None:
    check(recipe(room))
    check(recipe(room, *URLS, "teacher.model_name=big"))
    start = (f"{PEFT}.init_adapter={room / 'teacher'}", "policy.reference_policy=base")
    check(recipe(room, "teacher.adapter=null", *start))
    for kl_type in ("forward", "reverse", "mixed"):
        check(recipe(room, f"{TOP}=8", f"loss_fn.kl_type={kl_type}", "loss_fn.zero_outside_topk=true"))


REFUSALS = {
    "no teacher": (("teacher.adapter=null",), "the recipe names no teacher"),
    "two teachers": (("teacher.urls=[http://a:1]",), "name two teachers"),
    "the whole model": ((f"{PEFT}.enabled=false",), "which full fine-tuning changes"),
    "a name without servers": (("teacher.model_name=big",), "are for teacher.urls, which is empty"),
    "a time without servers": (("teacher.timeout_seconds=5",), "are for teacher.urls, which is empty"),
    "a place without servers": (("teacher.requests_at_once=5",), "are for teacher.urls, which is empty"),
    "the same twice": (("teacher.adapter=null", "teacher.urls=[http://a:1, http://a:1]"), "wanted each server once"),
    "no address": (("teacher.adapter=null", "teacher.urls=[a]"), "wanted each server once"),
    "another temperature": ((*URLS, "policy.generation.temperature=0.7"), "give the teacher's own distribution"),
    "a part of the vocabulary": ((*URLS, "policy.generation.top_k=5"), "give the teacher's own distribution"),
    "no draws": (("policy.generation.temperature=0",), "policy.generation.temperature=0"),
    "other ranks": ((f"{PEFT}.dim=8",), "no adapter of the run's shapes, in 16 linears"),
    "other linears": ((f"{PEFT}.target_modules=[linear_qkv]",), "it has ((('gate', 'up'), 4),), the run nothing"),
    "a residual": ((f"{PEFT}.init_lora_weights=pissa",), "keeps a part only"),
    "no folder": (("teacher.adapter=/nowhere",), "/nowhere"),
    "turns without an environment": (("distillation.max_rollout_turns=3",), "distillation.max_rollout_turns=3 needs"),
    "half a stop": (
        ("distillation.stop_at_validation_metric=accuracy",),
        "stop_at_validation_threshold belong together",
    ),
    "a batch": (("policy.train_global_batch_size=48",), "(distillation.num_prompts_per_step=64"),
    "the other divergence alone": (("loss_fn.kl_type=forward",), "say how many (distillation.topk_logits_k"),
    "a whole vocabulary alone": (("loss_fn.zero_outside_topk=true",), "loss_fn.zero_outside_topk=true sums over"),
    "candidates that are never drawn": ((f"{TOP}=8", "policy.generation.top_p=0.9"), "have no log-probability"),
    "candidates of few draws": ((f"{TOP}=8", "policy.generation.top_k=50"), "have no log-probability"),
    "more than there are": ((f"{TOP}=8000",), "the model has 101 tokens"),
    "less than none": ((f"{TOP}=-1",), "distillation.topk_logits_k"),
    "a weight above 1": (("loss_fn.mixed_kl_weight=1.5",), "loss_fn.mixed_kl_weight"),
    "another name": (("loss_fn.kl_type=jsd",), "loss_fn.kl_type"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_before_weights_load(name: str, room: Path) -> None:
    overrides, text = REFUSALS[name]
    with pytest.raises(UserError) as error:
        check(recipe(room, *overrides))
    assert text in str(error.value)


def test_keys_of_losses_with_rewards_are_named_as_unread(room: Path) -> None:
    own = [f"policy.model_name={room / 'base'}", "loss_fn.use_cispo=true"]
    [notice] = load_recipe(RECIPE, own).notices
    assert "loss_fn.use_cispo" in notice and "reference_policy_kl_penalty" not in notice
    # The clip is of the estimate, which has a ratio.
    clipped = (own[0], "loss_fn.ratio_clip_min=0.1")
    assert not any("ratio_clip_min" in line for line in load_recipe(RECIPE, clipped).notices)
    [notice] = load_recipe(RECIPE, [*clipped, f"{TOP}=8"]).notices
    assert "loss_fn.ratio_clip_min" in notice


def test_keys_of_distillation_are_named_as_unread_by_grpo(room: Path) -> None:
    own = [f"policy.model_name={room / 'base'}", "loss_fn.kl_type=mixed", "loss_fn.mixed_kl_weight=0.5"]
    [notice] = load_recipe(RECIPE.with_name("grpo-quickstart-megatron.yaml"), own).notices
    assert "loss_fn.kl_type" in notice and "mixed_kl_weight" not in notice


def test_another_scale_is_in_b(room: Path) -> None:
    plain = other_adapter(recipe(room).policy, str(room / "teacher"), "teacher.adapter")
    halved = other_adapter(recipe(room, f"{PEFT}.alpha=16").policy, str(room / "teacher"), "teacher.adapter")
    assert plain.keys() == halved.keys()
    for name, tensor in plain.items():
        assert torch.equal(halved[name], tensor / 2 if name.endswith("lora_B") else tensor)


class Server(JsonServer):
    """A token's log-probability is minus its id, a text's tokens are its bytes. behaviour: ok, error, garbage or other
    tokens. asked: models of the requests."""

    def __init__(self, max_length: int = 65):
        self.behaviour, self.asked, self.max_length = "ok", [], max_length
        super().__init__()

    def get(self, path: str) -> Any:
        models = [{"id": "big", "parent": None, "max_model_len": self.max_length}, {"id": "tuned", "parent": "big"}]
        return {"data": models}

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(body["model"])
        if self.behaviour == "error":
            return 500, {"error": "out of memory"}
        if self.behaviour == "garbage":
            return 200, {"choices": [{"prompt_logprobs": [None, {"0": {"logprob": -1.0}}]}]}
        if path == "/tokenize":
            shift = 1 if self.behaviour == "other tokens" else 0
            return 200, {"tokens": [token + shift for token in build_tokenizer().encode(body["prompt"])]}
        if body["prompt_logprobs"] > 20:
            return 400, {"error": "Requested prompt logprobs of 64, which is greater than max allowed: 20"}
        if body["prompt_logprobs"]:
            return 200, {
                "choices": [{"index": 0, "prompt_logprobs": [None, *map(self.most_likely, body["prompt"][1:])]}]
            }
        scores = [None, *({str(token): {"logprob": -float(token), "rank": 1}} for token in body["prompt"][1:])]
        return 200, {"choices": [{"index": 0, "prompt_logprobs": scores}]}

    def most_likely(self, token: int) -> dict[str, Any]:
        """The two most likely are 40 and 41 (-0.5, -1), in another order, and the token itself (its id)."""
        best = {41: -1.0, 40: -0.5}
        return {str(one): {"logprob": value} for one, value in ({token: -float(token)} | best).items()}


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    both = [Server(), Server()]
    yield both
    for one in both:
        one.http.shutdown()
        one.http.server_close()


def teacher_of(
    servers: list[Server], name: str | None = None, max_length: int = 64, num_candidates: int = 0
) -> TeacherServers:
    return TeacherServers([server.url for server in servers], name, 5.0, 4, max_length, num_candidates)


def test_rows_are_scored_by_the_servers_in_turn(servers: list[Server]) -> None:
    teacher = teacher_of(servers, "tuned")
    teacher.start(build_tokenizer(), ["1+1="])
    rows = [[5, 6, 7], [8, 9], [3, 2, 1]]
    assert [scores.tolist() for scores in teacher.score(rows)] == [[0, -6, -7], [0, -9], [0, -2, -1]]
    assert all(server.asked and set(server.asked) == {"tuned"} for server in servers)


def test_a_teachers_most_likely_tokens(servers: list[Server]) -> None:
    teacher = teacher_of(servers, num_candidates=2)
    teacher.start(build_tokenizer(), [])
    found = MostLikely(2).parts(teacher.score([[5, 6, 41]])[0])
    assert [part[1:].tolist() for part in found] == [[-6, -1], [[-0.5, -1]] * 2, [[40, 41]] * 2]
    assert all(not part[0].any() for part in found)
    with pytest.raises(UserError, match="does not give its 64 most likely tokens.*--max-logprobs 64"):
        teacher_of(servers, num_candidates=64).start(build_tokenizer(), [])
    servers[0].behaviour = "garbage"
    with pytest.raises(UserError, match="not each token with 2 others"):
        teacher_of(servers, num_candidates=2).start(build_tokenizer(), [])


@pytest.mark.parametrize("behaviour", ["error", "garbage"])
def test_a_server_that_fails_is_left_out(servers: list[Server], behaviour: str) -> None:
    teacher = teacher_of(servers)
    teacher.start(build_tokenizer(), [])
    servers[0].behaviour = behaviour
    assert [scores.tolist() for scores in teacher.score([[5, 6]] * 4)] == [[0, -6]] * 4
    assert list(teacher.failures) == [servers[0].url]
    servers[1].behaviour = behaviour
    with pytest.raises(RolloutError, match="no server of the teacher is left: http"):
        teacher.score([[5, 6]])


def test_a_dry_run_says_which_servers_are_not_there(room: Path, servers: list[Server]) -> None:
    urls = f"teacher.urls=[{servers[0].url}, http://127.0.0.1:9]"
    found = Distillation().not_ready(recipe(room, "teacher.adapter=null", urls), World.alone())
    assert len(found) == 1 and found[0].startswith("not ready yet: teacher.urls: http://127.0.0.1:9")
    assert Distillation().not_ready(recipe(room), World.alone()) == []


def test_what_a_server_may_not_be(servers: list[Server]) -> None:
    with pytest.raises(UserError, match="serves big, tuned"):
        teacher_of(servers, "small").start(build_tokenizer(), [])
    with pytest.raises(UserError, match="--max-model-len 66"):
        teacher_of(servers, max_length=65).start(build_tokenizer(), [])
    servers[1].behaviour = "other tokens"
    with pytest.raises(UserError, match="makes other tokens of '1\\+1='"):
        teacher_of(servers).start(build_tokenizer(), ["1+1="])
    with pytest.raises(UserError, match="teacher.urls: http://127.0.0.1:9"):
        TeacherServers(["http://127.0.0.1:9"], None, 1.0, 1, 8).start(build_tokenizer(), [])
