"""The model card of published weights: description, use, accuracy and who measured it, training, limits, licence."""

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from spd_zoo.weights.manifest import Entry

__all__ = ["TERMS", "model_card"]

_METRICS = {  # name in the manifest -> name on the Hub, name in the text
    "top1": ("accuracy", "top-1"),
    "top5": ("top_5_accuracy", "top-5"),
    "agreement": ("agreement", "same class as the original network"),
    "ap": ("mAP", "AP"),
    "ap50": ("AP50", "AP50"),
    "ap_small": ("AP_small", "AP of small objects"),
    "ap_medium": ("AP_medium", "AP of medium objects"),
    "ap_large": ("AP_large", "AP of large objects"),
}
TERMS = {  # licences that the Hub does not know -> what they allow, and where it is written
    "imagenet-research": (
        "non-commercial research and education, as the terms of ImageNet allow its images, which they were trained on",
        "https://www.image-net.org/download",
    )
}
_WHO = {"us": "measured by the authors of spd_zoo", "authors": "reported by the authors, not verified"}


_TRANSFORMERS = """With the timm wrapper of transformers:

```python
import spd_zoo
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{repo}")
net = AutoModelForImageClassification.from_pretrained("{repo}").eval()
```

"""


def model_card(entry: Entry, net: nn.Module, repo: str, sha256: str, notes: str) -> str:
    """The text of README.md, with its metadata.

    Args:
        entry: The weights.
        net: Their network; its docstring describes it, and its module's docstring lists the papers.
        repo: ORG/NAME on the Hub.
        sha256: The SHA-256 of the weights' file.
        notes: Further remarks.

    Returns:
        The text.
    """
    name = _slug(entry.license)  # lower case on the Hub
    own: dict[str, Any] = {"license_name": name, "license_link": TERMS[name][1]} if name in TERMS else {}
    data = ModelCardData(
        license="other" if own else name,
        library_name="timm",
        pipeline_tag=_task(entry),
        tags=[_task(entry), "timm", *(() if _detects(entry) else ("transformers",)), "spd_zoo"],
        datasets=[_slug(entry.dataset)] if entry.dataset else None,
        model_name=entry.name,
        eval_results=[_result(entry, metric) for metric in entry.metrics],
        **own,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{_text(entry, net, repo, sha256, notes)}"))


def _detects(entry: Entry) -> bool:
    return any(metric["metric"].startswith("ap") for metric in entry.metrics)


def _task(entry: Entry) -> str:
    return "object-detection" if _detects(entry) else "image-classification"


def _slug(name: str | None) -> str:
    return (name or "").lower().replace(" ", "-")


def _result(entry: Entry, metric: dict[str, Any]) -> EvalResult:
    metric_type, metric_name = _METRICS[metric["metric"]]
    return EvalResult(
        task_type=_task(entry),
        dataset_type=_slug(entry.dataset),
        dataset_name=metric["dataset"],
        dataset_split=metric["dataset"].removeprefix(entry.dataset or "").strip() or None,
        metric_type=metric_type,
        metric_name=(
            f"{metric_name} in per cent at {metric['input_size']} pixels{_note(metric)}, {_WHO[metric['measured_by']]}"
        ),
        metric_value=metric["value"],
    )


def _note(metric: dict[str, Any]) -> str:
    return f", {metric['notes']}" if metric.get("notes") else ""


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _text(entry: Entry, net: nn.Module, repo: str, sha256: str, notes: str) -> str:
    if entry.group == "timm":
        about, sources = f"timm's {entry.network}, trained by others.", f"Original code: {entry.origin_url}"
    else:
        summary, sources, *more = (inspect.getdoc(sys.modules[type(net).__module__]) or "").split("\n\n")
        about = "\n\n".join([inspect.getdoc(timm.model_entrypoint(entry.network)) or "", summary, *more])
    pixels = "x".join(map(str, entry.input_size))
    figures = [
        f"| {metric['dataset']}{_note(metric)} | {_METRICS[metric['metric']][1]} | {metric['value']} "
        f"| {metric['input_size']} | {_WHO[metric['measured_by']]} |"
        for metric in entry.metrics
    ]
    recipe = [
        f"- {name.replace('_', ' ')}: {value}" for name, value in (entry.recipe or {}).items() if value is not None
    ]
    limits = [
        f"- It only accepts images of {pixels}, unless it is created for another size."
        if entry.fixed_input_size
        else f"- Images are resized to {pixels}; the figures hold for the sizes in the table above.",
        f"- It detects {entry.num_classes} classes of objects, and may mistake other things for them."
        if _detects(entry)
        else f"- It predicts one of its {entry.num_classes} classes even if an image shows none of them.",
        "- Nothing else was measured: no other data, no damaged images, no bias.",
    ]
    if notes:
        limits.append(f"- {notes}")
    wrapper = "" if _detects(entry) else _TRANSFORMERS.format(repo=repo)
    terms = " ({}: {})".format(*TERMS[_slug(entry.license)]) if _slug(entry.license) in TERMS else ""
    theirs = f", the licence of {entry.origin_url}, whose copyright notice applies" if entry.origin_url else ""
    return f"""
# {entry.name}

{about}

{entry.params / 1e6:.2f} M parameters, {entry.macs / 1e9:.2f} G multiply-accumulates for an image of {pixels}
(channels, height, width); {entry.num_classes} classes. `model.safetensors` has sha256 `{sha256}`.

## Use

Install the package `spd-zoo`, and `import spd_zoo` first, which registers the network with timm.

With timm:

```python
import spd_zoo, timm

net = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
```

With `torch.hub`, from a checkout of spd_zoo whose manifest has these weights; their SHA-256 is checked on every load:

```python
import torch

weights = dict(pretrained=True, pretrained_cfg="{entry.tag}")
net = torch.hub.load("path/to/spd_zoo", "{entry.network}", source="local", **weights).eval()
```

{wrapper}## Accuracy

| dataset | metric | per cent | pixels | source |
| --- | --- | --- | --- | --- |
{_lines(figures)}

## Training

On {entry.dataset}:

{_lines(recipe)}

## Limits

{_lines(limits)}

## Licence

The weights: {entry.license}{terms}{theirs}. The code, spd_zoo: Apache-2.0.

## Citation

{sources}

```bibtex
@software{{spd_zoo,
  author = {{{{The spd_zoo authors}}}},
  title = {{{{spd_zoo, a model zoo for low-resolution images and small objects}}}}
}}
```
"""
