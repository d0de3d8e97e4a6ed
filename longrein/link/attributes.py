"""Attributes of a far environment: read, write and call them by name. What they are is the far side's business."""

from __future__ import annotations

from typing import Any

from longrein.link import codec
from longrein.link import messages as m
from longrein.link.client import Client


class RemoteAttributes:
    """What every single far environment offers, Gymnasium's and PettingZoo's. Needs the scope "call".

    Raises NotFound for what the far environment has not, Forbidden for a name that begins with an underscore.
    """

    _client: Client

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method of the far environment."""
        return self._attribute("call", name, codec.wrap(list(args)), codec.wrap(kwargs))

    def get_attr(self, name: str) -> Any:
        """Read an attribute of the far environment, dotted names included."""
        return self._attribute("get", name)

    def set_attr(self, name: str, value: Any) -> None:
        """Write an attribute of the far environment."""
        self._attribute("set", name, [codec.wrap(value)])

    def _attribute(
        self, op: str, name: str, args: list[Any] | None = None, kwargs: dict[str, Any] | None = None
    ) -> Any:
        reply, _, _ = self._client.ask(m.Call, op, name, args or [], kwargs or {}, 0)
        return reply.value
