"""Train on what others collected: python train_on_trajectories.py MODEL FILE [section.key=value]

FILE has rows {"messages": [...], "reward": 1.0}, of `elpo eval` or of another framework, or is a
`.pt` file of slime or miles.
"""

import asyncio
import sys
from dataclasses import replace

import elpo_fast as elpo


async def main(name, path, *overrides):
    config = elpo.parse_config({}, [f"model.name={name}", *overrides])
    async with elpo.assembled(config, samples=False) as parts:
        trees = elpo.read_trees(path, parts.collector.chat)
        forest = elpo.Forest.from_trees(trees)
        batches = elpo.micro_batches(
            forest,
            elpo.score(forest, config.algo),
            range(len(trees)),
            config.train.micro_batch_tokens,
            scale=1 / len(trees),
        )
        # Messages do not say how likely their tokens were; ratios are against the model as it is.
        logprobs = parts.policy.logprobs(batches)
        pairs = zip(batches, logprobs, strict=True)
        batches = [replace(batch, old_logprob=logprob) for batch, logprob in pairs]
        for step in range(config.train.steps):
            stats = parts.policy.update(batches)
            print(f"update {step + 1}: loss {stats.loss:.4f}, gradient {stats.grad_norm:.3f}")
        parts.loaded.model.save_pretrained("trained")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
