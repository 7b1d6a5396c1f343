"""`spd-zoo demo`: a page, served from this machine, to try networks on pictures.

It also shows the predictions for smaller inputs, and those of the other network of a pair: padded and padding-free, or
strided and with space-to-depth. The page is made with Gradio, which the extra `demo` installs; the browser loads
nothing from elsewhere.
"""

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision.ops import box_iou

from spd_zoo.access import SameOrigin, host_name
from spd_zoo.data.reading import channel_mode, read_image
from spd_zoo.inference.classifier import DEFAULT_CLASSIFIER, check_classifier
from spd_zoo.inference.detector import Detections, Detector
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import pick_device
from spd_zoo.weights import WeightsError, entries, original_of
from spd_zoo.weights.catalogue import local_checkpoints
from spd_zoo.weights.load import ModelError, class_names, load_network, pretrained_cfg, timm_name
from spd_zoo.weights.manifest import default_checkpoints

if TYPE_CHECKING:
    import gradio as gr

__all__ = ["EXAMPLES", "SIZES", "Twin", "build", "compare", "offered", "predict_html", "read_picture", "serve", "twin"]

SIZES = (32, 64, 128)  # pixels: the smaller inputs
MAX_FILE = "10mb"  # maximum size of an upload
MAX_SIDE = 2048  # pixels: larger pictures are reduced when they are read
SHOWN = 256  # pixels: small inputs are enlarged to about this size
TOP = 5  # classes in a table
PAIRS = {"_pfd": ("padded", "padding-free"), "_spd": ("strided", "space-to-depth")}  # suffix: without it, with it
SAME_OBJECT = 0.5  # IoU of boxes of two detectors

_PICTURES = Path(__file__).parent / "demo_pictures"
EXAMPLES = (  # a picture and a network that is right about it
    (str(_PICTURES / "coffee.jpg"), "tf_efficientnet_lite0_spd.in1k"),
    (str(_PICTURES / "rocket.jpg"), "cifar_resnet20_pfd.cifar100"),
    (str(_PICTURES / "cells.jpg"), "yolov8n_spd.bccd"),
)

_ABOUT = """# spd_zoo: small pictures, small objects
Choose an example, or drop a picture and choose a network: a classifier predicts its class, a detector finds objects in
it. Drag the line between the picture on the left and what the network sees or finds on the right. Everything is
computed on the machine that serves this page."""
_NO_PICTURE = "Drop a picture on the page, or click to choose one."
_SMALLER = """## The effect of image size
The same network gets the picture at fewer (or more) pixels. No network was trained at every size, so predictions
can get worse at smaller and at larger sizes than its own."""
_CSS = ".answer table { width: 100%; margin-left: 0 } .answer td + td { text-align: right }"


def read_picture(file: str | None) -> Image.Image:
    """An image file upright, in RGB, with sides of at most `MAX_SIDE` pixels.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    if file is None:
        raise ValueError(_NO_PICTURE)
    try:
        picture = read_image(file)
    except ValueError as error:
        raise ValueError(f"This file cannot be used: {error}. Try another, or save it again as PNG or JPEG.") from error
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    return picture


@lru_cache(maxsize=4)
def load(model: str) -> nn.Module:
    """A classifier or detector by its name or the folder of a run, on a GPU if there is one; the last few are kept.

    Raises:
        ModelError: If there is no such network, or it cannot be used.
        WeightsError: If its weights are unavailable or must not be used.
    """
    net = load_network(model, pick_device())
    channel_mode(pretrained_cfg(net)["input_size"][0], model)
    if not isinstance(net, DetectionNet):
        check_classifier(net, model)
    return net


def predict_html(net: nn.Module, picture: Image.Image, size: int | None = None) -> tuple[Image.Image, str]:
    """The network's input as an image, with a detector's boxes, and its predictions as an HTML table.

    Args:
        net: A classifier or a detector.
        picture: In RGB.
        size: Height and width of the network's input in pixels; None: its own.

    Raises:
        ModelError: If the network does not take such inputs.
    """
    try:
        if isinstance(net, DetectionNet):
            found = Detector(net, image_size=size)(picture)
            return found.draw(_coarse(picture, size)), _objects(found)
        seen, probabilities = _classify(net, picture, size)
    except (RuntimeError, ValueError, AssertionError) as error:  # the network does not accept this size
        raise ModelError(f"no prediction at {size or 'its own number of'} pixels: {error}") from error
    names = class_names(pretrained_cfg(net))
    best = probabilities.argsort(descending=True)[:TOP].tolist()
    return seen, _table(("class", "probability"), [(names[i], _percent(probabilities[i])) for i in best])


@torch.inference_mode()
def _classify(net: nn.Module, picture: Image.Image, size: int | None) -> tuple[Image.Image, Tensor]:
    """A classifier's input as an enlarged image, and the probability of each class, (num_classes,)."""
    pixels, seen = _input(net, picture, size)
    probabilities = net(pixels[None].to(next(net.parameters()))).float().softmax(1)[0].cpu()
    times = max(1, SHOWN // max(seen.size))
    return seen.resize((seen.width * times, seen.height * times), Image.Resampling.NEAREST), probabilities


def _input(net: nn.Module, picture: Image.Image, size: int | None) -> tuple[Tensor, Image.Image]:
    """A classifier's input, (C, H, W), and as an image."""
    cfg = pretrained_cfg(net)
    channels = cfg["input_size"][0]
    mode = channel_mode(channels, str(cfg["architecture"]))
    config = resolve_data_config({"input_size": (channels, size, size)} if size else {}, pretrained_cfg=cfg)
    pixels = create_transform(**config)(picture.convert(mode))
    mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
    colours = ((pixels * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    return pixels, Image.fromarray(colours.squeeze(2).numpy())  # (H, W) for grey images


def _coarse(picture: Image.Image, size: int | None) -> Image.Image:
    """The picture reduced to the detail of an input of `size` pixels."""
    small = picture.copy()
    if size:
        small.thumbnail((size, size), Image.Resampling.BILINEAR)
    return small.resize(picture.size, Image.Resampling.NEAREST)


def _objects(found: Detections) -> str:
    counts = {name: found.names.count(name) for name in sorted(set(found.names))}
    text = ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"
    best = zip(found.names[:TOP], found.scores[:TOP], strict=True)
    return f"<p>Found: {escape(text)}.</p>" + _table(("the most certain", "score"), [(n, f"{s:.3f}") for n, s in best])


@dataclass(frozen=True)
class Twin:
    """A network to compare with another, and its description in one sentence."""

    net: nn.Module
    description: str


@lru_cache(maxsize=1)
def twin(model: str) -> Twin | None:
    """The other network of a pair, if its weights with the same tag are on this machine.

    Pairs are padded and padding-free, or strided and with space-to-depth. Weights that are only converted are no pair:
    both networks compute the same.

    Raises:
        ModelError: If the network cannot be used.
        WeightsError: If its weights are unavailable or must not be used.
    """
    network, _, tag = model.partition(".")
    here = local_checkpoints()
    for suffix, (without, having) in PAIRS.items():
        bare = network.removesuffix(suffix)
        other, variant = (f"{bare}.{tag}", without) if bare != network else (f"{bare}{suffix}.{tag}", having)
        if model in here and other in here and not _same_file(model, other):
            return Twin(load(other), f"**{other}**, the {variant} network, which has its own weights.")
    return None


def _same_file(model: str, other: str) -> bool:
    """Whether the weights of one name are those of the other, converted."""
    both = [entries().get(name) for name in (model, other)]
    return len({original_of(entry).name for entry in both if entry}) < len([entry for entry in both if entry])


def compare(net: nn.Module, other: nn.Module, picture: Image.Image) -> str:
    """The predictions of two networks for a picture, as HTML.

    Raises:
        ModelError: If the networks cannot be compared, or do not take the picture.
    """
    names = class_names(pretrained_cfg(net))
    if names != class_names(pretrained_cfg(other)):
        raise ModelError("the two networks have different classes, so their predictions cannot be compared")
    if isinstance(other, DetectionNet):
        return _differences(Detector(net)(picture), Detector(other)(picture))
    (_, ours), (_, theirs) = _classify(net, picture, None), _classify(other, picture, None)
    best = dict.fromkeys(i for each in (ours, theirs) for i in each.argsort(descending=True)[:TOP].tolist())
    return _table(("class", "network", "twin"), [(names[i], _percent(ours[i]), _percent(theirs[i])) for i in best])


def _differences(ours: Detections, theirs: Detections) -> str:
    """How many objects of each class two detectors find in one picture, and how many of them are the same."""
    overlap = box_iou(ours.boxes, theirs.boxes) * (ours.labels[:, None] == theirs.labels)
    same = 0
    while overlap.numel() and overlap.max() >= SAME_OBJECT:  # the best pair first, each object once
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        same += 1
        overlap[i] = overlap[:, j] = 0
    names = sorted({*ours.names, *theirs.names})
    rows = [(name, str(ours.names.count(name)), str(theirs.names.count(name))) for name in names]
    return f"<p>Objects that both find: {same}.</p>" + _table(("class", "network", "twin"), rows)


def _percent(probability: Tensor) -> str:
    return f"{100 * probability:.2f} %"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in (header, *rows)]
    return f"<table>{''.join(lines)}</table>"


def offered(models: Sequence[str] = ()) -> list[str]:
    """The networks to choose from: `models`, then the default classifier, then all others with weights on this machine.

    Raises:
        ModelError: If there is no network of such a name.
    """
    for model in models:
        timm_name(model)
    here = local_checkpoints()
    default = [name for name in here if name == default_checkpoints(entries()).get(DEFAULT_CLASSIFIER)]
    return list(dict.fromkeys([*models, *default, *here]))


def build(models: Sequence[str] = ()) -> "gr.Blocks":
    """The page, not served yet.

    Args:
        models: Networks, with or without a tag, or folders of runs, that are offered before those on this machine.

    Raises:
        ModelError: If there is no such network, or none at all.
        ModuleNotFoundError: If Gradio is missing.
    """
    choices = offered(models)
    if not choices:
        raise ModelError("no weights are on this machine; `spd-zoo weights pull` gets some")
    import gradio as gr

    def view() -> gr.ImageSlider:
        return gr.ImageSlider(show_label=False, interactive=False, height=SHOWN, buttons=[])

    def answer() -> gr.HTML:
        return gr.HTML(elem_classes="answer")

    # Other features of Gradio, such as telemetry, a public link and an open API, are off here and in `serve`.
    with gr.Blocks(analytics_enabled=False, title="spd_zoo", delete_cache=(3600, 3600)) as page:
        gr.Markdown(_ABOUT)
        with gr.Row():
            with gr.Column():
                file = gr.File(label="Picture", height=160)
                chosen = gr.Dropdown(choices, value=choices[0], label="Network", filterable=False)
                gr.Examples([[*pair] for pair in EXAMPLES if pair[1] in choices], [file, chosen], label="Examples")
                message = gr.Markdown(elem_id="message", value=_NO_PICTURE)
            with gr.Column():
                own = [view(), answer()]
        with gr.Column(visible=False) as more:
            gr.Markdown(_SMALLER)
            with gr.Row():
                smaller: list[gr.ImageSlider | gr.HTML] = []
                for size in SIZES:
                    with gr.Column(min_width=200):
                        gr.Markdown(f"**{size} x {size} pixels**")
                        smaller += [view(), answer()]
            with gr.Column(visible=False) as pair:
                described, other = gr.Markdown(), answer()
        outputs = [message, more, *own, *smaller, pair, described, other]

        def show(path: str | None, model: str) -> list[Any]:
            """All outputs for a picture; only a message if there is nothing to show."""
            try:
                picture, net = read_picture(path), load(model)
                seen, text = predict_html(net, picture)
                values: list[Any] = [_beside(net, picture, seen), text]
                for size in SIZES:
                    reduced, words = _at(net, picture, size)
                    values += [_beside(net, picture, reduced), words]
                compared = twin(model)
                table = compare(net, compared.net, picture) if compared is not None else ""
            except (ValueError, WeightsError) as error:
                return [str(error), gr.Column(visible=False), None, "", *[gr.skip() for _ in outputs[4:]]]
            title = f"## Against its twin\n{compared.description}" if compared is not None else ""
            values += [gr.Column(visible=compared is not None), title, table]
            return [_summary(model, net, picture), gr.Column(visible=True), *values]

        changed = [file.change, chosen.change]
        gr.on(changed, show, [file, chosen], outputs, trigger_mode="always_last", api_visibility="private")
    return page.queue(max_size=16, api_open=False, default_concurrency_limit=1)


def _beside(net: nn.Module, picture: Image.Image, seen: Image.Image | None) -> tuple[Image.Image, Image.Image] | None:
    """The picture and a network's input, of the same size and with the same part of the picture."""
    if seen is None:
        return None
    return (picture if isinstance(net, DetectionNet) else _input(net, picture, seen.width)[1]), seen


def _at(net: nn.Module, picture: Image.Image, size: int) -> tuple[Image.Image | None, str]:
    """The result of `predict_html`, or no image and the reason."""
    try:
        return predict_html(net, picture, size)
    except ModelError as error:
        return None, f"<p>{escape(str(error))}</p>"


def _summary(model: str, net: nn.Module, picture: Image.Image) -> str:
    """The network and the picture in two sentences."""
    cfg, entry = pretrained_cfg(net), entries().get(model)
    data = f", trained on {entry.dataset}," if entry and entry.dataset else ""
    does = "finds objects of" if isinstance(net, DetectionNet) else "classifies into"
    size = "x".join(map(str, cfg["input_size"][1:]))
    return (
        f"`{model}`{data} {does} {cfg['num_classes']} classes, and takes {size} pixels. "
        f"The picture is used at {picture.width}x{picture.height}."
    )


def serve(
    models: Sequence[str] = (), host: str = "127.0.0.1", port: int = 7860, allow_hosts: Sequence[str] = ()
) -> None:
    """Serves the page until it is interrupted.

    It answers only requests to its own host and from its own pages, as `SameOrigin` says.

    Args:
        models: As for `build`.
        host: The address to listen on; 0.0.0.0 opens the page to everyone who can reach this machine.
        port: The port.
        allow_hosts: Other host names of the page, for example the public one behind a proxy.

    Raises:
        ModelError: If there is no such network, or none at all.
        ModuleNotFoundError: If Gradio is missing.
        ValueError: If one of `allow_hosts` is no host name.
        OSError: If the page cannot be served there.
    """
    allowed = [host_name(name) for name in allow_hosts]
    if not 0 < port < 2**16:
        raise OSError(f"there is no port {port}; choose a --port from 1 to {2**16 - 1}")
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass  # the port is free
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"cannot serve at {host}, port {port}: {reason}; choose another --host or --port") from error
    page = build(models)
    import gradio as gr
    from starlette.middleware import Middleware

    page.launch(
        app_kwargs={"middleware": [Middleware(SameOrigin, host=host, allowed=allowed)]},
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MAX_FILE,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # no fonts of the web
        css=_CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        ssr_mode=False,
    )
