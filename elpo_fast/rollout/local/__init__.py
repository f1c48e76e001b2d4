"""An engine in this process: `engine` is its asyncio side, `batching` what a step computes."""
