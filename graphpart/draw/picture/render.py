"""DOT source to a picture file, with Graphviz."""

from __future__ import annotations

import re
from pathlib import Path

from graphpart.errors import DrawError

SOURCE_SUFFIXES = (".dot", ".gv")
PICTURE_SUFFIXES = (".svg", ".png", ".pdf")
PNG_DPI = 144

_HEAD = re.compile(r"\A\s*(?:strict\s+)?(?:di)?graph\s*\w*\s*\{")


def write_text(text: str, path: str | Path) -> Path:
    """Write text to a file, whose folder is made if need be; returns its path.

    Raises:
        DrawError: if it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except (OSError, UnicodeEncodeError) as error:
        raise DrawError(f"cannot write {str(path)!r}: {error}") from error
    return path


def render(dot_source: str, path: str | Path) -> Path:
    """Write a picture of DOT source; the suffix of ``path`` chooses the format.

    Args:
        dot_source: a graph in the DOT language.
        path: where to write; ``.svg``, ``.png`` and ``.pdf`` need Graphviz's ``dot``, while ``.dot`` and
            ``.gv`` take the source as it is.

    Returns:
        The path that was written.

    Raises:
        DrawError: if the suffix is unknown, if ``dot`` is not installed, or if it cannot draw the source. In
            the last two cases the source lies next to ``path``, with the suffix ``.dot``.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in PICTURE_SUFFIXES + SOURCE_SUFFIXES:
        known = ", ".join(PICTURE_SUFFIXES + SOURCE_SUFFIXES)
        raise DrawError(f"cannot draw to {str(path)!r}: unknown suffix {path.suffix!r}; known ones are {known}")
    if suffix in SOURCE_SUFFIXES:
        return write_text(dot_source, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_picture(dot_source, suffix.removeprefix("."), path))
    except OSError as error:
        raise DrawError(f"cannot write {str(path)!r}: {error}") from error
    return path


def _picture(dot_source: str, kind: str, path: Path) -> bytes:
    try:
        import graphviz  # here, so that planning and training do without it
    except ImportError as error:
        kept = _keep_source(dot_source, path)
        raise DrawError(
            f"the Python package 'graphviz' is not installed, so {path.name!r} was not drawn; `pip install graphviz`. "
            f"The DOT source is in {str(kept)!r}"
        ) from error
    source = _with_attribute(dot_source, f"dpi={PNG_DPI}") if kind == "png" else dot_source
    try:
        try:
            return graphviz.Source(source).pipe(format=kind, engine="dot", quiet=True)
        except graphviz.CalledProcessError:
            # Graphviz 2.43 sometimes fails to route curves around boxes; straight lines always work.
            return graphviz.Source(_with_attribute(source, "splines=line")).pipe(format=kind, engine="dot", quiet=True)
    except graphviz.ExecutableNotFound as error:
        kept = _keep_source(dot_source, path)
        raise DrawError(
            f"Graphviz's 'dot' program is not installed, so {path.name!r} was not drawn; install it "
            f"(Debian/Ubuntu: `apt install graphviz`, macOS: `brew install graphviz`). "
            f"The DOT source is in {str(kept)!r}"
        ) from error
    except graphviz.CalledProcessError as error:
        kept = _keep_source(dot_source, path)
        raise DrawError(f"'dot' could not draw the source, which is in {str(kept)!r}: {error}") from error


def _with_attribute(dot_source: str, attribute: str) -> str:
    """The source with one more attribute of the graph, where its head is plain enough to find."""
    return _HEAD.sub(lambda head: f"{head[0]} graph [{attribute}];", dot_source, count=1)


def _keep_source(dot_source: str, path: Path) -> Path:
    kept = path.with_suffix(".dot")
    kept.write_text(dot_source, encoding="utf-8")
    return kept
