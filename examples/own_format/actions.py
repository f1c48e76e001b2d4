"""A format of tool calls of one's own: a line `Action: NAME[CODE]`."""

import re

from elpo_fast import CallFormat, MalformedCall, ToolCall


class Actions(CallFormat):
    opening, closing = "Action: ", "\n"

    def read(self, body):
        found = re.fullmatch(r"(\w+)\[(.*)\]", body)
        if found is None:
            return MalformedCall("An action is written as NAME[CODE].")
        return ToolCall(found[1], {"code": found[2]})

    def write(self, name, arguments):
        return f"{name}[{arguments['code']}]"
