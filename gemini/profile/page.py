"""The report as one self-contained HTML file, with its data and plotly.js."""

from __future__ import annotations

import json
from importlib import resources

from gemini.errors import RecordingError
from gemini.profile.recording import Recording
from gemini.profile.report_parts import report_of

__all__ = ["html_page"]


def html_page(recording: Recording) -> str:
    """Draw a recording.

    Args:
        recording: one rank's recording.

    Returns:
        The page, ASCII except for plotly.js: about 5 MB of library and some hundred kilobytes per step with details.

    Raises:
        RecordingError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError as error:
        raise RecordingError(
            "an HTML report needs plotly, which is not installed: pip install 'gemini-memory[report]', or use --trace, "
            "--json or --terminal"
        ) from error
    data = json.dumps(report_of(recording), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    template = resources.files("gemini.profile").joinpath("page.html").read_text(encoding="utf-8")
    head, between, tail = _split(template, "/*REPORT*/", "/*PLOTLY*/")
    return "".join((head, data, between, get_plotlyjs().replace("</script", "<\\/script"), tail))


def _split(text: str, *marks: str) -> list[str]:
    """Split a text at marks that occur once each, in their order."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        assert found, f"the template lacks {mark}"
        parts.append(part)
    return [*parts, text]
