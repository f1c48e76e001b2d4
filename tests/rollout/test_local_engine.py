"""The local engine against a plain transformers forward, and its promises to callers."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from elpo_fast.model.tokenizer import train_tokenizer
from elpo_fast.rollout.local.engine import LocalEngine
from elpo_fast.types import Engine, Sampling


def texts_of(completions: list[Any]) -> list[list[int]]:
    return [c.token_ids.tolist() for c in completions]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_and_entropies_equal_a_plain_forward(
    any_model: Any, prompt: Any, use: Any, check: Any, temperature: float
) -> None:
    prefix = prompt(23)
    sampling = Sampling(max_tokens=18, temperature=temperature, seed=1)
    for completion in use(any_model, lambda e: e.generate(prefix, 3, sampling), prefill_chunk=7):
        assert completion.finish == "length" and len(completion.token_ids) == 18
        assert completion.token_ids.dtype == np.int32
        assert completion.logprobs.dtype == completion.entropies.dtype == np.float32
        check(any_model, prefix, completion, temperature)


def test_bfloat16_is_no_further_from_fp32_than_transformers(
    any_model: Any, prompt: Any, use: Any
) -> None:
    prefix = prompt(30)
    sampling = Sampling(max_tokens=40, seed=0)
    completions = use(any_model, lambda e: e.generate(prefix, 5, sampling), dtype=torch.bfloat16)
    errors = {"engine": [], "transformers": []}
    other = type(any_model)(any_model.config)
    other.load_state_dict(any_model.state_dict())
    other.bfloat16().eval()
    for c in completions:
        ids = torch.tensor(np.concatenate([prefix, c.token_ids])).long()[None]
        with torch.no_grad():
            exact, rounded = (
                m(ids).logits[0, len(prefix) - 1 : -1].double().log_softmax(-1)
                for m in (any_model, other)
            )
        chosen = ids[0, len(prefix) :, None]
        expected = exact.gather(-1, chosen)[:, 0].numpy()
        errors["engine"].append(np.abs(c.logprobs - expected))
        errors["transformers"].append(np.abs(rounded.gather(-1, chosen)[:, 0].numpy() - expected))
    assert 0 < np.mean(errors["engine"]) <= 1.05 * np.mean(errors["transformers"])


def test_mixed_batch_gives_each_request_what_it_gets_alone(
    model: Any, prompt: Any, use: Any, check: Any
) -> None:
    requests = [
        (prompt(5, 1), 2, Sampling(max_tokens=30, seed=1)),
        (prompt(60, 2), 3, Sampling(max_tokens=9, seed=2, temperature=0.5)),
        (prompt(1, 3), 1, Sampling(max_tokens=40, seed=3, top_p=0.8, top_k=30)),
        (prompt(60, 2)[:31], 2, Sampling(max_tokens=12, seed=4, temperature=0)),
    ]

    async def together(engine: LocalEngine) -> Any:
        tasks = []
        for request in requests:  # later ones join while earlier ones decode
            tasks.append(asyncio.create_task(engine.generate(*request)))
            await asyncio.sleep(0.01)
        return await asyncio.gather(*tasks)

    mixed = use(model, together, max_batch=5, prefill_chunk=16)
    for request, completions in zip(requests, mixed, strict=True):
        alone = use(model, lambda e, r=request: e.generate(*r))
        assert sorted(texts_of(completions)) == sorted(texts_of(alone))
        if request[2].top_p == 1 and request[2].temperature:
            for c in completions:
                check(model, request[0], c, request[2].temperature)


def test_the_seed_decides_and_no_seed_varies(model: Any, prompt: Any, use: Any) -> None:
    async def work(engine: LocalEngine) -> Any:
        seeded = Sampling(max_tokens=12, seed=5)
        first = texts_of(await engine.generate(prompt(9), 4, seeded))
        again = texts_of(await engine.generate(prompt(9), 4, seeded))
        free = [texts_of(await engine.generate(prompt(9), 4, Sampling(12))) for _ in range(2)]
        return first, again, free

    first, again, free = use(model, work, seed=3)
    assert sorted(first) == sorted(again)
    assert len({tuple(t) for t in first}) == 4
    assert free[0] != free[1]
    assert free == use(model, work, seed=3)[2] != use(model, work, seed=4)[2]


def test_siblings_compute_their_prompt_once(model: Any, prompt: Any, use: Any) -> None:
    async def work(engine: LocalEngine) -> Any:
        completions = await engine.generate(prompt(50), 8, Sampling(max_tokens=4))
        return completions, engine.stats()

    completions, stats = use(model, work)
    assert stats.prompt_tokens == 400
    assert (stats.computed_tokens, stats.cached_tokens) == (50, 350)
    assert stats.generated_tokens == 32
    assert sorted(c.cached_tokens for c in completions) == [0] + [50] * 7


def test_requests_made_together_share_their_common_prefix(
    model: Any, prompt: Any, use: Any, check: Any
) -> None:
    stem = prompt(40)
    prefixes = [np.concatenate([stem, prompt(4, seed)]) for seed in range(1, 6)]

    async def work(engine: LocalEngine) -> Any:
        sampling = Sampling(max_tokens=6)
        done = await asyncio.gather(*(engine.generate(p, 1, sampling) for p in prefixes))
        return done, engine.stats()

    done, stats = use(model, work, prefill_chunk=15)
    assert stats.computed_tokens == 40 + 5 * 4
    for prefix, (completion,) in zip(prefixes, done, strict=True):
        check(model, prefix, completion)


def test_branch_from_the_middle_of_a_trajectory_is_served_from_the_cache(
    any_model: Any, prompt: Any, use: Any, check: Any
) -> None:
    async def work(engine: LocalEngine) -> Any:
        prefix = prompt(80)
        (old,) = await engine.generate(prefix, 1, Sampling(max_tokens=60))
        branch = np.concatenate([prefix, old.token_ids[:40], prompt(5, 9)])
        return branch, await engine.generate(branch, 3, Sampling(max_tokens=10)), engine.stats()

    branch, completions, stats = use(any_model, work)
    assert all(c.cached_tokens >= 0.95 * len(branch) for c in completions)
    assert stats.computed_tokens == 80 + 5
    for completion in completions:
        check(any_model, branch, completion)


def test_a_whole_trajectory_can_be_continued(model: Any, prompt: Any, use: Any, check: Any) -> None:
    async def work(engine: LocalEngine) -> Any:
        (old,) = await engine.generate(prompt(20), 1, Sampling(max_tokens=30))
        prefix = np.concatenate([prompt(20), old.token_ids])
        first = await engine.generate(prefix, 2, Sampling(max_tokens=8))
        second = await engine.generate(prefix, 1, Sampling(max_tokens=8))
        return prefix, first + second

    prefix, completions = use(model, work)
    # The last sampled token is computed by the first row; a fully cached prefix once more.
    assert sorted(c.cached_tokens for c in completions) == [49, 49, 50]
    for completion in completions:
        check(model, prefix, completion)


def test_a_small_cache_evicts_recomputes_and_never_grows(
    model: Any, prompt: Any, use: Any, check: Any
) -> None:
    async def work(engine: LocalEngine) -> Any:
        done = []
        for seed in (*range(6), 0):
            prefix = prompt(60, seed)
            done.append((prefix, await engine.generate(prefix, 2, Sampling(max_tokens=20))))
            assert len(engine._batcher._cache) <= 150
        return done, engine.stats()

    done, stats = use(model, work, cache_tokens=150)
    assert done[-1][1][0].cached_tokens < 60  # the first prompt was dropped meanwhile
    assert stats.computed_tokens + stats.cached_tokens == stats.prompt_tokens == 7 * 120
    for prefix, completions in done:
        for completion in completions:
            check(model, prefix, completion)


def test_rows_that_do_not_fit_together_are_preempted_and_still_exact(
    model: Any, prompt: Any, use: Any, check: Any
) -> None:
    requests = [(prompt(20, seed), 2, Sampling(max_tokens=60, seed=seed)) for seed in range(4)]

    async def work(engine: LocalEngine) -> Any:
        return await asyncio.gather(*(engine.generate(*r) for r in requests)), engine.stats()

    crowded, stats = use(model, work, cache_tokens=170, max_batch=8)
    roomy, _ = use(model, work, max_batch=8)
    assert stats.recomputed_tokens > 0
    assert stats.computed_tokens + stats.cached_tokens == stats.prompt_tokens == 160
    assert stats.generated_tokens == 480
    for request, narrow, wide in zip(requests, crowded, roomy, strict=True):
        assert sorted(texts_of(narrow)) == sorted(texts_of(wide))
        for completion in narrow:
            check(model, request[0], completion)


def test_update_weights_changes_output_version_and_forgets_the_cache(
    any_model: Any, prompt: Any, use: Any, check: Any
) -> None:
    new = type(any_model)(any_model.config).eval()
    new.load_state_dict(any_model.state_dict())
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.02)

    async def work(engine: LocalEngine) -> Any:
        (before,) = await engine.generate(prompt(30), 1, Sampling(max_tokens=8, seed=0))
        await engine.update_weights(new.named_parameters(), 7)
        (after,) = await engine.generate(prompt(30), 1, Sampling(max_tokens=8, seed=0))
        return before, after, engine.weight_version

    before, after, version = use(any_model, work)
    assert (before.weight_version, after.weight_version, version) == (0, 7, 7)
    assert after.cached_tokens == 0
    check(any_model, prompt(30), before)
    check(new, prompt(30), after)


def test_the_engine_keeps_its_weights_when_the_shared_model_changes(
    prompt: Any, model: Any, use: Any, check: Any
) -> None:
    shared = type(model)(model.config).eval()

    async def work(engine: LocalEngine) -> Any:
        shared.load_state_dict(model.state_dict())
        (stale,) = await engine.generate(prompt(6), 1, Sampling(max_tokens=4, seed=0))
        await engine.update_weights(shared.named_parameters(), 1)
        (fresh,) = await engine.generate(prompt(6), 1, Sampling(max_tokens=4, seed=0))
        return stale, fresh

    stale, fresh = use(shared, work)
    check(model, prompt(6), fresh)
    assert np.abs(stale.logprobs - fresh.logprobs).max() > 0.01


@pytest.mark.parametrize("warm", [False, True], ids=["empty cache", "warm cache"])
def test_score_equals_a_plain_forward(any_model: Any, prompt: Any, use: Any, warm: bool) -> None:
    async def work(engine: LocalEngine) -> Any:
        if warm:
            await engine.generate(prompt(30), 1, Sampling(max_tokens=4))
        return await engine.score(prompt(40)), engine.stats()

    ids = torch.tensor(prompt(40))
    with torch.no_grad():
        logprobs = any_model(ids[None]).logits[0, :-1].log_softmax(-1)
    scored, stats = use(any_model, work)
    expected = logprobs.gather(-1, ids[1:, None])[:, 0]
    np.testing.assert_allclose(scored, expected[None], rtol=0, atol=1e-4)
    assert stats.computed_tokens == (30 if warm else 0)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(
    model: Any, prompt: Any, use: Any, check: Any
) -> None:
    tensors = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    tensors["lm_head.weight"] = torch.ones(320, 96)

    async def work(engine: LocalEngine) -> Any:
        with pytest.raises(ValueError, match="is tied to the embedding but the update differs"):
            await engine.update_weights(tensors.items(), 1)
        assert engine.weight_version == 0
        return await engine.generate(prompt(6), 1, Sampling(max_tokens=3))

    check(model, prompt(6), use(model, work)[0])


def test_stop_strings_end_a_completion_as_soon_as_its_text_holds_one(
    model: Any, prompt: Any, use: Any
) -> None:
    tokenizer = train_tokenizer(["carry the four to the total and take seven from the sum"] * 3)

    async def work(engine: LocalEngine) -> Any:
        free = await engine.generate(prompt(6), 4, Sampling(max_tokens=30, seed=1))
        stops = []
        for c in free:  # three characters out of the middle, whatever tokens they lie in
            text = tokenizer.decode(c.token_ids[: len(tokenizer)].tolist())
            stops.append(text[len(text) // 2 :][:3])
        sampling = Sampling(max_tokens=30, seed=1, stop=tuple(stops))
        return free, stops, await engine.generate(prompt(6), 4, sampling)

    free, stops, stopped = use(model, work, tokenizer)
    assert all(c.finish == "stop_string" for c in stopped)
    by_start = {tuple(c.token_ids[:3].tolist()): c.token_ids.tolist() for c in free}
    for c in stopped:
        whole = by_start[tuple(c.token_ids[:3].tolist())]
        ends = [
            end for end in range(1, 31) if any(s in tokenizer.decode(whole[:end]) for s in stops)
        ]
        assert c.token_ids.tolist() == whole[: ends[0]]


def test_cancelling_frees_the_rows_for_others(model: Any, prompt: Any, use: Any) -> None:
    async def work(engine: LocalEngine) -> Any:
        task = asyncio.create_task(engine.generate(prompt(10), 4, Sampling(max_tokens=400)))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        done = await engine.generate(prompt(10, 1), 2, Sampling(max_tokens=3))
        return done, engine.stats()

    done, stats = use(model, work, max_batch=2)
    assert len(done) == 2
    assert stats.generated_tokens < 800


@pytest.mark.parametrize(
    ("prefix", "n", "sampling", "message"),
    [
        ([1, -1], 1, Sampling(4), "token id -1"),
        ([1] * 50, 1, Sampling(51), "50 prefix tokens and 51 new ones exceed the 100"),
        ([1], 1, Sampling(4, temperature=float("nan")), "temperature"),
        ([1], 1, Sampling(4, top_k=-1), "top_k"),
        ([1], 1, Sampling(4, min_p=1.5), "min_p"),
        ([1], 1, Sampling(4, stop=("x",)), "need a tokenizer"),
    ],
)
def test_bad_input_is_refused(  # what every engine refuses alike is in test_engines.py
    model: Any, use: Any, prefix: Any, n: int, sampling: Sampling, message: str
) -> None:
    async def work(engine: LocalEngine) -> None:
        with pytest.raises(ValueError, match=message):
            await engine.generate(np.array(prefix), n, sampling)

    use(model, work, cache_tokens=100)


def test_the_longest_request_that_fits_is_served(model: Any, prompt: Any, use: Any) -> None:
    sampling = Sampling(max_tokens=50)
    (completion, _) = use(model, lambda e: e.generate(prompt(50), 2, sampling), cache_tokens=100)
    assert len(completion.token_ids) == 50


def test_unsupported_models_are_refused() -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 50}
    gemma = GemmaForCausalLM(
        GemmaConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=16, **small)
    )
    with pytest.raises(ValueError, match="not GemmaForCausalLM"):
        LocalEngine(gemma, None)
    shape = {"num_attention_heads": 2, "num_key_value_heads": 1, **small}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match="not 'dynamic'"):
        LocalEngine(LlamaForCausalLM(LlamaConfig(rope_parameters=dynamic, **shape)), None)
    with pytest.raises(ValueError, match="activation 'gelu'"):
        LocalEngine(LlamaForCausalLM(LlamaConfig(hidden_act="gelu", **shape)), None)


@pytest.mark.parametrize("option", ["max_batch", "cache_tokens", "prefill_chunk"])
def test_sizes_must_be_positive(model: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        LocalEngine(model, None, **{option: 0})


def test_scaled_rotary_embeddings_follow_the_model(prompt: Any, use: Any, check: Any) -> None:
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    (completion,) = use(model, lambda e: e.generate(prompt(90), 1, Sampling(max_tokens=30)))
    check(model, prompt(90), completion)


def test_diverged_weights_are_an_error_for_everyone_and_can_be_replaced(
    model: Any, prompt: Any, use: Any, check: Any
) -> None:
    async def work(engine: LocalEngine) -> Any:
        broken = [(n, torch.full_like(p, torch.nan)) for n, p in model.named_parameters()]
        await engine.update_weights([(n, p) for n, p in broken if n != "lm_head.weight"], 1)
        asked = [engine.generate(prompt(6, s), 2, Sampling(max_tokens=4)) for s in range(3)]
        for result in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(result, RuntimeError) and "diverged" in str(result)
        await engine.update_weights(model.named_parameters(), 2)
        return await engine.generate(prompt(6), 1, Sampling(max_tokens=4))

    check(model, prompt(6), use(model, work)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_memory_comes_back_with_the_next_weights(
    model: Any, prompt: Any, use: Any, dtype: torch.dtype
) -> None:
    sampling = Sampling(max_tokens=30, seed=0)

    async def work(engine: LocalEngine) -> Any:
        decoder = engine._decoder
        held = [weakref.ref(each) for each in (decoder.embedding, decoder.keys, decoder.values)]
        running = asyncio.create_task(engine.generate(prompt(9), 2, sampling))
        await asyncio.sleep(0)
        await engine.release()
        await engine.release()
        assert not any(each() is not None for each in held)
        for asked in (engine.generate(prompt(9), 1, sampling), engine.score(prompt(9))):
            with pytest.raises(RuntimeError, match="update_weights"):
                await asked
        await engine.update_weights(model.named_parameters(), 1)
        return await running, await engine.generate(prompt(9), 2, sampling)

    before, after = use(model, work, dtype=dtype)
    assert texts_of(before) == texts_of(after)
    assert [c.weight_version for c in (*before, *after)] == [0, 0, 1, 1]


def test_closing_fails_what_runs_refuses_what_comes_and_ends_the_thread(
    model: Any, prompt: Any
) -> None:
    async def whole() -> None:
        engine = LocalEngine(model, None)
        running = asyncio.create_task(engine.generate(prompt(10), 2, Sampling(max_tokens=400)))
        await asyncio.sleep(0.02)
        await engine.close()
        with pytest.raises(RuntimeError, match="closed"):
            await running
        with pytest.raises(RuntimeError, match="closed"):
            await engine.generate(prompt(10), 1, Sampling(max_tokens=1))
        with pytest.raises(RuntimeError, match="closed"):
            await engine.update_weights(model.named_parameters(), 1)
        await engine.close()

    asyncio.run(whole())
    assert not [t for t in threading.enumerate() if t.name.startswith("local-engine")]


def test_the_event_loop_stays_free_while_the_engine_computes(
    model: Any, prompt: Any, use: Any
) -> None:
    async def work(engine: LocalEngine) -> float:
        await engine.generate(prompt(5), 1, Sampling(max_tokens=1))
        task = asyncio.create_task(engine.generate(prompt(100), 8, Sampling(max_tokens=200)))
        ticks = 0
        started = time.perf_counter()
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks / (time.perf_counter() - started)

    assert use(model, work) > 20  # per second; a blocked loop would tick once


def test_one_engine_serves_several_event_loops_in_turn(model: Any, prompt: Any) -> None:
    engine: Engine = LocalEngine(model, None)
    sampling = Sampling(max_tokens=3, seed=0)
    first, second = (asyncio.run(engine.generate(prompt(7), 1, sampling)) for _ in range(2))
    assert texts_of(first) == texts_of(second)
    asyncio.run(engine.close())
