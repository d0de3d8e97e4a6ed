"""The description of the HTTP paths in OpenAPI 3.1, made from the messages' structs, so that it cannot lag behind."""

from __future__ import annotations

from typing import Any

import msgspec

from longrein.link import messages as m
from longrein.link.protocol import ANSWERS
from longrein.link.transports import http_json


def describe_paths() -> dict[str, Any]:
    """The paths in OpenAPI 3.1, from the structs of the messages."""
    requests = {http_json.PATHS[path]: path.decode() for path in http_json.PATHS if http_json.PATHS[path]}
    kinds = {str(kind.__struct_config__.tag): kind for kind in ANSWERS}
    answers: list[type[m.Reply]] = [*ANSWERS.values(), m.Fault]
    bodies = {name: _as_object(kinds[name], f"{kinds[name].__name__}Body", enveloped=False) for name in requests}
    replies = {reply: _as_object(reply, reply.__name__, enveloped=True) for reply in answers}
    _, schemas = msgspec.json.schema_components(
        [*bodies.values(), *replies.values()], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {
        path: {"post": _operation(name, kinds[name], bodies[name].__name__, ANSWERS[kinds[name]].__name__)}
        for name, path in requests.items()
    }
    paths[http_json.MESSAGE_PATH] = {"post": _message_operation()}
    for path, what, kind in (
        ("/healthz", "Whether the process lives", "text/plain"),
        ("/readyz", "Whether new leases are taken", "text/plain"),
        ("/metrics", "Counters in Prometheus' text format", "text/plain"),
        ("/openapi.json", "This description", "application/json"),
        ("/", "A page about this server", "text/html"),
    ):
        schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
        responses: dict[str, Any] = {"200": {"description": what, "content": {kind: {"schema": schema}}}}
        if path == "/readyz":
            responses["503"] = {"description": "The server is draining"}
        paths[path] = {"get": {"operationId": f"get{path.strip('/').split('.')[0].title() or 'Index'}",
                               "summary": what, "responses": responses}}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "longrein",
            "version": str(m.PROTOCOL_VERSION),
            "description": "Reinforcement learning environments, stepped from afar. The version is the protocol's.",
        },
        "servers": [{"url": "/"}],
        "security": [{}, {"bearer": []}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}},
    }


def _as_object(kind: type[m.Request | m.Reply], name: str, *, enveloped: bool) -> type[msgspec.Struct]:
    """The twin of a message as a JSON object: the struct itself is an array on the wire.

    enveloped: with its type, and with lease, epoch and number as the message has them; without, these have defaults,
    since the path and the headers say them.
    """
    defaults = dict(http_json.ENVELOPE.values())
    fields: list[Any] = []
    for each in msgspec.structs.fields(kind):
        if not enveloped and each.name in defaults:
            fields.append((each.name, each.type, defaults[each.name]))
        elif each.default is not msgspec.NODEFAULT:
            fields.append((each.name, each.type, each.default))
        elif each.default_factory is not msgspec.NODEFAULT:
            fields.append((each.name, each.type, msgspec.field(default_factory=each.default_factory)))
        else:
            fields.append((each.name, each.type))
    if enveloped:
        twin = msgspec.defstruct(name, fields, kw_only=True, tag_field="type", tag=str(kind.__struct_config__.tag))
    else:
        twin = msgspec.defstruct(name, fields, kw_only=True)
    twin.__doc__ = kind.__doc__
    return twin


def _operation(name: str, kind: type[m.Request], body: str, answer: str) -> dict[str, Any]:
    def reply(schema: str, what: str) -> dict[str, Any]:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        return {"description": what, "content": content}

    faults: dict[int, list[str]] = {}
    for code, status in http_json.FAULT_STATUS.items():
        faults.setdefault(status, []).append(code)
    return {
        "operationId": name,
        "summary": (kind.__doc__ or name).strip().split("\n")[0],
        "parameters": [
            {
                "name": header.decode().title(),
                "in": "header",
                "required": False,
                "description": f"Stands for {field!r} where the body has none",
                "schema": {"type": "string"} if isinstance(default, str) else {"type": "integer", "default": default},
            }
            for header, (field, default) in http_json.ENVELOPE.items()
        ],
        "requestBody": {
            "required": False,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}},
        },
        "responses": {
            "200": reply(answer, "The answer"),
            **{str(status): reply("Fault", f"A fault: {', '.join(codes)}") for status, codes in sorted(faults.items())},
            "default": reply("Fault", "Any other fault"),
        },
    }


def _message_operation() -> dict[str, Any]:
    content = {
        "application/vnd.longrein": {},
        "application/json": {"schema": {"type": "object", "required": ["type"],
                                        "properties": {"type": {"type": "string"}}}},
    }  # fmt: skip
    return {
        "operationId": "message",
        "summary": "Any message whole, in the binary form or in JSON",
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": {"description": "The answer, a Fault too, in the form of the request", "content": content}
        },
    }
