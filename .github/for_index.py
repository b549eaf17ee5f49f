"""README files as a package index shows them: relative links lead into the repository, at the tag that is published.

    python .github/for_index.py https://github.com/OWNER/peftcore v0.1.0

An index shows a README without the files beside it. This rewrites those of the core and the plugins in place, and
gives each package the address of the repository, which no file of it knows. The publishing workflow runs it before it
builds; run by hand, undo it with git.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

LINK = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def absolute(text: str, folder: Path, root: Path, url: str, tag: str) -> str:
    """`text` of a README in `folder`, its links absolute; FileNotFoundError for one that leads nowhere."""

    def there(link: re.Match[str]) -> str:
        image, label, target, anchor = link.groups()
        path = Path(os.path.normpath(folder / target))
        if not path.exists():
            raise FileNotFoundError(f"{folder / 'README.md'} links to {target}, which does not exist")
        kind = "raw" if image else "tree" if path.is_dir() else "blob"
        return f"{image}{label}({url}/{kind}/{tag}/{path.relative_to(root).as_posix()}{anchor or ''})"

    return LINK.sub(there, text)


def main(root: Path, url: str, tag: str) -> None:
    for project in [root / "pyproject.toml", *sorted(root.glob("plugins/*/pyproject.toml"))]:
        readme = project.parent / "README.md"
        readme.write_text(absolute(readme.read_text(), project.parent, root, url, tag))
        urls = f'[project.urls]\nRepository = "{url}"\nChangelog = "{url}/blob/{tag}/CHANGELOG.md"\n'
        project.write_text(f"{project.read_text()}\n{urls}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(__file__).resolve().parents[1], sys.argv[1].rstrip("/"), sys.argv[2])
