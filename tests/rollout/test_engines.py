"""What every engine promises, asked of each of them; expected values from a plain forward."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import torch

from elpo_fast.types import Engine, Sampling


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_equal_a_plain_forward(
    qwen3: Any, with_engine: Any, prompt: Any, check: Any, temperature: float
) -> None:
    sampling = Sampling(max_tokens=20, temperature=temperature)
    for completion in with_engine(lambda e: e.generate(prompt(30), 3, sampling)):
        assert completion.finish == "length" and len(completion.token_ids) == 20
        assert completion.token_ids.dtype == np.int32
        assert completion.logprobs.dtype == completion.entropies.dtype == np.float32
        check(qwen3, prompt(30), completion, temperature)


def test_the_most_likely_tokens_are_certain(qwen3: Any, with_engine: Any, prompt: Any) -> None:
    async def work(engine: Engine) -> Any:
        return await engine.generate(prompt(30), 2, Sampling(max_tokens=12, temperature=0))

    completions = with_engine(work)
    ids = torch.tensor(np.concatenate([prompt(30), completions[0].token_ids]))
    with torch.no_grad():
        logits = qwen3(ids[None]).logits[0, 29:-1]
    for completion in completions:
        assert completion.token_ids.tolist() == logits.argmax(-1).tolist()
        assert not completion.logprobs.any() and not completion.entropies.any()


def test_siblings_share_their_prompt_although_asked_for_together(
    qwen3: Any, with_engine: Any, prompt: Any, check: Any
) -> None:
    async def work(engine: Engine) -> Any:
        return await engine.generate(prompt(100), 8, Sampling(max_tokens=4)), engine.stats()

    completions, stats = with_engine(work)
    # SGLang computes a prompt's last token once for each sibling.
    assert 100 <= stats.computed_tokens <= 100 + 8
    assert stats.computed_tokens + stats.cached_tokens == stats.prompt_tokens == 800
    assert stats.generated_tokens == 32
    for completion in completions:
        check(qwen3, prompt(100), completion)


def test_requests_made_together_share_their_common_prefix(
    qwen3: Any, with_engine: Any, prompt: Any, check: Any
) -> None:
    stem = prompt(96)
    prefixes = [np.concatenate([stem, prompt(8, seed)]) for seed in range(1, 6)]

    async def work(engine: Engine) -> Any:
        sampling = Sampling(max_tokens=4)
        done = await asyncio.gather(*(engine.generate(p, 2, sampling) for p in prefixes))
        return done, engine.stats()

    done, stats = with_engine(work)
    assert stats.computed_tokens <= 96 + 5 * (8 + 2)
    for prefix, completions in zip(prefixes, done, strict=True):
        for completion in completions:
            check(qwen3, prefix, completion)


def test_a_branch_in_an_old_trajectory_is_served_from_the_cache(
    qwen3: Any, with_engine: Any, prompt: Any, check: Any
) -> None:
    async def work(engine: Engine) -> Any:
        (old,) = await engine.generate(prompt(120), 1, Sampling(max_tokens=80))
        branch = np.concatenate([prompt(120), old.token_ids[:60], prompt(5, 9)])
        return branch, await engine.generate(branch, 3, Sampling(max_tokens=10))

    branch, completions = with_engine(work)
    for completion in completions:
        assert completion.cached_tokens >= 0.95 * len(branch)
        check(qwen3, branch, completion)


def test_new_weights_change_output_version_and_forget_the_cache(
    qwen3: Any, with_engine: Any, prompt: Any, check: Any
) -> None:
    new = type(qwen3)(qwen3.config).eval()
    new.load_state_dict(qwen3.state_dict())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.02)

    async def work(engine: Engine) -> Any:
        (before,) = await engine.generate(prompt(50), 1, Sampling(max_tokens=8))
        scores = [await engine.score(prompt(50))]
        await engine.update_weights(new.named_parameters(), 7)
        stats = engine.stats()
        (after,) = await engine.generate(prompt(50), 1, Sampling(max_tokens=8))
        scores.append(await engine.score(prompt(50)))
        assert engine.stats().computed_tokens - stats.computed_tokens >= 50
        return before, after, scores, engine.weight_version

    before, after, scores, version = with_engine(work)
    assert (before.weight_version, after.weight_version, version) == (0, 7, 7)
    check(qwen3, prompt(50), before)
    check(new, prompt(50), after)
    ids = torch.tensor(prompt(50))
    for model, scored in zip((qwen3, new), scores, strict=True):
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, :-1].log_softmax(-1)
        expected = logprobs.gather(-1, ids[1:, None])[:, 0]
        np.testing.assert_allclose(scored, expected[None], rtol=0, atol=1e-4)


def test_an_update_waits_for_running_requests_and_later_ones_wait_for_it(
    qwen3: Any, with_engine: Any, prompt: Any
) -> None:
    async def work(engine: Engine) -> Any:
        await engine.generate(prompt(8), 1, Sampling(max_tokens=1))
        sampling = Sampling(max_tokens=60)
        early = asyncio.create_task(engine.generate(prompt(8), 4, sampling))
        await asyncio.sleep(0.01)
        update = asyncio.create_task(engine.update_weights(qwen3.named_parameters(), 1))
        await asyncio.sleep(0)
        late = asyncio.create_task(engine.generate(prompt(8), 4, sampling))
        return await early, await update, await late

    early, _, late = with_engine(work)
    assert {c.weight_version for c in early} == {0}
    assert {c.weight_version for c in late} == {1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "missing parameter model.norm.weight"),
        (lambda t: t.update(surprise=torch.zeros(1)), "unknown parameter surprise"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(3)}),
            r"gives model.norm.weight the shape \(3,\), the model has \(96,\)",
        ),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_faulty_update_is_refused_and_changes_nothing(
    qwen3: Any, with_engine: Any, prompt: Any, check: Any, change: Any, message: str
) -> None:
    tensors = {n: torch.zeros_like(p) for n, p in qwen3.named_parameters()}
    change(tensors)

    async def work(engine: Engine) -> Any:
        with pytest.raises(ValueError, match=message):
            await engine.update_weights(tensors.items(), 1)
        assert engine.weight_version == 0
        return await engine.generate(prompt(6), 1, Sampling(max_tokens=3))

    check(qwen3, prompt(6), with_engine(work)[0])


def test_stop_tokens_end_a_completion_and_are_kept(
    qwen3: Any, with_engine: Any, prompt: Any, check: Any, tokenizer: Any
) -> None:
    stops = (*range(0, 320, 3), tokenizer.eos_token_id)

    async def work(engine: Engine) -> Any:
        return await engine.generate(prompt(6), 6, Sampling(max_tokens=40, stop_token_ids=stops))

    completions = with_engine(work)
    assert sum(c.finish == "stop_token" for c in completions) >= 5
    for completion in completions:
        check(qwen3, prompt(6), completion)
        inside = np.isin(completion.token_ids, stops)
        assert not inside[:-1].any() and inside[-1] == (completion.finish == "stop_token")


def test_stop_strings_end_a_completion_as_soon_as_its_text_holds_one(
    qwen3: Any, with_engine: Any, tokenizer: Any, prompt: Any, check: Any
) -> None:
    stops = ("the", "ar", "e f", "r", "7")

    async def work(engine: Engine) -> Any:
        return await engine.generate(prompt(6), 8, Sampling(max_tokens=120, stop=stops))

    completions = with_engine(work)
    assert sum(c.finish == "stop_string" for c in completions) >= 6
    for completion in completions:
        check(qwen3, prompt(6), completion)
        ids = completion.token_ids.tolist()
        assert not any(s in tokenizer.decode(ids[:-1]) for s in stops)
        stopped = any(s in tokenizer.decode(ids) for s in stops)
        assert stopped == (completion.finish == "stop_string")


def test_a_cancelled_request_counts_for_nothing_and_leaves_room(
    with_engine: Any, prompt: Any
) -> None:
    async def work(engine: Engine) -> Any:
        await engine.generate(prompt(20, 1), 1, Sampling(max_tokens=1))
        task = asyncio.create_task(engine.generate(prompt(10), 4, Sampling(max_tokens=400)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await engine.generate(prompt(20, 1), 2, Sampling(max_tokens=3))

    assert [len(c.token_ids) for c in with_engine(work)] == [3, 3]


@pytest.mark.parametrize(
    ("prefix", "n", "sampling", "message"),
    [
        ([], 1, Sampling(4), "at least one token"),
        ([[1, 2]], 1, Sampling(4), "one dimension"),
        ([1.5], 1, Sampling(4), "float64"),
        ([1, 320], 1, Sampling(4), "token id 320 is outside the vocabulary of 320"),
        ([1], 0, Sampling(4), "n must be at least 1, got 0"),
        ([1], 1, Sampling(0), "max_tokens must be at least 1, got 0"),
        ([1] * 50, 1, Sampling(500), "50 prefix tokens and 500 new ones exceed the 5"),
        ([1], 1, Sampling(4, temperature=-1.0), "temperature"),
        ([1], 1, Sampling(4, top_p=0.0), "top_p"),
        ([1], 1, Sampling(4, stop=("",)), "must not be empty"),
    ],
)
def test_bad_input_is_refused_before_it_reaches_the_engine(
    with_engine: Any, prefix: Any, n: int, sampling: Sampling, message: str
) -> None:
    async def work(engine: Engine) -> None:
        with pytest.raises(ValueError, match=message):
            await engine.generate(np.array(prefix), n, sampling)

    with_engine(work)


def test_a_closed_engine_fails_what_runs_and_refuses_what_comes(
    with_engine: Any, prompt: Any
) -> None:
    async def work(engine: Engine) -> None:
        await engine.generate(prompt(10), 1, Sampling(max_tokens=1))
        running = asyncio.create_task(engine.generate(prompt(10), 2, Sampling(max_tokens=400)))
        await asyncio.sleep(0.05)
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await running
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate(prompt(10), 1, Sampling(max_tokens=1))

    with_engine(work)
