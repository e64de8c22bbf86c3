"""The model card that is written beside a few-bit pipeline: what it was made from, how, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from bittern.quantization.report import Report

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""What the card of the original says that is true of the copy, too."""

_BODY = """\
# {title}

`{base}` with few-bit weights: recipe `{recipe}` of [bittern](https://pypi.org/project/bittern/) {version}, seed {seed}.

| | |
|---|---|
| few-bit layers | {layers}, {weights:.1f} M weights |
| bits per weight, branches and scales included | {bits:.2f} |
| ternary share of the model's parameters | {ternary:.2%} |
| the denoiser's weight file | {after:.1f} MB, was {before:.1f} MB |
| relative weight error of a layer | {least:.3f} to {most:.3f} |

No picture was compared when this card was written; `bittern compare {base} THIS_FOLDER` does it.

## Use

```python
import bittern  # teaches diffusers to read few-bit models
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("THIS_FOLDER", dtype=torch.bfloat16)
```
"""


def model_card(base: str, source: Path, report: Report, *, before: int, seed: int, version: str) -> str:
    """The card's text; equal for equal arguments.

    Args:
        base: What the pipeline was made from, as it was named: a hub id, a folder, or a built-in model.
        source: The original's folder, whose card gives the licence.
        report: Every target.
        before: Bytes of the original denoiser's weight files.
        seed: Of the solver.
        version: Of bittern.
    """
    # A path of somebody's machine is no name for others.
    name = base if not Path(base).expanduser().exists() else source.name
    head = {key: value for key, value in _front_matter(source / "README.md").items() if key in _KEPT}
    head |= {"base_model": name, "base_model_relation": "quantized", "library_name": "diffusers"}
    head["tags"] = ["bittern", "quantized", str(report.recipe)]
    errors = [row.error for row in report.rows if row.error is not None] or [0.0]
    body = _BODY.format(
        title=f"{name.rpartition('/')[2]}, {report.recipe}",
        base=name,
        recipe=report.recipe,
        version=version,
        seed=seed,
        layers=len(report.rows),
        weights=sum(n * k for n, k in (row.shape for row in report.rows)) / 1e6,
        bits=report.bits_per_weight,
        ternary=report.ternary_share,
        after=report.file_bytes / 1e6,
        before=before / 1e6,
        least=min(errors),
        most=max(errors),
    )
    return f"---\n{yaml.safe_dump(head, sort_keys=True, allow_unicode=True)}---\n\n{body}"


def _front_matter(card: Path) -> Mapping[str, Any]:
    """The YAML head of a card; nothing where there is no card, or none that can be read."""
    try:
        parts = card.read_text(encoding="utf-8").split("---\n", 2)
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return head if isinstance(head, dict) else {}
