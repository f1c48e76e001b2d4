"""What is known of a server's prefixes, and who waits for whom."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from elpo_fast.rollout.sglang.stems import BLOCK, Stems


def tokens(*parts: tuple[int, int]) -> np.ndarray:
    """So many copies of each token."""
    return np.concatenate([np.full(count, token) for token, count in parts])


def test_prefixes_are_known_block_by_block() -> None:
    stems = Stems()
    assert stems.known(tokens((1, 40))) == 0
    stems.add(tokens((1, 2 * BLOCK), (2, BLOCK + 3)))
    assert stems.known(tokens((1, 2 * BLOCK), (2, BLOCK + 3))) == 3 * BLOCK
    assert stems.known(tokens((1, 2 * BLOCK), (3, BLOCK))) == 2 * BLOCK
    assert stems.known(tokens((1, BLOCK - 1))) == 0
    assert stems.known(tokens((2, BLOCK))) == 0  # known after another prefix only


def test_a_common_stem_is_computed_once_and_different_ends_at_the_same_time() -> None:
    events: list[str] = []

    async def ask(stems: Stems, name: str, prefix: np.ndarray) -> None:
        async with stems.compute(prefix):
            events.append(f"{name} starts")
            await asyncio.sleep(0.01)
            events.append(f"{name} ends")

    async def work() -> None:
        stems, stem = Stems(), (1, 2 * BLOCK)
        await asyncio.gather(
            ask(stems, "a", tokens(stem, (2, BLOCK))),
            ask(stems, "b", tokens(stem, (3, BLOCK))),
            ask(stems, "c", tokens(stem, (4, BLOCK))),
        )

    asyncio.run(work())
    assert events[:2] == ["a starts", "a ends"]
    assert set(events[2:4]) == {"b starts", "c starts"}


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
def test_whoever_fails_leaves_its_part_to_the_next(error: type[BaseException]) -> None:
    async def work() -> None:
        stems, prefix = Stems(), tokens((1, 3 * BLOCK))
        started = asyncio.Event()

        async def fail() -> None:
            async with stems.compute(prefix):
                started.set()
                await asyncio.sleep(0.01)
                raise error

        async def follow() -> int:
            await started.wait()
            async with stems.compute(prefix):
                return stems.known(prefix)

        failed, known = await asyncio.gather(fail(), follow(), return_exceptions=True)
        assert isinstance(failed, error) and known == 3 * BLOCK

    asyncio.run(work())
