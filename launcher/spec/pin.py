"""The line of a spec file that pins its image: changed in place, everything else kept byte for byte."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, cast

import yaml


def pin_image(path: Path, reference: str) -> None:
    """Make `image:` (or `image: {reference: ...}`) of the spec file `path` be `reference`. Raises OSError."""
    with open(path, encoding="utf-8", newline="") as file:
        text = file.read()
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(pinned(text, reference))
        os.chmod(temporary, path.stat().st_mode & 0o7777)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def pinned(text: str, reference: str) -> str:
    """`text`, a valid spec, with its image replaced by `reference`; where it names none, a line is added after `name`."""
    root: yaml.Node | None = cast("Any", yaml).compose(text, Loader=yaml.SafeLoader)  # untyped
    image = _value(root, "image")
    if isinstance(image, yaml.MappingNode):
        image = _value(image, "reference") or image
    if image is not None:
        start, end = image.start_mark.index, image.end_mark.index
        space = " " if text[start - 1] == ":" else ""  # `image:` with nothing after it
        return text[:start] + space + reference + text[end:]
    name = _value(root, "name")
    assert isinstance(root, yaml.MappingNode) and name is not None, "a valid spec is a mapping with a name"
    if root.flow_style:
        return f"{text[: name.end_mark.index]}, image: {reference}{text[name.end_mark.index :]}"
    line_end = text.find("\n", name.end_mark.index)
    if line_end < 0:
        return f"{text}\nimage: {reference}\n"
    newline = "\r\n" if text[line_end - 1] == "\r" else "\n"
    return f"{text[: line_end + 1]}image: {reference}{newline}{text[line_end + 1 :]}"


def _value(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for name, value in node.value if name.value == key), None)
