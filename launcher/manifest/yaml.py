"""The one YAML dump: deterministic, block style, readable multi-line text, no aliases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final, cast

import yaml

# Kubernetes reads YAML with another parser than PyYAML, to which `y` is true and `1e5` a number: such text is quoted.
_AMBIGUOUS: Final = re.compile(r"[-+.0-9]|(y|n|yes|no|on|off|true|false|null|nan|inf)$", re.IGNORECASE)

_Base = cast("type[yaml.SafeDumper]", yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper)


class _Dumper(_Base):
    """Safe dumper that repeats a shared value instead of writing an alias, and writes text with line breaks as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else "'" if _AMBIGUOUS.match(value) else None
        return yaml.ScalarNode("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def dump(document: Any) -> str:
    """One document as YAML, keys in the order they were written."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=1_000_000, allow_unicode=True)


def dump_all(documents: Sequence[Any]) -> str:
    """Several documents, each after a `---` line."""
    return "".join(f"---\n{dump(document)}" for document in documents)
