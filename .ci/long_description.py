"""What package indexes show: README.md, with paths in the place of its links to files of the repository.

On an index a relative link or picture leads nowhere, and the project has no address that it could lead to instead.
hatchling runs this whenever it reads the metadata of the project; `pyproject.toml` names it.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_PICTURE = re.compile(r"!\[([^\]]*)\]\((?!https?://)([^)]+)\)")
_LINK = re.compile(r"\[([^\]]+)\]\((?!https?://)([^)]+)\)")


def for_indexes(readme: str) -> str:
    """Pictures become their description, links their text, each with the path of the file."""
    return _LINK.sub(r"\1 (`\2`)", _PICTURE.sub(r"*Picture (`\2`): \1*", readme))


class LongDescription(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": for_indexes(readme)}
