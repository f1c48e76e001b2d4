"""ELPO in a loop of one's own: python elpo_in_one_page.py MODEL [section.key=value ...]"""

import asyncio
import sys

import elpo_fast as elpo


async def main(name, *overrides):
    settings = [f"model.name={name}", "task.options.steps=3", "tools.workers=1", *overrides]
    config = elpo.parse_config({}, settings)
    async with elpo.assembled(config) as parts:
        for step in range(config.train.steps):
            tasks = [parts.source.train(4 * step + index) for index in range(4)]
            trees = await parts.collector.collect(
                tasks, lambda: elpo.make_planner(config.algo), seed=step
            )
            forest = elpo.Forest.from_trees(trees)
            scored = elpo.score(forest, config.algo)
            batches = elpo.micro_batches(
                forest, scored, range(len(trees)), config.train.micro_batch_tokens, scale=1 / 4
            )
            stats = parts.policy.update(batches)
            await parts.engine.update_weights(elpo.named_weights(parts.loaded.model), step + 1)
            print(f"step {step + 1}: loss {stats.loss:.4f}, gradient {stats.grad_norm:.3f}")
        result = await elpo.evaluate(parts.collector, config.eval, seed=0)
        print(f"success {result.success:.1%}")
        parts.loaded.model.save_pretrained("trained")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
