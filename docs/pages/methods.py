"""A page for each method, written from its file, its recipe and a measured run."""

import inspect
import math
import warnings
from dataclasses import fields
from functools import cache
from typing import Any

import torch

import testtime as tt
from pages.docstring import box, parse
from testtime._core.errors import ScopeError
from testtime._core.registry import Entry, entries
from testtime.adaptation.parts.views import needs_pixels
from testtime.adaptation.recipe import Recipe, describe
from testtime.bench.models import load_model
from testtime.papers.catalogue import catalogue
from testtime.streams.batches import Batch
from testtime.streams.data import load_data
from testtime.streams.scenarios import Scenario

SETUP = """>>> import testtime as tt
>>> from testtime.bench.models import load_model
>>> from testtime.streams.data import load_data, stack
>>> model = load_model("embedded:batch")
>>> images, labels = stack(load_data("fashion-mnist:sample"), range(4))"""

EXPERTS = """
>>> import torch
>>> class Experts(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.one, self.other = model, load_model("embedded:group")
...     def forward(self, x):
...         return self.one(x), self.other(x)
>>> model = Experts().eval()"""
"""Two experts, for methods that weigh some."""

TRANSFORMER = """
>>> from torchvision.models import VisionTransformer
>>> model = VisionTransformer(
...     image_size=28, patch_size=7, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
...     num_classes=10,
... ).eval()
>>> images = images.expand(-1, 3, -1, -1)"""
"""A transformer of random weights, for methods that put tokens in one."""


class Experts(torch.nn.Module):
    """The two embedded classifiers as the experts of one model."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = load_model("embedded:batch"), load_model("embedded:group")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of both (B, C)."""
        return self.one(x), self.other(x)


def _weighs(entry: Entry) -> bool:
    """Whether a method reads experts from what the model returns."""
    return hasattr(entry.build().procedure, "read")


def _needed(entry: Entry) -> tuple[str, ...]:
    """Names of what a method must know of source data."""
    return tuple(need.name for need in entry.build().needs)


def _other_model(entry: Entry) -> str:
    """What makes the model where a method does not take the embedded one."""
    if _weighs(entry):
        return EXPERTS
    return TRANSFORMER if "cls_moments" in _needed(entry) else ""


def nav() -> list[dict[str, str]]:
    """Name and path of each method's page."""
    return [{name: f"methods/{name}.md"} for name in entries("method")]


def pages() -> dict[str, str]:
    """Path -> Markdown."""
    made = {f"methods/{name}.md": page(entry) for name, entry in entries("method").items()}
    return {"methods/index.md": index(), **made}


def index() -> str:
    """The table of all methods."""
    lines = [
        f"| [`{name}`]({name}.md) | {entry.summary} | {', '.join(_needed(entry)) or 'nothing'} |"
        for name, entry in entries("method").items()
    ]
    return "\n".join(
        [
            "# Methods\n",
            "Each is one file that opens with the paper's algorithm, and a value: a recipe of "
            "parts of which each can be [replaced](../extending.md). "
            "[How to choose](../how-to-choose.md) says when to use which.\n",
            "| method | what it does | needs of the source data |\n|---|---|---|",
            *lines,
        ]
    )


def page(entry: Entry, *, images: int = 64) -> str:
    """One method's page; its cost is measured on that many images."""
    title, algorithm = box(entry.factory)
    said = parse(inspect.getdoc(entry.factory) or "")
    where = f"{entry.factory.__module__}.{entry.factory.__name__}"
    notes = "\n\n".join(said.notes)
    return f"""# {entry.name}

*{title}.* {said.summary}

{notes}

```text
{algorithm}
```

**Use it when** {_linked(said.parts["Use when"])}

**Not when** {_linked(said.parts["Not when"])}

## Options

{_options(entry)}

## What it needs

{_needs(entry)}

## Cost

{_cost(entry, images)}

## Example

```python
{SETUP}{_other_model(entry)}
{_build(entry)}
>>> adapter(images).shape
torch.Size([4, 10])
```

The method as a value, [`{entry.factory.__name__}`][{where}]:

```python
>>> from {entry.factory.__module__} import {entry.factory.__name__}
{inspect.cleandoc(said.parts["Example"])}
```

## Parts

{_parts(entry.build())}

## Reference

{_reference(entry, said.parts.get("Reference", ""))}
"""


def _build(entry: Entry) -> str:
    if not _needed(entry):
        return f'>>> adapter = tt.adapt(model, "{entry.name}")'
    return (
        f'>>> known = tt.fit_source(model, [(images, labels)], methods=["{entry.name}"])\n'
        f'>>> adapter = tt.adapt(model, "{entry.name}", source=known)'
    )


def _options(entry: Entry) -> str:
    meaning = parse(inspect.getdoc(entry.factory) or "").options
    if not entry.options:
        return "None."
    lines = [
        f"| `{name}` | `{_short(default)}` | {_linked(meaning[name])} |"
        for name, default in entry.options.items()
    ]
    return "\n".join(["| option | default | meaning, and where the default stands |",
                      "|---|---|---|", *lines])  # fmt: skip


def _linked(text: str) -> str:
    for name in entries("method"):
        text = text.replace(f"`{name}`", f"[`{name}`]({name}.md)")
    return text


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else describe(value)


def _needs(entry: Entry) -> str:
    recipe: Recipe = entry.build()
    own = (getattr(recipe, field.name) for field in fields(recipe))
    pixels = any(getattr(part, "pixels", False) for part in own) or needs_pixels(recipe.augment)
    scope = (inspect.getdoc(recipe.scope) or describe(recipe.scope)).partition("\n")[0]
    lines = [
        f"of the source data: {', '.join(_needed(entry))}, from `tt.fit_source`"
        if _needed(entry)
        else "no source data",
        f"tensors that may change ([`{describe(recipe.scope)}`][{_home(recipe.scope)}]): {scope}"
        if recipe.learns
        else "no tensor of the model changes",
        "images in [0, 1], with normalisation as a layer of the model, for it changes pixels"
        if pixels
        else "any input that the model takes",
        "logits (B, C) or dense logits (B, C, H, W)" if recipe.dense else "logits (B, C)",
    ]
    return "\n".join(f"- {line}" for line in lines)


@cache
def _stream() -> list[Batch]:
    scenario = Scenario.parse("continual,batch_size=16,samples=64,severity=3,domains=fog")
    return list(scenario.stream(load_data("fashion-mnist:sample"), seed=0))


def _cost(entry: Entry, images: int) -> str:
    model = Experts().eval() if _weighs(entry) else load_model("embedded:batch")
    batches = [batch.inputs for batch in _stream()][: math.ceil(images / 16)]
    batches[0] = batches[0][:images]
    try:
        source = tt.fit_source(model, batches, methods=[entry.name]) if _needed(entry) else None
    except ScopeError:  # it takes other models alone
        forwards, backwards = entry.build().passes or ("?", "?")
        return (
            f"**{forwards}** forward and **{backwards}** backward passes for each sample, as the "
            "recipe says; it does not work on the classifier that other pages count with."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter = tt.adapt(model, entry.name, source=source)
        for batch in batches:
            adapter(batch)
    counts = adapter.counts
    tensors = adapter.plan()
    return (
        f"**{counts.forwards / counts.samples:.3g}** forward and "
        f"**{counts.backwards / counts.samples:.3g}** backward passes for each sample; "
        f"{tensors.values:,} of the model's values adapt ({tensors.share:.2%}).\n\n"
        f"Counted by `adapter.counts` when this page was built: {counts.samples} foggy images in "
        f"batches of {len(batches[0])}, on the embedded classifier with BatchNorm. Methods that "
        "select pay for what they select, so other streams cost differently."
    )


def _parts(recipe: Recipe) -> str:
    default = Recipe()
    lines = []
    for field in fields(recipe):
        part = getattr(recipe, field.name)
        if part == getattr(default, field.name):
            continue
        shown = [part] if not isinstance(part, tuple) else list(part)
        cells = [
            f"[`{describe(one)}`][{_home(one)}]" if _home(one) else f"`{describe(one)}`"
            for one in shown
        ]
        lines.append(f"| `{field.name}` | {', '.join(cells)} |")
    if not lines:
        return "A recipe with no part: the model answers as it is."
    return "\n".join(["| question | part |", "|---|---|", *lines])


def _home(part: Any) -> str:
    named = part if inspect.isfunction(part) else type(part)
    module = named.__module__
    return f"{module}.{named.__qualname__}" if module.startswith("testtime") else ""


def _reference(entry: Entry, citation: str) -> str:
    found = [record for record in catalogue() if record.slug == entry.paper]
    lines = [" ".join(citation.split())] if citation else ["A control; no paper."]
    if found:
        lines.append(f"In the catalogue: `testtime papers {entry.paper}`.")
    for check in entries("check").values():
        if check.paper == entry.paper:
            claim = getattr(inspect.getmodule(check.factory), "CLAIM", check.summary)
            lines.append(f"Small check, `testtime reproduce {check.paper}`: {claim}")
    return "\n\n".join(lines)
