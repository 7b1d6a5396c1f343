"""`spd_zoo.finetune`: a training by keyword arguments, as on the command line."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from spd_zoo.training import finetune as training
from spd_zoo.training.config import FinetuneConfig, as_options, make_config
from spd_zoo.training.continuing import continuation
from spd_zoo.weights.load import timm_name

__all__ = ["finetune"]


def finetune(
    model: str | os.PathLike[str] | FinetuneConfig | None = None,
    *,
    config: str | Path | None = None,
    recipe: str | None = None,
    **options: Any,
) -> training.Result | None:
    """Trains a network on your images, as `spd-zoo finetune` does; see `spd_zoo.training.finetune.finetune`.

    For example `finetune("cifar_resnet20", data="photos", out="run", epochs=5)`. `finetune("run", epochs="+10")`
    continues a finished run: it trains its network with its options, and writes into the new folder run+10.

    Args:
        model: A network, with or without a tag, or a run's folder; or a `FinetuneConfig` with everything.
        config: A YAML file with options.
        recipe: The name of a recipe, which is a set of options that comes with the package, such as quick or best.
        **options: The fields of `FinetuneConfig`, which are the options of the command. They take precedence over those
            in `config`, and these over those of the recipe.

    Returns:
        The result; None after a dry run.

    Raises:
        DataError: If the data set cannot be used.
        ModelError: If there is no such network.
        RunError: If the run cannot continue.
        Stopped: After SIGINT or SIGTERM, when the current step is done and the state is saved.
        ValueError: If an option is unknown or has no meaning, or a required one is missing.
        WeightsError: If pretrained weights are unavailable or must not be used.
    """
    if isinstance(model, FinetuneConfig):
        if config is not None or recipe is not None or options:
            raise ValueError("give a FinetuneConfig without other options; dataclasses.replace changes its fields")
        return training.finetune(replace(model, model=timm_name(model.model)))
    epochs = options.get("epochs")
    if isinstance(epochs, str) and epochs.startswith("+"):
        if config is not None or recipe is not None or model is None:
            raise ValueError(
                f"epochs {epochs} continues a finished run with its options: give its folder, and no config or recipe"
            )
        asked = as_options({name: value for name, value in options.items() if name != "epochs"}, "finetune")
        continued = continuation(os.fspath(model), epochs, asked)
        return training.finetune(make_config(continued.options), continued=continued)
    everything = options if model is None else {"model": model, **options}
    chosen = make_config(as_options(everything, "finetune"), config, recipe)
    return training.finetune(replace(chosen, model=timm_name(chosen.model)), recipe)
