"""What the program says about a method."""

from __future__ import annotations

from typing import Any

from fewbits.core.method import GradientMethod, Method


def describe(method: type[Method]) -> dict[str, Any]:
    """Name, family, paper and what it needs with its default fields, as JSON holds them."""
    paper = method.paper
    needs = [need.__name__.lower() for need in method().needs]
    if issubclass(method, GradientMethod) and method.uses_gradients:
        needs.append("gradients")
    return {"name": method.name(), "family": method.family(), "paper": paper.title, "arxiv": paper.arxiv, "needs": needs}


def cited(described: dict[str, Any]) -> str:
    """The paper's title and its number on arXiv, where it has one."""
    return described["paper"] + (f" (arXiv {described['arxiv']})" if described["arxiv"] else "")
