"""Rollout trees of one's own model: python collect_trees.py MODEL; or in a notebook, await main."""

import asyncio
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import elpo_fast as elpo


async def main(name):
    model = AutoModelForCausalLM.from_pretrained(name)
    tokenizer = AutoTokenizer.from_pretrained(name)
    config = elpo.load_config("collect_trees.yaml")
    async with elpo.assembled(config, model=model, tokenizer=tokenizer) as parts:
        tasks = [parts.source.train(index) for index in range(4)]
        trees = await parts.collector.collect(tasks, lambda: elpo.make_planner(config.algo), seed=0)
    return elpo.Forest.from_trees(trees)


if __name__ == "__main__":
    print(asyncio.run(main(sys.argv[1])).reward)
