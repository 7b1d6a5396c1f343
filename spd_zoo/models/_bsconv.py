"""What the networks of the BSConv library share: their initialisation, and the BatchNorm on the image."""

from torch import Tensor, nn

from spd_zoo.models._classifier import Classifier

__all__ = ["fit_image_norm", "init_weights"]


def init_weights(net: nn.Module) -> None:
    """As the authors': convolutions uniform by their fan-in, the classifier's weight Xavier-normal."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)


def fit_image_norm(state_dict: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
    """A checkpoint whose BatchNorm on the image has the network's channels, and whose classifier is a matrix.

    One channel gets the mean of the checkpoint's; more than it has repeat them in order.
    """
    for key in ("stem.0.weight", "stem.0.bias", "stem.0.running_mean", "stem.0.running_var"):
        if key in state_dict and state_dict[key].ndim == 1 and len(state_dict[key]) != model.in_chans:
            channels = state_dict[key].mean(0, keepdim=True) if model.in_chans == 1 else state_dict[key]
            state_dict[key] = channels.repeat(-(-model.in_chans // len(channels)))[: model.in_chans]
    classifier = state_dict.get("head.fc.weight")
    if classifier is not None and classifier.ndim == 4:
        state_dict["head.fc.weight"] = classifier.flatten(1)
    return state_dict
