"""Every network of the zoo for `torch.hub`: `torch.hub.load("OWNER/spd_zoo", "pyconvresnet50_spd", pretrained=True)`."""

dependencies = ["torch", "timm", "huggingface_hub", "safetensors"]

from spd_zoo.models import *  # noqa: E402
