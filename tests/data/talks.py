"""Conversations for the tests of data."""

from __future__ import annotations

from deltamem_tool.data.dialogues import assistant, user

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [user("My dog is called Rex."), assistant("Noted."), user("What is my dog called?"), assistant("Rex.")]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"where": "shed", "deep": None}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
FOUND = {"role": "tool", "content": "found", "name": "look", "tool_call_id": "a1"}
TOOLS = [*TALK[:2], user("Where is it?"), CALLING, FOUND, assistant("In the shed.")]

# Writes calls and names, like the templates of models with tools.
TOOL_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.name or '' }}{{ message.content or '' }}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
