"""Integrations need their libraries, and say so; gemini needs none of them."""

from __future__ import annotations

import importlib
import sys

import pytest

from gemini import MissingLibraryError


@pytest.mark.parametrize("name", ["accelerate", "transformers", "lightning"])
def test_a_missing_library_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = f"gemini.integrations.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{name}.pytorch.plugins.precision", None)
    with pytest.raises(MissingLibraryError, match=rf"{module} needs {name} \(pip install {name}\)"):
        importlib.import_module(module)
