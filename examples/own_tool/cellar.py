"""A tool with state: a cellar of three barrels that the model fills and pours."""

from elpo_fast import Section, Tool, ToolResult

SIZES = (8, 5, 3)


SCHEMA = {
    "type": "function",
    "function": {
        "name": "pour",
        "description": "Pours from one barrel (1 to 3) into another until that is full.",
        "parameters": {
            "type": "object",
            "properties": {"source": {"enum": [1, 2, 3]}, "into": {"enum": [1, 2, 3]}},
            "required": ["source", "into"],
        },
    },
}


class CellarOptions(Section):
    first: int = 8  # litres in the first barrel at the start


class Cellar(Tool):
    Options = CellarOptions
    schema = SCHEMA

    def __init__(self, options):
        self.options = options

    async def open(self, task):
        return (self.options.first, 0, 0)

    async def call(self, state, arguments):
        source, into = arguments["source"] - 1, arguments["into"] - 1
        if source == into:
            return ToolResult("these are one barrel", state, error=True)
        litres = list(state)
        poured = min(litres[source], SIZES[into] - litres[into])
        litres[source] -= poured
        litres[into] += poured
        return ToolResult(f"now {litres} of {list(SIZES)} litres", tuple(litres))


def rows():
    for litres in range(1, 8):
        yield {
            "prompt": f"There are barrels of {SIZES} litres, and the first one is full. Pour until "
            f"one of them holds {litres} litres.",
            "litres": litres,
        }


def score(task, messages, end):
    """Whether the last answer of the tool says so."""
    said = [message["content"] for message in messages if message["role"] == "tool"]
    return float(any(f"{task.info['litres']}" in text.split(" of ")[0] for text in said[-1:]))
