"""Measures the speed of our networks, compared with plain implementations of them and with timm's resnet50.

    python tools/benchmark.py --network pyconvresnet50 [--threads 2] [--batch 16] [--forms 'inference-fp32-*'] [--quick]
    python tools/benchmark.py --network pyconvresnet50 --device cuda --batch 1 256 [--record] [...]
    python tools/benchmark.py --network resnet50 --convert [...]
    python tools/benchmark.py --network ghostnet_pfd --against ghostnet [...]
    python tools/benchmark.py --cli

The plain implementation is that of the papers' code: space-to-depth by slices and concatenation, and a separate
convolution for every level of a pyramid. "/ plain" compares with it in the papers' form (contiguous, eager, BatchNorm
not folded, same precision), "/ plain, same form" and "/ resnet50" in the same form. All contenders alternate in one
process; images/s are medians over the rounds, ratios are medians of the ratios of each round. Before anything is timed,
the outputs of all contenders must agree. Peak memory is the additional memory of one step in a new process (Linux).

With --device cuda a step is timed by CUDA events after --warmup steps of each contender, and peak memory is what torch
allocates for the network and a step. The first step of every form lets cuDNN measure its kernels (`cudnn.benchmark`).
--record adds the rows, with the card's name, to tools/speed.jsonl, of which docs/speed.md is made.

A detector is only compared with its plain implementation, at its own input size and not folded. Its space-to-depth is
the plain one, so only the memory layout can make a difference. A last row has the milliseconds per image of decoding
and NMS with 300, 3000 and 30000 scores above the threshold. The scores are those of a random network, whose boxes
overlap more than a trained one's.

With --cli, only the CPU seconds of the commands that need no torch are measured, next to those of `python -c pass`; the
exit status is 1 if a command exceeds the limit.

With --convert, --network may be any network: "ours" is then the result of `convert_to_spd` with noise added to the new
weights; folded, the result of `fold_spd`. "/ as it was" compares with the original network in the same form.

With --against, --network is only compared with that other network, in the same form.

Note: with one thread and a batch below 16, torch computes fp32 1x1 and 3x3 convolutions with a slow built-in kernel.
"""

import argparse
import fnmatch
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import benchmark_cli
import timm
import torch
from benchmark_steps import FORMS, Form, build, hardware, make_step, measure_memory, time_steps
from convert_report import train_a_little
from plain_networks import check_agreement, with_plain_version
from torch import nn

from spd_zoo import convert_to_spd, fold_spd
from spd_zoo.fold import fold_batchnorm
from spd_zoo.models._detector import DetectionNet
from spd_zoo.process import pick_device
from spd_zoo.weights.fit import own_networks

QUICK = ("*-fp32-channels_last-eager", "inference-bf16-channels_last-eager")  # patterns of forms


def benchmark(network: str, forms: Iterable[Form], args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One row per form: images/s, ratios (above 1: ours is faster) and memory; for a detector also a row for NMS."""
    nets = {"ours": build(network, "ours"), "plain": build(network, "plain")}
    detector = nets["ours"] if isinstance(nets["ours"], DetectionNet) else None
    folded = {} if detector else {way: build(network, way, folded=True) for way in nets}
    check_agreement({**nets, **{f"{way}, folded": net for way, net in folded.items()}}, args.image_size)
    rivals = {} if detector else {is_folded: build("resnet50", "ours", is_folded) for is_folded in (False, True)}
    for form in forms:
        if detector and form.folded:
            continue
        in_form = folded if form.folded else nets
        contenders = {
            "ours": (in_form["ours"], form),
            "plain": (nets["plain"], Form(form.step, form.precision)),
            "plain, same form": (in_form["plain"], form),
        }
        if rivals:
            contenders["resnet50"] = rivals[bool(form.folded)], form
        row = _compare(network, form, contenders, args)
        if args.memory and form.mode == "eager":
            row["MiB"] = measure_memory(network, "ours", form, args)
            row["MiB plain"] = measure_memory(network, "plain", Form(form.step, form.precision), args)
        yield row
    if detector:
        yield {"network": network, "form": "suppression", **time_suppression(detector.eval(), args)}


def time_suppression(net: DetectionNet, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds per image of decoding and NMS, by the number of scores above the threshold."""
    size = (args.image_size, args.image_size)
    net = net.to(args.device)
    with torch.inference_mode():
        raw = net(torch.randn(1, 3, *size).to(args.device))
        scores = net.class_scores(net.decode(raw, size)).flatten().sort(descending=True).values
        counts = [count for count in (300, 3000, 30000) if count < len(scores)]
        steps: dict[str, Callable[[], Any]] = {
            f"ms, {count} scores": partial(net.detections, raw, size, scores[count].item()) for count in counts
        }
        seconds = time_steps(steps, args.rounds + 1, args.device)  # the first round warms up
    return {name: 1000 * statistics.median(times[1:]) for name, times in seconds.items()}


def benchmark_converted(network: str, forms: Iterable[Form], args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One row per form: images/s of the converted network and of the original."""
    original = build(network, "ours")
    converted = convert_to_spd(original)
    check_agreement({"as it was": original, "converted": converted}, args.image_size)
    train_a_little(converted)
    folded = fold_spd(converted)
    check_agreement({"converted": converted, "folded": folded}, args.image_size)
    folded_original = fold_batchnorm(original)
    for form in forms:
        ours, before = (folded, folded_original) if form.folded else (converted, original)
        contenders = {"ours": (ours, form), "as it was": (before, form)}
        yield _compare(network, form, contenders, args)


def benchmark_against(network: str, forms: Iterable[Form], args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """One row per form: images/s of a network and of the one that `args.against` names."""
    for form in forms:
        folded = bool(form.folded)
        contenders = {"ours": (build(network, "ours", folded), form)}
        contenders[args.against] = (build(args.against, "ours", folded), form)
        yield _compare(network, form, contenders, args)


def _compare(
    network: str, form: Form, contenders: dict[str, tuple[nn.Module, Form]], args: argparse.Namespace
) -> dict[str, Any]:
    """Images/s of all contenders, and the ratio of the first one's speed to each of the others."""
    torch._dynamo.reset()
    steps = {
        name: make_step(net, its, args.batch, args.image_size, args.device, args.warmup)
        for name, (net, its) in contenders.items()
    }
    seconds = time_steps(steps, args.rounds, args.device)
    row: dict[str, Any] = {"network": network, "form": str(form)}
    for name, times in seconds.items():
        row[name] = args.batch / statistics.median(times)
    for name in list(seconds)[1:]:
        row[f"/ {name}"] = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[name], strict=True))
    return row


def main(argv: list[str]) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="pyconvresnet50", help='a name, or "all" with a plain implementation')
    parser.add_argument(
        "--batch", dest="batches", type=int, nargs="+", default=[16], help="one size or several, one after the other"
    )
    parser.add_argument("--image-size", type=int, help="default: 224, or the input of a detector")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--warmup", type=int, help="steps before the timed ones (default: 1, on a GPU 5)")
    parser.add_argument("--record", action="store_true", help="add the rows to tools/speed.jsonl; only with a GPU")
    parser.add_argument("--forms", nargs="+", default=["*"], help="patterns, for example train-fp32-channels_last-*")
    parser.add_argument("--convert", action="store_true", help="compare with the converted network; without memory")
    parser.add_argument("--against", metavar="NETWORK", help="only compare with this network; without memory")
    parser.add_argument("--quick", action="store_true", help=f"only the forms {', '.join(QUICK)}; without memory")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument("--cli", action="store_true", help="only measure how fast `spd-zoo` starts")
    args = parser.parse_args(argv)
    if args.cli:
        return benchmark_cli.report(args.rounds, args.json)
    if args.quick:
        args.forms, args.memory = QUICK, False
    forms = [form for form in FORMS if any(fnmatch.fnmatch(str(form), pattern) for pattern in args.forms)]
    if not forms:
        parser.error(f"no form matches {args.forms}; there are: {', '.join(map(str, FORMS))}")
    if args.image_size is None:
        net = None if args.network == "all" else timm.create_model(args.network, device="meta")
        args.image_size = net.pretrained_cfg["input_size"][-1] if isinstance(net, DetectionNet) else 224
    torch.set_num_threads(args.threads)
    args.device = pick_device(args.device)
    on_gpu = args.device.startswith("cuda")
    args.warmup = args.warmup if args.warmup is not None else 5 if on_gpu else 1
    torch.backends.cudnn.benchmark = on_gpu
    if args.record and not on_gpu:
        parser.error("--record is for rows of a GPU: give --device cuda, too")
    machine = hardware(args.device)
    note = f"batch {args.batches}, {args.image_size} px, {args.threads} threads, {args.rounds} rounds"
    print(f"# {note}, torch {torch.__version__}, {machine}; images/s", file=sys.stderr)
    measure_rows = benchmark_converted if args.convert else benchmark_against if args.against else benchmark
    names = with_plain_version(own_networks()) if args.network == "all" else [args.network]
    for name, batch in itertools.product(names, args.batches):
        args.batch = batch
        for row in measure_rows(name, forms, args):
            full = row | {"batch": args.batch, "image_size": args.image_size, "threads": args.threads}
            full |= {"device": machine, "torch": torch.__version__} if on_gpu else {}
            if args.record:
                with (Path(__file__).parent / "speed.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(full) + "\n")
            if args.json:
                print(json.dumps(full), flush=True)
            else:
                cells = (f"{key} {value:.2f}" for key, value in row.items() if isinstance(value, float))
                print(f"{row['network']} {row['form']}: {' | '.join(cells)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
