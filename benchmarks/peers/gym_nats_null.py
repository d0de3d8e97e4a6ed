"""A system as a user of gym-nats writes it: six callbacks of nats-py that cost nothing. `gym_nats_null.py URL`."""

from __future__ import annotations

import asyncio
import base64
import struct
import sys
from typing import Any

import nats

STATE = base64.b64encode(struct.pack("<4d", 0, 1, 0, 1))
ANSWERS = {
    "rl.update": STATE,
    "rl.reward": base64.b64encode(struct.pack("<d", 1.0)),
    "rl.action": b"",
    "rl.reset": b"",
    "rl.actions": base64.b64encode(struct.pack("<2d", 0, 1)),
    "r.done": base64.b64encode(struct.pack("<d", 0.0)),
}


async def main(url: str) -> None:
    """Answer for ever."""
    client = await nats.connect(url)

    async def answer(message: Any) -> None:
        await message.respond(ANSWERS[message.subject])

    for subject in ANSWERS:
        await client.subscribe(subject, cb=answer)
    await client.flush()
    print("ready", flush=True)
    await asyncio.Event().wait()


asyncio.run(main(sys.argv[1]))
